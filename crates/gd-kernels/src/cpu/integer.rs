//! Upper bounds of scores from products of 8-bit integers.
//!
//! Keys are stored as `Q + 128` in 0..=255, since the fastest instruction multiplies unsigned by
//! signed bytes; starting a query's sums at `-128 * sum(Q)` takes that away again. All integer sums
//! are exact in f32, and the few floating-point operations behind them are the same everywhere, so
//! every instruction set gives the same bits.
#![allow(unsafe_code)]

use crate::plan::Isa;

/// Keys of a panel.
pub(crate) const KEYS: usize = 32;
/// Queries of a group.
pub(crate) const ROWS: usize = 8;
/// Products that one instruction adds up.
pub(crate) const STEP: usize = 4;

/// One panel of keys as a block of queries meets it.
pub(crate) struct Panel<'a> {
    /// `[D / 4][KEYS][4]`.
    pub(crate) values: &'a [u8],
    pub(crate) scale: &'a [f32; KEYS],
    /// What does not depend on the query, rounded up.
    pub(crate) bias: &'a [f32; KEYS],
    /// Error of the score for a query of norm 1.
    pub(crate) error: &'a [f32; KEYS],
    /// By how much the bias was rounded up.
    pub(crate) slack: &'a [f32; KEYS],
    /// The first key.
    pub(crate) first: u32,
}

/// A block of queries, in groups of [`ROWS`].
pub(crate) struct Queries {
    /// `[groups][D / 4][ROWS][4]`.
    pub(crate) values: Vec<i8>,
    /// `-128 * sum(Q)`.
    pub(crate) start: Vec<i32>,
    pub(crate) scale: Vec<f32>,
    pub(crate) norm: Vec<f32>,
}

/// Keys that a row may keep before it is left to the native scan: enough for 32 candidates.
pub(crate) const CAPACITY: usize = 96;

/// For every row the keys that may still be candidates, with bounds of their scores.
pub(crate) struct Lists {
    /// Entries that a list may have; it is as long as that and one panel more.
    capacity: usize,
    count: Vec<usize>,
    key: Vec<u32>,
    upper: Vec<f32>,
    lower: Vec<f32>,
    /// Keys whose scores have no bound, whatever the row.
    pub(crate) unbounded: Vec<u32>,
}

impl Lists {
    /// Empty lists.
    pub(crate) fn new(rows: usize, capacity: usize) -> Self {
        let len = rows * (capacity + KEYS);
        Self {
            capacity,
            count: vec![0; rows],
            key: vec![0; len],
            upper: vec![0.0; len],
            lower: vec![0.0; len],
            unbounded: Vec::new(),
        }
    }

    /// Appends a key; the list may not be full.
    #[inline(always)]
    pub(crate) fn push(&mut self, row: usize, key: u32, upper: f32, lower: f32) {
        let at = self.first(row) + self.count[row];
        (self.key[at], self.upper[at], self.lower[at]) = (key, upper, lower);
        self.count[row] += 1;
    }

    fn first(&self, row: usize) -> usize {
        row * (self.capacity + KEYS)
    }

    /// Whether a row has no room for another panel.
    pub(crate) fn full(&self, row: usize) -> bool {
        self.count[row] > self.capacity
    }

    /// Lower bounds of a row's scores.
    pub(crate) fn lower(&self, row: usize) -> &[f32] {
        &self.lower[self.first(row)..][..self.count[row]]
    }

    /// Upper bounds of a row's scores.
    pub(crate) fn upper(&self, row: usize) -> &[f32] {
        &self.upper[self.first(row)..][..self.count[row]]
    }

    /// Drops the keys whose upper bound does not reach the threshold; returns how many stay.
    pub(crate) fn retain(&mut self, row: usize, threshold: f32) -> usize {
        let first = self.first(row);
        let mut to = first;
        for at in first..first + self.count[row] {
            (self.key[to], self.upper[to], self.lower[to]) = (self.key[at], self.upper[at], self.lower[at]);
            to += usize::from(self.upper[at] >= threshold);
        }
        self.count[row] = to - first;
        self.count[row]
    }

    /// Makes room in a full list: raises the row's threshold to what K of its lower bounds reach, and
    /// drops what does not reach that. Returns the threshold; none if too many keys stay.
    #[inline(always)]
    pub(crate) fn tighten(&mut self, row: usize, k: usize, threshold: f32) -> Option<f32> {
        let threshold = reached_by(self.lower(row), k, threshold);
        (self.retain(row, threshold) <= self.capacity / 4 * 3).then_some(threshold)
    }

