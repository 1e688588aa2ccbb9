//! The settings and the verdict of one AdamW update, and the layout of the sums of squares behind it.

use crate::backend::check::elements;
use crate::error::Result;

/// Elements of a gradient that one partial sum of squares covers.
pub(crate) const ELEMENTS_PER_SUM: usize = 1 << 14;

/// Where the sums of squares of several gradients lie: f32, one for each piece of a gradient.
#[derive(Debug, Clone)]
pub struct Parts {
    pub(crate) counts: Vec<usize>,
    /// Where the parts of each gradient begin, and at the end where the last ones end.
    pub(crate) starts: Vec<usize>,
}

impl Parts {
    /// For gradients of these numbers of elements.
    ///
    /// # Errors
    /// A gradient of 2^31 elements or more.
    pub fn new(counts: Vec<usize>) -> Result<Self> {
        let mut starts = vec![0];
        for &count in &counts {
            elements("a gradient", count as u128)?;
            starts.push(starts[starts.len() - 1] + count.div_ceil(ELEMENTS_PER_SUM));
        }
        elements("sums of squares", starts[counts.len()] as u128)?;
        Ok(Self { counts, starts })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.starts[self.counts.len()]
    }

    /// The first gradient whose squares, which are `parts`, have no finite sum.
    pub fn not_finite(&self, parts: &[f32]) -> Option<usize> {
        self.starts.windows(2).position(|of| parts[of[0]..of[1]].iter().any(|x| !x.is_finite()))
    }
}

/// When a gradient is clipped and when an update is skipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Gradients and loss are sums, to be divided by this.
    pub weight: f64,
    /// The norm to which a longer gradient is shortened.
    pub clip: f64,
    /// Above this loss the update is skipped.
    pub loss: f32,
    /// The same of the norm.
    pub norm: f32,
}

/// What a verdict says: three f32 in this order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// The loss.
    pub loss: f32,
    /// The norm of the gradient before clipping.
    pub norm: f32,
    /// What the summed gradients are multiplied by; not finite where the update is skipped.
    pub factor: f32,
}

impl Verdict {
    /// Whether the update changes anything.
    pub fn applies(&self) -> bool {
        self.factor.is_finite()
    }
}

/// The numbers of one update of a parameter: what is left of the settings of an optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Number of this update, from 1, if that before it was made.
    pub number: u32,
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decay of the weight, times the learning rate.
    pub weight_decay: f64,
}
