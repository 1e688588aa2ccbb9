// The page: one view per trace with its state, and the keyboard shortcuts.

const OPTIONS = { shows: document.querySelector('#shows'), shade: document.querySelector('#shade') };
const LINKED = document.querySelector('#linked');
// Number of reads that are shown at first: those with the largest margins.
const STRONGEST = 5;
// What the arrows show, besides single heads and layers.
const STRONGEST_READS = 'strongest', ALL_HEADS = 'all', ONE_HEAD = 'head';
// Delay of the path counts after the last key press if they need BigInt, which is slow on long texts.
const PATHS_DELAY_MS = 150;

class View {
  constructor(trace, number, chosen) {
    const prefix = `t${number}`;
    this.trace = trace;
    this.chosen = chosen;
    // What the arrows show, the head that is shown alone (-1: none), the cell with the focus, and the positions to go back
    // to.
    this.which = STRONGEST_READS;
    this.selected = -1;
    this.cursor = 0;
    this.history = [];
    this.section = document.querySelector('#trace').content.cloneNode(true).firstElementChild;
    const part = (name) => this.section.querySelector(name);
    this.section.setAttribute('aria-label', `Trace ${trace.name}`);
    const model = trace.header.model?.name;
    part('h2').append(trace.name, ...(model ? [el('small', {}, ` ${model}`)] : []));
    document.querySelector('#traces').append(this.section);
    this.status = part('.status');
    this.chosenText = part('.at');
    this.search = part('.search input');
    this.matrix = new Matrix(part('.matrix'), trace);
    this.paths = new Paths(part('.paths .body'), trace, prefix, () => this.refresh());
    this.pane = new TextPane(this.section, trace, prefix, {
      choose: (position) => this.choose(position),
      selectHead: (cell) => this.selectHead(cell),
      show: (text) => this.setStatus(text),
      hover: (position, paths) => {
        const count = paths && paths !== '0' ? `, ${formatCount(BigInt(paths))} paths` : '';
        this.setStatus(`position ${position} ${quoted(trace.text(position))}${count}`);
      },
    });
    this.choice = part('.which');
    const recorded = [...new Set(trace.heads.map((head) => head.layer))];
    this.choice.append(...recorded.map((layer) => el('option', { value: `layer ${layer}` }, `layer ${layer}`)));
    this.panels = {};
    for (const name of ['candidates', 'shares', 'totals', 'proof']) this.panels[name] = part(`.${name}`);
    this.panels.totals.querySelector('.body').append(...totals(trace));
    this.panels.proof.querySelector('.body').append(...hashes(trace));
    const { length } = trace, generated = trace.generated.reduce((sum, flag) => sum + flag, 0);
    const share = generated ? `${formatCount(generated)} of them generated` : 'none of them generated';
    const summary = `${formatCount(length)} tokens, ${share}`;
    const swatch = ({ layer }, n) => el('span', { class: `swatch c${n % LAYER_COLORS}` }, `layer ${layer}`);
    const swatches = trace.layers.map(swatch);
    const marks = generated ? [el('span', { class: 'generated' }, 'generated'), ' '] : [];
    part('.legend').append(`${summary}. `, ...marks, ...swatches);
    this.listen(part);
  }

  listen(part) {
    this.choice.addEventListener('change', () => this.show(this.choice.value));
    part('.search').addEventListener('submit', (event) => {
      event.preventDefault();
      this.find(this.search.value);
    });
    this.section.addEventListener('click', (event) => {
      const link = event.target.closest('[data-go]'), cell = event.target.closest('[data-cell][role=gridcell]');
      const layer = event.target.closest('.layer');
      if (link) this.choose(Number(link.dataset.go));
      if (cell) this.selectHead(this.matrix.cells.indexOf(cell));
      if (layer) this.show(`layer ${layer.dataset.layer}`);
    });
    this.section.addEventListener('focusin', (event) => {
      active = this;
      const cell = this.matrix.cells.indexOf(event.target);
      if (cell < 0) return;
      this.cursor = cell;
      this.matrix.cells.forEach((other, c) => (other.tabIndex = c === cell ? 0 : -1));
      this.setStatus(describe(this.trace, this.chosen, cell));
    });
    this.section.addEventListener('pointerdown', () => (active = this));
    for (const name of ['shares', 'candidates']) this.panels[name].addEventListener('toggle', () => this.refresh());
  }

