//! Few query rows, as in a decoding step: one pass over the keys and values as they are stored.
//!
//! The time is that of reading them. The keys of a head are divided into parts at fixed positions, which are computed in
//! parallel for all queries of the head: scores, their exponentials relative to the greatest score of the part, and the
//! values weighted by these. The parts are then added in their order, each scaled to the greatest score of all, so that
//! the bits depend neither on the number of threads nor on what else is in the batch.

use std::array;
use std::ops::Range;

use candle_core::{DType, Tensor};

use super::super::{Sizes, sink_of_queries};
use super::Problem;
use super::block::within;
use crate::backend::cpu::element::{Bf16, F16, Real, maximum, sum1};
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::lanes::{LANES, Lanes, WithLanes, fastest_isa, with_lanes};
use crate::backend::cpu::parallel::{par_chunks, vectorize};
use crate::backend::cpu::prefetch::prefetch_at;
use crate::backend::cpu::stored::{PREFETCH_DISTANCE_BYTES, Stored};
use crate::backend::cpu::view::{View, with_slices, with_view};
use crate::backend::graph::with_contiguous_rows;
use crate::error::{Error, Result};

/// Keys of a part.
const PART_KEYS: usize = 128;
/// Query rows that a key is multiplied by together.
const MAX_GROUP_ROWS: usize = 4;
/// Bytes of keys and values below which all parts run on the calling thread: about ten microseconds of work.
const MIN_PARALLEL_BYTES: usize = 1 << 17;

/// [`softmax_attention`](super::super::softmax_attention) for validated tensors, of which q is in f32, f16 or bf16. The
/// arithmetic is in f32, and the result has no gradient.
pub(in super::super) fn softmax_attention(
    [q, k, v]: [&Tensor; 3],
    prior: Option<&Tensor>,
    sink: Option<&Tensor>,
    problem: &Problem,
) -> Result<Tensor> {
    let sizes = problem.sizes;
    let wide = |t: &Tensor| -> Result<Tensor> { Ok(t.detach().to_dtype(DType::F32)?.contiguous()?) };
    let sinks = |sink: &Tensor| -> Result<Tensor> {
        wide(&sink_of_queries(sink)?.broadcast_as((sizes.batch, sizes.q_heads, sizes.queries, 1))?)
    };
    let queries = wide(q)?;
    let prior = prior.map(wide).transpose()?;
    let sink = sink.map(sinks).transpose()?;
    let (prior, sink) = (prior.as_ref().unwrap_or(&queries), sink.as_ref().unwrap_or(&queries));
    let (k, v) = (with_contiguous_rows(&k.detach())?, with_contiguous_rows(&v.detach())?);
    let y = with_slices([&queries, prior, sink], |[queries, prior, sink]| {
        let inputs = Inputs {
            problem,
            queries,
            prior: sizes.has_prior.then_some(prior),
            sink: sizes.has_sink.then_some(sink),
        };
        by_stored_rows(&inputs, &k, &v)
    })??;
    let shape = (sizes.batch, sizes.q_heads, sizes.queries, sizes.value_dim);
    Ok(Tensor::from_vec(y, shape, q.device())?.to_dtype(q.dtype())?)
}

/// The output for keys and values in the dtype in which they are stored.
fn by_stored_rows(inputs: &Inputs<'_>, k: &Tensor, v: &Tensor) -> Result<Vec<f32>> {
    fn run<S: Stored>(inputs: &Inputs<'_>, k: &Tensor, v: &Tensor) -> Result<Vec<f32>> {
        with_view::<S, _>(k, |k| with_view::<S, _>(v, |v| Ok(forward(fastest_isa(), inputs, k, v))))
    }
    match (k.dtype(), v.dtype()) {
        (DType::F32, DType::F32) => run::<f32>(inputs, k, v),
        (DType::F16, DType::F16) => run::<F16>(inputs, k, v),
        (DType::BF16, DType::BF16) => run::<Bf16>(inputs, k, v),
        (k, v) => Err(Error::Unsupported(format!("softmax attention: k is {k:?} and v is {v:?}"))),
    }
}

/// The inputs in f32.
struct Inputs<'a> {
    problem: &'a Problem,
    /// `[B, Hq, N, D]`.
    queries: &'a [f32],
    /// `[B, Hk, M]`.
    prior: Option<&'a [f32]>,
    /// The sink of every query, `[B, Hq, N]`.
    sink: Option<&'a [f32]>,
}

