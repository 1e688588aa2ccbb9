// A decoded trace and the statistics that are computed from it. This file does not use the document.
//
// Shapes: T records (one per token) and C cells (one per head of each selecting layer, in the order of the header). The heads
// of softmax layers whose greatest weights are recorded follow as blends: head number C + b is blend b.
// Positions count the tokens of the text. Record r describes the token at position first + r.

const ABSTAINED = -1;
const GENERATED = 1;
const PROTECTED = 1, REJECTED = 2, LIFTED = 4, RUNNER_UP = 8;
// Size of the fixed part of a cell: i32 selected position, then six f32.
const CELL_BYTES = 28;

/** By how much an energy may exceed the threshold of a layer: its energy or margin gate is then at least `exclude_below`. */
function admission(layer) {
  const temperature = (layer.gate?.energy ?? layer.gate?.margin)?.temperature, below = layer.exclude_below ?? 0.5;
  return temperature === undefined ? 0 : temperature * Math.log((1 - below) / below);
}

/** What the number of keys that the query at a position sees adds to the threshold of a head. */
function lengthShift({ slope, window }, head, position) {
  return slope[head] * Math.log(Math.min(position + 1, window ?? Infinity));
}

class Trace {
  /** `info`: { name, header, head }; `bytes`: the concatenated records. Throws an Error if a record is malformed. */
  constructor(info, bytes) {
    this.name = info.name;
    this.header = info.header;
    this.head = info.head;
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.layers = [];
    this.cells = [];
    this.blends = [];
    // Number of reads after the first (of refinement rounds, or further picks of one scan), summed over the cells.
    this.laterRounds = 0;
    for (const layer of this.header.layers) {
      for (let head = 0; head < (layer.weights ? layer.heads : 0); head++) {
        this.blends.push({ name: `${layer.layer}.${head}`, layer: layer.layer, head, mechanism: layer.mechanism });
      }
      if (!layer.selects) continue;
      const picks = layer.picks ?? 1, word = picks > 1 ? 'pick' : 'round';
      const entry = {
        layer: layer.layer, firstCell: this.cells.length, heads: layer.heads, rounds: (layer.rounds ?? 1) + picks - 1,
      };
      for (let head = 0; head < layer.heads; head++) {
        this.cells.push({
          name: `${layer.layer}.${head}`, layer: layer.layer, row: this.layers.length, head,
          rounds: entry.rounds, laterIndex: this.laterRounds, word,
          // A further pick has its weight behind its position.
          laterBytes: picks > 1 ? 8 : 4,
          threshold: layer.threshold ? layer.threshold[head] + admission(layer) : null,
          byLength: layer.threshold_by_length ?? null,
          // With the margin gate the threshold is relative to the candidate of this rank.
          runnerUp: layer.gate?.margin ? picks : null,
        });
        this.laterRounds += entry.rounds - 1;
      }
      this.layers.push(entry);
    }
    // Every head that is recorded: `head(c)` for a cell or a blend.
    this.heads = this.cells.concat(this.blends);
    this.findRecords();
    this.decode();
    this.totals = this.computeTotals();
  }

  /** Computes the byte range of each record. */
  findRecords() {
    this.starts = [];
    let offset = 0;
    while (offset < this.bytes.length) {
      const length = offset + 4 <= this.bytes.length ? this.view.getUint32(offset, true) : Infinity;
      if (offset + 4 + length > this.bytes.length) throw new Error(`record ${this.starts.length} is cut off`);
      this.starts.push(offset + 4);
      offset += 4 + length;
    }
    if (!this.starts.length) throw new Error('the trace has no records');
    this.ends = this.starts.slice(1).map((start) => start - 4).concat(this.bytes.length);
    this.length = this.starts.length;
  }

