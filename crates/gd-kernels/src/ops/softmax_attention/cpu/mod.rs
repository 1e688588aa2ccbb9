//! Softmax attention on the CPU: blocks of query rows by blocks of keys, whose products are computed in registers by the
//! matrix product of the `gemm` crate.

mod backward;
mod block;
pub(super) mod decode;
mod forward;

use candle_core::{DType, Device, Shape, Tensor};

use self::block::prior_of_rows;
use super::Sizes;
use crate::backend::cpu::element::{Bf16, Element, F16, by_float};
use crate::backend::cpu::view::with_view;
use crate::backend::graph::{attach3, with_contiguous_rows};
use crate::error::{Error, Result};
use crate::mask::Mask;

/// A problem apart from its tensors.
#[derive(Clone)]
pub(super) struct Problem {
    pub(super) sizes: Sizes,
    pub(super) mask: Mask,
    pub(super) scale: f64,
}

/// [`softmax_attention`](super::softmax_attention) for validated tensors, with the sink as last element of the rows of q
/// and the prior as last element of the rows of k.
pub(super) fn softmax_attention([q, k, v]: [&Tensor; 3], problem: Problem) -> Result<Tensor> {
    let sizes = problem.sizes;
    let (q, k, v) = (with_contiguous_rows(q)?, with_contiguous_rows(k)?, with_contiguous_rows(v)?);
    by_float!("softmax attention", q.dtype(), T => {
        let (y, log_sums) = with_view::<T, _>(&q, |q| with_view::<T, _>(&k, |k| with_view::<T, _>(&v, |v| {
            let prior = sizes.has_prior.then(|| prior_of_rows(&problem, k));
            Ok(forward::forward(&problem, q, k, v, prior.as_deref()))
        })))?;
        let shape = Shape::from((sizes.batch, sizes.q_heads, sizes.queries, sizes.value_dim));
        Ok(attach3("softmax-attention", [&q, &k, &v], (y, shape), move |[q, k, v], y, dy| {
            let dy = with_contiguous_rows(dy)?;
            Ok(gradients::<T>(&problem, [q, k, v], y, &dy, &log_sums)?)
        })?)
    })
}

/// The same without gradients, for q in f32, with the sink as last element of its rows, and k and v in half precision.
pub(super) fn softmax_attention_of_stored(
    [q, k, v]: [&Tensor; 3],
    prior: Option<&Tensor>,
    problem: &Problem,
) -> Result<Tensor> {
    fn run<S: Element<Acc = f32>>(
        [q, k, v]: [&Tensor; 3],
        prior: Option<&[f32]>,
        problem: &Problem,
    ) -> Result<Vec<f32>> {
        with_view::<f32, _>(q, |q| {
            with_view::<S, _>(k, |k| {
                with_view::<S, _>(v, |v| Ok(forward::forward(problem, q, k, v, prior).0))
            })
        })
    }
    let (q, k, v) = (with_contiguous_rows(q)?, with_contiguous_rows(k)?, with_contiguous_rows(v)?);
    let prior = prior.map(|prior| prior.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()).transpose()?;
    let y = match k.dtype() {
        DType::F16 => run::<F16>([&q, &k, &v], prior.as_deref(), problem)?,
        DType::BF16 => run::<Bf16>([&q, &k, &v], prior.as_deref(), problem)?,
        other => return Err(Error::Unsupported(format!("softmax attention: q is F32, k is {other:?}"))),
    };
    let Sizes { batch, q_heads, queries, value_dim, .. } = problem.sizes;
    Ok(Tensor::from_vec(y, (batch, q_heads, queries, value_dim), &Device::Cpu)?)
}

