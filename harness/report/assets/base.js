// What all parts of the page use: elements, numbers in words, moving between buttons with arrow keys.

const SVG = 'http://www.w3.org/2000/svg';
const $ = (id) => document.getElementById(id);

// An element; text goes in as text nodes only, so that nothing in the data can become markup.
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

function section(id, title, ...children) {
  return el('section', { id, 'aria-labelledby': `${id}-title`, tabindex: '-1' }, el('h2', { id: `${id}-title` }, title), ...children);
}

// A table; a column is [heading, class]. Rows are lists of cells: text, or a list of nodes.
function table(caption, columns, rows) {
  const head = columns.map(([name, kind]) => el('th', { scope: 'col', class: kind }, name));
  const body = rows.map((cells) => el('tr', {}, cells.map((cell, n) => el('td', { class: columns[n][1] }, cell))));
  return el('div', { class: 'scroll' }, el('table', {}, caption && el('caption', {}, caption), el('thead', {}, el('tr', {}, head)), el('tbody', {}, body)));
}

const FAILED = ['failed', 'crashed', 'hung'];
const red = (counts) => FAILED.reduce((sum, status) => sum + (counts[status] || 0), 0);
const total = (counts) => Object.values(counts).reduce((sum, n) => sum + n, 0);
const number = (n) => Number(n).toLocaleString('en-US');
const many = (n, thing) => `${number(n)} ${thing}${n === 1 ? '' : 's'}`;
const share = (used) => (used === null || used === undefined ? '-' : used === Infinity ? 'inf' : used < 100 ? used.toFixed(2) : used < 1e4 ? used.toFixed(0) : used.toExponential(0));
const value = (used) => (used === 'inf' ? Infinity : used);
const commit = (name) => name.replace(/^[0-9a-f]{13,}/, (hash) => hash.slice(0, 9));
const percent = (ratio) => `${ratio >= 1 ? '+' : '\u2212'}${Math.abs((ratio - 1) * 100).toFixed(1)} %`;

function when(seconds) {
  return seconds ? `${new Date(seconds * 1000).toISOString().slice(0, 16).replace('T', ' ')} UTC` : 'unknown time';
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return '-';
  if (seconds < 100) return `${Number(seconds.toPrecision(3))} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 100 ? `${minutes} min ${Math.round(seconds % 60)} s` : `${(seconds / 3600).toFixed(1)} h`;
}

function micro(us) {
  if (us === null || us === undefined) return '-';
  return us < 1000 ? `${Number(us.toPrecision(3))} \u00b5s` : us < 1e6 ? `${Number((us / 1e3).toPrecision(3))} ms` : `${Number((us / 1e6).toPrecision(3))} s`;
}

function si(quantity, unit) {
  if (quantity === null || quantity === undefined) return '-';
  const steps = [[1e15, 'P'], [1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k'], [0, '']];
  const [size, letter] = steps.find(([least]) => quantity >= least);
  return `${Number((quantity / (size || 1)).toPrecision(3))} ${letter}${unit}`;
}

function placeName(place) {
  const device = place.device.replace(' (emulated)', ', emulated');
  return place.name === place.device ? device : `${place.name} (${device})`;
}

// The step of the colour scale for a share of the budget; the words beside it say the same.
function level(used) {
  return used === null ? 'lnone' : used > 1 ? 'lred' : used >= 0.95 ? 'l4' : used >= 0.8 ? 'l3' : used >= 0.6 ? 'l2' : used >= 0.3 ? 'l1' : 'l0';
}

// One stop for Tab in a set of buttons; arrow keys, Home and End move within. Each list of `lines()` is a line.
function roving(container, lines) {
  const all = () => lines().flat();
  const enter = (node) => {
    for (const other of all()) other.setAttribute('tabindex', other === node ? '0' : '-1');
  };
  container.addEventListener('focusin', (event) => { if (all().includes(event.target)) enter(event.target); });
  container.addEventListener('keydown', (event) => {
    const grid = lines().filter((line) => line.length);
    const y = grid.findIndex((line) => line.includes(event.target));
    if (y < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const x = grid[y].indexOf(event.target);
    const column = (node) => node.dataset.column;
    const across = (line) => line && (line.find((node) => column(node) !== undefined && column(node) === column(event.target)) || line[Math.min(x, line.length - 1)]);
    const targets = {
      ArrowRight: grid[y][x + 1], ArrowLeft: grid[y][x - 1], ArrowDown: across(grid[y + 1]), ArrowUp: across(grid[y - 1]),
      Home: grid[y][0], End: grid[y][grid[y].length - 1],
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    if (targets[event.key]) targets[event.key].focus();
  });
  const first = all()[0];
  if (first) enter(first);
}

function say(text) {
  $('said').textContent = text;
}

// A note beside whatever the pointer or the focus is on.
function tip(node, text) {
  const show = () => {
    const box = $('tip');
    box.textContent = typeof text === 'function' ? text() : text;
    box.hidden = false;
    const at = node.getBoundingClientRect();
    const left = Math.min(at.right + 8, window.innerWidth - box.offsetWidth - 8);
    box.style.left = `${Math.max(4, left)}px`;
    box.style.top = `${at.bottom + 8 + box.offsetHeight > window.innerHeight ? Math.max(4, at.top - box.offsetHeight - 8) : at.bottom + 8}px`;
  };
  const hide = () => { $('tip').hidden = true; };
  for (const name of ['mouseenter', 'focus']) node.addEventListener(name, show);
  for (const name of ['mouseleave', 'blur']) node.addEventListener(name, hide);
  return node;
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Where the clipboard is refused to a local file, the older way needs a selection.
    window.getSelection().selectAllChildren(from);
    document.execCommand('copy');
  }
  say('Copied');
}
