//! Bounds of scores with AVX-512: integer products with VNNI or AMX, then the same floating-point operations for both.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use crate::backend::cpu::amx::int8::{STRIP, Sums};
use crate::backend::cpu::prefetch::prefetch_line;
use crate::backend::cpu::quantize::{KEYS, STEP};
use crate::ops::scan::cpu::bounded_lists::BoundedLists;
use crate::ops::scan::cpu::int8::{Panel, PanelTask, ROWS};

/// Distance between the keys that are read and the keys that are prefetched.
const PREFETCH_DISTANCE_BYTES: usize = 1 << 13;

/// The sums of the first N queries of a group with the keys of a panel.
type Group<const N: usize> = [[__m512i; 2]; N];

/// [`crate::ops::scan::cpu::int8::collect`] with VNNI, for the number of queries in a group, which is often one in decoding.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,popcnt")]
pub(crate) fn vnni(task: &PanelTask<'_>, out: &mut BoundedLists) -> u64 {
    match task.queries.used {
        1 => vnni_rows::<1>(task, out),
        2 => vnni_rows::<2>(task, out),
        3 | 4 => vnni_rows::<4>(task, out),
        _ => vnni_rows::<ROWS>(task, out),
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,popcnt")]
fn vnni_rows<const N: usize>(task: &PanelTask<'_>, out: &mut BoundedLists) -> u64 {
    let PanelTask { queries, panel, .. } = task;
    let group_len = panel.values.len() / KEYS * ROWS;
    bound_rows(task, out, |g| {
        let mut sums: Group<N> = [[_mm512_setzero_si512(); 2]; N];
        // A second set of accumulators, which hides latency where there are enough registers.
        let mut more = sums;
        for (sums, &start) in sums.iter_mut().zip(&queries.start[g * ROWS..]) {
            *sums = [_mm512_set1_epi32(start); 2];
        }
        let values = &queries.values[g * group_len..][..group_len];
        let steps = values.chunks_exact(ROWS * STEP).zip(panel.values.chunks_exact(KEYS * STEP));
        for (i, (q, k)) in steps.enumerate() {
            // With few queries, memory is the bottleneck; the panels are consecutive in memory.
            if N < ROWS {
                for line in [0, 64] {
                    prefetch_line(k.as_ptr().wrapping_add(PREFETCH_DISTANCE_BYTES + line));
                }
            }
            if N < ROWS && i % 2 == 1 { add_products(&mut more, q, k) } else { add_products(&mut sums, q, k) }
        }
        for r in 0..N {
            for half in 0..2 {
                sums[r][half] = _mm512_add_epi32(sums[r][half], more[r][half]);
            }
        }
        sums
    })
}

/// Adds the products of one step: of queries `[ROWS][4]` and keys `[KEYS][4]`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_products<const N: usize>(sums: &mut Group<N>, q: &[i8], k: &[u8]) {
    assert!(q.len() == ROWS * STEP && k.len() == KEYS * STEP);
    // SAFETY: `k` holds KEYS * STEP = 128 bytes.
    let k = unsafe { [_mm512_loadu_si512(k.as_ptr().cast()), _mm512_loadu_si512(k.as_ptr().add(64).cast())] };
    for r in 0..N {
        let q = [q[r * STEP], q[r * STEP + 1], q[r * STEP + 2], q[r * STEP + 3]];
        let q = _mm512_set1_epi32(i32::from_le_bytes(q.map(i8::cast_unsigned)));
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], k[0], q);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], k[1], q);
    }
}

/// [`crate::ops::scan::cpu::int8::collect`] with AMX.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,popcnt")]
pub(crate) fn amx(task: &PanelTask<'_>, out: &mut BoundedLists) -> u64 {
    /// Groups of a strip.
    const GROUPS: usize = STRIP / ROWS;
    let PanelTask { queries, panel, .. } = task;
    let Some(tiled) = &queries.tiled else { unreachable!("queries are tiled where AMX runs") };
    let mut products = Sums([[0; KEYS]; STRIP]);
    let mut multiplied = None;
    bound_rows(task, out, |g| {
        if multiplied != Some(g / GROUPS) {
            tiled.multiply(g / GROUPS, panel.values, &mut products);
            multiplied = Some(g / GROUPS);
        }
        let mut sums: Group<ROWS> = [[_mm512_setzero_si512(); 2]; ROWS];
        let rows = products.0[g % GROUPS * ROWS..][..ROWS].iter().zip(&queries.start[g * ROWS..]);
        for (sums, (row, &start)) in sums.iter_mut().zip(rows) {
            for (half, sum) in sums.iter_mut().enumerate() {
                // SAFETY: a row holds two halves of 16.
                let product = unsafe { _mm512_loadu_si512(row.as_ptr().add(16 * half).cast()) };
                *sum = _mm512_add_epi32(product, _mm512_set1_epi32(start));
            }
        }
        sums
    })
}

