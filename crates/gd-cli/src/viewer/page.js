// The page: one view a trace, what is chosen in it, and the keys.

const OPTIONS = { shows: document.querySelector('#shows'), shade: document.querySelector('#shade') };
const LINKED = document.querySelector('#linked');
// Counts beyond a double take time on long texts, so they wait until the keys rest: milliseconds.
const REST = 150;

class View {
  constructor(trace, number, chosen) {
    const prefix = `t${number}`;
    this.trace = trace;
    this.chosen = chosen;
    this.alone = -1;
    this.cursor = 0;
    this.back = [];
    this.section = document.querySelector('#trace').content.cloneNode(true).firstElementChild;
    const part = (name) => this.section.querySelector(name);
    this.section.setAttribute('aria-label', `Trace ${trace.name}`);
    const model = trace.header.model?.name;
    part('h2').append(trace.name, ...(model ? [el('small', {}, ` ${model}`)] : []));
    document.querySelector('#traces').append(this.section);
    this.status = part('.status');
    this.at = part('.at');
    this.search = part('.search input');
    this.matrix = new Matrix(part('.matrix'), trace);
    this.paths = new Paths(part('.paths .body'), trace, prefix, () => this.refresh());
    this.pane = new TextPane(this.section, trace, prefix, {
      choose: (position) => this.choose(position),
      alone: (cell) => this.single(cell),
      show: (text) => this.say(text),
      hover: (position, paths) => {
        const count = paths && paths !== '0' ? `, ${group(BigInt(paths))} paths` : '';
        this.say(`position ${position} ${quoted(trace.text(position))}${count}`);
      },
    });
    this.panels = {};
    for (const name of ['candidates', 'shares', 'totals', 'proof']) this.panels[name] = part(`.${name}`);
    this.panels.totals.querySelector('.body').append(...totals(trace));
    this.panels.proof.querySelector('.body').append(...hashes(trace));
    const { length } = trace, made = trace.generated.reduce((sum, one) => sum + one, 0);
    const summary = `${group(length)} tokens, ${group(made)} of them generated`;
    const swatches = trace.layers.map(({ layer }, n) => el('span', { class: `swatch c${n % 7}` }, `layer ${layer}`));
    part('.legend').append(`${summary}. `, el('span', { class: 'generated' }, 'generated'), ' ', ...swatches);
    this.listen(part);
  }

  listen(part) {
    part('.all').addEventListener('click', () => this.single(-1));
    part('.search').addEventListener('submit', (event) => {
      event.preventDefault();
      this.find(this.search.value);
    });
    this.section.addEventListener('click', (event) => {
      const go = event.target.closest('[data-go]'), cell = event.target.closest('[data-cell][role=gridcell]');
      if (go) this.choose(Number(go.dataset.go));
      if (cell) this.single(this.matrix.cells.indexOf(cell));
    });
    this.section.addEventListener('focusin', (event) => {
      active = this;
      const cell = this.matrix.cells.indexOf(event.target);
      if (cell < 0) return;
      this.cursor = cell;
      this.matrix.cells.forEach((other, c) => (other.tabIndex = c === cell ? 0 : -1));
      this.say(describe(this.trace, this.chosen, cell));
    });
    this.section.addEventListener('pointerdown', () => (active = this));
    for (const name of ['shares', 'candidates']) this.panels[name].addEventListener('toggle', () => this.refresh());
  }

  say(text) {
    if (this.status.textContent !== text) this.status.textContent = text;
  }

  /** Chooses a position here, and in the other view where the two are linked. */
  choose(position, remember = true) {
    for (const view of LINKED.checked ? views : [this]) {
      const { first, end } = view.trace, to = Math.min(end - 1, Math.max(first, position));
      if (to === view.chosen) continue;
      if (remember) view.back.push(view.chosen);
      view.chosen = to;
      view.levels = null;
      view.refresh();
    }
  }

  /** Shows one head alone, or all with -1; choosing the same again shows all. */
  single(cell) {
    const alone = cell === this.alone ? -1 : cell;
    for (const view of LINKED.checked && difference ? views : [this]) {
      view.alone = alone;
      if (alone >= 0) view.cursor = alone;
      view.refresh();
    }
  }

  /** Goes to a position given in figures, or to the next token with a text. */
  find(wanted) {
    const { trace } = this, { first, end } = trace;
    if (/^\s*\d+\s*$/.test(wanted)) {
      const position = Number(wanted);
      if (position >= first && position < end) return this.choose(position);
      return this.say(`The text has the positions ${first} to ${end - 1}.`);
    }
    for (let n = 1; wanted && n <= end - first; n++) {
      const position = first + ((this.chosen - first + n) % (end - first));
      if (trace.text(position).includes(wanted)) return this.choose(position);
    }
    this.say(`No token contains ${quoted(wanted)}.`);
  }

  /** Goes to what the chosen head, or the one under the cursor, reads. */
  follow() {
    const cell = this.alone >= 0 ? this.alone : this.cursor, key = this.trace.pick(this.chosen, cell);
    if (key === ABSTAINED) return this.say(describe(this.trace, this.chosen, cell));
    this.choose(key);
  }

