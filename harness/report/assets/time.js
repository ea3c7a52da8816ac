// Time: against the roof of the device, and over the runs.

const MOST_POINTS = 2000;
const SERIES = 25;

function rooflineSection(data, cases, detail) {
  const { perf } = data;
  if (!perf.row.length) {
    return section('roofline', 'Roofline', el('p', {}, 'No record has a time. To make some, on the device: ', el('code', {}, 'python3 -m pytest cases -m "cuda and perf" --results=results/perf.jsonl'), '.'));
  }
  const points = perf.row.map((row, n) => ({ row, n })).filter(({ n }) => perf.flops_per_s[n] > 0 && perf.bytes[n] > 0 && perf.flops[n] > 0);
  const places = [...new Set(points.map(({ row }) => data.columns.place[row]))];
  const where = el('div', {});
  const chooser = el('select', { id: 'roof-place', onchange: () => draw() }, places.map((at) => el('option', { value: String(at) }, placeName(data.places[at]))));
  const draw = () => {
    const at = Number(chooser.value);
    const mine = points.filter(({ row }) => data.columns.place[row] === at).slice(0, MOST_POINTS);
    const all = points.filter(({ row }) => data.columns.place[row] === at).length;
    const backends = [...new Set(mine.map(({ row }) => data.text('backend', row)))].sort();
    const dots = mine.map(({ row, n }) => ({
      x: perf.flops[n] / perf.bytes[n], y: perf.flops_per_s[n], kind: backends.indexOf(data.text('backend', row)), open: () => detail.open(row, mine.map((point) => point.row)),
      text: `${data.text('case', row)}\n${data.text('backend', row)}\n${micro(perf.device_us[n])}, ${si(perf.flops_per_s[n], 'FLOP/s')}, ${si(perf.bytes_per_s[n], 'B/s')}${perf.share[n] ? `\n${(perf.share[n] * 100).toFixed(1)} % of the roof` : ''}`,
    })).sort((a, b) => a.x - b.x || a.y - b.y);
    const ceilings = measured(mine.map(({ n }) => perf.tables.ceilings[perf.ceilings[n]]));
    where.replaceChildren(
      ceilings ? roofline(dots, ceilings, Math.max(320, Math.min(1100, where.clientWidth || 1100))) : el('p', {}, 'These records have no measured ceilings.'),
      el('div', { class: 'legend' }, backends.map((name, kind) => el('span', {}, svg('svg', { width: 14, height: 12, viewBox: '-7 -6 14 12', 'aria-hidden': 'true', class: 'inline' }, svg('path', marker(kind))), ` ${name}`))),
      all > mine.length ? el('p', { class: 'muted' }, `The first ${number(mine.length)} of ${number(all)} cases are drawn; the table has them all.`) : '');
  };
  const part = section('roofline', 'Roofline',
    el('p', {}, 'Each case by its arithmetic intensity (operations over the bytes that any kernel must move) and the rate it achieved. The lines are what this device did in the same process on a plain copy and a plain matrix product: nothing runs much above them, and the distance below is what is left to gain.'),
    el('div', { class: 'filters' }, el('label', {}, 'Place', chooser), el('button', { type: 'button', class: 'plain', onclick: () => cases.show({ place: chooser.value }, { name: 'roof', down: false }) }, 'Cases by share of the roof')), where);
  requestAnimationFrame(draw);
  window.addEventListener('resize', draw);
  return part;
}

// The best that was measured of every ceiling, over the records shown.
function measured(list) {
  const known = list.filter((c) => c && c.copy_bytes_per_s);
  if (!known.length) return null;
  const rates = {};
  for (const c of known) for (const [name, rate] of Object.entries(c.flops_per_s || {})) rates[name] = Math.max(rate, rates[name] || 0);
  return { copy: Math.max(...known.map((c) => c.copy_bytes_per_s)), rates: Object.entries(rates).sort((a, b) => a[1] - b[1]) };
}

function shiftInWords(data, series, s) {
  const run = data.runs[series.runs[s.at]];
  return [el('strong', { class: s.ratio > 1 ? 'red' : '' }, percent(s.ratio)), ` from ${commit(run.commit)}, ${when(run.started)} (p = ${s.p < 1e-4 ? s.p.toExponential(0) : s.p.toPrecision(2)})`, s.with.length > 0 && [el('br'), el('span', { class: 'muted' }, `at the same time: ${s.with.join(', ')}`)]];
}