/// The output `[B, Hq, N, Dv]`.
fn forward<S: Stored>(isa: Isa, inputs: &Inputs<'_>, k: View<'_, S>, v: View<'_, S>) -> Vec<f32> {
    let sizes = inputs.problem.sizes;
    let (rows, heads) = (sizes.rows(), sizes.batch * sizes.kv_heads);
    let mut y = vec![0.0; heads * rows * sizes.value_dim];
    if y.is_empty() || sizes.keys == 0 {
        return y;
    }
    let count = sizes.keys.div_ceil(PART_KEYS);
    let part_len = rows * part_row(sizes);
    let mut parts = vec![0.0; heads * count * part_len];
    let run = |at: usize, out: &mut [f32]| {
        let (head, keys) = (at / count, at % count * PART_KEYS..sizes.keys.min((at % count + 1) * PART_KEYS));
        with_lanes(isa, Part { inputs, k, v, head, keys, out });
    };
    if heads * sizes.keys * (sizes.head_dim + sizes.value_dim) * size_of::<S>() < MIN_PARALLEL_BYTES {
        parts.chunks_mut(part_len).enumerate().for_each(|(at, out)| run(at, out));
    } else {
        par_chunks(&mut parts, part_len, &run);
    }
    vectorize(
        #[inline(always)]
        || {
            let of_heads =
                y.chunks_exact_mut(rows * sizes.value_dim).zip(parts.chunks_exact(count * part_len));
            for (head, (y, parts)) in of_heads.enumerate() {
                for (row, y) in y.chunks_exact_mut(sizes.value_dim).enumerate() {
                    let parts = parts.chunks_exact(part_row(sizes)).skip(row).step_by(rows);
                    add_parts(inputs.sink.map(|sink| sink[head * rows + row]), parts, y);
                }
            }
        },
    );
    y
}

/// Numbers of a row of a part: the greatest score, the sum of the exponentials, and the weighted values.
fn part_row(sizes: Sizes) -> usize {
    2 + sizes.value_dim
}

/// The output of a row from its parts.
#[inline(always)]
fn add_parts<'a>(sink: Option<f32>, parts: impl Iterator<Item = &'a [f32]> + Clone, y: &mut [f32]) {
    let mut top = sink.unwrap_or(f32::NEG_INFINITY);
    for part in parts.clone() {
        top = if part[0] > top { part[0] } else { top };
    }
    if top == f32::NEG_INFINITY {
        return;
    }
    let mut total = sink.map_or(0.0, |sink| (sink - top).exp_fast());
    for part in parts.filter(|part| part[0] > f32::NEG_INFINITY) {
        let scale = (part[0] - top).exp_fast();
        total += scale * part[1];
        for (y, x) in y.iter_mut().zip(&part[2..]) {
            *y += scale * x;
        }
    }
    let share = total.recip();
    y.iter_mut().for_each(|y| *y *= share);
}

/// All query rows of a key-value head and some of its keys.
struct Part<'a, S> {
    inputs: &'a Inputs<'a>,
    k: View<'a, S>,
    v: View<'a, S>,
    /// `b * Hk + h`.
    head: usize,
    keys: Range<usize>,
    /// A row of numbers for each query row, see [`part_row`].
    out: &'a mut [f32],
}

impl<S: Stored> WithLanes for Part<'_, S> {
    type Output = ();

    #[inline(always)]
    fn with_lanes<V: Lanes>(mut self) {
        let Problem { sizes, mask, .. } = self.inputs.problem;
        let (n, group) = (sizes.queries, sizes.q_heads / sizes.kv_heads);
        for query in 0..n {
            let visible = within(&mask.visible(self.head / sizes.kv_heads, query, sizes.keys), &self.keys);
            let keys = self.keys.start + visible.start..self.keys.start + visible.end;
            for first in (0..group).step_by(MAX_GROUP_ROWS) {
                // The heads of a group see the same keys.
                match group - first {
                    1 => self.rows::<V, 1>(query, first, &keys),
                    2 => self.rows::<V, 2>(query, first, &keys),
                    3 => self.rows::<V, 3>(query, first, &keys),
                    _ => self.rows::<V, MAX_GROUP_ROWS>(query, first, &keys),
                }
            }
        }
    }
}

