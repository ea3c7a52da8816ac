// The table of all cases: filtered, sorted, a page at a time, so that a hundred thousand are as quick as ten.

const PAGE = 100;
const STATUS_ORDER = { failed: 0, crashed: 0, hung: 0, known: 1, mistrusted: 1, passed: 2, unsupported: 3 };

class Cases {
  constructor(data, detail) {
    this.data = data;
    this.detail = detail;
    this.filter = { text: '', statuses: new Set(), family: '', backend: '', place: '' };
    this.sort = { name: 'status', down: false };
    this.page = 0;
    // name, heading, how to compare, how to show, class
    this.columns = [
      ['status', 'Verdict', (n) => STATUS_ORDER[data.status(n)] * 1e3 - Math.min(999, data.budget(n) || 0), (n) => el('span', { class: `status ${data.status(n)}` }, data.status(n)), 'nowrap'],
      ['case', 'Case', (n) => data.text('case', n), null, 'case'],
      ['backend', 'Backend', (n) => data.text('backend', n), (n) => data.text('backend', n), 'nowrap'],
      ['family', 'Family', (n) => data.text('family', n), (n) => data.text('family', n), 'nowrap'],
      ['place', 'Place', (n) => data.columns.place[n], (n) => placeName(data.places[data.columns.place[n]]), 'nowrap'],
      ['budget', 'Budget', (n) => data.used(n) ?? -1, (n) => [share(data.used(n)), data.used(n) !== null && el('span', { class: `mini ${level(data.used(n))}` })], 'n'],
      ['statistic', 'Statistic', (n) => data.text('statistic', n), (n) => data.text('statistic', n), 'nowrap'],
      ['seconds', 'Took', (n) => data.columns.seconds[n] || 0, (n) => duration(data.columns.seconds[n]), 'n'],
      ['device_us', 'Device', (n) => data.perfOf(n)?.device_us ?? -1, (n) => micro(data.perfOf(n)?.device_us), 'n'],
      ['roof', 'Roof', (n) => data.perfOf(n)?.share ?? Infinity, (n) => { const p = data.perfOf(n)?.share; return p ? `${(p * 100).toFixed(1)} %` : '-'; }, 'n'],
      ['reason', 'Reason', (n) => data.text('reason', n), (n) => data.text('reason', n), 'reason'],
    ];
    this.section = section('cases', 'Cases', this.filters(), this.count = el('p', { role: 'status', id: 'count' }), this.place = el('div', { class: 'scroll' }), this.pager = el('div', { class: 'pager' }));
    this.update();
  }

  filters() {
    const { data } = this;
    const choose = (name, label, options) => el('label', {}, label, this[name] = el('select', { id: `filter-${name}`, onchange: (event) => this.set({ [name]: event.target.value }) },
      el('option', { value: '' }, 'all'), options.map(([value, text]) => el('option', { value }, text))));
    const named = (name) => data.columns.tables[name].map((text) => [text, text]).sort((a, b) => (a[0] < b[0] ? -1 : 1));
    let pause;
    this.text = el('input', { type: 'search', id: 'filter-text', placeholder: 'words of the case or reason', oninput: (event) => {
      clearTimeout(pause);
      pause = setTimeout(() => this.set({ text: event.target.value }), 120);
    } });
    this.buttons = data.statuses.filter((status) => data.counts[status]).map((status) => el('button', { type: 'button', class: 'plain', 'aria-pressed': 'false', 'data-status': status, onclick: () => {
      const chosen = new Set(this.filter.statuses);
      if (!chosen.delete(status)) chosen.add(status);
      this.set({ statuses: chosen });
    } }, `${status} ${number(data.counts[status])}`));
    return el('form', { class: 'filters', onsubmit: (event) => event.preventDefault() },
      el('label', {}, 'Search', this.text), choose('family', 'Family', named('family')), choose('backend', 'Backend', named('backend')),
      choose('place', 'Place', data.places.map((place, n) => [String(n), placeName(place)])), el('fieldset', {}, el('legend', {}, 'Verdict'), this.buttons),
      el('button', { type: 'button', class: 'plain', onclick: () => this.set({ text: '', statuses: new Set(), family: '', backend: '', place: '' }) }, 'Show all'));
  }

  set(changes, sort) {
    Object.assign(this.filter, changes);
    if (sort) this.sort = sort;
    this.page = 0;
    this.update();
  }

