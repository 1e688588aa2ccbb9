//! A projection whose weights may be stored in half precision: `y = x Wᵀ + b`.
//!
//! x `[.., I]`, weight `[O, I]`, bias `[O]`, y `[.., O]` in the dtype of x. Half-precision weights under f32
//! activations give what the same weights in f32 would give, from half the memory: a decoding step does
//! little else than read them. On the CPU a few rows of x go through a fused pass over the stored weights;
//! more rows, and other devices, go through the matrix product of candle with the weights widened for it.

use candle_core::{DType, Module, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use gd_kernels::element::{Bf16, Element, F16, sum2};
use gd_kernels::fused::{Rows, attach1, attach2, cpu_slice, vectorize, with_contiguous_rows};
use gd_kernels::on_cpu;
use rayon::prelude::*;

/// The most rows of x that read the stored weights directly: with more, widening them once costs less.
const FEW: usize = 8;

/// Weight elements that one task reads.
const TASK: usize = 1 << 15;

/// A projection.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// From weight `[O, I]` and bias `[O]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// The weight `[O, I]` as it is stored.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

/// A projection with weights of standard deviation `1 / sqrt(inputs)`, or 0 for one that adds to
/// the residual stream.
pub fn linear(inputs: usize, outputs: usize, bias: bool, residual: bool, vb: VarBuilder) -> Result<Linear> {
    let init = match residual {
        true => Init::Const(0.0),
        false => Init::Randn { mean: 0.0, stdev: (inputs as f64).sqrt().recip() },
    };
    let weight = vb.get_with_hints((outputs, inputs), "weight", init)?;
    let bias = match bias {
        true => Some(vb.get_with_hints(outputs, "bias", Init::Const(0.0))?),
        false => None,
    };
    Ok(Linear::new(weight, bias))
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = product(x, &self.weight)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(&bias.to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }
}

/// `x Wᵀ`.
fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (outputs, inputs) = weight.dims2()?;
    let Some((&last, lead)) = x.dims().split_last() else { bail!("a projection of a scalar") };
    if last != inputs {
        bail!("a projection of x {:?} by weights {:?}", x.dims(), weight.dims());
    }
    let few = lead.iter().product::<usize>() <= FEW && on_cpu(x.device()) && x.dtype() == DType::F32;
    match weight.dtype() {
        DType::BF16 if few => fused::<Bf16>(x, weight, outputs),
        DType::F16 if few => fused::<F16>(x, weight, outputs),
        DType::BF16 if x.dtype() == DType::F32 => many::<Bf16>(x, weight),
        DType::F16 if x.dtype() == DType::F32 => many::<F16>(x, weight),
        _ => candle_nn::Linear::new(weight.to_dtype(x.dtype())?, None).forward(x),
    }
}

/// The same for many rows of f32, by the weights in f32.
fn many<T: Element<Acc = f32>>(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let wide = match on_cpu(weight.device()) {
        true => {
            let weight = weight.contiguous()?;
            let wide = {
                let (storage, layout) = weight.storage_and_layout();
                let (from, to) = layout.contiguous_offsets().unwrap_or_default();
                widen(&cpu_slice::<T>(&storage)?[from..to])
            };
            attach1("widen", &weight, (wide, weight.shape().clone()), |weight, dy| {
                dy.to_dtype(weight.dtype())
            })?
        }
        false => weight.to_dtype(DType::F32)?,
    };
    candle_nn::Linear::new(wide, None).forward(x)
}

/// In f32, on all threads.
fn widen<T: Element<Acc = f32>>(narrow: &[T]) -> Vec<f32> {
    let mut wide = vec![0f32; narrow.len()];
    wide.par_chunks_mut(TASK).zip(narrow.par_chunks(TASK)).for_each(|(wide, narrow)| {
        vectorize(
            #[inline(always)]
            || {
                T::widened(narrow, wide);
            },
        );
    });
    wide
}

/// The same for a few rows of f32 and weights of `T`.
fn fused<T: Element<Acc = f32>>(x: &Tensor, weight: &Tensor, outputs: usize) -> Result<Tensor> {
    let (x, weight) = (with_contiguous_rows(x)?, with_contiguous_rows(weight)?);
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let y = {
        let ((xs, xl), (ws, wl)) = (x.storage_and_layout(), weight.storage_and_layout());
        multiply(&Rows::<f32>::new(&xs, xl)?, &Rows::<T>::new(&ws, wl)?)
    };
    attach2("linear", &x, &weight, (y, shape.into()), |x, weight, dy| {
        let (outputs, inputs) = weight.dims2()?;
        let rows = dy.reshape(((), outputs))?;
        let dx = rows.matmul(&weight.to_dtype(DType::F32)?)?.reshape(x.shape())?;
        let dw = rows.t()?.matmul(&x.reshape(((), inputs))?)?.to_dtype(weight.dtype())?;
        Ok([dx, dw])
    })
}

