// What a reader sees first: is it red, what ran where, what did not, and the matrix.

function summarySection(data) {
  const bad = red(data.counts), ran = data.size - (data.counts.unsupported || 0);
  const places = many(data.places.length, 'place');
  const verdict = bad
    ? [el('span', { class: 'red' }, `\u2715 ${number(bad)} red`), ` of ${many(ran, 'verdict')} at ${places}`]
    : [`\u2713 None red of ${many(ran, 'verdict')} at ${places}`];
  const turned = data.places.flatMap((place) => place.turned_red.map(([family, backend, name]) => ({ place, family, backend, name })));
  const parts = [['passed', 'passed'], ['mistrusted', 'mistrusted (matched, but the output proves little)'], ['known', 'known failures (in the ledger)']].filter(([status]) => data.counts[status]).map(([status, text]) => `${number(data.counts[status])} ${text}`);
  if (data.counts.unsupported) parts.push(`${number(data.counts.unsupported)} not run, for declared reasons`);
  return section('summary', 'Summary',
    el('p', { class: 'verdict' }, verdict),
    el('p', {}, `${parts.join(', ')}.`),
    turned.length > 0 && el('div', { class: 'note bad' }, el('p', {}, `${many(turned.length, 'case')} turned red since the state before:`),
      el('ul', { class: 'lines' }, turned.slice(0, 10).map((t) => el('li', {}, el('span', { class: 'mono' }, t.name), `, ${t.backend}, ${placeName(t.place)}`)), turned.length > 10 && el('li', {}, `and ${number(turned.length - 10)} more`))),
    data.warnings.length > 0 && el('div', { class: 'note', id: 'warnings' }, data.warnings.slice(0, 6).map((line) => el('p', {}, line)), data.warnings.length > 6 && el('details', {}, el('summary', {}, `and ${data.warnings.length - 6} more`), data.warnings.slice(6).map((line) => el('p', {}, line)))),
    table(null, [['Where', ''], ['Device', 'nowrap'], ['Versions', ''], ['When', 'nowrap'], ['Commit', 'mono'], ['Executed', 'n'], ['Red', 'n'], ['Mistrusted', 'n'], ['Not run', 'n']],
      data.places.map((p) => [p.name, p.device, p.versions, when(p.started), commit(p.commit), number(total(p.counts) - (p.counts.unsupported || 0)),
        red(p.counts) ? el('span', { class: 'red' }, number(red(p.counts))) : '0', number(p.counts.mistrusted || 0), number(p.counts.unsupported || 0)])),
    data.remarks.length > 0 && el('details', { id: 'remarks', open: data.remarks.length <= 4 }, el('summary', {}, `Reading the files: ${many(data.remarks.length, 'remark')}`), el('ul', { class: 'lines' }, data.remarks.map((line) => el('li', {}, line)))));
}

function matrixSection(data, cases) {
  const families = [...new Set(data.matrix.map((cell) => cell.family))].sort();
  const grid = el('table', { class: 'matrix', 'aria-describedby': 'matrix-legend' });
  grid.append(el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'Backend'), el('th', { scope: 'col' }, 'all families'), families.map((name) => el('th', { scope: 'col' }, breakable(name))))));
  data.places.forEach((place, at) => {
    const mine = data.matrix.filter((cell) => cell.place === at);
    const backends = [...new Set(mine.map((cell) => cell.backend))].sort();
    const body = el('tbody', {}, el('tr', {}, el('th', { class: 'place', scope: 'rowgroup', colspan: families.length + 2 },
      el('span', {}, el('strong', {}, placeName(place)), el('span', { class: 'muted' }, ` ${place.versions}, ${commit(place.commit)}, ${when(place.started)}`)))));
    for (const backend of backends) {
      const row = mine.filter((cell) => cell.backend === backend);
      body.append(el('tr', {}, el('th', { scope: 'row' }, backend), el('td', {}, matrixCell(merged(row), '', cases)), families.map((family) => {
        const cell = row.find((one) => one.family === family);
        return el('td', { class: cell ? null : 'none' }, cell ? matrixCell(cell, family, cases) : 'no record');
      })));
    }
    grid.append(body);
  });
  roving(grid, () => Array.from(grid.querySelectorAll('tr'), (line) => [...line.querySelectorAll('button.cell')]));
  const key = (kind, text) => el('span', {}, el('i', { class: kind }), text);
  return section('matrix', 'Matrix',
    el('p', { class: 'muted' }, 'The figure at the right of a cell is the largest share of the error budget that a case used: above 1 fails. A cell leads to its cases; arrow keys move between cells.'),
    el('div', { class: 'scroll' }, grid),
    el('div', { class: 'legend', id: 'matrix-legend' }, key('l0', 'below 0.3'), key('l1', '0.3 to 0.6'), key('l2', '0.6 to 0.8'), key('l3', '0.8 to 0.95'), key('l4', '0.95 to 1: close'), key('lred', 'red'), key('lnone', 'nothing was judged'), el('span', {}, '? n: n cases are mistrusted; n known: they failed as the ledger says')));
}

// A long name may be folded behind an underscore.
function breakable(name) {
  return name.split(/(?<=_)/).flatMap((part, n) => (n ? [el('wbr'), part] : [part]));
}