/// The gradients of q, k and v.
fn gradients<T: Element>(
    problem: &Problem,
    [q, k, v]: [&Tensor; 3],
    y: &Tensor,
    dy: &Tensor,
    log_sums: &[T::Acc],
) -> Result<[Tensor; 3]> {
    let shapes = [q.shape().clone(), k.shape().clone(), v.shape().clone()];
    let values = with_view::<T, _>(q, |q| {
        with_view(k, |k| {
            with_view(v, |v| {
                with_view(y, |y| {
                    with_view(dy, |dy| Ok(backward::backward(problem, [q, k, v, y, dy], log_sums)))
                })
            })
        })
    })?;
    let [q, k, v] = values;
    let [q_shape, k_shape, v_shape] = shapes;
    let tensor = |values: Vec<T::Acc>, shape: Shape| -> Result<Tensor> {
        let values: Vec<T> = values.into_iter().map(T::down).collect();
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    };
    Ok([tensor(q, q_shape)?, tensor(k, k_shape)?, tensor(v, v_shape)?])
}

/// Against the composition of candle's operations.
#[cfg(test)]
mod tests {
    use candle_core::{DType, Result, Tensor};

    use super::super::{composed, softmax_attention};
    use crate::mask::Mask;
    use crate::ops::agreement::{agree, noise};

    fn check(
        [b, hq, hk, n, m, d, dv]: [usize; 7],
        mask: &Mask,
        dtype: DType,
        (has_prior, has_sink): (bool, bool),
    ) -> Result<()> {
        let mut inputs = vec![
            noise(1, &[b, hq, n, d], dtype)?,
            noise(2, &[b, hk, m, d], dtype)?,
            noise(3, &[b, hk, m, dv], dtype)?,
        ];
        if has_prior {
            inputs.push(noise(4, &[b, hk, m], dtype)?);
        }
        if has_sink {
            inputs.push(noise(5, &[hq], dtype)?);
        }
        let prior = |t: &[Tensor]| has_prior.then(|| t[3].clone());
        let sink = |t: &[Tensor]| has_sink.then(|| t[t.len() - 1].clone());
        agree(
            &inputs,
            |t| Ok(softmax_attention(&t[0], &t[1], &t[2], prior(t).as_ref(), sink(t).as_ref(), mask, 0.4)?),
            |t| {
                composed::softmax_attention(
                    &t[0],
                    &t[1],
                    &t[2],
                    prior(t).as_ref(),
                    sink(t).as_ref(),
                    mask,
                    0.4,
                )
            },
        )
    }

    #[test]
    fn fused_equals_composed() -> Result<()> {
        let masks = [
            Mask::none(),
            Mask::causal(0),
            Mask::causal(-2),
            Mask::causal(3),
            Mask::window(3, 1),
            Mask::causal(0).kv_len(vec![0, 7]),
            Mask::causal(2).packed(vec![vec![0, 4, 9]]),
        ];
        let mut cases = 0;
        for mask in &masks {
            for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
                for extras in [(false, false), (true, false), (true, true)] {
                    check([2, 4, 2, 7, 9, 5, 3], mask, dtype, extras)?;
                    cases += 1;
                }
            }
        }
        assert_eq!(cases, 84);
        Ok(())
    }

    /// Several blocks of rows, chunks of blocks and blocks of keys, and rows of several heads in a block.
    #[test]
    fn several_blocks_equal_one_product() -> Result<()> {
        for (sizes, mask) in [
            ([1, 2, 1, 301, 301, 3, 4], Mask::causal(0)),
            ([1, 1, 1, 530, 530, 2, 2], Mask::window(40, 0)),
            ([1, 2, 2, 65, 520, 3, 2], Mask::none()),
            ([2, 6, 2, 1, 700, 4, 3], Mask::causal(699)),
            ([1, 1, 1, 300, 300, 2, 2], Mask::causal(0).packed(vec![vec![0, 100, 257, 300]])),
        ] {
            check(sizes, &mask, DType::F64, (true, true))?;
            check(sizes, &mask, DType::F64, (false, false))?;
        }
        Ok(())
    }
}