  /** Decodes the texts, flags, selected positions and margins of all records. */
  decode() {
    const { view, length } = this, width = this.cells.length, text = new TextDecoder();
    this.first = view.getUint32(this.starts[0], true);
    this.end = this.first + length;
    this.texts = new Array(length);
    this.ids = new Uint32Array(length);
    this.generated = new Uint8Array(length);
    this.cellStart = new Float64Array(length);
    this.blendStart = new Float64Array(length);
    this.selected = new Int32Array(length * width);
    this.margins = new Float32Array(length * width);
    this.later = new Int32Array(length * this.laterRounds);
    for (let r = 0; r < length; r++) {
      try {
        this.decodeRecord(r, text);
      } catch (error) {
        // DataView throws a RangeError if the fields of the last record extend beyond the data.
        throw error instanceof RangeError ? new Error(`record ${r} is shorter than its heads`) : error;
      }
    }
  }

  decodeRecord(r, text) {
    const { view, cells } = this, width = cells.length;
    let offset = this.starts[r];
    const position = view.getUint32(offset, true);
    if (position !== this.first + r) {
      throw new Error(`record ${r} has position ${position}, expected ${this.first + r}`);
    }
    this.ids[r] = view.getUint32(offset + 4, true);
    this.generated[r] = view.getUint32(offset + 8, true) & GENERATED;
    const textBytes = view.getUint16(offset + 12, true);
    offset += 14;
    this.texts[r] = text.decode(this.bytes.subarray(offset, offset + textBytes));
    offset += textBytes;
    this.cellStart[r] = offset;
    for (let c = 0; c < width; c++) {
      const index = r * width + c, extraRounds = cells[c].rounds - 1;
      this.selected[index] = this.checkKey(view.getInt32(offset, true), r);
      this.margins[index] = view.getFloat32(offset + 8, true);
      offset += CELL_BYTES;
      for (let round = 0; round < extraRounds; round++, offset += cells[c].laterBytes) {
        this.later[r * this.laterRounds + cells[c].laterIndex + round] = this.checkKey(view.getInt32(offset, true), r);
      }
      let candidates = view.getUint8(offset++);
      for (; candidates > 0; candidates--) offset += view.getUint8(offset + 4) & LIFTED ? 13 : 9;
    }
    this.blendStart[r] = offset;
    for (let b = 0; b < this.blends.length; b++) {
      for (let count = view.getUint8(offset++); count > 0; count--, offset += 8) {
        this.checkKey(view.getInt32(offset, true), r);
      }
    }
    if (offset !== this.ends[r]) throw new Error(`record ${r} is longer than its heads`);
  }

  /** Returns `key`, or throws if it is not a position that record `r` may read. */
  checkKey(key, r) {
    if (key < ABSTAINED || key >= this.end) throw new Error(`record ${r} reads position ${key}`);
    return key;
  }

  /** Index of the record for a position, or -1 if the trace has none. */
  row(position) {
    return position >= this.first && position < this.end ? position - this.first : -1;
  }

  /** Text of the token at a position, or null if the trace has no record for it. */
  text(position) {
    const row = this.row(position);
    return row < 0 ? null : this.texts[row];
  }

  /** Position that cell `c` selects in its first round at a query position, or ABSTAINED. */
  selection(position, c) {
    return this.selected[this.row(position) * this.cells.length + c];
  }

  /** The greatest weights of blend `b`: [{ key, weight }]. */
  weights(position, b) {
    const { view } = this;
    let offset = this.blendStart[this.row(position)];
    for (; b > 0; b--) offset += 1 + 8 * view.getUint8(offset);
    return Array.from({ length: view.getUint8(offset) }, (_, n) => (
      { key: view.getInt32(offset + 1 + 8 * n, true), weight: view.getFloat32(offset + 5 + 8 * n, true) }));
  }