    /// The keys of a row.
    pub(crate) fn keys(&self, row: usize) -> &[u32] {
        &self.key[self.first(row)..][..self.count[row]]
    }
}

/// Which code computes the bounds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Code {
    /// Plain loops, compiled for the instruction set of their caller.
    Plain,
    /// AVX-512 with VNNI, which the caller has found on this machine.
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Code {
    /// The code for an instruction set of this machine.
    pub(crate) fn of(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Code::Vnni,
            _ => Code::Plain,
        }
    }
}

/// Appends the keys whose upper bound reaches the row's threshold, of those that are `open` to the row
/// (bits), for the groups in `active` (bits). No list may be full; returns the rows (bits) whose list
/// is now.
#[inline(always)]
pub(crate) fn collect(
    code: Code,
    queries: &Queries,
    active: u32,
    panel: &Panel<'_>,
    open: &[u32],
    threshold: &[f32],
    out: &mut Lists,
) -> u64 {
    match code {
        Code::Plain => plain(queries, active, panel, open, threshold, out),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a plan names VNNI only where it was found, and `Code::of` is given a plan's.
        Code::Vnni => unsafe { vnni(queries, active, panel, open, threshold, out) },
    }
}

#[inline(always)]
fn plain(
    queries: &Queries,
    active: u32,
    panel: &Panel<'_>,
    open: &[u32],
    threshold: &[f32],
    out: &mut Lists,
) -> u64 {
    let mut full = 0;
    let group_len = panel.values.len() / KEYS * ROWS;
    for (g, values) in queries.values.chunks_exact(group_len.max(1)).enumerate() {
        if active >> g & 1 == 0 {
            continue;
        }
        for r in 0..ROWS {
            let row = g * ROWS + r;
            let mut sums = [queries.start[row]; KEYS];
            for (q, keys) in values.chunks_exact(ROWS * STEP).zip(panel.values.chunks_exact(KEYS * STEP)) {
                let q: [i32; STEP] = std::array::from_fn(|s| i32::from(q[r * STEP + s]));
                for (sum, k) in sums.iter_mut().zip(keys.chunks_exact(STEP)) {
                    for s in 0..STEP {
                        *sum += q[s] * i32::from(k[s]);
                    }
                }
            }
            let (scale, norm, threshold) = (queries.scale[row], queries.norm[row], threshold[row]);
            let mut upper = [0f32; KEYS];
            let mut any = false;
            for w in 0..KEYS {
                let score = (sums[w] as f32 * panel.scale[w]).mul_add(scale, panel.bias[w]);
                upper[w] = norm.mul_add(panel.error[w], score);
                any |= upper[w] >= threshold;
            }
            if !any {
                continue;
            }
            let mut to = out.first(row) + out.count[row];
            for (w, &bound) in upper.iter().enumerate() {
                let gap = norm.mul_add(panel.error[w], panel.slack[w]);
                (out.key[to], out.upper[to]) = (panel.first + w as u32, bound);
                out.lower[to] = (-2f32).mul_add(gap, bound);
                to += usize::from(bound >= threshold && open[row] >> w & 1 == 1);
            }
            out.count[row] = to - out.first(row);
            full |= u64::from(out.full(row)) << row;
        }
    }
    full
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,popcnt")]
fn vnni(
    queries: &Queries,
    active: u32,
    panel: &Panel<'_>,
    open: &[u32],
    threshold: &[f32],
    out: &mut Lists,
) -> u64 {
    use std::arch::x86_64::*;

    let mut full = 0;
    let group_len = panel.values.len() / KEYS * ROWS;
    let load = |x: &[f32; KEYS]| {
        // SAFETY: both halves lie within the array.
        unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] }
    };
    let (scale, bias, error) = (load(panel.scale), load(panel.bias), load(panel.error));
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let first = panel.first.cast_signed();
    let key = [
        _mm512_add_epi32(lanes, _mm512_set1_epi32(first)),
        _mm512_add_epi32(lanes, _mm512_set1_epi32(first + 16)),
    ];
    let each = queries.values.chunks_exact(group_len.max(1)).zip(queries.start.chunks_exact(ROWS));
    for (g, (values, start)) in each.enumerate() {
        if active >> g & 1 == 0 {
            continue;
        }
        let mut sums = [[_mm512_setzero_si512(); 2]; ROWS];
        for (sums, &start) in sums.iter_mut().zip(start) {
            *sums = [_mm512_set1_epi32(start); 2];
        }
        for (q, k) in values.chunks_exact(ROWS * STEP).zip(panel.values.chunks_exact(KEYS * STEP)) {
            // SAFETY: `k` holds KEYS * STEP = 128 bytes.
            let k = unsafe {
                [_mm512_loadu_si512(k.as_ptr().cast()), _mm512_loadu_si512(k.as_ptr().add(64).cast())]
            };
            for r in 0..ROWS {
                let q = [q[r * STEP], q[r * STEP + 1], q[r * STEP + 2], q[r * STEP + 3]];
                let q = _mm512_set1_epi32(i32::from_le_bytes(q.map(i8::cast_unsigned)));
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], k[0], q);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], k[1], q);
            }
        }
        let rows = g * ROWS..(g + 1) * ROWS;
        let (scales, norms) = (&queries.scale[rows.clone()], &queries.norm[rows.clone()]);
        let (thresholds, open) = (&threshold[rows.clone()], &open[rows.clone()]);
        let (mut upper, mut hits, mut any) = ([[_mm512_setzero_ps(); 2]; ROWS], [0u32; ROWS], 0);
        for r in 0..ROWS {
            let (s, n) = (_mm512_set1_ps(scales[r]), _mm512_set1_ps(norms[r]));
            let t = _mm512_set1_ps(thresholds[r]);
            let mut halves = [0u16; 2];
            for half in 0..2 {
                let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][half]), scale[half]);
                let score = _mm512_fmadd_ps(dot, s, bias[half]);
                upper[r][half] = _mm512_fmadd_ps(n, error[half], score);
                let reached = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(upper[r][half], t);
                halves[half] = reached;
            }
            hits[r] = _mm512_kunpackw(u32::from(halves[1]), u32::from(halves[0])) & open[r];
            any |= hits[r];
        }
        if any == 0 {
            continue;
        }
        let slack = load(panel.slack);
        for r in 0..ROWS {
            if hits[r] == 0 {
                continue;
            }
            let n = _mm512_set1_ps(norms[r]);
            let row = rows.start + r;
            let mut to = out.first(row) + out.count[row];
            // The list ends a whole panel behind its capacity; checked here, once for both halves.
            assert!(!out.full(row) && to + KEYS <= out.key.len());
            for half in 0..2 {
                let hit = (hits[r] >> (16 * half)) as u16;
                let gap = _mm512_fmadd_ps(n, error[half], slack[half]);
                let lower = _mm512_fmadd_ps(_mm512_set1_ps(-2.0), gap, upper[r][half]);
                // SAFETY: at most 16 entries precede the second half's 16 in the panel's room.
                unsafe {
                    let key = _mm512_maskz_compress_epi32(hit, key[half]);
                    _mm512_storeu_si512(out.key.as_mut_ptr().add(to).cast(), key);
                    let upper = _mm512_maskz_compress_ps(hit, upper[r][half]);
                    _mm512_storeu_ps(out.upper.as_mut_ptr().add(to), upper);
                    let lower = _mm512_maskz_compress_ps(hit, lower);
                    _mm512_storeu_ps(out.lower.as_mut_ptr().add(to), lower);
                }
                to += hit.count_ones() as usize;
            }
            out.count[row] = to - out.first(row);
            full |= u64::from(out.full(row)) << row;
        }
    }
    full
}