impl<S: Stored> Part<'_, S> {
    /// The rows of a query in `R` heads of the group from the `first` on.
    #[inline(always)]
    fn rows<V: Lanes, const R: usize>(&mut self, query: usize, first: usize, keys: &Range<usize>) {
        let sizes = self.inputs.problem.sizes;
        let (len, count) = (part_row(sizes), keys.len());
        let mut scores = self.scores::<V, R>(query, first, keys);
        for r in 0..R {
            let out = &mut self.out[((first + r) * sizes.queries + query) * len..][..len];
            let scores = &mut scores[r][..count];
            let mut top = maximum(scores);
            if top == f32::NEG_INFINITY {
                // No key is visible, or all are excluded, unless a score is NaN, which the output is then.
                let mut is_nan = false;
                for score in scores.iter() {
                    is_nan |= score.is_nan();
                }
                top = if is_nan { 0.0 } else { top };
            }
            out[0] = top;
            if top == f32::NEG_INFINITY {
                scores.fill(0.0);
                continue;
            }
            for score in scores.iter_mut() {
                *score = (*score - top).exp_fast();
            }
            out[1] = sum1(
                scores,
                #[inline(always)]
                |x| x,
            );
        }
        let whole = sizes.value_dim / LANES * LANES;
        let mut column = 0;
        // With few rows several columns at a time, so that one sum does not wait for another.
        while R == 1 && column + 4 * LANES <= whole {
            self.weighted::<V, R, 4>((query, first), keys, &scores, column);
            column += 4 * LANES;
        }
        while R <= 2 && column + 2 * LANES <= whole {
            self.weighted::<V, R, 2>((query, first), keys, &scores, column);
            column += 2 * LANES;
        }
        while column < whole {
            self.weighted::<V, R, 1>((query, first), keys, &scores, column);
            column += LANES;
        }
        let (b, h) = (self.head / sizes.kv_heads, self.head % sizes.kv_heads);
        for (r, scores) in scores.iter().enumerate() {
            let out = &mut self.out[((first + r) * sizes.queries + query) * len..][..len];
            for (weight, j) in scores.iter().zip(keys.clone()) {
                for (out, x) in out[2 + whole..].iter_mut().zip(&self.v.row(b, h, j)[whole..]) {
                    *out += weight * x.up();
                }
            }
        }
    }

    /// The scores of those rows.
    #[inline(always)]
    fn scores<V: Lanes, const R: usize>(
        &self,
        query: usize,
        first: usize,
        keys: &Range<usize>,
    ) -> [[f32; PART_KEYS]; R] {
        let Inputs { problem, queries, prior, .. } = self.inputs;
        let (sizes, scale) = (problem.sizes, problem.scale as f32);
        let (b, h, d) = (self.head / sizes.kv_heads, self.head % sizes.kv_heads, sizes.head_dim);
        let row = (self.head * (sizes.q_heads / sizes.kv_heads) + first) * sizes.queries + query;
        let mut x: [&[f32]; R] = [&[]; R];
        for r in 0..R {
            x[r] = &queries[(row + r * sizes.queries) * d..][..d];
        }
        let mut scores = [[0f32; PART_KEYS]; R];
        // Several keys at a time, so that one sum does not wait for another.
        let mut at = 0;
        while R == 1 && at + 4 <= keys.len() {
            let rows = array::from_fn(|w| self.k.row(b, h, keys.start + at + w));
            let [products] = products::<V, S, 1, 4>([x[0]], rows);
            for (score, product) in scores[0][at..].iter_mut().zip(products) {
                *score = product * scale;
            }
            at += 4;
        }
        for at in at..keys.len() {
            let products = products::<V, S, R, 1>(x, [self.k.row(b, h, keys.start + at)]);
            for (scores, [product]) in scores.iter_mut().zip(products) {
                scores[at] = product * scale;
            }
        }
        if let Some(prior) = prior {
            let prior = &prior[self.head * sizes.keys..][keys.clone()];
            for scores in &mut scores {
                for (score, prior) in scores.iter_mut().zip(prior) {
                    *score += prior;
                }
            }
        }
        scores
    }

    /// The values of `C` registers from `column` on, weighted: for every column one chain of sums in the order of the keys.
    #[inline(always)]
    fn weighted<V: Lanes, const R: usize, const C: usize>(
        &mut self,
        (query, first): (usize, usize),
        keys: &Range<usize>,
        weights: &[[f32; PART_KEYS]; R],
        column: usize,
    ) {
        let sizes = self.inputs.problem.sizes;
        let (b, h) = (self.head / sizes.kv_heads, self.head % sizes.kv_heads);
        let mut sums = [[V::splat_float(0.0); C]; R];
        for (at, j) in keys.clone().enumerate() {
            let row = &self.v.row(b, h, j)[column..][..C * LANES];
            prefetch_at(row, PREFETCH_DISTANCE_BYTES);
            for c in 0..C {
                let Some(x) = row[c * LANES..].first_chunk() else { unreachable!("a whole register") };
                let x = S::load::<V>(x);
                for r in 0..R {
                    let weight = V::splat_float(weights[r][at % PART_KEYS]);
                    sums[r][c] = V::plus(sums[r][c], V::times(weight, x));
                }
            }
        }
        let len = part_row(sizes);
        for (r, sums) in sums.into_iter().enumerate() {
            let out = &mut self.out[((first + r) * sizes.queries + query) * len..][..len];
            for (c, sum) in sums.into_iter().enumerate() {
                out[2 + column + c * LANES..][..LANES].copy_from_slice(&V::array(sum));
            }
        }
    }
}

