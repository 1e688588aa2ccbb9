//! The vector half of the running average: `m_t = keep_t m_(t-1) + take_t v_t` over rows of D.
//!
//! A sequence is cut into blocks of [`BLOCK_STEPS`] steps for any number of threads. First, all blocks compute their
//! last mean from an initial mean of zero, in parallel; a sequential pass over the blocks turns these into the initial
//! mean of every block; then all blocks run again from their initial means and write their rows. The backward pass does
//! the same in the opposite direction.
//!
//! v rows `[B * Hk * N]` of D, m rows `[B * H * N]` of D, weights `[B * H, N]`, carry
//! `[B * H, blocks, D]`.

use num_traits::One;

use super::weights::Weight;
use crate::backend::cpu::element::{Element, Real, sum3};
use crate::backend::cpu::parallel::{for_chunks, for_chunks2, vectorize};
use crate::backend::cpu::view::Rows;
use crate::ops::running_average::Sizes;

/// Steps in a block.
const BLOCK_STEPS: usize = 64;

/// Sets `mean = keep mean + take value`. Up to `take` = 1/2 it is computed as a correction of the mean, so that the
/// average of constant values stays exactly constant; above, as a weighted sum, so that a reset (`keep` = 0) leaves
/// nothing of the previous mean.
#[inline(always)]
fn advance<T: Element>(weight: Weight<T::Acc>, mean: &mut [T::Acc], value: &[T]) {
    let Weight { keep, take } = weight;
    if take > T::Acc::of(0.5) {
        mean.iter_mut().zip(value).for_each(|(m, v)| *m = keep * *m + take * v.up());
    } else {
        mean.iter_mut().zip(value).for_each(|(m, v)| *m += take * (v.up() - *m));
    }
}

/// The steps of block `c`.
fn steps(sizes: Sizes, c: usize) -> std::ops::Range<usize> {
    c * BLOCK_STEPS..((c + 1) * BLOCK_STEPS).min(sizes.rows)
}

/// The weight of consecutive steps taken as one: the factor of the mean before them and the total share of their
/// values.
fn combined<R: Real>(weights: &[Weight<R>]) -> Weight<R> {
    weights.iter().fold(Weight { keep: R::one(), take: R::zero() }, |all, w| {
        // The total share is the mean of values that are all 1.
        let mut take = [all.take];
        advance(*w, &mut take, &[R::one()]);
        Weight { keep: all.keep * w.keep, take: take[0] }
    })
}

/// The averages m, and the last mean of every sequence in the accumulator type.
pub(super) fn forward<T: Element>(
    sizes: Sizes,
    v: &Rows<T>,
    weights: &[Weight<T::Acc>],
    start: Option<&[T::Acc]>,
) -> (Vec<T>, Vec<T::Acc>) {
    let Sizes { rows: n, dim: d, .. } = sizes;
    let blocks = n.div_ceil(BLOCK_STEPS);
    let value = |s: usize, t: usize| v.row(sizes.values_of(s) * n + t);
    let mut carry = vec![T::Acc::default(); sizes.sequences() * blocks * d];
    for_chunks(&mut carry, d, |i, mean| {
        let (s, c) = (i / blocks, i % blocks);
        match (c.checked_sub(1), start) {
            (Some(before), _) => vectorize(|| {
                for t in steps(sizes, before) {
                    advance(weights[s * n + t], mean, value(s, t));
                }
            }),
            (None, Some(start)) => mean.copy_from_slice(&start[s * d..(s + 1) * d]),
            (None, None) => {}
        }
    });
    for_chunks(&mut carry, blocks * d, |s, carry| {
        for c in 1..blocks {
            let all = combined(&weights[s * n..(s + 1) * n][steps(sizes, c - 1)]);
            let (before, here) = carry[(c - 1) * d..].split_at_mut(d);
            for (here, &before) in here.iter_mut().zip(before.iter()) {
                *here = match all.take > T::Acc::of(0.5) {
                    true => all.keep * before + *here,
                    false => before + (*here - all.take * before),
                };
            }
        }
    });
    let mut m = vec![T::zero(); sizes.sequences() * n * d];
    for_chunks2((&mut m, n * d), (&mut carry, blocks * d), |s, m, carry| {
        for_chunks2((m, BLOCK_STEPS * d), (carry, d), |c, m, mean| {
            vectorize(|| {
                for (t, m) in steps(sizes, c).zip(m.chunks_exact_mut(d)) {
                    advance(weights[s * n + t], mean, value(s, t));
                    m.iter_mut().zip(mean.iter()).for_each(|(m, &mean)| *m = T::down(mean));
                }
            });
        });
    });
    // The carry now holds the last mean of every block.
    if blocks > 1 {
        carry = carry.chunks_exact(blocks * d).flat_map(|c| &c[(blocks - 1) * d..]).copied().collect();
    }
    (m, carry)
}

