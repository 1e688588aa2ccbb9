// One trace: its records decoded, and what is counted from them. Nothing here knows of the page.
//
// Shapes: T records (one a token), C cells (every head of every selecting layer, in the header's order).
// Positions are those of the text; record r stands for position first + r.

const ABSTAINED = -1;
const GENERATED = 1;
const PROTECTED = 1, REJECTED = 2, LIFTED = 4;
// Bytes of a cell before the keys of later rounds: i32 selected, then six f32.
const CELL = 28;

class Trace {
  /** `shown`: { name, header, head }; `bytes`: the records, one after the other. Throws where they do not fit. */
  constructor(shown, bytes) {
    this.name = shown.name;
    this.header = shown.header;
    this.head = shown.head;
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.layers = [];
    this.cells = [];
    this.laterCount = 0;
    for (const layer of this.header.layers) {
      if (!layer.selects) continue;
      const entry = { layer: layer.layer, from: this.cells.length, heads: layer.heads, rounds: layer.rounds ?? 1 };
      for (let head = 0; head < layer.heads; head++) {
        this.cells.push({
          name: `${layer.layer}.${head}`, layer: layer.layer, row: this.layers.length, head,
          rounds: entry.rounds, later: this.laterCount, threshold: layer.threshold?.[head] ?? null,
        });
        this.laterCount += entry.rounds - 1;
      }
      this.layers.push(entry);
    }
    this.frames();
    this.decode();
    this.totals = this.count();
  }

  /** Finds where each record begins. */
  frames() {
    this.starts = [];
    let at = 0;
    while (at < this.bytes.length) {
      const length = at + 4 <= this.bytes.length ? this.view.getUint32(at, true) : Infinity;
      if (at + 4 + length > this.bytes.length) throw new Error(`record ${this.starts.length} is cut off`);
      this.starts.push(at + 4);
      at += 4 + length;
    }
    if (!this.starts.length) throw new Error('the trace has no records');
    this.ends = this.starts.slice(1).map((start) => start - 4).concat(this.bytes.length);
    this.length = this.starts.length;
  }

  /** Reads what every view needs at once: texts, flags, selected keys and margins. */
  decode() {
    const { view, length } = this, width = this.cells.length, text = new TextDecoder();
    this.first = view.getUint32(this.starts[0], true);
    this.end = this.first + length;
    this.texts = new Array(length);
    this.ids = new Uint32Array(length);
    this.generated = new Uint8Array(length);
    this.cellStart = new Float64Array(length);
    this.selected = new Int32Array(length * width);
    this.margins = new Float32Array(length * width);
    this.later = new Int32Array(length * this.laterCount);
    for (let r = 0; r < length; r++) {
      try {
        this.decodeRecord(r, text);
      } catch (error) {
        // A read beyond the last record, where the fields of one do not fit in its length.
        throw error instanceof RangeError ? new Error(`record ${r} is shorter than its heads`) : error;
      }
    }
  }

  decodeRecord(r, text) {
    const { view, cells } = this, width = cells.length;
    let at = this.starts[r];
    const position = view.getUint32(at, true);
    if (position !== this.first + r) {
      throw new Error(`record ${r} is of position ${position}, and ${this.first + r} was expected`);
    }
    this.ids[r] = view.getUint32(at + 4, true);
    this.generated[r] = view.getUint32(at + 8, true) & GENERATED;
    const bytes = view.getUint16(at + 12, true);
    at += 14;
    this.texts[r] = text.decode(this.bytes.subarray(at, at + bytes));
    at += bytes;
    this.cellStart[r] = at;
    for (let c = 0; c < width; c++) {
      const place = r * width + c, extra = cells[c].rounds - 1;
      this.selected[place] = this.key(view.getInt32(at, true), r);
      this.margins[place] = view.getFloat32(at + 8, true);
      at += CELL;
      for (let round = 0; round < extra; round++, at += 4) {
        this.later[r * this.laterCount + cells[c].later + round] = this.key(view.getInt32(at, true), r);
      }
      let candidates = view.getUint8(at++);
      for (; candidates > 0; candidates--) at += view.getUint8(at + 4) & LIFTED ? 13 : 9;
    }
    if (at !== this.ends[r]) throw new Error(`record ${r} does not end with its last head`);
  }

  key(key, r) {
    if (key < ABSTAINED || key >= this.end) throw new Error(`record ${r} reads position ${key}`);
    return key;
  }

  /** The record of a position, or -1. */
  row(position) {
    return position >= this.first && position < this.end ? position - this.first : -1;
  }

  /** The text of the token at a position; null where the trace has no record of it. */
  text(position) {
    const row = this.row(position);
    return row < 0 ? null : this.texts[row];
  }

  /** The key that cell `c` reads at a position. */
  pick(position, c) {
    return this.selected[this.row(position) * this.cells.length + c];
  }

  /** What cell `c` reads at a position, in each of its rounds: [{ cell, key, round, name }]. */
  reads(position, c) {
    const { name, later, rounds } = this.cells[c];
    const first = { cell: c, key: this.pick(position, c), round: 1, name };
    const reads = [first];
    for (let round = 2; round <= rounds; round++) {
      const key = this.later[this.row(position) * this.laterCount + later + round - 2];
      reads.push({ cell: c, key, round, name: `${name} round ${round}` });
    }
    return reads.filter((read) => read.key !== ABSTAINED);
  }

