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

/** Describes in a sentence what a head reads at a position. */
function describe(trace, position, c) {
  const { layer, head } = trace.heads[c], name = `layer ${layer} head ${head}`;
  if (c >= trace.cells.length) {
    const weights = trace.weights(position, c - trace.cells.length);
    const sum = weights.reduce((total, { weight }) => total + weight, 0);
    return `${name} blends all keys; the ${weights.length} greatest weights are ${formatPercent(sum)} of all`;
  }
  const key = trace.selection(position, c);
  if (key === ABSTAINED) return `${name} abstained`;
  const margin = trace.margin(position, c), { gate } = trace.detail(position, c);
  const lead = Number.isFinite(margin) ? `margin ${formatNumber(margin)}` : 'no runner-up';
  const factor = gate === 1 ? '' : `, gate ρ ${formatNumber(gate)}`;
  return `${name} reads position ${key} ${quoted(trace.text(key))}, ${position - key} back, ${lead}${factor}`;
}

/** Describes one read of a head. The reads of later rounds have no recorded margin; further picks have a weight. */
function describeRead(trace, position, { cell, key, round, weight }) {
  const { layer, head, word } = trace.heads[cell];
  const read = `layer ${layer} head ${head} reads position ${key} ${quoted(trace.text(key))}`;
  if (weight !== undefined) return `${read} with weight ${formatPercent(weight)}, ${position - key} back`;
  if (round === 1) return describe(trace, position, cell);
  const picked = trace.detail(position, cell).weights[round - 2];
  const part = picked === undefined ? '' : `, weight ${formatNumber(picked)}`;
  return `${read} in ${word} ${round}${part}, ${position - key} back`;
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

// A layer with more heads shows colors without numbers, so that all of them fit.
const MAX_WRITTEN_HEADS = 16;

/** The grid of layers and heads: one cell per head with the position that it selects, or that has the greatest weight. Layers
 *  that are not recorded are listed below. */
class Matrix {
  constructor(root, trace) {
    this.trace = trace;
    const margins = trace.totals.map((total) => total.margin).filter((margin) => margin > 0);
    // The margin at which a cell has half of the full color.
    this.meanMargin = margins.reduce((sum, margin) => sum + margin, 0) / margins.length || 1;
    const { layers } = trace.header, recorded = layers.filter((layer) => layer.selects || layer.weights);
    const first = recorded.findIndex((layer) => layer.selects);
    // The first selecting layer is the first row; softmax layers before it follow after the others.
    const order = recorded.slice(Math.max(first, 0)).concat(recorded.slice(0, Math.max(first, 0)));
    const width = Math.max(...recorded.map((layer) => layer.heads), 1);
    const heads = Array.from({ length: width }, (_, head) => el('th', { scope: 'col' }, String(head)));
    root.classList.toggle('dense', width > MAX_WRITTEN_HEADS);
    // Cells by head number, and the rows of head numbers in the order of the grid.
    this.cells = new Array(trace.heads.length);
    this.rows = [];
    root.append(el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'layer'), ...heads)));
    root.append(el('tbody', {}, ...order.map((layer) => this.createRow(layer))));
    const others = layers.filter((layer) => !layer.selects && !layer.weights);
    if (others.length) {
      const names = [...new Set(others.map((layer) => mechanismName(layer)))].join(', ');
      const list = ranges(others.map((layer) => layer.layer)), plural = others.length > 1;
      const text = `${plural ? 'Layers' : 'Layer'} ${list} (${names}) blend${plural ? '' : 's'}: no single source.`;
      root.after(el('p', { class: 'note blends' }, text));
    }
  }

  createRow({ layer, selects, heads }) {
    const { trace } = this, start = trace.heads.findIndex((head) => head.layer === layer);
    const button = el('button', { type: 'button', class: 'layer', 'data-layer': layer, tabindex: '-1' }, String(layer));
    button.title = `show all heads of layer ${layer}`;
    const row = el('tr', {}, el('th', { scope: 'row' }, button)), numbers = [];
    for (let c = start; c < start + heads; c++) {
      const { name, row: layerRow } = trace.heads[c];
      const kind = selects ? `c${layerRow % LAYER_COLORS}` : 'blend';
      const cell = el('td', { role: 'gridcell', class: kind, tabindex: '-1', 'data-cell': name });
      this.cells[c] = cell;
      numbers.push(c);
      row.append(cell);
    }
    this.rows.push(numbers);
    return row;
  }

  /** Shows the reads at a position. `selected` is the head that is shown alone (-1: none), `cursor` the cell that takes the
   *  focus, `shows` 'distance' or 'position', `other` the trace to compare with or null. */
  update(position, selected, cursor, shows, other) {
    const { trace } = this;
    this.cells.forEach((cell, c) => {
      const blend = c >= trace.cells.length;
      if (blend) this.updateBlend(cell, position, c, shows);
      else this.updateCell(cell, position, c, shows, other);
      const differs = !blend && other !== null && other.selection(position, c) !== trace.selection(position, c);
      const label = describe(trace, position, c) + (differs ? '; the other trace selects another position' : '');
      cell.classList.toggle('differs', differs);
      cell.setAttribute('aria-label', label);
      cell.title = label;
      cell.setAttribute('aria-selected', c === selected);
      cell.tabIndex = c === cursor ? 0 : -1;
    });
  }

  updateCell(cell, position, c, shows) {
    const { trace } = this;
    const key = trace.selection(position, c), margin = trace.margin(position, c), abstained = key === ABSTAINED;
    const value = shows === 'distance' ? position - key : key;
    cell.textContent = abstained ? '∅' : `${value}${Number.isFinite(margin) ? '' : '∞'}`;
    cell.classList.toggle('abstained', abstained);
    const strength = abstained ? 0 : Number.isFinite(margin) ? margin / (margin + this.meanMargin) : 1;
    cell.style.setProperty('--strength', `${(6 + 44 * Math.max(0, strength)).toFixed(1)}%`);
  }

  updateBlend(cell, position, c, shows) {
    const [top] = this.trace.weights(position, c - this.trace.cells.length);
    if (!top) return (cell.textContent = '–');
    const value = shows === 'distance' ? position - top.key : top.key;
    cell.replaceChildren(String(value), el('small', {}, `${(100 * top.weight).toFixed(0)} %`));
    cell.style.setProperty('--strength', `${(44 * top.weight).toFixed(1)}%`);
  }

  /** The cell that is `rows` rows below and `columns` columns to the right of cell `c`, clamped to the grid. */
  neighbor(c, rows, columns) {
    const at = this.rows.findIndex((row) => row.includes(c)), column = this.rows[at].indexOf(c) + columns;
    const row = this.rows[Math.min(this.rows.length - 1, Math.max(0, at + rows))];
    return row[Math.min(row.length - 1, Math.max(0, column))];
  }
}

