//! Rotary position embedding, half-split as in Llama; see [`gd_kernels::rotary`].

use candle_core::{DType, Device, Result, Tensor, bail};
use gd_kernels::Rotation;

/// How the frequencies are scaled for a context that is longer than in training.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum RopeScaling {
    /// No scaling.
    #[default]
    None,
    /// Position interpolation (Chen et al., arXiv 2306.15595): all frequencies are divided by one factor, so that
    /// position `p` has the angles of `p / factor`.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// As in Llama 3.1 (`rope_type` "llama3" of transformers): frequencies of at most `low_turns` turns within the
    /// trained context are divided by the factor, those of at least `high_turns` turns are not scaled, and between the
    /// two the result is interpolated linearly in the number of turns.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Turns within the trained context up to which a frequency is divided by the factor; `low_freq_factor` in
        /// transformers.
        low_turns: f64,
        /// Turns from which a frequency is not scaled, more than `low_turns`; `high_freq_factor` in transformers.
        high_turns: f64,
        /// Positions of the context in training; `original_max_position_embeddings` in transformers.
        trained_positions: usize,
    },
}

impl RopeScaling {
    /// The scaled frequency of `frequency`, both in radians per position.
    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_turns, high_turns, trained_positions } => {
                let turns = trained_positions as f64 * frequency / std::f64::consts::TAU;
                let unscaled = ((turns - low_turns) / (high_turns - low_turns)).clamp(0.0, 1.0);
                (1.0 - unscaled) * frequency / factor + unscaled * frequency
            }
        }
    }

    fn validate(self) -> Result<()> {
        let (factor, bands) = match self {
            Self::None => return Ok(()),
            Self::Linear { factor } => (factor, true),
            Self::Llama3 { factor, low_turns, high_turns, trained_positions } => {
                (factor, low_turns > 0.0 && high_turns > low_turns && trained_positions > 0)
            }
        };
        if !(factor.is_finite() && factor > 0.0 && bands) {
            bail!("rotary embedding: {self:?} does not scale by positive factors in rising bands");
        }
        Ok(())
    }
}

/// The cosines and sines of the rotary position embedding for all positions of a model.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_layer::{RopeScaling, Rotary};
///
/// let rotary = Rotary::new(8, 32, 10_000.0, RopeScaling::None, DType::F32, &Device::Cpu)?;
/// // Batch, heads, positions, head_dim; the first row is position 5.
/// let q = Tensor::ones((1, 2, 3, 8), DType::F32, &Device::Cpu)?;
/// assert_eq!(rotary.apply(&q, 5)?.dims(), [1, 2, 3, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Rotary {
    /// Cosines `[positions, D / 2]`.
    cos: Tensor,
    /// Sines `[positions, D / 2]`.
    sin: Tensor,
}

impl Rotary {
    /// Angles for `max_positions` positions and heads of `head_dim` elements, of base `theta`, in f32, or in f64 where
    /// `dtype` is.
    ///
    /// # Errors
    /// If `head_dim` is odd or 0, `theta` is not a positive number, or the scaling is not by positive factors in rising
    /// bands.
    pub fn new(
        head_dim: usize,
        max_positions: usize,
        theta: f64,
        scaling: RopeScaling,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            bail!("rotary embedding: head_dim {head_dim} is not a positive even number");
        }
        if !(theta.is_finite() && theta > 0.0) {
            bail!("rotary embedding: theta {theta} is not a positive number");
        }
        scaling.validate()?;
        let half = head_dim / 2;
        let frequency = |i: usize| scaling.apply(theta.powf(-(i as f64) / half as f64));
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        let angles = || (0..max_positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        // Rounded on the host: Metal has no f64.
        let table = |f: fn(f64) -> f64| match dtype {
            DType::F64 => {
                Tensor::from_vec(angles().map(f).collect::<Vec<_>>(), (max_positions, half), device)
            }
            _ => {
                let values: Vec<f32> = angles().map(|angle| f(angle) as f32).collect();
                Tensor::from_vec(values, (max_positions, half), device)
            }
        };
        Ok(Self { cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    /// The number of positions that can be embedded.
    pub fn max_positions(&self) -> usize {
        self.cos.dims()[0]
    }

    /// The rotation by these angles of rows that start at these positions.
    pub(crate) fn rotation<'a>(&'a self, offsets: &'a [usize]) -> Rotation<'a> {
        Rotation { cos: &self.cos, sin: &self.sin, offsets }
    }

    /// Rotates row `n` of every head of `x` `[B, H, N, D]` to position `offset + n`.
    ///
    /// # Errors
    /// If D is not the head dimension, if `offset + N` exceeds the positions, or if `x` is f64 and the angles are not,
    /// or the other way round.
    pub fn apply(&self, x: &Tensor, offset: usize) -> Result<Tensor> {
        self.apply_each(x, &[offset])
    }

    /// As [`Rotary::apply`], with an offset for every batch entry, or one for all.
    ///
    /// # Errors
    /// As [`Rotary::apply`], or offsets that are neither one nor B.
    pub fn apply_each(&self, x: &Tensor, offsets: &[usize]) -> Result<Tensor> {
        let (d, head_dim) = (x.dims4()?.3, 2 * self.cos.dim(1)?);
        if d != head_dim {
            bail!("rotary embedding: x {:?} has head dimension {d} instead of {head_dim}", x.dims());
        }
        Ok(gd_kernels::rotary(x, &self.cos, &self.sin, offsets)?)
    }
    /// As [`Rotary::apply`], for rows that hold several sequences, each from position 0: `boundaries` has the ends of the
    /// sequences `[0, e1, e2, .., N]`, for every batch entry or once for all.
    ///
    /// # Errors
    /// As [`Rotary::apply`], or boundaries beyond N.
    pub(crate) fn apply_packed(&self, x: &Tensor, boundaries: &[Vec<usize>]) -> Result<Tensor> {
        let sequences = |x: &Tensor, boundaries: &[usize]| {
            let ranges = boundaries.windows(2).filter(|ends| ends[0] < ends[1]);
            let parts = ranges.map(|ends| self.apply(&x.narrow(2, ends[0], ends[1] - ends[0])?, 0));
            Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 2)
        };
        match boundaries {
            [same] => sequences(x, same),
            each => {
                let entries = each.iter().enumerate().map(|(b, ends)| sequences(&x.narrow(0, b, 1)?, ends));
                Tensor::cat(&entries.collect::<Result<Vec<_>>>()?, 0)
            }
        }
    }
}
