//! A projection whose weights may be stored in half precision or in blocks of integers: `y = x Wᵀ + b`.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor, bail};
use candle_nn::{Init, VarBuilder};
use gd_kernels::{LowRank, QuantizedMatrix, linears, low_rank_linear, quantized_linear, quantized_linears};

use crate::adapter_dropout::AdapterDropout;

/// A projection: x `[.., I]` -> `[.., O]` in the dtype of x; see [`gd_kernels::linear`] for weights in f16 or bf16
/// under f32 activations, and [`gd_kernels::quantized_linear`] for quantised weights.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
}

/// A weight `[O, I]`.
#[derive(Debug, Clone)]
enum Weight {
    Tensor(Tensor),
    Quantized {
        matrix: Arc<QuantizedMatrix>,
        /// The first of the rows of the matrix that belong to the projection, and their number.
        first: usize,
        count: usize,
    },
}

/// A trained matrix of low rank beside the frozen weight of a projection (LoRA), whose sum is `W + scale B A`.
#[derive(Debug, Clone)]
struct Adapter {
    /// `[R, I]`.
    a: Tensor,
    /// `[O, R]`.
    b: Tensor,
    scale: f64,
    /// Dropout in trainings, and the seed of this projection.
    dropout: Option<(Arc<AdapterDropout>, u64)>,
}

impl Linear {
    /// From weight `[O, I]` and bias `[O]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight: Weight::Tensor(weight), bias, adapter: None }
    }

    /// Replaces the weight by a quantised one `[O, I]`. From then on the projection has no gradients.
    ///
    /// # Errors
    /// Another shape, or a projection with an adapter.
    pub fn set_quantized(&mut self, matrix: Arc<QuantizedMatrix>) -> Result<()> {
        let (outputs, inputs) = self.dims()?;
        if matrix.dims() != [outputs, inputs] {
            bail!("a quantized weight {:?} for a projection [{outputs}, {inputs}]", matrix.dims());
        }
        if self.adapter.is_some() {
            bail!("a quantized weight for a projection with an adapter");
        }
        self.weight = Weight::Quantized { matrix, first: 0, count: outputs };
        Ok(())
    }

    /// Adds an adapter of rank `rank` and factor `scale` with weights under `vb`, by the names of the library PEFT:
    /// `lora_A.weight` `[R, I]` and `lora_B.weight` `[O, R]`. From then on the weight and the bias get no gradient.
    ///
    /// New weights are those of PEFT: A is uniform in `± 1 / sqrt(I)`, B is 0.
    ///
    /// # Errors
    /// Weights that are missing or of another shape, or a projection with a quantised weight.
    pub fn adapt(&mut self, rank: usize, scale: f64, vb: VarBuilder) -> Result<()> {
        if matches!(self.weight, Weight::Quantized { .. }) {
            bail!("an adapter for a projection with a quantized weight");
        }
        let (outputs, inputs) = self.dims()?;
        let bound = (inputs as f64).sqrt().recip();
        let uniform = Init::Uniform { lo: -bound, up: bound };
        let a = vb.pp("lora_A").get_with_hints((rank, inputs), "weight", uniform)?;
        let b = vb.pp("lora_B").get_with_hints((outputs, rank), "weight", Init::Const(0.0))?;
        self.adapter = Some(Adapter { a, b, scale, dropout: None });
        Ok(())
    }

    /// Gives the adapter, if there is one, dropout of its inputs. `seed` is that of this projection.
    pub fn set_dropout(&mut self, dropout: &Arc<AdapterDropout>, seed: u64) {
        if let Some(adapter) = &mut self.adapter {
            adapter.dropout = Some((dropout.clone(), seed));
        }
    }

    /// The weight if the projection is the product with this tensor and its bias alone: it has no adapter, and the weight is
    /// not quantised.
    pub fn plain_weight(&self) -> Option<&Tensor> {
        match (&self.weight, &self.adapter) {
            (Weight::Tensor(weight), None) => Some(weight),
            _ => None,
        }
    }

    /// The weight `[O, I]` as it is stored, or dequantised, without that of an adapter.
    ///
    /// # Errors
    /// An error of candle.
    pub fn weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Tensor(weight) => Ok(weight.clone()),
            Weight::Quantized { matrix, first, count } => {
                let rows: Vec<u32> = (*first..first + count).map(|row| row as u32).collect();
                Ok(matrix.dequantize_rows(&rows)?)
            }
        }
    }

    /// The numbers of outputs and inputs.
    ///
    /// # Errors
    /// A weight of another rank.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match &self.weight {
            Weight::Tensor(weight) => weight.dims2(),
            Weight::Quantized { matrix, count, .. } => Ok((*count, matrix.dims()[1])),
        }
    }

    /// The bias `[O]`, if the projection has one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The outputs of several projections for the same x: those of [`Linear::forward`](Module::forward), with the same bits.
    /// Where it can, it computes all of them in one operator; see [`gd_kernels::linears`] and
    /// [`gd_kernels::quantized_linears`].
    ///
    /// # Errors
    /// As `forward`.
    pub fn forward_all<const N: usize>(projections: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let plain = projections.map(|p| Some((p.plain_weight()?, p.bias())));
        if let Some(plain) = all_of(plain) {
            return Ok(linears(x, plain)?);
        }
        let quantized = projections.map(|p| Some((p.whole_matrix()?, p.bias())));
        if let Some(quantized) = all_of(quantized) {
            return Ok(quantized_linears(x, quantized)?);
        }
        let outputs = projections.iter().map(|p| p.forward(x)).collect::<Result<Vec<_>>>()?;
        let Ok(outputs) = outputs.try_into() else { unreachable!("an output for each projection") };
        Ok(outputs)
    }

    /// The quantised matrix whose rows are the weight.
    fn whole_matrix(&self) -> Option<&QuantizedMatrix> {
        match &self.weight {
            Weight::Quantized { matrix, count, .. } if *count == matrix.dims()[0] => Some(matrix),
            _ => None,
        }
    }

    /// The projection to `count` of the outputs, from `first` on. That of a quantised weight computes all outputs.
    pub(crate) fn outputs(&self, first: usize, count: usize) -> Result<Self> {
        let part = |x: &Tensor| x.narrow(0, first, count);
        let adapter = self
            .adapter
            .as_ref()
            .map(|adapter| -> Result<Adapter> { Ok(Adapter { b: part(&adapter.b)?, ..adapter.clone() }) });
        let weight = match &self.weight {
            Weight::Tensor(weight) => Weight::Tensor(part(weight)?),
            Weight::Quantized { matrix, first: before, .. } => {
                Weight::Quantized { matrix: matrix.clone(), first: before + first, count }
            }
        };
        Ok(Self { weight, bias: self.bias.as_ref().map(part).transpose()?, adapter: adapter.transpose()? })
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_ref();
        match (&self.weight, &self.adapter) {
            (Weight::Tensor(weight), None) => Ok(gd_kernels::linear(x, weight, bias)?),
            (Weight::Tensor(weight), Some(Adapter { a, b, scale, dropout })) => {
                let dropout = dropout.as_ref().and_then(|(dropout, seed)| dropout.of(*seed, x));
                Ok(low_rank_linear(x, weight, bias, LowRank { a, b, scale: *scale, dropout })?)
            }
            (Weight::Quantized { matrix, first, count }, _) => {
                if let Some(matrix) = self.whole_matrix() {
                    return Ok(quantized_linear(x, matrix, bias)?);
                }
                let all = quantized_linear(x, matrix, None)?;
                let y = all.narrow(all.rank() - 1, *first, *count)?;
                bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(&bias.to_dtype(y.dtype())?))
            }
        }
    }
}

