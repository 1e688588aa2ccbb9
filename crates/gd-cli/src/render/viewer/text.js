// The text of a trace and the arrows over it. The list is virtual: line breaks are computed here from measured
// text widths, and only the visible lines are in the document, so the cost per frame does not depend on the
// length of the text.

// Pixels: distance of two lines, height of the text in a line, offset of the first line, horizontal padding.
const LINE_PX = 32, TEXT_PX = 20, TOP_PX = 14, PADDING_PX = 8;
// A text of at most this many lines has wide gaps between them and a gutter to the left. Its arrows run through these, in
// lanes of this distance in pixels, and never across a word.
const MAX_ROUTED_LINES = 10, ROUTED_LINE_PX = 76, GUTTER_PX = 46, LANE_PX = 5, LANES = 7, CORNER_PX = 5;
// Lines that are drawn above and below the visible ones.
const OVERSCAN_LINES = 3;
// Average width of a character of an arrow label, in pixels.
const LABEL_CHAR_PX = 6.2;
// Number of layer colors c0, c1, … in the style sheet.
const LAYER_COLORS = 7;
// Dash patterns that distinguish the heads of a layer.
const DASHES = ['', '7 3', '2 3', '9 3 2 3', '4 2', '1 3', '12 4', '6 2 1 2 1 2'];
const SVG = 'http://www.w3.org/2000/svg';

