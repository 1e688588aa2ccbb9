// The panels next to the text: heads of the chosen token, candidates of one head, paths, output shares, totals, hashes.

/** Formats a number with at most four significant digits. */
function formatNumber(x) {
  if (Number.isNaN(x)) return '–';
  if (!Number.isFinite(x)) return x > 0 ? '∞' : '−∞';
  return String(Number(x.toPrecision(4))).replace('-', '−');
}

const formatPercent = (x) => (Number.isNaN(x) ? '–' : `${(100 * x).toFixed(1)} %`);
/** Formats an integer with a narrow space between groups of three digits. */
const formatCount = (n) => n.toLocaleString('en-US').replace(/,/g, '\u202f');

/** Describes in a sentence what a head selects at a position. */
function describe(trace, position, c) {
  const { layer, head } = trace.cells[c], name = `layer ${layer} head ${head}`, key = trace.selection(position, c);
  if (key === ABSTAINED) return `${name} abstained`;
  const margin = trace.margin(position, c);
  const lead = Number.isFinite(margin) ? `margin ${formatNumber(margin)}` : 'no runner-up';
  return `${name} reads position ${key} ${quoted(trace.text(key))}, ${position - key} back, ${lead}`;
}

/** Describes one read of a head. The reads of later rounds have no recorded margin. */
function describeRead(trace, position, { cell, key, round }) {
  if (round === 1) return describe(trace, position, cell);
  const { layer, head, word } = trace.cells[cell], distance = `${position - key} back`;
  return `layer ${layer} head ${head} reads position ${key} ${quoted(trace.text(key))} in ${word} ${round}, ${distance}`;
}

/** A button that chooses a position. */
function positionLink(trace, position, suffix = '') {
  const text = trace.text(position), short = text?.length > 24 ? `${text.slice(0, 24)}…` : text;
  return el('button', { type: 'button', class: 'go', 'data-go': position }, `${position} ${quoted(short)}${suffix}`);
}

/** A table. Each row is a tr element or a list of cell contents. */
function table(head, rows) {
  const toRow = (tag, cells) => el('tr', {}, ...cells.map((cell) => (cell instanceof Element && cell.matches('td, th')
    ? cell : el(tag, tag === 'th' ? { scope: 'col' } : {}, cell))));
  const body = rows.map((row) => (row instanceof Element ? row : toRow('td', row)));
  return el('table', {}, el('thead', {}, toRow('th', head)), el('tbody', {}, ...body));
}

/** The grid of layers and heads: one cell per head with the position that it selects. */
class Matrix {
  constructor(root, trace) {
    this.trace = trace;
    this.cells = [];
    const margins = trace.totals.map((total) => total.margin).filter((margin) => margin > 0);
    // The margin at which a cell has half of the full color.
    this.meanMargin = margins.reduce((sum, margin) => sum + margin, 0) / margins.length || 1;
    const width = Math.max(...trace.layers.map((layer) => layer.heads), 1);
    const heads = Array.from({ length: width }, (_, head) => el('th', { scope: 'col' }, String(head)));
    root.append(el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'layer'), ...heads)));
    root.append(el('tbody', {}, ...trace.header.layers.map((layer) => this.createRow(layer, width))));
  }

  createRow(layer, width) {
    const row = el('tr', {}, el('th', { scope: 'row' }, String(layer.layer)));
    if (!layer.selects) {
      row.append(el('td', { class: 'blends', colspan: width }, `${layer.mechanism}: blends, no single source`));
      return row;
    }
    const { firstCell } = this.trace.layers.find((entry) => entry.layer === layer.layer);
    for (let head = 0; head < layer.heads; head++) {
      const { name, row: layerRow } = this.trace.cells[firstCell + head], color = `c${layerRow % LAYER_COLORS}`;
      const cell = el('td', { role: 'gridcell', class: color, tabindex: '-1', 'data-cell': name });
      this.cells.push(cell);
      row.append(cell);
    }
    return row;
  }

  /** Shows the selections at a position. `selected` is the head that is shown alone (-1: all heads), `cursor` the
   *  cell that takes the focus, `shows` 'distance' or 'position', `other` the trace to compare with or null. */
  update(position, selected, cursor, shows, other) {
    const { trace } = this;
    this.cells.forEach((cell, c) => {
      const key = trace.selection(position, c), margin = trace.margin(position, c), abstained = key === ABSTAINED;
      const differs = other !== null && other.selection(position, c) !== key;
      const value = shows === 'distance' ? position - key : key;
      cell.textContent = abstained ? '∅' : `${value}${Number.isFinite(margin) ? '' : '∞'}`;
      cell.classList.toggle('abstained', abstained);
      cell.classList.toggle('differs', differs);
      const strength = abstained ? 0 : Number.isFinite(margin) ? margin / (margin + this.meanMargin) : 1;
      cell.style.setProperty('--strength', `${(6 + 44 * Math.max(0, strength)).toFixed(1)}%`);
      const label = describe(trace, position, c) + (differs ? '; the other trace selects another position' : '');
      cell.setAttribute('aria-label', label);
      cell.title = label;
      cell.setAttribute('aria-selected', c === selected);
      cell.tabIndex = c === cursor ? 0 : -1;
    });
  }

  /** The cell that is `rows` rows below and `columns` columns to the right of cell `c`, clamped to the grid. */
  neighbor(c, rows, columns) {
    const { layers, cells } = this.trace, { row, head } = cells[c];
    const layer = layers[Math.min(layers.length - 1, Math.max(0, row + rows))];
    return layer.firstCell + Math.min(layer.heads - 1, Math.max(0, head + columns));
  }
}