  setStatus(text) {
    if (this.status.textContent !== text) this.status.textContent = text;
  }

  /** Chooses a position in this view, and in the other view if the two are linked. */
  choose(position, remember = true) {
    for (const view of LINKED.checked ? views : [this]) {
      const { first, end } = view.trace, clamped = Math.min(end - 1, Math.max(first, position));
      if (clamped === view.chosen) continue;
      if (remember) view.history.push(view.chosen);
      view.chosen = clamped;
      view.levels = null;
      view.refresh();
    }
  }

  /** Shows one head alone, or the strongest reads if it is already shown alone. */
  selectHead(cell) {
    this.show(cell === this.selected ? STRONGEST_READS : ONE_HEAD, cell);
  }

  /** Shows the strongest reads, all heads, the heads of a layer (`layer N`) or one head. */
  show(which, cell = -1) {
    for (const view of LINKED.checked && difference ? views : [this]) {
      view.which = which;
      view.selected = which === ONE_HEAD ? cell : -1;
      if (which === ONE_HEAD) view.cursor = cell;
      view.refresh();
    }
  }

  /** The reads that the arrows show. Of a softmax layer that is not shown alone, only the greatest weight of each head. */
  reads() {
    const { trace, chosen, which } = this;
    if (which === STRONGEST_READS) {
      const reads = trace.strongest(chosen, STRONGEST);
      return reads.length || trace.cells.length ? reads : trace.reads(chosen, 0);
    }
    if (which === ONE_HEAD) return trace.reads(chosen, this.selected);
    const shown = (head) => which === ALL_HEADS || which === `layer ${head.layer}`;
    return [...trace.heads.keys()].filter((c) => shown(trace.heads[c])).flatMap((c) => {
      const reads = trace.reads(chosen, c);
      return c < trace.cells.length ? reads : reads.slice(0, 1);
    });
  }

  /** Goes to a position if `query` is a number, else to the next token that contains `query`. */
  find(query) {
    const { trace } = this, { first, end } = trace;
    if (/^\s*\d+\s*$/.test(query)) {
      const position = Number(query);
      if (position >= first && position < end) return this.choose(position);
      return this.setStatus(`The text has the positions ${first} to ${end - 1}.`);
    }
    for (let n = 1; query && n <= end - first; n++) {
      const position = first + ((this.chosen - first + n) % (end - first));
      if (trace.text(position).includes(query)) return this.choose(position);
    }
    this.setStatus(`No token contains ${quoted(query)}.`);
  }

  /** Goes to the position that the selected head reads, or the head with the focus if none is selected. */
  follow() {
    const cell = this.selected >= 0 ? this.selected : this.cursor, [read] = this.trace.reads(this.chosen, cell);
    if (!read) return this.setStatus(describe(this.trace, this.chosen, cell));
    this.choose(read.key);
  }

  /** Requests a redraw in the next frame. Several requests before that frame cause one redraw. */
  refresh() {
    if (this.scheduled) return;
    this.scheduled = true;
    requestAnimationFrame(() => {
      this.scheduled = false;
      this.draw();
    });
  }

