// One case: everything that its record says, in a dialog. Escape closes it; the address names it.

const HISTORY = { p: 'passed', f: 'failed', m: 'mistrusted', u: 'unsupported', c: 'crashed', h: 'hung', k: 'known' };
const OFF_BY = { sigma: 'predicted standard deviations (\u03c3) of the element', rms: 'the root mean square of the expected output' };

class Detail {
  constructor(data) {
    this.data = data;
    this.dialog = $('detail');
    this.order = [];  // the rows that "previous" and "next" go through
    this.dialog.addEventListener('close', () => {
      if (location.hash.startsWith('#case/')) history.replaceState(null, '', `${location.pathname}${location.search}#cases`);
      if (this.opener && this.opener.isConnected) this.opener.focus();
    });
    this.dialog.addEventListener('click', (event) => { if (event.target === this.dialog) this.dialog.close(); });
    window.addEventListener('hashchange', () => this.follow());
  }

  address(row) {
    const c = this.data.case(row);
    return `#case/${[c.case, c.backend, placeName(c.place), c.family].map(encodeURIComponent).join('/')}`;
  }

  // Open the case that the address names, if it names one.
  follow() {
    const wanted = decodeURIComponent(location.hash);
    if (!wanted.startsWith('#case/') || this.shown === location.hash) return;
    const row = this.data.rows().find((n) => this.address(n) === location.hash);
    if (row === undefined) say('No such case on this page');
    else this.open(row, [row]);
  }

  open(row, order) {
    if (!this.dialog.open) this.opener = document.activeElement;
    this.order = order;
    this.row = row;
    this.shown = this.address(row);
    history.replaceState(null, '', this.shown);
    this.dialog.replaceChildren(this.head(row), el('div', { class: 'body' }, this.body(row)));
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.scrollTop = 0;
    $('detail-title').focus();
  }

  head(row) {
    const at = this.order.indexOf(row);
    const go = (step, name) => el('button', { type: 'button', class: 'plain', disabled: !(at + step in this.order), onclick: () => this.open(this.order[at + step], this.order) }, name);
    const c = this.data.case(row);
    return el('div', { class: 'head' },
      el('div', { class: 'row' }, el('h2', { id: 'detail-title', tabindex: '-1' }, c.case),
        el('button', { type: 'button', class: 'plain', onclick: () => this.dialog.close(), 'aria-keyshortcuts': 'Escape' }, 'Close')),
      el('div', { class: 'pager' }, el('span', { class: `status ${c.status}` }, c.status), el('span', {}, `${c.backend}, ${placeName(c.place)}`),
        this.order.length > 1 && [go(-1, 'Previous'), go(1, 'Next'), el('span', { class: 'muted' }, `${number(at + 1)} of ${number(this.order.length)}`)]));
  }

  body(row) {
    const c = this.data.case(row);
    const report = this.data.texts[row], map = this.data.maps[row];
    const line = el('code', { id: 'reproduce' }, c.reproduce);
    return [
      c.reason && el('p', { class: FAILED.includes(c.status) ? 'red' : '' }, c.reason),
      el('h3', {}, 'To run it again'),
      el('div', { class: 'copyline' }, line, el('button', { type: 'button', class: 'plain', onclick: () => copy(c.reproduce, line) }, 'Copy')),
      map && map.map && [el('h3', {}, 'Where it is off'), el('p', { class: 'muted' }, `Every cell is the worst of ${map.token_step} \u00d7 ${map.column_step} outputs, in units of ${OFF_BY[map.unit] || map.unit}. Tokens go down, 0 to ${map.tokens - 1}; columns across, 0 to ${map.columns - 1}.`), errorMap(map), this.experts(map)],
      report && [el('h3', {}, 'Report'), el('pre', { tabindex: '0' }, report)],
      Object.keys(c.budgets).length > 0 && [el('h3', {}, `Share of the error budget used: ${share(c.budget)} (above 1 fails)`), this.budgets(c)],
      c.perf && this.time(c),
      this.series(row),
      el('h3', {}, 'The question'),
      this.words(c.case),
      el('h3', {}, 'The answer'),
      this.facts(c),
    ];
  }