/** Why a candidate was selected or not. */
function outcome({ key, rejected, energy, lifted }, detail, threshold) {
  if (key === detail.selected) return 'selected';
  const round = detail.later.indexOf(key);
  if (round >= 0 && detail.weights.length) return `pick ${round + 2}, weight ${formatNumber(detail.weights[round])}`;
  if (round >= 0) return `read in round ${round + 2}`;
  if (!rejected) return 'not least';
  const comparison = threshold === null ? '' : `: ${formatNumber(lifted ?? energy)} > ${formatNumber(threshold)}`;
  return `rejected by the threshold${comparison}`;
}

/** The candidates of one head at a position, with the outcome for each. */
function candidates(trace, position, c) {
  if (c < 0) return [el('p', { class: 'note' }, 'Choose a head in the matrix.')];
  const detail = trace.detail(position, c), { name, threshold } = trace.cells[c];
  const rows = detail.candidates.map((candidate) => {
    const { key, energy, lifted } = candidate;
    const row = el('tr', { 'data-key': key, class: key === detail.selected ? 'selected' : null });
    for (const content of [
      positionLink(trace, key), formatNumber(energy), lifted === null ? '' : formatNumber(lifted),
      candidate.protected ? 'yes' : '', outcome(candidate, detail, threshold),
    ]) row.append(el('td', {}, content));
    return row;
  });
  const summary = [
    describe(trace, position, c), `energy ${formatNumber(detail.energy)}`, `gate ${formatNumber(detail.gate)}`,
    `coherence point u* ${Number.isNaN(detail.coherence) ? 'not computed' : formatNumber(detail.coherence)}`,
  ];
  const list = rows.length ? table(['key', 'energy', 'energy after the barrier', 'protected', 'outcome'], rows)
    : el('p', {}, 'The head had no candidates.');
  return [el('p', {}, el('b', {}, name), ` ${summary.join('; ')}.`), el('div', { class: 'wide' }, list)];
}

/** The table of paths: one row per selecting layer, the last layer first. The chosen row shades the text. */
class Paths {
  constructor(root, trace, prefix, onChange) {
    this.trace = trace;
    this.level = trace.layers.length - 1;
    this.rows = trace.layers.slice().reverse().map((layer, n) => {
      const label = `shade by layer ${layer.layer}`;
      const radio = el('input', { type: 'radio', name: `${prefix}-level`, 'aria-label': label });
      radio.checked = n === this.level;
      radio.addEventListener('change', () => {
        this.level = n;
        onChange();
      });
      const cells = ['positions', 'paths', 'top'].map((kind) => el('td', { class: kind }));
      return el('tr', { 'data-layer': layer.layer }, el('td', {}, radio), el('td', {}, String(layer.layer)), ...cells);
    });
    root.append(table(['shade', 'layer', 'positions', 'paths', 'positions with the most paths'], this.rows));
  }

  /** The `k` reached positions with the largest counts, the smaller position first if counts are equal. */
  static topPositions({ counts, reached }, k) {
    const top = [];
    for (const p of reached) {
      if (top.length === k && counts[p] <= counts[top[k - 1]]) continue;
      top.push(p);
      top.sort((a, b) => (counts[a] < counts[b] ? 1 : counts[a] > counts[b] ? -1 : a - b));
      top.length = Math.min(top.length, k);
    }
    return top;
  }

  update(levels) {
    this.rows.forEach((row, n) => {
      const cells = [...row.children].slice(2);
      if (!levels) return cells.forEach((cell) => cell.replaceChildren('…'));
      const { counts, reached, total } = levels[n], top = Paths.topPositions(levels[n], 4);
      cells[0].textContent = formatCount(reached.length);
      cells[1].textContent = formatCount(total);
      cells[2].replaceChildren(...top.map((p) => positionLink(this.trace, p, ` ×${formatCount(counts[p])}`)));
    });
  }
}

/** The shares of each head's output norm by origin: selected value, running average, later rounds. */
function shares(trace, position, selected) {
  const rows = [];
  trace.cells.forEach(({ name }, c) => {
    if (selected >= 0 && c !== selected) return;
    const { value, average } = trace.detail(position, c), rest = Math.max(0, 1 - value - average);
    const parts = [['value', value], ['average', average], ['rest', rest]];
    const label = parts.map(([kind, share]) => `${kind} ${formatPercent(share)}`).join(', ');
    const chart = el('div', { class: 'share-chart', role: 'img', 'aria-label': label });
    for (const [kind, share] of parts) {
      const part = el('span', { class: kind });
      part.style.width = `${100 * (share || 0)}%`;
      chart.append(part);
    }
    rows.push([name, chart, ...parts.map((part) => formatPercent(part[1]))]);
  });
  return [table(['head', '', 'selected value', 'running average', 'later rounds'], rows)];
}

/** Statistics of each head over the whole trace. */
function totals(trace) {
  const rows = trace.cells.map(({ name }, c) => {
    const { abstention, margin, zero } = trace.totals[c];
    const row = el('tr', { 'data-cell': name });
    for (const text of [name, formatPercent(abstention), formatNumber(margin), formatPercent(zero)]) {
      row.append(el('td', {}, text));
    }
    return row;
  });
  return [table(['head', 'abstention rate', 'mean margin', 'reads of position 0'], rows)];
}

/** The header of the trace and the head of its hash chain. */
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
