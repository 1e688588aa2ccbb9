//! A projection whose weights may be stored in half precision: `y = x Wᵀ + b`.

use std::sync::Arc;

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use gd_kernels::{LowRank, low_rank_linear};

use crate::adapter_dropout::AdapterDropout;

/// A projection: x `[.., I]` -> `[.., O]` in the dtype of x; see [`gd_kernels::linear`] for weights in f16 or bf16
/// under f32 activations.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
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
        Self { weight, bias, adapter: None }
    }

    /// Adds an adapter of rank `rank` and factor `scale` with weights under `vb`, by the names of the library PEFT:
    /// `lora_A.weight` `[R, I]` and `lora_B.weight` `[O, R]`. From then on the weight and the bias get no gradient.
    ///
    /// New weights are those of PEFT: A is uniform in `± 1 / sqrt(I)`, B is 0.
    ///
    /// # Errors
    /// Weights that are missing or of another shape.
    pub fn adapt(&mut self, rank: usize, scale: f64, vb: VarBuilder) -> Result<()> {
        let (outputs, inputs) = self.weight.dims2()?;
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

    /// Whether the projection has an adapter, so that its [`weight`](Linear::weight) is not all of it.
    pub fn is_adapted(&self) -> bool {
        self.adapter.is_some()
    }

    /// The weight `[O, I]` as it is stored, without that of an adapter.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[O]`, if the projection has one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The projection to `count` of the outputs, from `first` on.
    pub(crate) fn outputs(&self, first: usize, count: usize) -> Result<Self> {
        let part = |x: &Tensor| x.narrow(0, first, count);
        let adapter = self
            .adapter
            .as_ref()
            .map(|adapter| -> Result<Adapter> { Ok(Adapter { b: part(&adapter.b)?, ..adapter.clone() }) });
        Ok(Self {
            weight: part(&self.weight)?,
            bias: self.bias.as_ref().map(part).transpose()?,
            adapter: adapter.transpose()?,
        })
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match &self.adapter {
            None => gd_kernels::linear(x, &self.weight, self.bias.as_ref())?,
            Some(Adapter { a, b, scale, dropout }) => {
                let dropout = dropout.as_ref().and_then(|(dropout, seed)| dropout.of(*seed, x));
                let added = LowRank { a, b, scale: *scale, dropout };
                low_rank_linear(x, &self.weight, self.bias.as_ref(), added)?
            }
        })
    }
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
