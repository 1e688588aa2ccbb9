//! Dropout of the inputs of adapters in a training.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::Tensor;
use gd_kernels::Dropout;

/// The state in which nothing is dropped.
const OFF: u64 = u64::MAX;

/// Dropout of the inputs of the adapters of a model, which all of its projections share.
///
/// It is off at first and in evaluations. What is dropped depends on the seeds, on the number of the sequence in the training
/// and on the place in the sequence, so that a step can be repeated, and computed in parts.
#[derive(Debug)]
pub struct AdapterDropout {
    probability: f64,
    /// The number of the first sequence of the batch, or [`OFF`].
    first: AtomicU64,
}

impl AdapterDropout {
    /// Dropout with this probability, in [0, 1), which is off.
    pub fn new(probability: f64) -> Self {
        Self { probability, first: AtomicU64::new(OFF) }
    }

    /// Switches dropout on for a batch of sequences with the numbers from `first` on.
    pub fn start(&self, first: u64) {
        self.first.store(first, Ordering::Relaxed);
    }

    /// Switches dropout off.
    pub fn stop(&self) {
        self.first.store(OFF, Ordering::Relaxed);
    }

    /// The dropout of the input x `[B, .., I]` of the projection with this seed. None while dropout is off.
    pub(crate) fn of(&self, seed: u64, x: &Tensor) -> Option<Dropout> {
        let number = self.first.load(Ordering::Relaxed);
        let sequence: usize = x.dims().iter().skip(1).product();
        let first = number.wrapping_mul(sequence as u64);
        (number != OFF).then_some(Dropout { probability: self.probability, seed, first })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{DType, Device, Module, Result};
    use candle_nn::{VarBuilder, VarMap};

    use super::*;
    use crate::Linear;

    #[test]
    fn a_sequence_is_dropped_alike_in_every_batch_and_unlike_others() -> Result<()> {
        let (map, cpu) = (VarMap::new(), Device::Cpu);
        let mut linear = Linear::new(Tensor::zeros((5, 6), DType::F32, &cpu)?, None);
        linear.adapt(2, 1.0, VarBuilder::from_varmap(&map, DType::F32, &cpu))?;
        for var in map.all_vars() {
            var.set(&Tensor::rand(0.5f32, 1.0, var.dims(), &cpu)?)?;
        }
        let dropout = Arc::new(AdapterDropout::new(0.5));
        let x = Tensor::ones((4, 7, 6), DType::F32, &cpu)?;
        let whole = linear.forward(&x)?;
        linear.set_dropout(&dropout, 9);
        let equal = |a: &Tensor, b: &Tensor| {
            Ok::<_, candle_core::Error>((a - b)?.abs()?.sum_all()?.to_scalar::<f32>()? == 0.0)
        };
        assert!(equal(&linear.forward(&x)?, &whole)?, "it is off at first");
        dropout.start(10);
        let dropped = linear.forward(&x)?;
        assert!(equal(&linear.forward(&x)?, &dropped)?, "a repetition differs");
        dropout.start(12);
        let part = linear.forward(&x.narrow(0, 0, 2)?)?;
        assert!(equal(&part, &dropped.narrow(0, 2, 2)?)?, "the last two sequences differ");
        for (a, b) in [(0, 1), (1, 2), (0, 3)] {
            assert!(!equal(&dropped.get(a)?, &dropped.get(b)?)?, "sequences {a} and {b} are dropped alike");
        }
        dropout.stop();
        assert!(equal(&linear.forward(&x)?, &whole)?, "it is still on");
        Ok(())
    }
}