/// A number that at least `k` of the values reach, near the greatest such; `floor` if there is none
/// above it.
#[inline(always)]
pub(crate) fn reached_by(values: &[f32], k: usize, floor: f32) -> f32 {
    /// Halvings of the interval.
    const HALVINGS: usize = 12;
    if values.len() < k {
        return floor;
    }
    let (least, greatest) = extremes(values);
    if k == 1 {
        return if greatest > floor { greatest } else { floor };
    }
    // All of them reach the least.
    let (mut low, mut high) = (if least > floor { least } else { floor }, greatest);
    for _ in 0..HALVINGS {
        let middle = 0.5 * low + 0.5 * high;
        let count: u32 = values.iter().map(|&x| u32::from(x >= middle)).sum();
        (low, high) = if count as usize >= k { (middle, high) } else { (low, middle) };
    }
    low
}

/// The least and the greatest of finite values.
#[inline(always)]
fn extremes(values: &[f32]) -> (f32, f32) {
    const LANES: usize = 16;
    let (mut least, mut greatest) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for values in values.chunks(LANES) {
        for ((l, g), &x) in least.iter_mut().zip(&mut greatest).zip(values) {
            *l = if x < *l { x } else { *l };
            *g = if x > *g { x } else { *g };
        }
    }
    let least = least.into_iter().fold(f32::INFINITY, |m, x| if x < m { x } else { m });
    (least, greatest.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m }))
}