/** The name of a layer's mechanism, which can be an object with parameters. */
const mechanismName = ({ mechanism }) => mechanism?.name ?? String(mechanism);

/** Ascending numbers as text, with runs of them as ranges: `0–3, 7`. */
function ranges(numbers) {
  const runs = [];
  for (const n of numbers) {
    if (runs.length && runs.at(-1)[1] === n - 1) runs.at(-1)[1] = n;
    else runs.push([n, n]);
  }
  return runs.map(([from, to]) => (from === to ? String(from) : `${from}–${to}`)).join(', ');
}

/** Why a candidate was selected or not. */
function outcome({ key, rejected, runnerUp, energy, lifted }, detail, threshold) {
  if (key === detail.selected) {
    return detail.weights.length ? `selected, weight ${formatNumber(detail.gate)}` : 'selected';
  }
  const round = detail.later.indexOf(key);
  if (round >= 0 && detail.weights.length) return `pick ${round + 2}, weight ${formatNumber(detail.weights[round])}`;
  if (round >= 0) return `read in round ${round + 2}`;
  if (!rejected) return runnerUp ? 'runner-up, no candidate' : 'not least';
  const comparison = threshold === null ? '' : `: ${formatNumber(lifted ?? energy)} > ${formatNumber(threshold)}`;
  return `rejected by the threshold${comparison}`;
}

/** The candidates of one head at a position, with the outcome for each. */
function candidates(trace, position, c) {
  if (c < 0) return [el('p', { class: 'note' }, 'Choose a head in the matrix.')];
  if (c >= trace.cells.length) return blended(trace, position, c);
  const detail = trace.detail(position, c), { name } = trace.cells[c];
  const threshold = trace.limit(position, c, detail.candidates);
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
    describe(trace, position, c), `energy ${formatNumber(detail.energy)}`, `gate ρ ${formatNumber(detail.gate)}`,
    `coherence point u* ${Number.isNaN(detail.coherence) ? 'not computed' : formatNumber(detail.coherence)}`,
  ];
  const list = rows.length ? table(['key', 'energy', 'energy after the barrier', 'protected', 'outcome'], rows)
    : el('p', {}, 'The head had no candidates.');
  return [el('p', {}, el('b', {}, name), ` ${summary.join('; ')}.`), el('div', { class: 'wide' }, list)];
}

/** The greatest weights of a softmax head. */
function blended(trace, position, c) {
  const { name } = trace.heads[c];
  const rows = trace.weights(position, c - trace.cells.length).map(({ key, weight }) => {
    const chart = el('div', { class: 'share-chart', role: 'img', 'aria-label': formatPercent(weight) });
    const bar = el('span', { class: 'value' });
    bar.style.width = `${100 * weight}%`;
    chart.append(bar);
    return el('tr', { 'data-key': key }, ...[positionLink(trace, key), formatPercent(weight), chart].map((x) => el('td', {}, x)));
  });
  const note = 'A softmax head has no single source: its output is the sum of all values, times their weights.';
  return [el('p', {}, el('b', {}, name), ` ${describe(trace, position, c)}.`), table(['key', 'weight', ''], rows),
    el('p', { class: 'note' }, note)];
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
      const cells = ['positions', 'paths', 'most'].map((kind) => el('td', { class: kind }));
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
