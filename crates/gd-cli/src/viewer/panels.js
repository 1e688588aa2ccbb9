// The panels beside the text: the heads of the chosen token, one head's candidates, paths, shares, totals, hashes.

/** A number for people: four digits at most. */
function number(x) {
  if (Number.isNaN(x)) return '–';
  if (!Number.isFinite(x)) return x > 0 ? '∞' : '−∞';
  return String(Number(x.toPrecision(4))).replace('-', '−');
}

const percent = (x) => (Number.isNaN(x) ? '–' : `${(100 * x).toFixed(1)} %`);
const group = (n) => n.toLocaleString('en-US').replace(/,/g, '\u202f');

/** What a head did at a position, in words. */
function describe(trace, position, c) {
  const { layer, head } = trace.cells[c], who = `layer ${layer} head ${head}`, key = trace.pick(position, c);
  if (key === ABSTAINED) return `${who} abstained`;
  const margin = trace.margin(position, c);
  const least = Number.isFinite(margin) ? `margin ${number(margin)}` : 'no runner-up';
  return `${who} reads position ${key} ${quoted(trace.text(key))}, ${position - key} back, ${least}`;
}

/** One read of a head, in words: that of a later round has no margin. */
function describeRead(trace, position, { cell, key, round }) {
  if (round === 1) return describe(trace, position, cell);
  const { layer, head } = trace.cells[cell], back = `${position - key} back`;
  return `layer ${layer} head ${head} reads position ${key} ${quoted(trace.text(key))} in round ${round}, ${back}`;
}

/** Text that leads to a position. */
function link(trace, position, more = '') {
  const text = trace.text(position), short = text?.length > 24 ? `${text.slice(0, 24)}…` : text;
  return el('button', { type: 'button', class: 'go', 'data-go': position }, `${position} ${quoted(short)}${more}`);
}

function table(head, rows) {
  const line = (tag, cells) => el('tr', {}, ...cells.map((cell) => (cell instanceof Element && cell.matches('td, th')
    ? cell : el(tag, tag === 'th' ? { scope: 'col' } : {}, cell))));
  const body = rows.map((row) => (row instanceof Element ? row : line('td', row)));
  return el('table', {}, el('thead', {}, line('th', head)), el('tbody', {}, ...body));
}

/** The grid of layers and heads: one cell a head, with what it read. */
class Matrix {
  constructor(root, trace) {
    this.trace = trace;
    this.cells = [];
    const finite = trace.totals.map((total) => total.margin).filter((margin) => margin > 0);
    this.usual = finite.reduce((sum, margin) => sum + margin, 0) / finite.length || 1;
    const most = Math.max(...trace.layers.map((layer) => layer.heads), 1), layers = trace.header.layers;
    const heads = Array.from({ length: most }, (_, head) => el('th', { scope: 'col' }, String(head)));
    root.append(el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'layer'), ...heads)));
    const body = el('tbody');
    for (const layer of layers) {
      const row = el('tr', {}, el('th', { scope: 'row' }, String(layer.layer)));
      if (layer.selects) {
        const { from } = trace.layers.find((entry) => entry.layer === layer.layer);
        for (let head = 0; head < layer.heads; head++) {
          const { name, row: colour } = trace.cells[from + head];
          const cell = el('td', { role: 'gridcell', class: `c${colour % 7}`, tabindex: '-1', 'data-cell': name });
          this.cells.push(cell);
          row.append(cell);
        }
      } else {
        row.append(el('td', { class: 'blends', colspan: most }, `${layer.mechanism}: blends, no single source`));
      }
      body.append(row);
    }
    root.append(body);
  }

  update(position, alone, cursor, shows, other) {
    const { trace } = this;
    this.cells.forEach((cell, c) => {
      const key = trace.pick(position, c), margin = trace.margin(position, c), gone = key === ABSTAINED;
      const differs = other !== null && other.pick(position, c) !== key;
      const alike = shows === 'distance' ? position - key : key;
      cell.textContent = gone ? '∅' : `${alike}${Number.isFinite(margin) ? '' : '∞'}`;
      cell.classList.toggle('abstained', gone);
      cell.classList.toggle('differs', differs);
      const strength = gone ? 0 : Number.isFinite(margin) ? margin / (margin + this.usual) : 1;
      cell.style.setProperty('--strength', `${(6 + 44 * Math.max(0, strength)).toFixed(1)}%`);
      const label = describe(trace, position, c) + (differs ? '; the other trace picks differently' : '');
      cell.setAttribute('aria-label', label);
      cell.title = label;
      cell.setAttribute('aria-selected', c === alone);
      cell.tabIndex = c === cursor ? 0 : -1;
    });
  }

  /** The cell beside `c` in a direction of (rows, columns). */
  beside(c, rows, columns) {
    const { layers, cells } = this.trace, { row, head } = cells[c];
    const layer = layers[Math.min(layers.length - 1, Math.max(0, row + rows))];
    return layer.from + Math.min(layer.heads - 1, Math.max(0, head + columns));
  }
}