  // Show these and go there: what a cell of the matrix does.
  show(changes, sort) {
    this.set({ text: '', statuses: new Set(), family: '', backend: '', place: '', ...changes }, sort);
    this.section.scrollIntoView();
    const first = this.place.querySelector('button.case');
    if (first) first.focus({ preventScroll: true });
  }

  matching() {
    const { data, filter } = this;
    const index = (name) => (filter[name] === '' ? null : data.columns.tables[name].indexOf(filter[name]));
    const [family, backend] = [index('family'), index('backend')];
    const place = filter.place === '' ? null : Number(filter.place);
    const words = filter.text.toLowerCase().split(/\s+/).filter(Boolean);
    const cached = (name) => { const known = data.columns.tables[name].map((text) => text.toLowerCase()); return (n) => known[data.columns[name][n]]; };
    const [descriptor, reason] = words.length ? [cached('case'), cached('reason')] : [];
    return data.rows().filter((n) => (family === null || data.columns.family[n] === family) && (backend === null || data.columns.backend[n] === backend)
      && (place === null || data.columns.place[n] === place) && (!filter.statuses.size || filter.statuses.has(data.status(n)))
      && words.every((word) => descriptor(n).includes(word) || reason(n).includes(word)));
  }

  update() {
    const { data } = this;
    for (const name of ['family', 'backend', 'place']) this[name].value = this.filter[name];
    if (this.text.value !== this.filter.text) this.text.value = this.filter.text;
    for (const button of this.buttons) button.setAttribute('aria-pressed', String(this.filter.statuses.has(button.dataset.status)));
    const [, , key] = this.columns.find(([name]) => name === this.sort.name);
    const found = this.matching().map((n) => [key(n), n]);
    const sign = this.sort.down ? -1 : 1;
    found.sort((a, b) => (a[0] < b[0] ? -sign : a[0] > b[0] ? sign : a[1] - b[1]));
    this.order = found.map(([, n]) => n);
    this.timed = this.order.some((n) => data.timed.has(n));
    const pages = Math.max(1, Math.ceil(this.order.length / PAGE));
    this.page = Math.min(this.page, pages - 1);
    const shown = this.order.slice(this.page * PAGE, (this.page + 1) * PAGE);
    this.count.textContent = `${many(this.order.length, 'case')}${this.order.length < data.size ? ` of ${number(data.size)}` : ''}${pages > 1 ? `, ${number(this.page * PAGE + 1)} to ${number(this.page * PAGE + shown.length)} shown` : ''}`;
    this.place.replaceChildren(this.table(shown));
    roving(this.place, () => Array.from(this.place.querySelectorAll('button.case'), (button) => [button]));
    this.pager.replaceChildren(...this.turning(pages));
  }

  table(shown) {
    const columns = this.columns.filter(([name]) => this.timed || !['device_us', 'roof'].includes(name));
    const head = columns.map(([name, title, , , kind]) => {
      const mine = this.sort.name === name;
      return el('th', { scope: 'col', class: kind, 'aria-sort': mine ? (this.sort.down ? 'descending' : 'ascending') : null },
        el('button', { type: 'button', class: 'sort', 'data-sort': name, onclick: () => {
          this.set({}, { name, down: mine && !this.sort.down });
          this.place.querySelector(`[data-sort=${name}]`).focus();
        } }, `${title}${mine ? (this.sort.down ? ' \u25be' : ' \u25b4') : ''}`));
    });
    const cell = (n, [name, , , show, kind]) => el('td', { class: kind }, name === 'case'
      ? el('button', { type: 'button', class: 'link case mono', 'data-row': n, onclick: () => this.detail.open(n, this.order) }, this.data.text('case', n)) : show(n));
    return el('table', {}, el('thead', {}, el('tr', {}, head)), el('tbody', {}, shown.map((n) => el('tr', {}, columns.map((column) => cell(n, column))))));
  }

  turning(pages) {
    const turn = (to, name) => el('button', { type: 'button', class: 'plain', disabled: to < 0 || to >= pages || to === this.page, onclick: () => {
      this.page = to;
      this.update();
      this.count.scrollIntoView({ block: 'nearest' });
      const again = [...this.pager.querySelectorAll('button')].find((button) => button.textContent === name && !button.disabled);
      if (again) again.focus();
    } }, name);
    return pages === 1 ? [] : [turn(0, 'First'), turn(this.page - 1, 'Previous'), el('span', {}, `page ${number(this.page + 1)} of ${number(pages)}`), turn(this.page + 1, 'Next'), turn(pages - 1, 'Last')];
  }
}

function shortened(text) {
  return text.length > 110 ? `${text.slice(0, 107)}...` : text;
}