function merged(cells) {
  const counts = {};
  for (const cell of cells) for (const [status, n] of Object.entries(cell.counts)) counts[status] = (counts[status] || 0) + n;
  const judged = cells.map((cell) => value(cell.worst)).filter((used) => used !== null);
  return { ...cells[0], counts, worst: judged.length ? Math.max(...judged) : null };
}

function matrixCell(cell, family, cases) {
  const bad = red(cell.counts), used = value(cell.worst);
  const { passed = 0, mistrusted = 0, known = 0, unsupported = 0 } = cell.counts;
  const first = bad ? `\u2715 ${number(bad)} red` : passed ? `${number(passed)} passed` : mistrusted ? `${number(mistrusted)} mistrusted` : known ? `${number(known)} known` : 'not run';
  const rest = [bad && passed && `${number(passed)} passed`, (bad || passed) && mistrusted && `? ${number(mistrusted)}`, (bad || passed || mistrusted) && known && `${number(known)} known`, unsupported && `${number(unsupported)} ${first === 'not run' ? 'unsupported' : 'not run'}`].filter(Boolean).join(', ');
  const name = `${cell.backend}, ${family || 'all families'}: ${first}${rest ? `, ${rest.replace('?', 'mistrusted')}` : ''}${used === null ? '' : `; worst budget ${share(used)}`}`;
  return el('button', { type: 'button', class: `cell ${bad ? 'lred' : level(used)}`, 'aria-label': name, 'data-column': family, onclick: () => cases.show({ family, backend: cell.backend, place: String(cell.place) }) },
    el('span', { class: 'top' }, el('span', { class: bad ? 'red' : '' }, first), used !== null && el('span', { class: 'share' }, share(used))), el('small', {}, rest || '\u00a0'));
}

function reasonsSection(data, cases, detail) {
  const names = (counts) => Object.entries(counts).sort((a, b) => b[1] - a[1]).map(([name, n]) => `${name} ${number(n)}`);
  const few = (list) => list.slice(0, 3).join(', ') + (list.length > 3 ? ` and ${list.length - 3} more` : '');
  const told = data.reasons.map((r) => [el('span', { class: `status ${r.status}` }, r.status), number(r.count), data.text('reason', r.row) || 'no reason given', few(names(r.backends)), few(names(r.families)),
    el('button', { type: 'button', class: 'link mono', onclick: () => detail.open(r.row, [r.row]) }, data.text('case', r.row))]);
  const columns = [['Verdict', 'nowrap'], ['Cases', 'n'], ['Reason of the first', ''], ['Backends', ''], ['Families', ''], ['Such as', '']];
  return section('reasons', 'Red, mistrusted and known, by reason',
    told.length ? [table('Each reason once, whatever numbers are in it.', columns, told.slice(0, 15)), told.length > 15 && el('details', {}, el('summary', {}, `${many(told.length - 15, 'rarer reason')}`), table(null, columns, told.slice(15)))]
      : el('p', {}, 'Nothing is red, and no match is mistrusted.'));
}

function notRunSection(data, cases) {
  const sum = data.not_run.reduce((n, kind) => n + kind.count, 0);
  return section('not-run', 'Not run',
    el('p', { class: 'muted' }, sum ? `${many(sum, 'case')} did not run because the backend declares that it does not support them.` : 'Every case ran.'),
    data.not_run.map((kind) => el('details', {}, el('summary', {}, el('strong', {}, kind.keyword || 'no keyword'), ` ${number(kind.count)}: `, el('span', { class: 'muted' }, shortened(kind.texts.length ? `${kind.texts.length > 1 ? 'mostly ' : ''}${kind.texts[0][1]}: ${kind.texts[0][0]}` : ''))),
      table(null, [['Cases', 'n'], ['Backend', 'nowrap'], ['Reason', '']], kind.texts.map(([text, backend, n]) => [number(n), backend, text])))));
}

function budgetsSection(data, cases) {
  return section('budgets', 'Error budget used',
    el('p', {}, 'Cases with random inputs, by how much of the admissible error their worst statistic used. A 16-bit kernel that rounds exactly where it declares gathers between 0.7 and 0.9: the root mean square of its errors is then the predicted one, and the limit lies 15 % above it. Batches of few tokens have a wider limit; float32 lies near 0.25, fp8 near 0 where no value flips. What gathers close to 1 is fragile; what lies near 0 throughout is suspicious: it rounds less than it declares. Exact cases use nothing or everything and are left out.'),
    data.histograms.length ? el('div', { class: 'charts' }, data.histograms.map((found) => {
      const name = `${found.backend}, ${placeName(data.places[found.place])}`;
      const judged = found.bins.reduce((a, b) => a + b, 0), over = found.bins[found.bins.length - 1];
      return el('figure', {}, el('figcaption', {}, el('button', { type: 'button', class: 'link', onclick: () => cases.show({ backend: found.backend, place: String(found.place) }, { name: 'budget', down: true }) }, found.backend), el('span', { class: 'muted' }, placeName(data.places[found.place])), el('span', {}, many(judged, 'case'), over > 0 && el('strong', { class: 'red' }, `, ${number(over)} above 1`))), histogram(found.bins, name));
    })) : el('p', {}, 'No case was judged statistically.'));
}