/** One head's candidates, with what became of each. */
function candidates(trace, position, c) {
  if (c < 0) return [el('p', { class: 'note' }, 'Choose a head in the matrix.')];
  const detail = trace.detail(position, c), { name, threshold } = trace.cells[c];
  const fate = ({ key, rejected, energy, lifted }) => {
    if (key === detail.selected) return 'selected';
    const round = detail.later.indexOf(key);
    if (round >= 0) return `read in round ${round + 2}`;
    if (!rejected) return 'not least';
    const bound = threshold === null ? '' : `: ${number(lifted ?? energy)} > ${number(threshold)}`;
    return `rejected by the threshold${bound}`;
  };
  const rows = detail.candidates.map((candidate) => {
    const row = el('tr', { 'data-key': candidate.key, class: candidate.key === detail.selected ? 'selected' : null });
    for (const content of [
      link(trace, candidate.key), number(candidate.energy), candidate.lifted === null ? '' : number(candidate.lifted),
      candidate.protected ? 'yes' : '', fate(candidate),
    ]) row.append(el('td', {}, content));
    return row;
  });
  const said = [
    describe(trace, position, c), `energy ${number(detail.energy)}`, `gate ${number(detail.gate)}`,
    `coherence u* ${Number.isNaN(detail.coherence) ? 'not resolved' : number(detail.coherence)}`,
  ];
  const list = rows.length ? table(['key', 'energy', 'lifted to', 'protected', 'fate'], rows)
    : el('p', {}, 'No key was a candidate.');
  return [el('p', {}, el('b', {}, name), ` ${said.join('; ')}.`), el('div', { class: 'wide' }, list)];
}

/** The table of paths: one line a selecting layer, the last first; the line that is chosen shades the text. */
class Paths {
  constructor(root, trace, prefix, changed) {
    this.trace = trace;
    this.level = trace.layers.length - 1;
    this.rows = trace.layers.slice().reverse().map((layer, n) => {
      const label = `shade by layer ${layer.layer}`;
      const radio = el('input', { type: 'radio', name: `${prefix}-level`, 'aria-label': label });
      radio.checked = n === this.level;
      radio.addEventListener('change', () => changed((this.level = n)));
      const cells = ['positions', 'paths', 'most'].map((kind) => el('td', { class: kind }));
      return el('tr', { 'data-layer': layer.layer }, el('td', {}, radio), el('td', {}, String(layer.layer)), ...cells);
    });
    root.append(table(['shade', 'layer', 'positions', 'paths', 'most paths lead to'], this.rows));
  }

  update(levels) {
    this.rows.forEach((row, n) => {
      const cells = [...row.children].slice(2);
      if (!levels) return cells.forEach((cell) => cell.replaceChildren('…'));
      const { counts, reached, total } = levels[n], top = [];
      for (const p of reached) {
        if (top.length === 4 && counts[p] <= counts[top[3]]) continue;
        top.push(p);
        top.sort((a, b) => (counts[a] < counts[b] ? 1 : counts[a] > counts[b] ? -1 : a - b));
        top.length = Math.min(top.length, 4);
      }
      cells[0].textContent = group(reached.length);
      cells[1].textContent = group(total);
      cells[2].replaceChildren(...top.map((p) => link(this.trace, p, ` ×${group(counts[p])}`)));
    });
  }
}

/** Where the norm of each head's output comes from. */
function shares(trace, position, alone) {
  const rows = [];
  trace.cells.forEach(({ name }, c) => {
    if (alone >= 0 && c !== alone) return;
    const { value, average } = trace.detail(position, c), rest = Math.max(0, 1 - value - average);
    const parts = [['value', value], ['average', average], ['rest', rest]];
    const said = parts.map(([kind, share]) => `${kind} ${percent(share)}`).join(', ');
    const bar = el('div', { class: 'bar', role: 'img', 'aria-label': said });
    for (const [kind, share] of parts) {
      const part = el('span', { class: kind });
      part.style.width = `${100 * (share || 0)}%`;
      bar.append(part);
    }
    rows.push([name, bar, ...parts.map((part) => percent(part[1]))]);
  });
  return [table(['head', '', 'selected value', 'running average', 'later rounds'], rows)];
}

/** What each head does over the whole trace. */
function totals(trace) {
  const rows = trace.cells.map(({ name }, c) => {
    const { abstention, margin, zero } = trace.totals[c];
    const row = el('tr', { 'data-cell': name });
    for (const text of [name, percent(abstention), number(margin), percent(zero)]) row.append(el('td', {}, text));
    return row;
  });
  return [table(['head', 'abstains', 'mean margin', 'reads position 0'], rows)];
}

/** The header and the head. */
function hashes(trace) {
  const list = el('dl'), { model = {}, ...header } = trace.header;
  const entry = (name, value) => {
    if (value === undefined || value === null || value.length === 0) return;
    const text = Array.isArray(value) ? value.join('; ') : typeof value === 'object' ? JSON.stringify(value) : value;
    list.append(el('dt', {}, name), el('dd', {}, text));
  };
  entry('head', trace.head);
  for (const name of ['weights', 'config', 'tokenizer']) entry(name, model[name]);
  for (const name of ['input', 'device', 'isa', 'precision', 'sampling', 'seed', 'interventions', 'gd']) {
    entry(name, header[name]);
  }
  return [list];
}