  /** The positions that head `c` reads: those of a cell in each of its rounds [{ cell, key, round, name }], or those of the
   *  greatest weights of a blend [{ cell, key, weight, name }]. */
  reads(position, c) {
    if (c >= this.cells.length) {
      const { name } = this.heads[c], percent = (weight) => `${(100 * weight).toFixed(0)} %`;
      return this.weights(position, c - this.cells.length)
        .map(({ key, weight }) => ({ cell: c, key, weight, round: 1, name: `${name} ${percent(weight)}` }));
    }
    const { name, laterIndex, rounds, word } = this.cells[c];
    const reads = [{ cell: c, key: this.selection(position, c), round: 1, name }];
    for (let round = 2; round <= rounds; round++) {
      const key = this.later[this.row(position) * this.laterRounds + laterIndex + round - 2];
      reads.push({ cell: c, key, round, name: `${name} ${word} ${round}` });
    }
    return reads.filter((read) => read.key !== ABSTAINED);
  }

  /** Energy of the runner-up minus energy of the selected key; Infinity without a runner-up. */
  margin(position, c) {
    return this.margins[this.row(position) * this.cells.length + c];
  }

  /** The greatest energy that a cell can select at a position among these candidates; null without a threshold. */
  limit(position, c, candidates) {
    const { threshold, byLength, head, runnerUp } = this.cells[c];
    if (threshold === null) return null;
    const shift = byLength === null ? 0 : lengthShift(byLength, head, position);
    return threshold + shift + (runnerUp === null ? 0 : candidates[runnerUp]?.energy ?? Infinity);
  }

  /** The `count` first reads of cells with the largest margins. A key without a runner-up comes after all others. */
  strongest(position, count) {
    const rank = (c) => (Number.isFinite(this.margin(position, c)) ? this.margin(position, c) : -1);
    return [...this.cells.keys()].filter((c) => this.selection(position, c) !== ABSTAINED)
      .sort((a, b) => rank(b) - rank(a) || a - b).slice(0, count).map((c) => this.reads(position, c)[0]);
  }

  /** All recorded values of one cell at one position. */
  detail(position, c) {
    const { view } = this;
    let start = this.cellStart[this.row(position)];
    for (let cell = 0; ; cell++) {
      const { rounds, laterBytes } = this.cells[cell], extraRounds = rounds - 1;
      const countOffset = start + CELL_BYTES + laterBytes * extraRounds;
      const float = (n) => view.getFloat32(start + 4 * n, true);
      let entry = countOffset + 1;
      const candidates = Array.from({ length: view.getUint8(countOffset) }, () => {
        const flags = view.getUint8(entry + 4);
        const candidate = {
          key: view.getInt32(entry, true),
          protected: (flags & PROTECTED) !== 0,
          rejected: (flags & REJECTED) !== 0,
          runnerUp: (flags & RUNNER_UP) !== 0,
          energy: view.getFloat32(entry + 5, true),
          lifted: flags & LIFTED ? view.getFloat32(entry + 9, true) : null,
        };
        entry += flags & LIFTED ? 13 : 9;
        return candidate;
      });
      if (cell === c) {
        return {
          selected: view.getInt32(start, true), energy: float(1), margin: float(2), coherence: float(3), gate: float(4),
          value: float(5), average: float(6), candidates,
          later: Array.from({ length: extraRounds }, (_, n) => view.getInt32(start + CELL_BYTES + laterBytes * n, true)),
          weights: Array.from({ length: laterBytes === 8 ? extraRounds : 0 },
            (_, n) => view.getFloat32(start + CELL_BYTES + 8 * n + 4, true)),
        };
      }
      start = entry;
    }
  }

  /** Per cell: abstention rate, mean finite margin, and the share of reads that go to position 0. */
  computeTotals() {
    const width = this.cells.length;
    const sums = this.cells.map(() => ({ abstained: 0, margins: 0, margin: 0, zero: 0 }));
    for (let index = 0; index < this.selected.length; index++) {
      const sum = sums[index % width], key = this.selected[index];
      if (key === ABSTAINED) {
        sum.abstained++;
        continue;
      }
      if (key === 0) sum.zero++;
      if (Number.isFinite(this.margins[index])) {
        sum.margins++;
        sum.margin += this.margins[index];
      }
    }
    return sums.map(({ abstained, margins, margin, zero }) => ({
      abstention: abstained / this.length,
      margin: margins ? margin / margins : NaN,
      zero: abstained < this.length ? zero / (this.length - abstained) : NaN,
    }));
  }