/// y `[rows of x, rows of weight]`; every weight is read once.
fn multiply<T: Element<Acc = f32>>(x: &Rows<f32>, weight: &Rows<T>) -> Vec<f32> {
    let (rows, outputs) = (x.count(), weight.count());
    let per_task = (TASK / weight.len().max(1)).max(1);
    // Transposed, so that a task's results lie together.
    let mut turned = vec![0f32; outputs * rows];
    if rows > 0 {
        turned.par_chunks_mut(per_task * rows).enumerate().for_each(|(task, out)| {
            vectorize(
                #[inline(always)]
                || {
                    for (j, out) in out.chunks_exact_mut(rows).enumerate() {
                        let w = weight.row(task * per_task + j);
                        for (r, y) in out.iter_mut().enumerate() {
                            *y = sum2(x.row(r), w, |x, w: T| x * w.up());
                        }
                    }
                },
            );
        });
    }
    if rows == 1 {
        return turned;
    }
    (0..rows).flat_map(|r| turned.iter().skip(r).step_by(rows).copied()).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::oracle::noise;

    /// Values and gradients from f64.
    #[test]
    fn half_weights_give_what_they_give_in_full_precision() -> Result<()> {
        let mut fused_cases = 0;
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for (lead, inputs, outputs) in [
                (vec![1, 1], 7, 3),
                (vec![1, 1], 576, 1537),
                (vec![3], 65, 33),
                (vec![2, 4], 32, 70),
                (vec![3, 3], 40, 5),
                (vec![1, 0], 8, 4),
            ] {
                if dtype == DType::F32 && lead.contains(&0) {
                    // candle's own projection has no answer for no rows.
                    continue;
                }
                let shape = [&lead[..], &[inputs]].concat();
                let x = Var::from_tensor(&noise(1, &shape, DType::F32)?)?;
                let weight = Var::from_tensor(&noise(2, &[outputs, inputs], dtype)?)?;
                let bias = noise(3, &[outputs], dtype)?;
                let y = Linear::new(weight.as_tensor().clone(), Some(bias.clone())).forward(&x)?;
                let rows: usize = lead.iter().product();
                fused_cases += usize::from(rows <= FEW && dtype != DType::F32);
                let dy = noise(4, y.dims(), DType::F32)?;
                let grads = (&y * &dy)?.sum_all()?.backward()?;
                let wide = |t: &Tensor| t.detach().to_dtype(DType::F64);
                let (xw, ww, dw) = (
                    wide(&x)?.reshape((rows, inputs))?,
                    wide(&weight)?,
                    wide(&dy)?.reshape((rows, outputs))?,
                );
                let expected = [
                    (y.clone(), xw.matmul(&ww.t()?)?.broadcast_add(&wide(&bias)?)?, 1e-4),
                    (grads.get(&x).unwrap().clone(), dw.matmul(&ww)?, 1e-4),
                    (
                        grads.get(&weight).unwrap().clone(),
                        dw.t()?.matmul(&xw)?,
                        if dtype == DType::F32 { 1e-4 } else { 3e-2 },
                    ),
                ];
                for (i, (got, expected, bound)) in expected.into_iter().enumerate() {
                    if expected.elem_count() == 0 {
                        continue;
                    }
                    let got = wide(&got)?.reshape(expected.shape())?;
                    let scale = (expected.abs()? + 1.0)?;
                    let worst = (got - expected)?.abs()?.div(&scale)?.max_all()?.to_scalar::<f64>()?;
                    assert!(worst <= bound, "{dtype:?} {lead:?} {inputs} {outputs}, result {i}: {worst}");
                }
            }
        }
        assert_eq!(fused_cases, 10);
        Ok(())
    }

    #[test]
    fn a_batch_gives_each_row_what_it_gives_alone() -> Result<()> {
        let (x, w) = (noise(1, &[5, 48], DType::F32)?, noise(2, &[31, 48], DType::BF16)?);
        let strided = noise(1, &[48, 5], DType::F32)?.t()?;
        for x in [x, strided] {
            let together = product(&x, &w)?.to_vec2::<f32>()?;
            for (r, row) in together.iter().enumerate() {
                assert_eq!(&product(&x.narrow(0, r, 1)?, &w)?.to_vec2::<f32>()?[0], row);
            }
        }
        let error = product(&noise(1, &[2, 47], DType::F32)?, &w).unwrap_err().to_string();
        assert!(error.contains("[2, 47]") && error.contains("[31, 48]"), "{error}");
        Ok(())
    }
}