/// The products of `R` rows with `W` stored rows of the same length. The order of the additions is the same for all `R` and `W`.
#[inline(always)]
fn products<V: Lanes, S: Stored, const R: usize, const W: usize>(
    x: [&[f32]; R],
    rows: [&[S]; W],
) -> [[f32; W]; R] {
    let registers = rows[0].len() / LANES;
    for row in rows {
        prefetch_at(row, PREFETCH_DISTANCE_BYTES);
    }
    let mut sums = [[V::splat_float(0.0); W]; R];
    for i in 0..registers {
        for w in 0..W {
            let Some(y) = rows[w][i * LANES..].first_chunk() else { unreachable!("rows of one length") };
            let y = S::load::<V>(y);
            for r in 0..R {
                let Some(x) = x[r][i * LANES..].first_chunk() else { unreachable!("rows of one length") };
                sums[r][w] = V::plus(sums[r][w], V::times(V::load_float(x), y));
            }
        }
    }
    let mut totals = [[0.0; W]; R];
    for r in 0..R {
        for w in 0..W {
            let mut tail = 0.0;
            for (x, y) in x[r][registers * LANES..].iter().zip(&rows[w][registers * LANES..]) {
                tail += x * y.up();
            }
            totals[r][w] = V::total(sums[r][w]) + tail;
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::mask::Mask;
    use crate::ops::agreement::noise;

    /// The bits of the output for keys and values of this dtype, with one instruction set.
    fn bits<S: Stored>(isa: Isa, problem: &Problem, dtype: DType) -> Result<Vec<u32>> {
        let Sizes { batch, q_heads, kv_heads, queries, keys, head_dim, value_dim, .. } = problem.sizes;
        let q =
            noise(1, &[batch, q_heads, queries, head_dim], DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let prior = noise(4, &[batch, kv_heads, keys], DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let sink = noise(5, &[batch, q_heads, queries], DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let k = noise(2, &[batch, kv_heads, keys, head_dim], dtype)?;
        let v = noise(3, &[batch, kv_heads, keys, value_dim], dtype)?;
        let inputs = Inputs { problem, queries: &q, prior: Some(&prior), sink: Some(&sink) };
        let y = with_view::<S, _>(&k, |k| with_view::<S, _>(&v, |v| Ok(forward(isa, &inputs, k, v))))?;
        Ok(y.into_iter().map(f32::to_bits).collect())
    }

    #[test]
    fn all_instruction_sets_and_numbers_of_threads_give_the_same_bits() -> Result<()> {
        for ([batch, q_heads, kv_heads, queries, keys, head_dim, value_dim], mask) in [
            ([1, 9, 3, 1, 700, 64, 64], Mask::causal(650)),
            ([2, 4, 2, 2, 300, 33, 49], Mask::window(200, 298)),
            ([1, 7, 1, 1, 513, 8, 5], Mask::none()),
            ([1, 2, 1, 3, 30, 70, 96], Mask::causal(-1)),
        ] {
            let sizes = Sizes {
                batch,
                q_heads,
                kv_heads,
                queries,
                keys,
                head_dim,
                value_dim,
                has_prior: true,
                has_sink: true,
            };
            let problem = Problem { sizes, mask, scale: 0.3 };
            let all = |isa| -> Result<_> {
                Ok([
                    bits::<f32>(isa, &problem, DType::F32)?,
                    bits::<F16>(isa, &problem, DType::F16)?,
                    bits::<Bf16>(isa, &problem, DType::BF16)?,
                ])
            };
            let expected = all(Isa::Portable)?;
            for isa in Isa::available() {
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let got = pool.map_err(candle_core::Error::wrap)?.install(|| all(isa))?;
                    assert!(got == expected, "{isa:?}, {threads} threads: {sizes:?}");
                }
            }
        }
        Ok(())
    }

    /// Cached keys of a batch are read in place, whatever their strides are.
    #[test]
    fn strides_do_not_change_the_bits() -> Result<()> {
        let q = noise(1, &[2, 4, 1, 24], DType::F32)?;
        let wide = noise(2, &[2, 300, 2, 24], DType::F16)?;
        let (k, v) = (wide.transpose(1, 2)?.narrow(2, 10, 280)?, wide.transpose(1, 2)?.narrow(2, 5, 280)?);
        let attend = |k: &Tensor, v: &Tensor| {
            crate::softmax_attention(&q, k, v, None, None, &Mask::none(), 0.3)?
                .flatten_all()?
                .to_vec1::<f32>()
        };
        assert!(!k.is_contiguous() && k.device().same_device(&Device::Cpu));
        assert_eq!(attend(&k, &v)?, attend(&k.contiguous()?, &v.contiguous()?)?);
        Ok(())
    }
}