/// The values if there are all of them.
fn all_of<T, const N: usize>(values: [Option<T>; N]) -> Option<[T; N]> {
    values.into_iter().flatten().collect::<Vec<_>>().try_into().ok()
}

/// A projection with weights under `vb`: `weight [outputs, inputs]` and, with `bias`, `bias [outputs]`.
///
/// New weights are normal with standard deviation `1 / sqrt(inputs)`, or 0 for a projection that adds to the residual
/// stream (`residual`); a new bias is 0.
///
/// # Errors
/// Weights that are missing or of another shape.
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

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn some_outputs_are_those_of_the_whole_projection() -> Result<()> {
        let weight = Tensor::arange(0f32, 24.0 * 32.0, &Device::Cpu)?.reshape((24, 32))?.sin()?;
        let bias = Tensor::arange(0f32, 24.0, &Device::Cpu)?;
        let stored = QTensor::quantize(&weight, GgmlDType::Q8_0)?;
        let matrix = Arc::new(QuantizedMatrix::new(GgmlDType::Q8_0, [24, 32], &stored.data()?)?);
        let mut quantized = Linear::new(Tensor::zeros((24, 32), DType::F32, &Device::Cpu)?, Some(bias));
        quantized.set_quantized(matrix)?;
        let x = Tensor::arange(0f32, 96.0, &Device::Cpu)?.reshape((3, 32))?.cos()?;
        let (all, weight) = (quantized.forward(&x)?, quantized.weight()?);
        let part = quantized.outputs(5, 9)?.outputs(2, 4)?;
        assert_eq!(part.dims()?, (4, 32));
        assert_eq!(part.forward(&x)?.to_vec2::<f32>()?, all.narrow(1, 7, 4)?.to_vec2::<f32>()?);
        assert_eq!(part.weight()?.to_vec2::<f32>()?, weight.narrow(0, 7, 4)?.to_vec2::<f32>()?);
        Ok(())
    }
}