  /** Whether a double represents every possible path count exactly. */
  get countsFitDouble() {
    const bound = this.layers.reduce((n, { heads, rounds }) => n * (1 + heads * rounds), 1);
    return bound <= Number.MAX_SAFE_INTEGER;
  }

  /**
   * Counts the paths from a position back through the selecting layers, starting with the last layer. In each
   * layer a path either stays at its position (residual stream) or moves to a position that a head reads in one
   * of its rounds. Two heads that read the same position give two paths. Returns one entry per layer: `counts`
   * has the exact number of paths to each position (BigInt if a double is too small), `reached` lists the
   * positions with a nonzero count in ascending order.
   */
  paths(position) {
    const fits = this.countsFitDouble;
    let counts = fits ? new Float64Array(this.end) : new Array(this.end).fill(0n), reached = [position];
    counts[position] = fits ? 1 : 1n;
    const levels = [];
    for (const layer of this.layers.slice().reverse()) {
      counts = this.pathsThrough(layer, counts, reached);
      reached = [];
      let total = fits ? 0 : 0n, max = total;
      for (let p = 0; p < this.end; p++) {
        const count = counts[p];
        if (!count) continue;
        reached.push(p);
        total += count;
        if (count > max) max = count;
      }
      levels.push({ layer: layer.layer, counts, reached, total, max: Number(max) });
    }
    return levels;
  }

  /** Path counts below `layer`, given the counts above it and the positions where they are nonzero. */
  pathsThrough(layer, counts, reached) {
    const next = counts.slice(), { laterIndex } = this.cells[layer.firstCell];
    const laterReads = layer.heads * (layer.rounds - 1);
    for (const query of reached) {
      const row = this.row(query), count = counts[query];
      if (row < 0) continue;
      const first = row * this.cells.length + layer.firstCell, firstLater = row * this.laterRounds + laterIndex;
      for (let h = 0; h < layer.heads; h++) {
        const key = this.selected[first + h];
        if (key >= 0) next[key] += count;
      }
      for (let n = 0; n < laterReads; n++) {
        const key = this.later[firstLater + n];
        if (key >= 0) next[key] += count;
      }
    }
    return next;
  }
}

/** Compares two traces that have the same heads: the number of different selections per common position and in
 *  total, and the number of different tokens. Null if the traces have different heads or no common position. */
function differences(a, b) {
  const names = (trace) => trace.cells.map((cell) => cell.name).join();
  const start = Math.max(a.first, b.first), end = Math.min(a.end, b.end);
  if (names(a) !== names(b) || start >= end) return null;
  const width = a.cells.length, counts = new Int32Array(end);
  let selections = 0, tokens = 0;
  for (let p = start; p < end; p++) {
    const left = a.row(p) * width, right = b.row(p) * width;
    for (let c = 0; c < width; c++) if (a.selected[left + c] !== b.selected[right + c]) counts[p]++;
    selections += counts[p];
    if (a.ids[a.row(p)] !== b.ids[b.row(p)]) tokens++;
  }
  return { start, end, counts, selections, tokens, compared: (end - start) * width };
}

/** Decodes the records in an embedded script element: base64 of gzip. */
async function unpack(element) {
  // A multiple of 4 characters, so that each chunk is valid base64.
  const text = element.textContent.trim(), chunkChars = 1 << 20;
  const padding = text.endsWith('==') ? 2 : text.endsWith('=') ? 1 : 0;
  const compressed = new Uint8Array((text.length / 4) * 3 - padding);
  for (let start = 0, offset = 0; start < text.length; start += chunkChars) {
    const chunk = atob(text.slice(start, start + chunkChars));
    for (let n = 0; n < chunk.length; n++) compressed[offset++] = chunk.charCodeAt(n);
  }
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