/// Gradients of v and of the shares taken. With `p_t = dm_t + keep_(t+1) p_(t+1)`, the whole gradient
/// of `m_t`: `dv_t = take_t p_t`, summed over the heads that share v, and
/// `dtake_t = <p_t, v_t - m_(t-1)>`.
pub(super) fn backward<T: Element>(
    sizes: Sizes,
    v: &Rows<T>,
    m: &Rows<T>,
    dm: &Rows<T>,
    weights: &[Weight<T::Acc>],
    start: Option<&[T::Acc]>,
) -> (Vec<T>, Vec<T::Acc>) {
    let Sizes { rows: n, dim: d, .. } = sizes;
    let (blocks, group) = (n.div_ceil(BLOCK_STEPS), sizes.group());
    let carry = carried_gradients(sizes, dm, weights);
    // dtake in the order in which it is computed, [B * Hk, blocks, group, BLOCK_STEPS].
    let mut block_dtake = vec![T::Acc::default(); sizes.sequences() * blocks * BLOCK_STEPS];
    let mut dv = vec![T::zero(); v.count() * d];
    let per_value = blocks * group * BLOCK_STEPS;
    for_chunks2((&mut dv, n * d), (&mut block_dtake, per_value), |sv, dv, block_dtake| {
        for_chunks2((dv, BLOCK_STEPS * d), (block_dtake, group * BLOCK_STEPS), |c, dv, block_dtake| {
            let mut sum = vec![T::Acc::default(); dv.len()];
            let mut p = vec![T::Acc::default(); d];
            let zeros = vec![T::Acc::default(); d];
            vectorize(|| {
                for (j, block_dtake) in block_dtake.chunks_exact_mut(BLOCK_STEPS).enumerate() {
                    let s = sv * group + j;
                    p.copy_from_slice(&carry[(s * blocks + c) * d..][..d]);
                    for (i, t) in steps(sizes, c).enumerate().rev() {
                        let Weight { keep, take } = weights[s * n + t];
                        let value = v.row(sv * n + t);
                        p.iter_mut().zip(dm.row(s * n + t)).for_each(|(p, dm)| *p += dm.up());
                        block_dtake[i] = if t > 0 {
                            sum3(&p, value, m.row(s * n + t - 1), |p, v: T, m: T| p * (v.up() - m.up()))
                        } else {
                            let before = start.map_or(&zeros[..], |start| &start[s * d..(s + 1) * d]);
                            sum3(&p, value, before, |p, v: T, m| p * (v.up() - m))
                        };
                        for (sum, p) in sum[i * d..(i + 1) * d].iter_mut().zip(p.iter_mut()) {
                            *sum += take * *p;
                            *p = keep * *p;
                        }
                    }
                }
                dv.iter_mut().zip(&sum).for_each(|(dv, &sum)| *dv = T::down(sum));
            });
        });
    });
    let mut dtake = vec![T::Acc::default(); sizes.sequences() * n];
    for (s, dtake) in dtake.chunks_exact_mut(n).enumerate() {
        for (c, dtake) in dtake.chunks_mut(BLOCK_STEPS).enumerate() {
            let at = (s / group * blocks + c) * group + s % group;
            dtake.copy_from_slice(&block_dtake[at * BLOCK_STEPS..][..dtake.len()]);
        }
    }
    (dv, dtake)
}

/// For every block, the gradient of its last mean by the blocks after it.
fn carried_gradients<T: Element>(sizes: Sizes, dm: &Rows<T>, weights: &[Weight<T::Acc>]) -> Vec<T::Acc> {
    let Sizes { rows: n, dim: d, .. } = sizes;
    let blocks = n.div_ceil(BLOCK_STEPS);
    let mut carry = vec![T::Acc::default(); sizes.sequences() * blocks * d];
    for_chunks(&mut carry, d, |i, p| {
        let (s, next) = (i / blocks, i % blocks + 1);
        if next < blocks {
            vectorize(|| {
                for t in steps(sizes, next).rev() {
                    let keep = weights[s * n + t].keep;
                    p.iter_mut().zip(dm.row(s * n + t)).for_each(|(p, dm)| *p = keep * (*p + dm.up()));
                }
            });
        }
    });
    for_chunks(&mut carry, blocks * d, |s, carry| {
        for c in (1..blocks).rev() {
            let block = &weights[s * n..(s + 1) * n][steps(sizes, c)];
            let keep = block.iter().fold(T::Acc::one(), |all, w| all * w.keep);
            let (here, after) = carry[(c - 1) * d..].split_at_mut(d);
            here.iter_mut().zip(after.iter()).for_each(|(here, &after)| *here += keep * after);
        }
    });
    carry
}