  experts(map) {
    const rows = map.experts.map(([expert, tokens, rowsWrong, wrong, rms]) => [String(expert), number(tokens), number(rowsWrong), number(wrong), rms.toPrecision(3)]);
    const more = map.experts_left_out ? ` The ${map.experts_left_out} best are left out.` : '';
    return rows.length > 0 && el('details', { open: rows.length <= 10 }, el('summary', {}, `By expert: ${rows.length}, the worst first.${more}`),
      table(null, [['Local expert', 'n'], ['Tokens', 'n'], ['Tokens with a wrong output', 'n'], ['Wrong outputs', 'n'], [`Rms error of the finite ones, ${map.unit === 'sigma' ? '\u03c3' : 'rms'}`, 'n']], rows));
  }

  budgets(c) {
    return table(null, [['Statistic', ''], ['Share', 'n'], ['', '']], Object.entries(c.budgets).map(([name, used]) => [
      `${name}${this.data.statistics[name] ? `: ${this.data.statistics[name]}` : ''}`, share(used), miniBar(used)]));
  }

  time(c) {
    const p = c.perf;
    const known = [['On the device', micro(p.device_us)], ['On the host, until the call returns', p.host_us && micro(p.host_us)], ['Compiling', p.compile_seconds && duration(p.compile_seconds)],
      ['Needed', p.bytes && `${si(p.bytes, 'B')}, ${si(p.flops, 'FLOP')}`], ['Achieved', p.bytes_per_s && `${si(p.bytes_per_s, 'B/s')}, ${si(p.flops_per_s, 'FLOP/s')}`],
      ['Share of the roof', p.share && `${(p.share * 100).toFixed(1)} %${p.floor_us ? ` (no call could take less than about ${micro(p.floor_us)})` : ''}`],
      ['Operands', p.operand], ['Configurations', p.configurations && p.configurations.length > 0 && el('ul', { class: 'bare mono' }, p.configurations.map((text) => el('li', {}, text)))], ['Measured by', p.method], ['Driver and clocks', p.clocks && Object.entries(p.clocks).map(([k, v]) => `${k} ${v}`).join(', ')]];
    return [el('h3', {}, 'Time'), facts(known)];
  }

  series(row) {
    const found = this.data.seriesOf(row);
    return found && [el('h3', {}, `Device time over ${found.us.length} runs`), sparkline(found.us, found.shifts, 420, 60),
      el('ul', { class: 'lines' }, found.shifts.map((s) => el('li', {}, shiftInWords(this.data, found, s)))),
      table(null, [['Run', 'nowrap'], ['Commit', 'mono'], ['Device', 'n']], found.us.map((us, n) => [when(this.data.runs[found.runs[n]].started), commit(this.data.runs[found.runs[n]].commit), micro(us)]).reverse())];
  }

  words(descriptor) {
    const told = descriptor.split('-').map((token) => [token, ...(this.data.words[token] || ['', token])]);
    const named = new Set(told.map(([, field]) => field));
    const rest = Object.entries(this.data.defaults).filter(([field]) => !named.has(field)).map(([field, text]) => `${field} ${text}`);
    return [facts(told.map(([token, field, text]) => [field, [text === token ? text : `${text} `, text !== token && el('code', { class: 'muted' }, token)]])), el('p', { class: 'muted' }, `Else the default: ${rest.join('; ')}.`)];
  }

  facts(c) {
    const trace = Object.entries(c.trace).map(([name, n]) => `${number(n)} ${name.replace(/_/g, ' ')}`).join(', ');
    const past = Array.from(c.history, (letter) => HISTORY[letter]);
    return facts([
      ['Family', c.family], ['Backend', c.backend], ['Place', `${placeName(c.place)}${c.place.versions ? `, ${c.place.versions}` : ''}`],
      ['Rounding plan', c.plan], ['Calls judged', c.calls ? `${c.calls} in ${duration(c.seconds)}, oracle included` : 'none'],
      ['Kernels launched', c.status === 'unsupported' ? null : c.launches || 'no Triton kernel'], ['Traced, last call', trace],
      ['Runs, newest first', past.length > 1 ? past.reverse().join(', ') : null],
    ]);
  }
}

function facts(pairs) {
  return el('dl', { class: 'facts' }, pairs.filter(([, text]) => text).map(([name, text]) => [el('dt', {}, name), el('dd', {}, text)]));
}

// A bar for a share of the budget; the number stands beside it.
function miniBar(used) {
  if (used === null || used === undefined) return '';
  const width = Math.max(0, Math.min(1, used)) * 60;
  return svg('svg', { width: 62, height: 9, 'aria-hidden': 'true' }, svg('rect', { width: 60, height: 8, y: 0.5, x: 0.5, class: 'frame' }), svg('rect', { width, height: 8, y: 0.5, x: 0.5, class: used > 1 ? 'over' : 'bars' }));
}