/** Creates an element with attributes and children. Attributes whose value is null are omitted. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Replaces control characters by visible symbols. */
function visible(text) {
  return text.replace(/\t/g, '⇥').replace(/[\u0000-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
}

/** Text of a token in quotes, for tables and descriptions. */
function quoted(text) {
  if (text === null) return '(not in the trace)';
  return text === '' ? '(part of a character)' : `“${visible(text.replace(/\n/g, '⏎'))}”`;
}

class TextPane {
  /** Callbacks: `choose(position)` for a click on a token, `selectHead(cell)` for a click on an arrow,
   *  `show(label)` when an arrow has the pointer or the focus, `hover(position, paths)` when a token has the
   *  pointer. */
  constructor(section, trace, prefix, { choose, selectHead, show, hover }) {
    this.trace = trace;
    this.prefix = prefix;
    this.scroll = section.querySelector('.scroll');
    this.lines = section.querySelector('.lines');
    this.svg = section.querySelector('.arrows');
    this.state = { chosen: -1, reads: [], keys: new Set(), level: null, differs: null };
    this.drawnLines = new Map();
    this.textWidths = new Map();
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
      if (arrow) selectHead(Number(arrow.dataset.cell));
    });
    new ResizeObserver(() => this.resize()).observe(this.scroll);
    document.fonts.ready.then(() => this.resize());
  }

  /** Breaks the text into lines if the width of the pane has changed. */
  resize() {
    const inner = this.scroll.clientWidth - 2 * PADDING_PX;
    this.height = this.scroll.clientHeight;
    if (inner <= 0 || inner === this.inner) return this.draw();
    this.inner = inner;
    const style = getComputedStyle(this.lines);
    this.canvas = document.createElement('canvas').getContext('2d');
    this.canvas.font = `${style.fontStyle} ${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    this.useGaps(true);
    this.layOut();
    if (this.lineStart.length > MAX_ROUTED_LINES) {
      this.useGaps(false);
      this.layOut();
    }
    const textHeight = this.lineStart.length * this.linePx + this.topPx;
    this.lines.style.height = `${textHeight}px`;
    this.scroll.parentElement.style.setProperty('--text', `${textHeight + 2}px`);
    this.height = this.scroll.clientHeight;
    this.clear();
    if (this.state.chosen >= 0) this.scrollToChosen();
    this.draw();
  }

  /** Sets the distances of lines: wide ones with a gutter for the arrows of short texts, or narrow ones. */
  useGaps(wide) {
    this.routed = wide;
    this.linePx = wide ? ROUTED_LINE_PX : LINE_PX;
    this.topPx = wide ? ROUTED_LINE_PX - TEXT_PX - 4 : TOP_PX;
    this.leftPx = wide ? GUTTER_PX : PADDING_PX;
    this.width = this.inner + PADDING_PX - this.leftPx;
  }

  /** Splits the text into segments (a token, or a part of one that spans lines) and assigns them to lines. */
  layOut() {
    const { texts } = this.trace;
    // Index of the first segment of each line, the segments themselves, and the first segment and line of each token.
    this.lineStart = [0];
    this.segments = { token: [], x: [], width: [], text: [] };
    this.segmentOf = new Int32Array(texts.length).fill(-1);
    this.lineOf = new Int32Array(texts.length);
    this.nextX = 0;
    texts.forEach((text, token) => {
      const parts = text.split('\n');
      parts.forEach((part, n) => {
        const last = n === parts.length - 1;
        if (!last || part || parts.length === 1) {
          this.addToken(token, last ? visible(part) || '▫' : `${visible(part)}⏎`);
        }
        if (!last) this.breakLine();
      });
    });
  }

  /** Width of a text in pixels. */
  measure(text) {
    let width = this.textWidths.get(text);
    if (width === undefined) this.textWidths.set(text, (width = this.canvas.measureText(text).width + 2));
    return width;
  }

  breakLine() {
    this.lineStart.push(this.segments.token.length);
    this.nextX = 0;
  }

  /** Adds the text of a token. A text that is wider than a line is broken between characters. */
  addToken(token, text) {
    const width = this.measure(text);
    if (width <= this.width) return this.addSegment(token, text, width);
    for (const character of text) this.addSegment(token, character, this.measure(character));
  }

  addSegment(token, text, width) {
    const { segments } = this;
    if (this.nextX > 0 && this.nextX + width > this.width) this.breakLine();
    if (this.segmentOf[token] < 0) {
      this.segmentOf[token] = segments.token.length;
      this.lineOf[token] = this.lineStart.length - 1;
    }
    segments.token.push(token);
    segments.x.push(this.nextX);
    segments.width.push(width);
    segments.text.push(text);
    this.nextX += width;
  }

  clear() {
    for (const line of this.drawnLines.values()) line.remove();
    this.drawnLines.clear();
  }

  /** Line of a position, or -1 if the trace has no record for it. */
  line(position) {
    const row = this.trace.row(position);
    return row < 0 ? -1 : this.lineOf[row];
  }

  /** The position that is horizontally nearest to `position` in the line that is `lines` lines below it. */
  positionBelow(position, lines) {
    const segment = this.segmentOf[this.trace.row(position)], { x, width, token } = this.segments;
    const center = (n) => x[n] + width[n] / 2, last = this.lineStart.length - 1;
    const line = Math.min(last, Math.max(0, this.line(position) + lines));
    const start = this.lineStart[line], end = this.lineStart[line + 1] ?? token.length;
    let nearest = -1, distance = Infinity;
    for (let n = start; n < end; n++) {
      const d = Math.abs(center(n) - center(segment));
      if (d < distance) [nearest, distance] = [n, d];
    }
    // If the text ends with a newline, the last line is empty.
    return nearest < 0 ? this.trace.end - 1 : this.trace.first + token[nearest];
  }

  /** Number of lines by which Page Up and Page Down move. */
  get pageLines() {
    return Math.max(1, Math.floor(this.height / this.linePx) - 1);
  }

  /** Scrolls the chosen token into view, with one line of context above and below it. */
  scrollToChosen() {
    const line = this.line(this.state.chosen);
    if (line < 0 || !this.height) return;
    const { linePx } = this, top = line * linePx, { scrollTop } = this.scroll;
    if (top < scrollTop + linePx) this.scroll.scrollTop = top - linePx;
    else if (top + 2 * linePx > scrollTop + this.height) this.scroll.scrollTop = top + 2 * linePx - this.height;
  }

  /** Shows a state: the chosen position, its reads [{ cell, key, name, label }], the path counts that shade the
   *  text (null for no shading) and the number of differing selections per position. */
  update(state) {
    const moved = state.chosen !== this.state.chosen;
    this.state = { ...state, keys: new Set(state.reads.map((read) => read.key)) };
    if (!this.segments) return;
    if (moved) this.scrollToChosen();
    this.draw();
  }

  /** Draws the visible lines and the arrows. */
  draw() {
    if (!this.segments || !this.height) return;
    const top = this.scroll.scrollTop, lastLine = this.lineStart.length - 1;
    const first = Math.max(0, Math.floor(top / this.linePx) - OVERSCAN_LINES);
    const last = Math.min(lastLine, Math.ceil((top + this.height) / this.linePx) + OVERSCAN_LINES);
    for (const [number, line] of this.drawnLines) {
      if (number < first || number > last) {
        line.remove();
        this.drawnLines.delete(number);
      }
    }
    for (let number = first; number <= last; number++) this.drawLine(number);
    const row = this.trace.row(this.state.chosen);
    this.scroll.setAttribute('aria-activedescendant', row < 0 ? '' : `${this.prefix}-${this.segmentOf[row]}`);
    this.drawArrows(top);
  }

  /** Creates the elements of a line. */
  createLine(number) {
    const line = el('div', { class: 'line', role: 'presentation' }), { segments } = this;
    line.style.top = `${number * this.linePx + this.topPx}px`;
    const end = this.lineStart[number + 1] ?? segments.token.length;
    for (let n = this.lineStart[number]; n < end; n++) {
      const position = this.trace.first + segments.token[n];
      const token = el('span', { id: `${this.prefix}-${n}`, role: 'option', 'data-position': position });
      token.textContent = segments.text[n];
      token.style.left = `${segments.x[n] + this.leftPx}px`;
      token.title = `${position}: ${quoted(this.trace.text(position))}, id ${this.trace.ids[segments.token[n]]}`;
      line.append(token);
    }
    this.lines.append(line);
    this.drawnLines.set(number, line);
    return line;
  }

  /** Draws a line and updates the classes and the shading of its tokens. */
  drawLine(number) {
    const line = this.drawnLines.get(number) ?? this.createLine(number);
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
      const shade = count ? (0.08 + (0.5 * Math.log1p(count)) / Math.log1p(level.max)).toFixed(3) : '0';
      if (token.shade !== shade || token.paths !== paths) {
        token.shade = shade;
        token.paths = paths;
        token.style.setProperty('--shade', shade);
        token.dataset.paths = paths;
      }
    }
  }

  /** Where a token is on the screen: the center `x` and the top `y` in pixels; `out` is -1 if the token is above
   *  the visible part, 1 if it is below, else 0. */
  screenPlace(position, top) {
    const row = this.trace.row(position);
    if (row < 0) return { x: this.leftPx, y: 0, width: 8, line: -1, out: -1 };
    const segment = this.segmentOf[row], line = this.lineOf[row], y = line * this.linePx + this.topPx - top;
    const out = y + TEXT_PX < -6 ? -1 : y > this.height - 6 ? 1 : 0;
    const width = this.segments.width[segment];
    return { x: this.segments.x[segment] + width / 2 + this.leftPx, y, width, line, out };
  }

  drawArrows(top) {
    const { chosen, reads } = this.state, from = this.screenPlace(chosen, top), targets = new Map();
    for (const read of reads) {
      if (!targets.has(read.key)) targets.set(read.key, []);
      targets.get(read.key).push(read);
    }
    let arrowCount = 0, labelCount = 0, lane = 0;
    const placed = [];
    for (const [key, group] of targets) {
      const to = this.screenPlace(key, top);
      if (from.out && from.out === to.out) continue;
      const step = Math.min(4, to.width / group.length);
      group.forEach((read, n) => {
        const shift = (n - (group.length - 1) / 2) * step;
        this.drawArrow(arrowCount++, read, from, { ...to, x: to.x + shift }, this.routed ? lane : n);
      });
      lane++;
      const beside = this.routed && !to.out && to.line === from.line;
      if (this.drawLabel(labelCount, group, key, { ...to, beside }, placed)) labelCount++;
    }
    for (let n = arrowCount; n < this.arrows.length && this.arrows[n].isConnected; n++) this.arrows[n].remove();
    for (let n = labelCount; n < this.labels.length && this.labels[n].isConnected; n++) this.labels[n].remove();
  }

  /** Creates the elements of an arrow: a wide transparent line for the pointer, the line, and the tip. */
  createArrow() {
    const group = document.createElementNS(SVG, 'g');
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
    return group;
  }

  /** Draws arrow number `n`. `spread` separates the arrows that lead to the same token. */
  drawArrow(n, read, from, to, spread) {
    const group = (this.arrows[n] ??= this.createArrow()), cell = this.trace.heads[read.cell];
    if (!group.isConnected) this.svg.append(group);
    group.dataset.cell = read.cell;
    const kind = read.weight === undefined ? `c${cell.row % LAYER_COLORS}` : 'cblend';
    group.setAttribute('class', `arrow ${kind}`);
    // The arrows of a blend are as strong as the weights.
    group.style.opacity = read.weight === undefined ? '' : (0.25 + 0.75 * Math.sqrt(read.weight)).toFixed(2);
    group.setAttribute('aria-label', read.label);
    const paths = this.routed && from.line >= 0 && to.line >= 0 ? this.routedPaths(from, to, spread)
      : this.arrowPaths(from, to, spread);
    const [curve, tip] = paths, [hitPath, linePath, tipPath] = group.children;
    hitPath.setAttribute('d', curve);
    linePath.setAttribute('d', curve);
    linePath.setAttribute('stroke-dasharray', DASHES[cell.head % DASHES.length]);
    tipPath.setAttribute('d', tip);
  }

  /** SVG path data of an arrow between the lines: it leaves its token upwards, runs in the gap above its line, in the gutter
   *  if more than one line lies between, and in the gap at the other token. Earlier tokens never lie below. */
  routedPaths(from, to, spread) {
    const lane = 10 + LANE_PX * (spread % LANES), start = [from.x, from.y - 1], r = CORNER_PX;
    const above = from.y - lane;
    let points, tip;
    if (to.line === from.line) {
      // A token that reads itself gets a loop.
      const shift = Math.abs(to.x - from.x) < 2 ? 7 : 0;
      points = [[from.x + shift, start[1]], [from.x + shift, above], [to.x - shift, above], [to.x - shift, to.y - 1]];
      tip = [to.x - shift, to.y - 1, -5];
    } else {
      const below = to.y + this.linePx - lane, end = [to.x, to.y + TEXT_PX + 1];
      const gutter = 6 + LANE_PX * (spread % LANES);
      points = to.line === from.line - 1 ? [start, [from.x, above], [to.x, above], end]
        : [start, [from.x, above], [gutter, above], [gutter, below], [to.x, below], end];
      tip = [...end, 5];
    }
    let path = `M${points[0][0]} ${points[0][1]}`;
    for (let n = 1; n < points.length - 1; n++) {
      const [before, at, after] = [points[n - 1], points[n], points[n + 1]];
      // A point at a distance of at most r from the corner, in the direction of another one.
      const toward = ([x, y]) => {
        const length = Math.hypot(x - at[0], y - at[1]) || 1, part = Math.min(r, length / 2) / length;
        return `${at[0] + (x - at[0]) * part} ${at[1] + (y - at[1]) * part}`;
      };
      path += `L${toward(before)}Q${at[0]} ${at[1]} ${toward(after)}`;
    }
    const [x, y] = points.at(-1), [tipX, tipY, height] = tip;
    return [`${path}L${x} ${y}`, `M${tipX - 3} ${tipY + height}L${tipX} ${tipY}L${tipX + 3} ${tipY + height}`];
  }

  /** SVG path data of an arrow's curve and tip. */
  arrowPaths(from, to, spread) {
    // Vertical offsets of the two ends: above and below the text of a line.
    const above = -1, below = TEXT_PX + 2;
    const clamp = (y) => Math.min(this.height - 2, Math.max(2, y));
    if (to.line === from.line && !to.out) {
      const y = clamp(to.y + above), rise = 8 + Math.min(20, Math.abs(to.x - from.x) / 10) + 3 * spread;
      const loop = to.x === from.x ? 12 : 0;
      return [
        `M${from.x + loop} ${y}C${from.x + loop} ${y - rise} ${to.x - loop} ${y - rise} ${to.x} ${y}`,
        `M${to.x - 3} ${y - 5}L${to.x} ${y}L${to.x + 3} ${y - 5}`,
      ];
    }
    const up = to.line < from.line, y0 = clamp(from.y + (up ? above : below)), y1 = clamp(to.y + (up ? below : above));
    const bend = (up ? 1 : -1) * (Math.abs(y1 - y0) / 2 + 4 + 2 * spread), tipY = y1 + (up ? 5 : -5);
    return [
      `M${from.x} ${y0}C${from.x} ${y0 - bend} ${to.x} ${y1 + bend} ${to.x} ${y1}`,
      `M${to.x - 3} ${tipY}L${to.x} ${y1}L${to.x + 3} ${tipY}`,
    ];
  }

  /** Writes the names of the heads that read `key` next to it. `placed` lists the labels drawn so far. Returns
   *  false, without drawing, if every possible place overlaps one of them. */
  drawLabel(n, group, key, to, placed) {
    const names = group.slice(0, 3).map((read) => read.name).join(' ');
    const more = group.length > 3 ? ` +${group.length - 3}` : '';
    const content = to.out ? `${to.out < 0 ? '↑' : '↓'}${key}: ${names}${more}` : names + more;
    const half = (content.length * LABEL_CHAR_PX) / 2 + 2, shift = to.out ? half + 4 : 0;
    // An arrow that leaves a short text does so in the gutter; one of the same line ends above its token, beside the label.
    const center = to.out && this.routed ? this.leftPx : to.beside ? to.x + half + 3 : to.x;
    const x = Math.min(Math.max(center + shift, half), this.width + this.leftPx - half);
    // A visible token has its label in the gap above it. For a token out of view there are four rows at the edge.
    const rows = to.out === 0 ? [Math.max(9, to.y - 3)] : [0, 1, 2, 3].map((row) => (to.out < 0 ? 10 + 11 * row
      : this.height - 4 - 11 * row));
    const isFree = (y) => placed.every((other) => Math.abs(other.y - y) > 9
      || Math.abs(other.x - x) > other.half + half);
    const y = rows.find(isFree);
    if (y === undefined) return false;
    placed.push({ x, y, half });
    let text = this.labels[n];
    if (!text) {
      text = this.labels[n] = document.createElementNS(SVG, 'text');
      text.setAttribute('aria-hidden', 'true');
    }
    if (!text.isConnected) this.svg.append(text);
    text.textContent = content;
    text.setAttribute('x', x);
    text.setAttribute('y', y);
    return true;
  }
}
