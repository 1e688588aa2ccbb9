//! Root-mean-square normalisation with a learned weight.

use candle_core::{Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};

/// `y = x / sqrt(mean(x^2) + eps) * weight` over the last dimension; see [`gd_kernels::rms_norm`].
///
/// x `[.., C]` of any strides -> `[.., C]` in the same dtype. Unlike `candle_nn::RmsNorm`, it computes the
/// gradients of x and of the weight in one fused pass.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use gd_layer::RmsNorm;
///
/// let map = VarMap::new();
/// let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
/// let norm = RmsNorm::new(4, 1e-6, vb)?;
/// let y = norm.forward(&Tensor::new(&[[2f32, -2.0, 2.0, -2.0]], &Device::Cpu)?)?;
/// assert!((y.to_vec2::<f32>()?[0][0] - 1.0).abs() < 1e-5);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Gets or creates the weight `weight [size]` under `vb`; a new one is all ones.
    ///
    /// # Errors
    /// A weight that is missing or of another shape.
    pub fn new(size: usize, eps: f64, vb: VarBuilder) -> Result<Self> {
        Ok(Self { weight: vb.get_with_hints(size, "weight", Init::Const(1.0))?, eps })
    }

    /// The learned scale `[size]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The number that is added to the mean of the squares.
    pub fn eps(&self) -> f64 {
        self.eps
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(gd_kernels::rms_norm(x, &self.weight, self.eps)?)
    }
}