  /** Computes the path counts, or starts a timer that does so if they are slow. */
  updatePaths() {
    if (this.levels) return;
    if (this.trace.countsFitDouble) {
      this.levels = this.trace.paths(this.chosen);
      return;
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.levels = this.trace.paths(this.chosen);
      this.refresh();
    }, PATHS_DELAY_MS);
  }

  draw() {
    const { trace, chosen, selected } = this;
    this.updatePaths();
    const reads = this.reads().map((read) => ({ ...read, label: describeRead(trace, chosen, read) }));
    this.choice.value = this.which;
    const other = difference ? views.find((view) => view !== this).trace : null;
    const common = other && other.row(chosen) >= 0 ? other : null;
    const level = OPTIONS.shade.checked && this.levels ? this.levels[this.paths.level] : null;
    this.pane.update({ chosen, reads, level, differs: difference?.counts });
    this.matrix.update(chosen, selected, this.cursor, OPTIONS.shows.value, common);
    this.paths.update(this.levels);
    const { candidates: candidatePanel, shares: sharePanel } = this.panels;
    if (candidatePanel.open) {
      candidatePanel.querySelector('.body').replaceChildren(...candidates(trace, chosen, selected));
    }
    if (sharePanel.open) sharePanel.querySelector('.body').replaceChildren(...shares(trace, chosen, selected));
    this.describeChosen(common);
  }

  /** Writes the chosen token and the status line. */
  describeChosen(common) {
    const { trace, chosen, selected } = this;
    const row = trace.row(chosen), origin = trace.generated[row] ? 'generated' : 'prompt';
    this.chosenText.textContent = `position ${chosen} ${quoted(trace.texts[row])}, id ${trace.ids[row]}, ${origin}`;
    const abstained = trace.cells.filter((_, c) => trace.selection(chosen, c) === ABSTAINED).length;
    const differing = common ? `, ${difference.counts[chosen]} select another position` : '';
    const strongest = Math.min(STRONGEST, trace.cells.length - abstained);
    const shown = this.which === STRONGEST_READS && trace.cells.length ? `; the arrows show the ${strongest} clearest reads` : '';
    this.setStatus(selected >= 0 ? describe(trace, chosen, selected)
      : `position ${chosen}: ${trace.cells.length - abstained} heads read, ${abstained} abstained${differing}${shown}`);
  }

  /** Handles a key in the matrix. Returns whether it has a function there. */
  matrixKey(key) {
    const heads = this.trace.heads.length;
    const moves = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -heads], End: [0, heads],
    };
    if (key === 'Enter' || key === ' ') this.selectHead(this.cursor);
    else if (moves[key]) this.matrix.cells[this.matrix.neighbor(this.cursor, ...moves[key])].focus();
    else return false;
    return true;
  }

  /** Handles a key on an arrow of the text. Returns whether it has a function there. */
  arrowKey(key, arrow) {
    const arrows = [...this.pane.svg.querySelectorAll('.arrow')], index = arrows.indexOf(arrow);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[key];
    if (key === 'Enter' || key === ' ') this.selectHead(Number(arrow.dataset.cell));
    else if (step) arrows[(index + step + arrows.length) % arrows.length].focus();
    else return false;
    return true;
  }

  /** Handles one of TEXT_KEYS. */
  textKey(key) {
    const { trace, pane, chosen } = this;
    const lines = { ArrowDown: 1, ArrowUp: -1, PageDown: pane.pageLines, PageUp: -pane.pageLines }[key];
    if (lines) return this.choose(pane.positionBelow(chosen, lines), false);
    const step = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[key];
    this.choose(step ? chosen + step : key === 'Home' ? trace.first : trace.end - 1, false);
  }
}

let views = [], active, difference = null;

/** Goes to the next (`step` 1) or previous (-1) position where the selections of the two traces differ. */
function nextDifference(step) {
  if (!difference) return;
  const { start, end, counts } = difference;
  for (let p = active.chosen + step; p >= start && p < end; p += step) if (counts[p]) return active.choose(p);
  active.setStatus(`No difference ${step > 0 ? 'after' : 'before'} position ${active.chosen}.`);
}

function toggle(checkbox) {
  checkbox.checked = !checkbox.checked;
  checkbox.dispatchEvent(new Event('change'));
}

