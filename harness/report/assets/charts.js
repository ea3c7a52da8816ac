// The drawings: histograms, the roofline, sparklines, error maps. All SVG, all with their numbers in words as well.

function histogram(bins, name) {
  const [w, h, gap] = [240, 78, 1];
  const step = w / bins.length;
  const most = Math.max(1, ...bins);
  const bars = bins.map((n, i) => n && svg('rect', {
    x: i * step + (i === bins.length - 1 ? 3 : 0), width: step - gap, y: h - Math.max(1.5, (n / most) * h), height: Math.max(1.5, (n / most) * h),
    class: i === bins.length - 1 ? 'over' : 'bars',
  }, svg('title', {}, `${i === bins.length - 1 ? 'above 1' : `${(i / 20).toFixed(2)} to ${((i + 1) / 20).toFixed(2)}`}: ${n}`)));
  const end = step * (bins.length - 1);
  const words = bins.map((n, i) => n && `${i === bins.length - 1 ? 'above 1' : `${(i / 20).toFixed(2)}: `}${n}`).filter(Boolean).join(', ');
  return svg('svg', { width: '100%', viewBox: `0 -14 ${w + 4} ${h + 32}`, role: 'img', 'aria-label': `${name}: share of the budget used by bin, ${words}` },
    svg('line', { x1: 0, x2: w, y1: h, y2: h, class: 'axis' }), svg('line', { x1: end + 1, x2: end + 1, y1: 0, y2: h, class: 'guide' }), bars,
    [0, 0.5, 1].map((v) => svg('text', { x: v * end, y: h + 13, 'text-anchor': v ? 'middle' : 'start', class: 'dim' }, String(v))),
    svg('text', { x: 0, y: -4, class: 'dim' }, `most in a bin: ${most}`));
}

// [[x, y], ...] of a series, evenly spaced, and marks where its level shifted.
function sparkline(values, shifts, w = 190, h = 30) {
  const low = Math.min(...values), high = Math.max(...values);
  const x = (n) => (n * (w - 6)) / Math.max(1, values.length - 1) + 3;
  const y = (v) => (high === low ? h / 2 : h - 4 - ((v - low) / (high - low)) * (h - 8));
  return svg('svg', { width: w, height: h, role: 'img', 'aria-label': `${values.length} runs, from ${micro(values[0])} to ${micro(values[values.length - 1])}` },
    shifts.map((s) => svg('line', { x1: x(s.at - 0.5), x2: x(s.at - 0.5), y1: 0, y2: h, class: 'shift' })),
    svg('polyline', { points: values.map((v, n) => `${x(n).toFixed(1)},${y(v).toFixed(1)}`).join(' '), class: 'spark' }),
    svg('circle', { cx: x(values.length - 1), cy: y(values[values.length - 1]), r: 2.4, class: 'dot' }));
}

const SHAPES = ['M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0', 'M-3.5,-3.5h7v7h-7z', 'M0,-5l4.6,8h-9.2z', 'M0,-5l5,5l-5,5l-5,-5z', 'M0,5l4.6,-8h-9.2z',
  'M-5,-1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z', 'M-4.5,-2.5h9v5h-9z', 'M-2.5,-4.5h5v9h-5z'];
const marker = (n) => ({ d: SHAPES[n % SHAPES.length], class: `c${n % 8}` });

// points: [{x, y, kind, text, open}], ceilings: {copy, rates: [[name, FLOP/s]]}.
function roofline(points, ceilings, width) {
  const wide = width > 600;
  const [w, h, left, bottom, right] = [width, wide ? 430 : 330, 62, 40, wide ? 96 : 8];
  const logs = (list) => list.map(Math.log10);
  const xs = logs(points.map((p) => p.x)), ys = logs(points.map((p) => p.y));
  const ridge = ceilings.rates.map(([, rate]) => Math.log10(rate / ceilings.copy));
  const x0 = Math.floor(Math.min(...xs) - 0.1), x1 = Math.ceil(Math.max(...xs, ...ridge) + 0.3);
  const y0 = Math.floor(Math.min(...ys) - 0.1), y1 = Math.ceil(Math.max(...ys, ...logs(ceilings.rates.map(([, r]) => r)), Math.log10(ceilings.copy) + Math.min(...xs)) + 0.1);
  const px = (lx) => left + ((lx - x0) / (x1 - x0)) * (w - left - right);
  const py = (ly) => h - bottom - ((ly - y0) / (y1 - y0)) * (h - bottom - 10);
  const ticks = (from, to) => Array.from({ length: to - from + 1 }, (_, n) => from + n);
  const every = Math.max(1, Math.ceil((x1 - x0) / (wide ? 10 : 5)));
  const grid = [
    ticks(x0, x1).map((t) => [svg('line', { x1: px(t), x2: px(t), y1: 10, y2: h - bottom, class: 'grid' }), (t - x0) % every === 0 && svg('text', { x: px(t), y: h - bottom + 15, 'text-anchor': 'middle', class: 'dim' }, t >= 0 && t < 4 ? String(10 ** t) : `1e${t}`)]),
    ticks(y0, y1).map((t) => [svg('line', { x1: left, x2: w - right, y1: py(t), y2: py(t), class: 'grid' }), svg('text', { x: left - 6, y: py(t) + 4, 'text-anchor': 'end', class: 'dim' }, si(10 ** t, 'FLOP/s').replace('FLOP/s', ''))]),
  ];
  const slope = Math.log10(ceilings.copy);
  const corner = Math.max(...ridge, x0);
  const from = Math.max(x0, y0 - slope);
  const memory = svg('line', { x1: px(from), y1: py(from + slope), x2: px(corner), y2: py(corner + slope), class: 'roof' });
  const flat = ceilings.rates.map(([name, rate], n) => {
    const y = py(Math.log10(rate));
    return [svg('line', { x1: px(Math.max(x0, Math.log10(rate) - slope)), x2: w - right, y1: y, y2: y, class: `roof k${n % 4}` }),
      svg('text', { x: wide ? w - right + 6 : w - right - 4, y: wide ? y + 4 : y - 4, 'text-anchor': wide ? 'start' : 'end' }, `${name} ${si(rate, '')}`)];
  });
  const middle = (from + corner) / 2;
  const told = svg('text', { x: px(middle) - 6, y: py(middle + slope) - 6, 'text-anchor': 'end' }, `copy ${si(ceilings.copy, 'B/s')}`);
  const dots = points.map((p) => {
    const node = svg('path', {
      ...marker(p.kind), transform: `translate(${px(Math.log10(p.x)).toFixed(1)},${py(Math.log10(p.y)).toFixed(1)})`, tabindex: '-1', role: 'button', 'aria-label': p.text.replace(/\n/g, ', '),
      onclick: p.open, onkeydown: (event) => { if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); p.open(); } },
    });
    node.classList.add('point');
    return tip(node, p.text);
  });
  const chart = svg('svg', { width: w, height: h, role: 'group', 'aria-label': 'Achieved FLOP/s against arithmetic intensity; arrow keys move between the cases' },
    grid, svg('text', { x: left + (w - left - right) / 2, y: h - 6, 'text-anchor': 'middle' }, 'arithmetic intensity, FLOP per byte that must move'),
    svg('text', { x: left + 6, y: 22, class: 'dim' }, 'FLOP/s'), memory, flat, told, dots);
  roving(chart, () => [dots]);
  return chart;
}

