//! Projections between hidden states `[B, N, C]` and heads `[B, H, N, D]`.

mod cpu;

use candle_core::Tensor;

use crate::backend::cpu::product::computes;
use crate::error::{Error, Result};
use crate::ops::linear::linear;
use crate::ops::rms_norm::rms_norm;
use crate::ops::rotary::{self, rotary};

/// What follows the product of a projection to heads.
#[derive(Debug, Clone, Copy)]
pub struct HeadProjection<'a> {
    /// D.
    pub head_dim: usize,
    /// A bias `[H D]` of the projection.
    pub bias: Option<&'a Tensor>,
    /// A normalisation of every head: its weight `[D]`, and the number that it adds to the mean of the squares; see
    /// [`rms_norm`](crate::rms_norm).
    pub norm: Option<(&'a Tensor, f64)>,
    /// A rotary embedding of every head.
    pub rotation: Option<Rotation<'a>>,
}

/// A rotary embedding; see [`rotary`](crate::rotary).
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// The cosines of the angles `[positions, D / 2]`.
    pub cos: &'a Tensor,
    /// The sines of the angles `[positions, D / 2]`.
    pub sin: &'a Tensor,
    /// The position of row 0, one for all batch entries or one for each.
    pub offsets: &'a [usize],
}

/// The heads `[B, H, N, D]` of the projection `x weightᵀ` of `x` `[B, N, C]` by `weight` `[H D, C]`, normalised and rotated as
/// `heads` says.
///
/// All of them get gradients. On the CPU a training in f32 or f64 without a bias computes this as one operator, for the reason given at [`feed_forward`](crate::feed_forward); elsewhere it is composed of
/// [`linear`](crate::linear), [`rms_norm`](crate::rms_norm) and [`rotary`](crate::rotary).
///
/// # Errors
/// [`Error::Invalid`] if the shapes do not fit, else those of the composed operators.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_kernels::{HeadProjection, project_to_heads};
///
/// let x = Tensor::ones((2, 5, 8), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((12, 8), DType::F32, &Device::Cpu)?;
/// let heads = HeadProjection { head_dim: 4, bias: None, norm: None, rotation: None };
/// assert_eq!(project_to_heads(&x, &weight, &heads)?.dims(), [2, 3, 5, 4]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn project_to_heads(x: &Tensor, weight: &Tensor, heads: &HeadProjection<'_>) -> Result<Tensor> {
    let HeadProjection { head_dim, bias, norm, rotation } = *heads;
    let ([b, n, c], [outputs, inputs]) = (x.dims(), weight.dims()) else {
        return Err(invalid("project_to_heads", x, weight, head_dim));
    };
    let (b, n) = (*b, *n);
    let norm_fits = norm.is_none_or(|(weight, _)| weight.dims() == [head_dim]);
    if c != inputs || head_dim == 0 || !outputs.is_multiple_of(head_dim) || !norm_fits {
        return Err(invalid("project_to_heads", x, weight, head_dim));
    }
    let parameters = [Some(weight), norm.map(|(weight, _)| weight)];
    let parameters = parameters.iter().flatten();
    let one_dtype = parameters.clone().all(|t| t.dtype() == x.dtype());
    let differentiate = parameters.chain(&[x]).any(|t| t.track_op());
    if bias.is_none() && one_dtype && differentiate && computes(b * n, x.dtype(), x.device()) {
        if let Some(Rotation { cos, sin, offsets }) = rotation {
            rotary::validate(&[b, outputs / head_dim, n, head_dim], cos, sin, offsets)?;
        }
        return cpu::project_to_heads(x, weight, heads);
    }
    let y = linear(x, weight, bias)?.reshape((b, n, (), head_dim))?;
    let y = match norm {
        Some((weight, eps)) => rms_norm(&y, weight, eps)?,
        None => y,
    };
    let y = y.transpose(1, 2)?;
    match rotation {
        Some(Rotation { cos, sin, offsets }) => rotary(&y, cos, sin, offsets),
        None => Ok(y),
    }
}

/// The projection `[B, N, C]` of the heads `y` `[B, H, N, D]`, side by side in every row, by `weight` `[C, H D]`, plus `bias`
/// `[C]`.
///
/// All of them get gradients. As [`project_to_heads`], it is one operator where a training computes it on the CPU without a
/// bias.
///
/// # Errors
/// As [`project_to_heads`].
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
///
/// let y = Tensor::ones((2, 3, 5, 4), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((8, 12), DType::F32, &Device::Cpu)?;
/// assert_eq!(gd_kernels::project_from_heads(&y, &weight, None)?.dims(), [2, 5, 8]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn project_from_heads(y: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (&[b, h, n, d], &[_, inputs]) = (y.dims(), weight.dims()) else {
        return Err(invalid("project_from_heads", y, weight, 0));
    };
    if inputs != h * d {
        return Err(invalid("project_from_heads", y, weight, d));
    }
    let differentiate = y.track_op() || weight.track_op();
    let fits = y.dtype() == weight.dtype() && computes(b * n, y.dtype(), y.device());
    if bias.is_none() && differentiate && fits {
        return cpu::project_from_heads(y, weight);
    }
    linear(&y.transpose(1, 2)?.reshape((b, n, h * d))?, weight, bias)
}

fn invalid(name: &str, x: &Tensor, weight: &Tensor, head_dim: usize) -> Error {
    Error::Invalid(format!(
        "{name}: {:?} and weight {:?} do not fit each other with a head dimension of {head_dim}",
        x.dims(),
        weight.dims()
    ))
}