const TEXT_KEYS = ['ArrowDown', 'ArrowUp', 'ArrowLeft', 'ArrowRight', 'PageDown', 'PageUp', 'Home', 'End', 'j', 'k'];
const KEYS = {
  '/': () => (active.search.focus(), active.search.select()),
  m: () => active.matrix.cells[active.cursor]?.focus(),
  r: () => active.pane.svg.querySelector('.arrow')?.focus(),
  t: () => active.pane.scroll.focus(),
  a: () => active.show(ALL_HEADS),
  l: () => active.show(`layer ${active.trace.heads[active.cursor].layer}`),
  Escape: () => (active.show(STRONGEST_READS), active.pane.scroll.focus()),
  f: () => active.follow(),
  b: () => active.history.length && active.choose(active.history.pop(), false),
  s: () => toggle(OPTIONS.shade),
  u: () => views.length > 1 && toggle(LINKED),
  n: () => nextDifference(1),
  p: () => nextDifference(-1),
};

function onKeyDown(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || !active) return;
  if (target.matches('input:not([type=checkbox]), select')) {
    if (key === 'Escape') active.pane.scroll.focus();
    return;
  }
  const arrow = target.closest('.arrow');
  let handled = (target.closest('.matrix') && active.matrixKey(key)) || (arrow && active.arrowKey(key, arrow));
  if (!handled && TEXT_KEYS.includes(key)) handled = (active.textKey(key), true);
  if (!handled && KEYS[key]) handled = (KEYS[key](), true);
  if (handled) event.preventDefault();
}

/** Compares the two traces and shows the number of differences. */
function compare() {
  const [{ trace: a }, { trace: b }] = views;
  difference = differences(a, b);
  document.querySelector('#pair').hidden = false;
  const output = document.querySelector('#differences');
  if (!difference) return output.append('The traces have no heads and positions in common.');
  const { selections, compared, tokens } = difference;
  const share = `${formatCount(selections)} of ${formatCount(compared)} selections`;
  output.append(`${share} differ, ${formatCount(tokens)} tokens`);
}

/** JSON reviver that keeps a number as written if a double would round it, as a 64-bit seed can be. */
function keepExact(key, value, context) {
  const rounded = typeof value === 'number' && Math.abs(value) > Number.MAX_SAFE_INTEGER;
  return rounded ? (context?.source ?? value) : value;
}

async function start() {
  const elements = [...document.querySelectorAll('script[data-trace]')];
  const traces = await Promise.all(elements.map(async (element, n) => {
    const bytes = await unpack(document.querySelector(`#records-${n}`));
    return new Trace(JSON.parse(element.textContent, keepExact), bytes);
  }));
  document.querySelector('#loading').remove();
  document.title = `Trace: ${traces.map((trace) => trace.name).join(', ')}`;
  document.body.classList.toggle('two', traces.length > 1);
  const end = Math.min(...traces.map((trace) => trace.end));
  views = traces.map((trace, n) => new View(trace, n, Math.max(trace.first, end - 1)));
  active = views[0];
  if (views.length > 1) compare();
  const refresh = () => views.forEach((view) => view.refresh());
  OPTIONS.shows.addEventListener('change', refresh);
  OPTIONS.shade.addEventListener('change', refresh);
  LINKED.addEventListener('change', () => LINKED.checked && active.choose(active.chosen));
  document.querySelector('#next').addEventListener('click', () => nextDifference(1));
  document.querySelector('#previous').addEventListener('click', () => nextDifference(-1));
  document.addEventListener('keydown', onKeyDown);
  refresh();
  active.pane.scroll.focus({ preventScroll: true });
}

start().catch((error) => {
  const message = el('p', { role: 'alert' }, `This trace cannot be shown: ${error.message}`);
  document.querySelector('#traces').replaceChildren(message);
  console.error(error);
});