function trendsSection(data, detail) {
  const part = section('trends', 'Trends');
  if (data.runs.length < 2) part.append(el('p', {}, 'One run: give the files of several for a history.'));
  part.append(runsTable(data));
  if (!data.series.length) {
    part.append(el('p', {}, 'No case was timed in two runs or more.'));
    return part;
  }
  const { alpha, least, runs, trim } = data.rule;
  part.append(el('h3', {}, 'Device time by run'), el('p', {}, `A level shift is marked where the runs before and after differ by Yuen's t-test on log time (each side trimmed by ${trim * 100} %, at least ${runs} runs on it; corrected for the choice of the place), at a false discovery rate of ${alpha * 100} % over all series, and by at least ${least * 100} %. So it takes ${2 * runs} runs at least; "newest" tells the last run against the median of those before, without any test.`));
  const marked = data.series.filter((s) => s.shifts.length).sort((a, b) => worst(b) - worst(a));
  const name = (s) => el('button', { type: 'button', class: 'link mono series', onclick: () => detail.open(s.row, data.series.map((one) => one.row)) }, data.text('case', s.row));
  if (marked.length) {
    part.append(table(`${number(marked.length)} series with a shift, the largest slow-down first.`, [['Case', ''], ['Backend', 'nowrap'], ['Place', 'nowrap'], ['Over the runs', ''], ['Change of the level', '']],
      marked.slice(0, 50).map((s) => [name(s), data.text('backend', s.row), placeName(data.places[data.columns.place[s.row]]), sparkline(s.us, s.shifts), el('ul', { class: 'bare' }, s.shifts.map((one) => el('li', {}, shiftInWords(data, s, one))))])),
      marked.length > 50 ? el('p', { class: 'muted' }, `and ${marked.length - 50} more`) : '');
  } else part.append(el('p', {}, 'No level shift in any series.'));
  part.append(seriesTable(data, name));
  return part;
}

const worst = (s) => Math.max(...s.shifts.map((one) => one.ratio));

function seriesTable(data, name) {
  const ordered = [...data.series].sort((a, b) => Math.abs(Math.log(b.newest)) - Math.abs(Math.log(a.newest)));
  const place = el('div', {}), pager = el('div', { class: 'pager' });
  const draw = (page) => {
    const shown = ordered.slice(page * SERIES, (page + 1) * SERIES);
    place.replaceChildren(table(`All ${number(ordered.length)} series, the largest change of the newest run first.`, [['Case', ''], ['Backend', 'nowrap'], ['Place', 'nowrap'], ['Over the runs', ''], ['First', 'n'], ['Newest', 'n'], ['Newest / median before', 'n']],
      shown.map((s) => [name(s), data.text('backend', s.row), placeName(data.places[data.columns.place[s.row]]), sparkline(s.us, s.shifts), micro(s.us[0]), micro(s.us[s.us.length - 1]), percent(s.newest)])));
    const pages = Math.ceil(ordered.length / SERIES);
    const turn = (to, text) => el('button', { type: 'button', class: 'plain', disabled: to < 0 || to >= pages, onclick: () => {
      draw(to);
      const again = [...pager.querySelectorAll('button')].find((button) => button.textContent === text && !button.disabled);
      if (again) again.focus();
    } }, text);
    pager.replaceChildren(...(pages > 1 ? [turn(page - 1, 'Previous'), el('span', {}, `page ${page + 1} of ${number(pages)}`), turn(page + 1, 'Next')] : []));
  };
  draw(0);
  return el('div', {}, place, pager);
}

function runsTable(data) {
  const newest = [...data.runs].reverse();
  const most = Math.max(...data.runs.map((run) => total(run.counts)));
  const bar = (run) => {
    const parts = [['bars', (run.counts.passed || 0)], ['m3', run.counts.mistrusted || 0], ['over', red(run.counts)], ['m0', run.counts.unsupported || 0]];
    let at = 0.5;
    return svg('svg', { width: 142, height: 12, 'aria-hidden': 'true' }, parts.map(([kind, n]) => { const width = (n / most) * 140; at += width; return svg('rect', { x: at - width, y: 1, width, height: 10, class: kind }); }), svg('rect', { x: 0.5, y: 0.5, width: (total(run.counts) / most) * 140, height: 11, class: 'frame' }));
  };
  const rows = newest.map((run) => [when(run.started), placeName(data.places[run.place]), commit(run.commit), number(total(run.counts) - (run.counts.unsupported || 0)), red(run.counts) ? el('span', { class: 'red' }, number(red(run.counts))) : '0', number(run.counts.mistrusted || 0), number(run.counts.unsupported || 0), duration(run.seconds), bar(run)]);
  const columns = [['Run', 'nowrap'], ['Place', 'nowrap'], ['Commit', 'mono'], ['Executed', 'n'], ['Red', 'n'], ['Mistrusted', 'n'], ['Not run', 'n'], ['Took', 'n'], ['Passed, mistrusted, red, not run', 'nowrap']];
  const shown = table(`${many(data.runs.length, 'run')}, the newest first.`, columns, rows.slice(0, 12));
  return rows.length <= 12 ? shown : el('div', {}, shown, el('details', {}, el('summary', {}, `${number(rows.length - 12)} older runs`), table(null, columns, rows.slice(12, 500))));
}
