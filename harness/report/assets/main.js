// Unpacks the data and puts the page together.

class Data {
  constructor(packed) {
    Object.assign(this, packed);
    this.columns = packed.cases;
    this.size = this.columns.status.length;
    this.counts = {};
    for (const n of this.rows()) this.counts[this.status(n)] = (this.counts[this.status(n)] || 0) + 1;
    this.timed = new Map(this.perf.row.map((row, n) => [row, n]));
    this.bySeries = new Map(this.series.map((found) => [found.row, found]));
  }

  rows() { return Array.from({ length: this.size }, (_, n) => n); }
  text(name, n) { return this.columns.tables[name][this.columns[name][n]]; }
  status(n) { return this.statuses[this.columns.status[n]]; }
  budget(n) { return value(this.columns.budget[n]); }
  seriesOf(n) { return this.bySeries.get(n); }

  // The share of the budget, null where nothing was judged.
  used(n) { return this.columns.calls[n] ? this.budget(n) : null; }

  perfOf(row) {
    const n = this.timed.get(row);
    if (n === undefined) return null;
    const found = {};
    for (const [name, column] of Object.entries(this.perf)) if (Array.isArray(column)) found[name] = name in this.perf.tables ? this.perf.tables[name][column[n]] : column[n];
    return found;
  }

  case(n) {
    const some = (group) => Object.fromEntries(Object.entries(this.columns[group]).map(([name, column]) => [name, value(column[n])]).filter(([, v]) => v !== null));
    const found = Object.fromEntries(['case', 'backend', 'family', 'reason', 'statistic', 'plan', 'history', 'launches'].map((name) => [name, this.text(name, n)]));
    return { ...found, status: this.status(n), place: this.places[this.columns.place[n]], reproduce: this.text('reproduce', n).replace('\0', () => found.case), budget: this.budget(n), budgets: some('budgets'), trace: some('trace'), calls: this.columns.calls[n], seconds: this.columns.seconds[n], perf: this.perfOf(n) };
  }
}

async function unpacked() {
  const text = atob($('data').textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let n = 0; n < text.length; n += 1) bytes[n] = text.charCodeAt(n);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
  return new Data(JSON.parse(await new Response(stream).text()));
}

// The scheme: the system's, or the one chosen here, remembered where the browser lets a local file remember.
const SCHEMES = ['auto', 'light', 'dark'];

function remembered(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { /* no storage for this page: it then follows the system each time */ }
  return null;
}

function scheme(name) {
  if (name === 'auto') document.documentElement.removeAttribute('data-scheme');
  else document.documentElement.setAttribute('data-scheme', name);
  $('scheme').textContent = `Scheme: ${name}`;
  $('scheme').dataset.name = name;
}

async function start() {
  const before = remembered('moe-harness-scheme');
  scheme(SCHEMES.includes(before) ? before : 'auto');
  $('scheme').addEventListener('click', () => {
    const next = SCHEMES[(SCHEMES.indexOf($('scheme').dataset.name) + 1) % SCHEMES.length];
    scheme(next);
    remembered('moe-harness-scheme', next);
  });
  if (typeof DecompressionStream === 'undefined') {
    $('main').append(el('p', { class: 'note bad' }, 'This browser cannot unpack the data (DecompressionStream is missing): Chromium 80, Firefox 113 or Safari 16.4 can.'));
    return;
  }
  $('loading').hidden = false;
  const data = await unpacked();
  const detail = new Detail(data);
  const cases = new Cases(data, detail);
  const parts = [summarySection(data), matrixSection(data, cases), reasonsSection(data, cases, detail), notRunSection(data, cases), cases.section, budgetsSection(data, cases), rooflineSection(data, cases, detail), trendsSection(data, detail)];
  $('main').replaceChildren(...parts);
  $('nav').append(...parts.map((part) => el('a', { href: `#${part.id}` }, part.querySelector('h2').textContent)));
  $('nav').hidden = false;
  document.documentElement.dataset.ready = 'yes';
  detail.follow();
}

start();