  margin(position, c) {
    return this.margins[this.row(position) * this.cells.length + c];
  }

  /** Everything recorded of one cell at one position. */
  detail(position, c) {
    const { view } = this;
    let at = this.cellStart[this.row(position)];
    for (let cell = 0; ; cell++) {
      const extra = this.cells[cell].rounds - 1, list = at + CELL + 4 * extra;
      const float = (n) => view.getFloat32(at + 4 * n, true);
      let entry = list + 1;
      const candidates = Array.from({ length: view.getUint8(list) }, () => {
        const flags = view.getUint8(entry + 4);
        const candidate = {
          key: view.getInt32(entry, true),
          protected: (flags & PROTECTED) !== 0,
          rejected: (flags & REJECTED) !== 0,
          energy: view.getFloat32(entry + 5, true),
          lifted: flags & LIFTED ? view.getFloat32(entry + 9, true) : null,
        };
        entry += flags & LIFTED ? 13 : 9;
        return candidate;
      });
      if (cell === c) {
        return {
          selected: view.getInt32(at, true), energy: float(1), margin: float(2), coherence: float(3), gate: float(4),
          value: float(5), average: float(6), candidates,
          later: Array.from({ length: extra }, (_, n) => view.getInt32(at + CELL + 4 * n, true)),
        };
      }
      at = entry;
    }
  }

  /** Per cell: how often it abstains, its mean finite margin, how often it reads position 0. */
  count() {
    const width = this.cells.length;
    const totals = this.cells.map(() => ({ abstained: 0, margins: 0, margin: 0, zero: 0 }));
    for (let place = 0; place < this.selected.length; place++) {
      const total = totals[place % width], key = this.selected[place];
      if (key === ABSTAINED) {
        total.abstained++;
        continue;
      }
      if (key === 0) total.zero++;
      if (Number.isFinite(this.margins[place])) {
        total.margins++;
        total.margin += this.margins[place];
      }
    }
    return totals.map(({ abstained, margins, margin, zero }) => ({
      abstention: abstained / this.length,
      margin: margins ? margin / margins : NaN,
      zero: abstained < this.length ? zero / (this.length - abstained) : NaN,
    }));
  }

  /** Whether counts of paths stay within the integers that a double holds exactly. */
  get small() {
    const most = this.layers.reduce((n, { heads, rounds }) => n * (1 + heads * rounds), 1);
    return most <= Number.MAX_SAFE_INTEGER;
  }

  /**
   * The paths from a position back through the selecting layers, the last one first. In each layer a path
   * stays where it is (the residual stream) or goes to a key that a head reads there, in any of its rounds;
   * two heads that read one key are two paths. `counts` holds one exact number a position (BigInt where a
   * double could not), `reached` the positions with a count, rising.
   */
  paths(position) {
    const { small } = this, width = this.cells.length;
    let counts = small ? new Float64Array(this.end) : new Array(this.end).fill(0n), reached = [position];
    counts[position] = small ? 1 : 1n;
    const levels = [];
    for (const layer of this.layers.slice().reverse()) {
      const next = counts.slice(), { later } = this.cells[layer.from], extra = layer.heads * (layer.rounds - 1);
      for (const from of reached) {
        const row = this.row(from), count = counts[from];
        if (row < 0) continue;
        const place = row * width + layer.from, more = row * this.laterCount + later;
        for (let h = 0; h < layer.heads; h++) {
          const key = this.selected[place + h];
          if (key >= 0) next[key] += count;
        }
        for (let n = 0; n < extra; n++) {
          const key = this.later[more + n];
          if (key >= 0) next[key] += count;
        }
      }
      counts = next;
      reached = [];
      let total = small ? 0 : 0n, most = total;
      for (let p = 0; p < this.end; p++) {
        const count = counts[p];
        if (!count) continue;
        reached.push(p);
        total += count;
        if (count > most) most = count;
      }
      levels.push({ layer: layer.layer, counts, reached, total, most: Number(most) });
    }
    return levels;
  }
}

/** Where two traces of the same heads pick differently: one count a common position, and their sum. */
function differences(a, b) {
  const names = (trace) => trace.cells.map((cell) => cell.name).join();
  const from = Math.max(a.first, b.first), to = Math.min(a.end, b.end);
  if (names(a) !== names(b) || from >= to) return null;
  const width = a.cells.length, counts = new Int32Array(to);
  let picks = 0, tokens = 0;
  for (let p = from; p < to; p++) {
    const left = a.row(p) * width, right = b.row(p) * width;
    for (let c = 0; c < width; c++) if (a.selected[left + c] !== b.selected[right + c]) counts[p]++;
    picks += counts[p];
    if (a.ids[a.row(p)] !== b.ids[b.row(p)]) tokens++;
  }
  return { from, to, counts, picks, tokens, compared: (to - from) * width };
}

/** The records of an embedded script element: base64 of gzip. */
async function unpack(element) {
  const text = element.textContent.trim(), step = 1 << 20;
  const tail = text.endsWith('==') ? 2 : text.endsWith('=') ? 1 : 0;
  const packed = new Uint8Array((text.length / 4) * 3 - tail);
  for (let from = 0, at = 0; from < text.length; from += step) {
    const part = atob(text.slice(from, from + step));
    for (let n = 0; n < part.length; n++) packed[at++] = part.charCodeAt(n);
  }
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