  /** Draws at the next frame, once however much has changed. */
  refresh() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  draw() {
    const { trace, chosen, alone } = this;
    if (!this.levels && trace.small) this.levels = trace.paths(chosen);
    if (!this.levels) {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => {
        this.levels = trace.paths(this.chosen);
        this.refresh();
      }, REST);
    }
    const cells = alone >= 0 ? [alone] : trace.cells.keys(), reads = [];
    for (const cell of cells) {
      for (const read of trace.reads(chosen, cell)) reads.push({ ...read, label: describeRead(trace, chosen, read) });
    }
    const other = difference ? views.find((view) => view !== this).trace : null;
    const common = other && other.row(chosen) >= 0 ? other : null;
    const level = OPTIONS.shade.checked && this.levels ? this.levels[this.paths.level] : null;
    this.pane.update({ chosen, reads, level, differs: difference?.counts });
    this.matrix.update(chosen, alone, this.cursor, OPTIONS.shows.value, common);
    this.paths.update(this.levels);
    const { candidates: list, shares: parts } = this.panels;
    if (list.open) list.querySelector('.body').replaceChildren(...candidates(trace, chosen, alone));
    if (parts.open) parts.querySelector('.body').replaceChildren(...shares(trace, chosen, alone));
    const row = trace.row(chosen), kind = trace.generated[row] ? 'generated' : 'read';
    this.at.textContent = `position ${chosen} ${quoted(trace.texts[row])}, id ${trace.ids[row]}, ${kind}`;
    const abstained = trace.cells.filter((_, c) => trace.pick(chosen, c) === ABSTAINED).length;
    const differing = common ? `, ${difference.counts[chosen]} pick differently` : '';
    this.say(alone >= 0 ? describe(trace, chosen, alone)
      : `position ${chosen}: ${trace.cells.length - abstained} heads read, ${abstained} abstained${differing}`);
  }

  /** A key in the matrix; whether it had a meaning there. */
  matrixKey(key) {
    const { heads } = this.trace.layers[this.trace.cells[this.cursor].row];
    const moves = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -heads], End: [0, heads],
    };
    if (key === 'Enter' || key === ' ') this.single(this.cursor);
    else if (moves[key]) this.matrix.cells[this.matrix.beside(this.cursor, ...moves[key])].focus();
    else return false;
    return true;
  }

  /** A key on an arrow; whether it had a meaning there. */
  arrowKey(key, arrow) {
    const arrows = [...this.pane.svg.querySelectorAll('.arrow')], at = arrows.indexOf(arrow);
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[key];
    if (key === 'Enter' || key === ' ') this.single(Number(arrow.dataset.cell));
    else if (by) arrows[(at + by + arrows.length) % arrows.length].focus();
    else return false;
    return true;
  }

  textKey(key) {
    const { trace, pane, chosen } = this;
    const line = { ArrowDown: 1, ArrowUp: -1, PageDown: pane.page, PageUp: -pane.page }[key];
    if (line) return this.choose(pane.beside(chosen, line), false);
    const step = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[key];
    this.choose(step ? chosen + step : key === 'Home' ? trace.first : trace.end - 1, false);
  }
}

let views = [], active, difference = null;

/** Goes to the next or previous position where the two traces pick differently. */
function nextDifference(by) {
  if (!difference) return;
  const { from, to, counts } = difference;
  for (let p = active.chosen + by; p >= from && p < to; p += by) if (counts[p]) return active.choose(p);
  active.say(`No difference ${by > 0 ? 'after' : 'before'} position ${active.chosen}.`);
}

function toggle(box) {
  box.checked = !box.checked;
  box.dispatchEvent(new Event('change'));
}

const TEXT_KEYS = ['ArrowDown', 'ArrowUp', 'ArrowLeft', 'ArrowRight', 'PageDown', 'PageUp', 'Home', 'End', 'j', 'k'];
const KEYS = {
  '/': () => (active.search.focus(), active.search.select()),
  m: () => active.matrix.cells[active.cursor]?.focus(),
  r: () => active.pane.svg.querySelector('.arrow')?.focus(),
  t: () => active.pane.scroll.focus(),
  a: () => active.single(-1),
  Escape: () => (active.single(-1), active.pane.scroll.focus()),
  f: () => active.follow(),
  b: () => active.back.length && active.choose(active.back.pop(), false),
  s: () => toggle(OPTIONS.shade),
  u: () => views.length > 1 && toggle(LINKED),
  n: () => nextDifference(1),
  p: () => nextDifference(-1),
};

function pressed(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || !active) return;
  if (target.matches('input:not([type=checkbox]), select')) {
    if (key === 'Escape') active.pane.scroll.focus();
    return;
  }
  const arrow = target.closest('.arrow');
  let used = (target.closest('.matrix') && active.matrixKey(key)) || (arrow && active.arrowKey(key, arrow));
  if (!used && TEXT_KEYS.includes(key)) used = (active.textKey(key), true);
  if (!used && KEYS[key]) used = (KEYS[key](), true);
  if (used) event.preventDefault();
}

/** Counts what two traces have apart. */
function compare() {
  const [{ trace: a }, { trace: b }] = views;
  difference = differences(a, b);
  document.querySelector('#pair').hidden = false;
  const said = document.querySelector('#differences');
  if (!difference) return said.append('The traces have no heads and positions in common.');
  const { picks, compared, tokens } = difference;
  said.append(`${group(picks)} of ${group(compared)} picks differ, ${group(tokens)} tokens`);
}

/** A number that a double would round stays as it is written; a seed can be one. */
function exact(key, value, context) {
  const rounded = typeof value === 'number' && Math.abs(value) > Number.MAX_SAFE_INTEGER;
  return rounded ? (context?.source ?? value) : value;
}

async function start() {
  const elements = [...document.querySelectorAll('script[data-trace]')];
  const traces = await Promise.all(elements.map(async (element, n) => {
    const bytes = await unpack(document.querySelector(`#records-${n}`));
    return new Trace(JSON.parse(element.textContent, exact), bytes);
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
  document.addEventListener('keydown', pressed);
  refresh();
  active.pane.scroll.focus({ preventScroll: true });
}

start().catch((error) => {
  const said = el('p', { role: 'alert' }, `This trace cannot be shown: ${error.message}`);
  document.querySelector('#traces').replaceChildren(said);
  console.error(error);
});
