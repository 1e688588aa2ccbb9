//! Upper bounds of scores from products of 8-bit integers.
//!
//! Keys are stored as `Q + 128` in 0..=255, since the fastest instruction multiplies unsigned by
//! signed bytes; starting a query's sums at `-128 * sum(Q)` takes that away again. All integer sums
//! are exact in f32, and the few floating-point operations behind them are the same everywhere, so
//! every instruction set gives the same bits.
#![allow(unsafe_code)]

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

/// What a block of queries finds in a panel.
pub(crate) struct Hits {
    /// Keys whose upper bound reaches the threshold, as bits; of groups that were looked at.
    pub(crate) keys: Vec<u32>,
    /// Upper bounds of the groups that have a hit.
    pub(crate) upper: Vec<[f32; KEYS]>,
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

/// Finds the keys whose upper bound reaches the rows' thresholds, for the groups in `active` (bits).
#[inline(always)]
pub(crate) fn hits(
    code: Code,
    queries: &Queries,
    active: u32,
    panel: &Panel<'_>,
    threshold: &[f32],
    out: &mut Hits,
) {
    match code {
        Code::Plain => plain(queries, active, panel, threshold, out),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `Code::Vnni` is made only where the instruction set was found.
        Code::Vnni => unsafe { vnni(queries, active, panel, threshold, out) },
    }
}

#[inline(always)]
fn plain(queries: &Queries, active: u32, panel: &Panel<'_>, threshold: &[f32], out: &mut Hits) {
    let group_len = panel.values.len() / KEYS * ROWS;
    for (g, values) in queries.values.chunks_exact(group_len.max(1)).enumerate() {
        if active >> g & 1 == 0 {
            continue;
        }
        for r in 0..ROWS {
            let row = g * ROWS + r;
            let mut sums = [queries.start[row]; KEYS];
            for (q, keys) in
                values.chunks_exact(ROWS * STEP).zip(panel.values.chunks_exact(KEYS * STEP))
            {
                let q: [i32; STEP] = std::array::from_fn(|s| i32::from(q[r * STEP + s]));
                for (sum, k) in sums.iter_mut().zip(keys.chunks_exact(STEP)) {
                    for s in 0..STEP {
                        *sum += q[s] * i32::from(k[s]);
                    }
                }
            }
            let (scale, norm, threshold) = (queries.scale[row], queries.norm[row], threshold[row]);
            let mut hits = 0u32;
            for w in 0..KEYS {
                let score = (sums[w] as f32 * panel.scale[w]).mul_add(scale, panel.bias[w]);
                let upper = norm.mul_add(panel.error[w], score);
                out.upper[row][w] = upper;
                hits |= u32::from(upper >= threshold) << w;
            }
            out.keys[row] = hits;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2")]
fn vnni(queries: &Queries, active: u32, panel: &Panel<'_>, threshold: &[f32], out: &mut Hits) {
    use std::arch::x86_64::*;

    let group_len = panel.values.len() / KEYS * ROWS;
    let load = |x: &[f32; KEYS]| {
        // SAFETY: both halves lie within the array.
        unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] }
    };
    let (scale, bias, error) = (load(panel.scale), load(panel.bias), load(panel.error));
    let groups = queries.values.chunks_exact(group_len.max(1)).zip(queries.start.chunks_exact(ROWS));
    for (g, (values, start)) in groups.enumerate() {
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
                let q = [q[r * STEP] as u8, q[r * STEP + 1] as u8, q[r * STEP + 2] as u8, q[r * STEP + 3] as u8];
                let q = _mm512_set1_epi32(i32::from_le_bytes(q));
                sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], k[0], q);
                sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], k[1], q);
            }
        }
        let rows = g * ROWS..(g + 1) * ROWS;
        let (scales, norms) = (&queries.scale[rows.clone()], &queries.norm[rows.clone()]);
        let (mut upper, mut any) = ([[_mm512_setzero_ps(); 2]; ROWS], 0);
        let hits = out.keys[rows.clone()].iter_mut().zip(&threshold[rows.clone()]);
        for (r, (hits, &threshold)) in hits.enumerate() {
            let (s, n, t) = (_mm512_set1_ps(scales[r]), _mm512_set1_ps(norms[r]), _mm512_set1_ps(threshold));
            let mut reached = [0u32; 2];
            for half in 0..2 {
                let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][half]), scale[half]);
                let score = _mm512_fmadd_ps(dot, s, bias[half]);
                upper[r][half] = _mm512_fmadd_ps(n, error[half], score);
                reached[half] = u32::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(upper[r][half], t));
            }
            *hits = reached[0] | reached[1] << 16;
            any |= *hits;
        }
        if any != 0 {
            for (out, upper) in out.upper[rows].iter_mut().zip(upper) {
                // SAFETY: both halves lie within the row of KEYS = 32 bounds.
                unsafe {
                    _mm512_storeu_ps(out.as_mut_ptr(), upper[0]);
                    _mm512_storeu_ps(out.as_mut_ptr().add(16), upper[1]);
                }
            }
        }
    }
}
