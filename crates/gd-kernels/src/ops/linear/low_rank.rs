//! A projection with frozen weights and a trained matrix of low rank beside them (LoRA, Hu et al., arXiv 2106.09685).

use candle_core::Tensor;

use super::cpu::rows_of;
use super::dropout::Dropout;
use super::linear;
use crate::backend::cpu::product::{MatmulPrecision, product, with_matmul_precision};
use crate::backend::graph::{Finished, attach3};
use crate::backend::span::{Pass, operator_span};
use crate::error::{Error, Result};

/// The name of the operator in candle's graph.
const NAME: &str = "low_rank_linear";

/// What is added to the weights `[O, I]` of a projection: `scale b a`.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// `[R, I]`.
    pub a: &'a Tensor,
    /// `[O, R]`.
    pub b: &'a Tensor,
    /// The factor, alpha / R in LoRA.
    pub scale: f64,
    /// Dropout of what is multiplied by `a`; none outside of a training.
    pub dropout: Option<Dropout>,
}

/// Projects the last dimension of `x` by the weights `weight + scale b a`, whose sum is not formed:
/// `x weightᵀ + bias + scale (x aᵀ) bᵀ`.
///
/// * `x`: `[.., I]`, f64, f32, f16 or bf16.
/// * `weight`: `[O, I]`; `bias`: `[O]`; see [`linear`].
/// * `added`: `a` `[R, I]` and `b` `[O, R]` in the dtype of `x`. With dropout, x after it takes the place of x in the second
///   product alone, as in the library PEFT.
///
/// Returns `[.., O]` in the dtype of `x`. `x`, `a` and `b` get gradients, `weight` and `bias` none. The backward pass
/// therefore has two products with matrices of the size of `weight` where that of [`linear`] has three.
///
/// # Errors
/// [`Error::Invalid`] for shapes that do not fit, or a probability of dropout outside of [0, 1).
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use gd_kernels::{LowRank, low_rank_linear};
///
/// let weight = Tensor::new(&[[1f32, 0.0], [0.0, 1.0]], &Device::Cpu)?;
/// let (a, b) = (Var::new(&[[1f32, 1.0]], &Device::Cpu)?, Var::new(&[[0f32], [1.0]], &Device::Cpu)?);
/// let x = Tensor::new(&[[2f32, 3.0]], &Device::Cpu)?;
/// let y = low_rank_linear(&x, &weight, None, LowRank { a: &a, b: &b, scale: 2.0, dropout: None })?;
/// assert_eq!(y.to_vec2::<f32>()?, [[2.0, 13.0]]);
/// assert!(y.sum_all()?.backward()?.get(&b).is_some());
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn low_rank_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    added: LowRank<'_>,
) -> Result<Tensor> {
    let _span = operator_span(NAME, Pass::Forward);
    let LowRank { a, b, scale, dropout } = added;
    let fits = match (x.dims(), weight.dims(), a.dims(), b.dims()) {
        ([.., c], [o, i], [r, a], [b, s]) => c == i && i == a && o == b && r == s,
        _ => false,
    };
    if !fits {
        return Err(Error::Invalid(format!(
            "{NAME}: x {:?}, weight {:?}, a {:?} and b {:?}; [.., I], [O, I], [R, I] and [O, R] expected",
            x.dims(),
            weight.dims(),
            a.dims(),
            b.dims()
        )));
    }
    dropout.map_or(Ok(()), Dropout::validate)?;
    let scale = scale * dropout.map_or(1.0, Dropout::factor);
    // What is left of rows after dropout, without its factor. The backward pass computes the mask again and does not store it.
    let masked = move |rows: Tensor| match dropout {
        Some(dropout) => &rows * dropout.mask(&rows)?,
        None => Ok(rows),
    };
    let precision = MatmulPrecision::current();
    let weight = weight.detach();
    let y = linear(&x.detach(), &weight, bias.map(Tensor::detach).as_ref())?;
    let low = product(&product(&masked(rows_of(x)?)?, &a.t()?)?, &b.t()?)?;
    let y = Finished::copy_of(&(&y + (low.reshape(y.shape())? * scale)?)?)?;
    Ok(attach3(NAME, [x, a, b], y, move |[x, a, b], _, dy| {
        with_matmul_precision(precision, || {
            let (rows, dy) = (masked(rows_of(x)?)?, rows_of(dy)?);
            let dlow = (product(&dy, b)? * scale)?;
            let dx = || {
                let dx = product(&dy, &weight.to_dtype(dy.dtype())?)?;
                (dx + masked(product(&dlow, a)?)?)?.reshape(x.shape())
            };
            let db = (product(&dy.t()?, &product(&rows, &a.t()?)?)? * scale)?;
            let dx = x.track_op().then(dx).transpose()?;
            Ok([dx, Some(product(&dlow.t()?, &rows)?), Some(db)])
        })
    })?)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Result, Var};

    use super::*;
    use crate::ops::agreement::{agree, noise};

    #[test]
    fn it_is_the_projection_by_the_sum_of_the_weights() -> Result<()> {
        let (weight, bias) = (noise(8, &[6, 10], DType::F64)?, noise(9, &[6], DType::F64)?);
        for lead in [&[40][..], &[3, 17], &[2, 3]] {
            let x = noise(1, &[lead, &[10]].concat(), DType::F64)?;
            let inputs = [x, noise(2, &[4, 10], DType::F64)?, noise(3, &[6, 4], DType::F64)?];
            agree(
                &inputs,
                |t| {
                    let added = LowRank { a: &t[1], b: &t[2], scale: 1.5, dropout: None };
                    Ok(low_rank_linear(&t[0], &weight, Some(&bias), added)?)
                },
                |t| {
                    let sum = (&weight + (t[2].matmul(&t[1])? * 1.5)?)?;
                    t[0].broadcast_matmul(&sum.t()?)?.broadcast_add(&bias)
                },
            )?;
        }
        Ok(())
    }

    #[test]
    fn dropout_changes_the_input_of_the_added_matrix_alone() -> Result<()> {
        let weight = noise(8, &[6, 10], DType::F64)?;
        let dropout = Dropout { probability: 0.4, seed: 5, first: 3 };
        let inputs = [
            noise(1, &[3, 17, 10], DType::F64)?,
            noise(2, &[4, 10], DType::F64)?,
            noise(3, &[6, 4], DType::F64)?,
        ];
        let mask = dropout.mask(&rows_of(&inputs[0])?)?.reshape((3, 17, 10))?;
        agree(
            &inputs,
            |t| {
                let added = LowRank { a: &t[1], b: &t[2], scale: 1.5, dropout: Some(dropout) };
                Ok(low_rank_linear(&t[0], &weight, None, added)?)
            },
            |t| {
                let masked = ((&t[0] * &mask)? * (1.0 / 0.6))?;
                let low = masked.broadcast_matmul(&t[1].t()?)?.broadcast_matmul(&t[2].t()?)?;
                t[0].broadcast_matmul(&weight.t()?)? + (low * 1.5)?
            },
        )?;
        let [x, a, b] = &inputs;
        for probability in [1.0, -0.1, f64::NAN] {
            let dropout = Some(Dropout { probability, ..dropout });
            let error = low_rank_linear(x, &weight, None, LowRank { a, b, scale: 1.0, dropout }).unwrap_err();
            assert!(error.to_string().contains(&probability.to_string()), "{error}");
        }
        Ok(())
    }

    #[test]
    fn frozen_weights_get_no_gradient() -> Result<()> {
        let var = |seed, shape: &[usize]| Var::from_tensor(&noise(seed, shape, DType::F32)?);
        let (x, weight, a, b) = (var(1, &[40, 10])?, var(2, &[6, 10])?, var(3, &[4, 10])?, var(4, &[6, 4])?);
        let y = low_rank_linear(&x, &weight, None, LowRank { a: &a, b: &b, scale: 1.0, dropout: None })?;
        let grads = y.sum_all()?.backward()?;
        assert!([&x, &a, &b].iter().all(|var| grads.get(var).is_some()) && grads.get(&weight).is_none());
        // Without a graph before x, there is none of x either.
        let y =
            low_rank_linear(&x.detach(), &weight, None, LowRank { a: &a, b: &b, scale: 1.0, dropout: None })?;
        assert!(y.sum_all()?.backward()?.get(&x).is_none());
        let error = low_rank_linear(&x, &weight, None, LowRank { a: &b, b: &a, scale: 1.0, dropout: None });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("a [6, 4]"), "{error}");
        Ok(())
    }
}
