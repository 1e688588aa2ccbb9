// The text of a trace, and the arrows over it. Only the lines in view are in the document: the breaks are
// computed here from measured widths, so that a text of any length costs what a screen of it costs.

// Pixels of a line, of the text in it, above the first line and on both sides; lines drawn beyond the view.
const LINE = 32, TEXT = 20, TEXT_TOP = 14, PAD = 8, SPARE = 3;
const DASHES = ['', '7 3', '2 3', '9 3 2 3', '4 2', '1 3', '12 4', '6 2 1 2 1 2'];
const SVG = 'http://www.w3.org/2000/svg';

/** A new element with attributes and children; a null attribute is left out. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A piece of text with its control characters made visible. */
function visible(text) {
  return text.replace(/\t/g, '⇥').replace(/[\u0000-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
}

/** A token's text in quotes, for tables and descriptions. */
function quoted(text) {
  if (text === null) return '(not in the trace)';
  return text === '' ? '(part of a character)' : `“${visible(text.replace(/\n/g, '⏎'))}”`;
}

class TextPane {
  /** `choose(position)` is called for a click on a token, `alone(cell)` for one on an arrow, `show(label)` and
   *  `hover(position, paths)` when the pointer or the focus is on an arrow or a token. */
  constructor(section, trace, prefix, { choose, alone, show, hover }) {
    this.trace = trace;
    this.prefix = prefix;
    this.scroll = section.querySelector('.scroll');
    this.lines = section.querySelector('.lines');
    this.svg = section.querySelector('.arrows');
    this.state = { chosen: -1, reads: [], keys: new Set(), level: null, differs: null };
    this.drawn = new Map();
    this.widths = new Map();
    this.arrows = [];
    this.labels = [];
    this.show = show;
    this.lines.addEventListener('pointerover', (event) => {
      const token = event.target.closest('[data-position]');
      if (token) hover(Number(token.dataset.position), token.dataset.paths);
    });
    this.scroll.addEventListener('scroll', () => this.draw());
    this.scroll.addEventListener('click', (event) => {
      const token = event.target.closest('[data-position]');
      if (token) choose(Number(token.dataset.position));
    });
    this.svg.addEventListener('click', (event) => {
      const arrow = event.target.closest('.arrow');
      if (arrow) alone(Number(arrow.dataset.cell));
    });
    new ResizeObserver(() => this.resize()).observe(this.scroll);
    document.fonts.ready.then(() => this.resize());
  }

  /** Breaks the text into lines for the present width. */
  resize() {
    const width = this.scroll.clientWidth - 2 * PAD;
    this.height = this.scroll.clientHeight;
    if (width <= 0 || width === this.width) return this.draw();
    this.width = width;
    const style = getComputedStyle(this.lines), context = document.createElement('canvas').getContext('2d');
    context.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    const measure = (text) => {
      let known = this.widths.get(text);
      if (known === undefined) this.widths.set(text, (known = context.measureText(text).width + 2));
      return known;
    };
    const { texts } = this.trace;
    this.lineStart = [0];
    this.pieces = { token: [], x: [], width: [], text: [] };
    this.pieceOf = new Int32Array(texts.length);
    this.lineOf = new Int32Array(texts.length);
    let x = 0;
    const push = (token, text, wide) => {
      const { pieces } = this;
      if (x > 0 && x + wide > width) {
        this.lineStart.push(pieces.token.length);
        x = 0;
      }
      if (this.pieceOf[token] < 0) {
        this.pieceOf[token] = pieces.token.length;
        this.lineOf[token] = this.lineStart.length - 1;
      }
      pieces.token.push(token);
      pieces.x.push(x);
      pieces.width.push(wide);
      pieces.text.push(text);
      x += wide;
    };
    const place = (token, text) => {
      const wide = measure(text);
      if (wide <= width) return push(token, text, wide);
      // Wider than a line: broken between characters.
      for (const character of text) push(token, character, measure(character));
    };
    texts.forEach((text, token) => {
      this.pieceOf[token] = -1;
      const parts = text.split('\n');
      parts.forEach((part, n) => {
        const last = n === parts.length - 1;
        if (!last || part || parts.length === 1) place(token, last ? visible(part) || '▫' : `${visible(part)}⏎`);
        if (!last) {
          this.lineStart.push(this.pieces.token.length);
          x = 0;
        }
      });
    });
    this.lines.style.height = `${this.lineStart.length * LINE + TEXT_TOP}px`;
    this.clear();
    if (this.state.chosen >= 0) this.reveal();
    this.draw();
  }

  clear() {
    for (const line of this.drawn.values()) line.remove();
    this.drawn.clear();
  }

  /** The line of a position, -1 where the text does not have it. */
  line(position) {
    const row = this.trace.row(position);
    return row < 0 ? -1 : this.lineOf[row];
  }

  /** The position in the line `by` lines on that stands nearest below or above a position. */
  beside(position, by) {
    const piece = this.pieceOf[this.trace.row(position)], { x, width, token } = this.pieces;
    const middle = x[piece] + width[piece] / 2, last = this.lineStart.length - 1;
    const line = Math.min(last, Math.max(0, this.line(position) + by));
    const from = this.lineStart[line], to = this.lineStart[line + 1] ?? token.length;
    let best = -1;
    for (let n = from; n < to; n++) {
      if (best < 0 || Math.abs(x[n] + width[n] / 2 - middle) < Math.abs(x[best] + width[best] / 2 - middle)) best = n;
    }
    // The last line is empty where the text ends with a newline.
    return best < 0 ? this.trace.end - 1 : this.trace.first + token[best];
  }

  /** Lines in a page. */
  get page() {
    return Math.max(1, Math.floor(this.height / LINE) - 1);
  }

  /** Scrolls so that the chosen token is in view, with a line above it where there is one. */
  reveal() {
    const line = this.line(this.state.chosen);
    if (line < 0 || !this.height) return;
    const top = line * LINE, at = this.scroll.scrollTop;
    if (top < at + LINE) this.scroll.scrollTop = top - LINE;
    else if (top + 2 * LINE > at + this.height) this.scroll.scrollTop = top + 2 * LINE - this.height;
  }

  /** Shows a state: the chosen position, its reads [{ cell, key, name, label }], the level of paths that shades,
   *  the counts of differences. */
  update(state) {
    const moved = state.chosen !== this.state.chosen;
    this.state = { ...state, keys: new Set(state.reads.map((read) => read.key)) };
    if (!this.pieces) return;
    if (moved) this.reveal();
    this.draw();
  }

  /** Draws the lines in view and the arrows. */
  draw() {
    if (!this.pieces || !this.height) return;
    const top = this.scroll.scrollTop, last = this.lineStart.length - 1;
    const from = Math.max(0, Math.floor(top / LINE) - SPARE);
    const to = Math.min(last, Math.ceil((top + this.height) / LINE) + SPARE);
    for (const [number, line] of this.drawn) {
      if (number < from || number > to) {
        line.remove();
        this.drawn.delete(number);
      }
    }
    for (let number = from; number <= to; number++) this.drawLine(number);
    const row = this.trace.row(this.state.chosen);
    this.scroll.setAttribute('aria-activedescendant', row < 0 ? '' : `${this.prefix}-${this.pieceOf[row]}`);
    this.drawArrows(top);
  }

  drawLine(number) {
    let line = this.drawn.get(number);
    if (!line) {
      line = el('div', { class: 'line', role: 'presentation' });
      line.style.top = `${number * LINE + TEXT_TOP}px`;
      const end = this.lineStart[number + 1] ?? this.pieces.token.length;
      for (let n = this.lineStart[number]; n < end; n++) {
        const position = this.trace.first + this.pieces.token[n];
        const token = el('span', { id: `${this.prefix}-${n}`, role: 'option', 'data-position': position });
        token.textContent = this.pieces.text[n];
        token.style.left = `${this.pieces.x[n] + PAD}px`;
        token.title = `${position}: ${quoted(this.trace.text(position))}, id ${this.trace.ids[this.pieces.token[n]]}`;
        line.append(token);
      }
      this.lines.append(line);
      this.drawn.set(number, line);
    }
    const { chosen, keys, level, differs } = this.state;
    for (const token of line.children) {
      const position = Number(token.dataset.position), paths = level ? level.counts[position] : 0;
      const count = Number(paths);
      let name = 'token';
      if (this.trace.generated[position - this.trace.first]) name += ' generated';
      if (position === chosen) name += ' chosen';
      if (keys.has(position)) name += ' read';
      if (differs && differs[position]) name += ' differs';
      if (token.className !== name) {
        token.className = name;
        token.setAttribute('aria-selected', position === chosen);
      }
      const shade = count ? (0.08 + (0.5 * Math.log1p(count)) / Math.log1p(level.most)).toFixed(3) : '0';
      if (token.shade !== shade || token.paths !== paths) {
        token.shade = shade;
        token.paths = paths;
        token.style.setProperty('--shade', shade);
        token.dataset.paths = paths;
      }
    }
  }

  /** The middle of a token on the screen; `out` is -1 above the view, 1 below it. */
  spot(position, top) {
    const row = this.trace.row(position);
    if (row < 0) return { x: PAD, y: 0, wide: 8, line: -1, out: -1 };
    const piece = this.pieceOf[row], line = this.lineOf[row], y = line * LINE + TEXT_TOP - top;
    const out = y + LINE < 6 ? -1 : y > this.height - 6 ? 1 : 0;
    const wide = this.pieces.width[piece];
    return { x: this.pieces.x[piece] + wide / 2 + PAD, y, wide, line, out };
  }

  drawArrows(top) {
    const { chosen, reads } = this.state, from = this.spot(chosen, top), targets = new Map();
    for (const read of reads) {
      if (!targets.has(read.key)) targets.set(read.key, []);
      targets.get(read.key).push(read);
    }
    let used = 0, named = 0;
    const taken = [];
    for (const [key, group] of targets) {
      const to = this.spot(key, top);
      if (from.out && from.out === to.out) continue;
      const step = Math.min(4, to.wide / group.length);
      group.forEach((read, n) => {
        const shift = (n - (group.length - 1) / 2) * step;
        this.arrow(used++, read, from, { ...to, x: to.x + shift }, n);
      });
      if (this.label(named, group, key, to, taken)) named++;
    }
    for (; used < this.arrows.length && this.arrows[used].isConnected; used++) this.arrows[used].remove();
    for (; named < this.labels.length && this.labels[named].isConnected; named++) this.labels[named].remove();
  }

  arrow(n, read, from, to, spread) {
    let group = this.arrows[n];
    if (!group) {
      group = this.arrows[n] = document.createElementNS(SVG, 'g');
      for (const name of ['hit', 'line', 'tip']) {
        const path = document.createElementNS(SVG, 'path');
        path.setAttribute('class', name);
        group.append(path);
      }
      group.setAttribute('role', 'img');
      group.setAttribute('tabindex', '-1');
      for (const kind of ['pointerenter', 'focus']) {
        group.addEventListener(kind, () => this.show(group.getAttribute('aria-label')));
      }
    }
    if (!group.isConnected) this.svg.append(group);
    const cell = this.trace.cells[read.cell];
    group.dataset.cell = read.cell;
    group.setAttribute('class', `arrow c${cell.row % 7}`);
    group.setAttribute('aria-label', read.label);
    const head = -1, foot = TEXT + 2;
    const clamp = (y) => Math.min(this.height - 2, Math.max(2, y));
    let d, tip;
    if (to.line === from.line && !to.out) {
      const y = clamp(to.y + head), rise = 8 + Math.min(20, Math.abs(to.x - from.x) / 10) + 3 * spread;
      const wide = to.x === from.x ? 12 : 0;
      d = `M${from.x + wide} ${y}C${from.x + wide} ${y - rise} ${to.x - wide} ${y - rise} ${to.x} ${y}`;
      tip = `M${to.x - 3} ${y - 5}L${to.x} ${y}L${to.x + 3} ${y - 5}`;
    } else {
      const up = to.line < from.line, y0 = clamp(from.y + (up ? head : foot));
      const y1 = clamp(to.y + (up ? foot : head)), bend = (up ? 1 : -1) * (Math.abs(y1 - y0) / 2 + 4 + 2 * spread);
      d = `M${from.x} ${y0}C${from.x} ${y0 - bend} ${to.x} ${y1 + bend} ${to.x} ${y1}`;
      const back = up ? 5 : -5;
      tip = `M${to.x - 3} ${y1 + back}L${to.x} ${y1}L${to.x + 3} ${y1 + back}`;
    }
    const [hit, line, point] = group.children;
    hit.setAttribute('d', d);
    line.setAttribute('d', d);
    line.setAttribute('stroke-dasharray', DASHES[cell.head % DASHES.length]);
    point.setAttribute('d', tip);
  }

  /** Writes the heads of a group at its key where no other label is; whether there was room. */
  label(n, group, key, to, taken) {
    const names = group.slice(0, 3).map((read) => read.name).join(' ');
    const rest = group.length > 3 ? ` +${group.length - 3}` : '';
    const said = to.out ? `${to.out < 0 ? '↑' : '↓'}${key}: ${names}${rest}` : names + rest;
    const half = said.length * 3.1 + 2, beside = to.out ? half + 4 : 0;
    const x = Math.min(Math.max(to.x + beside, half), this.width + PAD - half);
    // In the gap above a token; in one of a few rows at the edge for what is out of view.
    const rows = to.out === 0 ? [Math.max(9, to.y - 3)] : [0, 1, 2, 3].map((row) => (to.out < 0 ? 10 + 11 * row
      : this.height - 4 - 11 * row));
    const free = (y) => taken.every((other) => Math.abs(other.y - y) > 9 || Math.abs(other.x - x) > other.half + half);
    const y = rows.find(free);
    if (y === undefined) return false;
    taken.push({ x, y, half });
    let text = this.labels[n];
    if (!text) {
      text = this.labels[n] = document.createElementNS(SVG, 'text');
      text.setAttribute('aria-hidden', 'true');
    }
    if (!text.isConnected) this.svg.append(text);
    text.textContent = said;
    text.setAttribute('x', x);
    text.setAttribute('y', y);
    return true;
  }
}