/// Computes bounds from the sums of the first N queries of the active groups, and appends the keys that reach the
/// thresholds. Returns the rows (bits) whose lists are then full.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,avx2,popcnt")]
fn bound_rows<const N: usize>(
    task: &PanelTask<'_>,
    out: &mut BoundedLists,
    mut sums: impl FnMut(usize) -> Group<N>,
) -> u64 {
    let PanelTask { queries, panel, active, visible } = task;
    let (scale, bias, error) = (load(panel.scale), load(panel.bias), load(panel.error));
    let mut full = 0;
    for g in (0..queries.start.len() / ROWS).filter(|g| active >> g & 1 == 1) {
        let sums = sums(g);
        let rows = g * ROWS..g * ROWS + N;
        let (scales, norms) = (&queries.scale[rows.clone()], &queries.norm[rows.clone()]);
        let thresholds = &out.threshold[rows.clone()];
        let (mut upper, mut any) = ([[_mm512_setzero_ps(); 2]; N], 0u16);
        for r in 0..N {
            let (s, n) = (_mm512_set1_ps(scales[r]), _mm512_set1_ps(norms[r]));
            let t = _mm512_set1_ps(thresholds[r]);
            for half in 0..2 {
                let dot = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][half]), scale[half]);
                let score = _mm512_fmadd_ps(dot, s, bias[half]);
                upper[r][half] = _mm512_fmadd_ps(n, error[half], score);
                any = _kor_mask16(any, _mm512_cmp_ps_mask::<_CMP_GE_OQ>(upper[r][half], t));
            }
        }
        if any != 0 {
            full |= append(g, &upper, &visible[rows], norms, panel, out);
        }
    }
    full
}

/// Appends the visible keys whose upper bound reaches the threshold of their row in group `g`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma,avx2,popcnt")]
fn append<const N: usize>(
    g: usize,
    upper: &[[__m512; 2]; N],
    visible: &[u32],
    norms: &[f32],
    panel: &Panel<'_>,
    out: &mut BoundedLists,
) -> u64 {
    let (error, slack, mut full) = (load(panel.error), load(panel.slack), 0);
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for r in 0..N {
        let row = g * ROWS + r;
        let t = _mm512_set1_ps(out.threshold[row]);
        let visible = [visible[r] as u16, (visible[r] >> 16) as u16];
        let hits = [0, 1].map(|h| _mm512_mask_cmp_ps_mask::<_CMP_GE_OQ>(visible[h], upper[r][h], t));
        if hits == [0, 0] {
            continue;
        }
        let n = _mm512_set1_ps(norms[r]);
        let mut to = out.first(row) + out.count[row];
        // The memory of a list ends a whole panel behind its capacity; checked once for both halves.
        assert!(!out.full(row) && to + KEYS <= out.key.len());
        let mut threshold = t;
        for half in 0..2 {
            let hit = hits[half];
            let gap = _mm512_fmadd_ps(n, error[half], slack[half]);
            let lower = _mm512_fmadd_ps(_mm512_set1_ps(-2.0), gap, upper[r][half]);
            threshold = _mm512_mask_max_ps(threshold, hit, threshold, lower);
            let first = panel.first.cast_signed() + 16 * half as i32;
            let key = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
            // SAFETY: at most 16 entries precede the 16 of the second half, within the panel of memory checked above.
            unsafe {
                let key = _mm512_maskz_compress_epi32(hit, key);
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
        if out.candidates == 1 {
            // A lower bound of one key is a threshold for all others.
            out.threshold[row] = _mm512_reduce_max_ps(threshold);
        }
    }
    full
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32; KEYS]) -> [__m512; 2] {
    // SAFETY: both halves lie within the array.
    unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(16))] }
}