// The error by token and column: a digit of the map is a step of the scale, 9 is NaN or infinity.
function errorMap(map) {
  const rows = map.map, high = rows.length, wide = rows[0].length;
  const size = Math.max(7, Math.min(16, Math.floor(640 / wide), Math.floor(360 / high)));
  const left = 46;
  const cells = rows.map((row, y) => Array.from(row, (digit, x) => digit !== '0' && svg('rect', { x: left + x * size, y: 16 + y * size, width: size - 0.5, height: size - 0.5, class: `m${digit}` })));
  const range = (from, step, most) => (step === 1 ? String(from) : `${from}-${Math.min(most, from + step) - 1}`);
  const at = (x, y) => `tokens ${range(y * map.token_step, map.token_step, map.tokens)}, columns ${range(x * map.column_step, map.column_step, map.columns)}: ${step(map, Number(rows[y][x]))}`;
  const [w, h] = [left + wide * size + 4, 22 + high * size];
  const chart = svg('svg', { class: 'map', width: w, height: h, viewBox: `0 0 ${w} ${h}`, role: 'img', 'aria-label': `Error by token and column: ${worstOf(map)}` },
    svg('rect', { x: left - 1, y: 15, width: wide * size + 1.5, height: high * size + 1.5, class: 'frame' }), cells,
    svg('text', { x: left, y: 10, class: 'dim' }, `column 0 to ${map.columns - 1}`),
    svg('text', { x: left - 5, y: 16 + Math.min(size, 10), 'text-anchor': 'end', class: 'dim' }, 'token 0'),
    high > 1 && svg('text', { x: left - 5, y: 16 + high * size - 1, 'text-anchor': 'end', class: 'dim' }, String(map.tokens - 1)));
  const below = el('p', { class: 'muted' }, 'Point at a cell to read it.');
  chart.addEventListener('mousemove', (event) => {
    const box = chart.getBoundingClientRect();
    const scale = w / box.width;
    const x = Math.floor(((event.clientX - box.left) * scale - left) / size), y = Math.floor(((event.clientY - box.top) * scale - 16) / size);
    if (rows[y] && rows[y][x]) below.textContent = at(x, y);
  });
  const used = [...new Set(rows.join(''))].sort();
  const scale = el('ul', { class: 'steps' }, used.map((digit) => el('li', {}, svg('svg', { width: 12, height: 12, 'aria-hidden': 'true' }, svg('rect', { width: 12, height: 12, class: `m${digit}` }), svg('rect', { width: 12, height: 12, class: 'frame' })), `${digit}: ${step(map, Number(digit))}`)));
  return el('div', {}, el('div', { class: 'scroll' }, chart), below, scale,
    el('details', {}, el('summary', {}, 'The map as text'), el('pre', {}, rows.map((row, y) => `${String(y * map.token_step).padStart(6)}  ${row}`).join('\n'))));
}

function step(map, digit) {
  const unit = map.unit === 'sigma' ? '\u03c3' : 'rms';
  const short = (v) => Number(v.toPrecision(3));
  if (digit === 9) return 'NaN or infinite, or should have been';
  if (digit === 0) return map.steps[0] ? `below ${short(map.steps[0])} ${unit}` : 'equal';
  const least = map.steps[digit - 1];
  return digit === map.steps.length ? `${short(least)} ${unit} and more` : least ? `${short(least)} to ${short(map.steps[digit])} ${unit}` : `below ${short(map.steps[1])} ${unit}`;
}

function worstOf(map) {
  const wrong = map.map.filter((row) => /[^0]/.test(row)).length;
  return `${wrong} of ${map.map.length} rows of blocks are off`;
}
