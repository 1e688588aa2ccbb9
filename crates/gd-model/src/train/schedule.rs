//! The values that a step takes from the schedules of its run.

use gd_kernels::Mask;

use crate::config::TrainConfig;

/// Every scheduled value of a step. It depends on the configuration and the number of the step alone, so that a run may
/// be resumed with another number of steps if the values of the steps that it has done stay the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScheduledValues {
    /// The learning rate.
    pub lr: f64,
    /// Whether the step aligns layers with those of the teacher.
    pub layer_alignment: bool,
    /// The number of candidates per query, if it is scheduled.
    pub candidates: Option<usize>,
    /// The weight of the hard forward pass.
    pub hardness: f64,
    /// The preserve floor of the gradient, if it is scheduled.
    pub preserve_floor: Option<f64>,
    /// The temperature of the softmax in the gradient, if it is scheduled.
    pub temperature: Option<f64>,
    /// The offset of the thresholds, if it is scheduled.
    pub threshold: Option<f64>,
}

impl ScheduledValues {
    /// The values of `step`, counted from 0.
    pub fn at(train: &TrainConfig, step: u64) -> Self {
        let mask = Mask::causal(0);
        let pass = train.select.pass(&mask, progress(train, step));
        Self {
            lr: train.lr.lr(step, train.steps),
            layer_alignment: train.aligns(step),
            candidates: pass.candidates,
            hardness: pass.hardness,
            preserve_floor: pass.preserve_floor,
            temperature: pass.temperature,
            threshold: pass.threshold,
        }
    }
}

/// The fraction of all steps that are done before `step`.
pub(super) fn progress(train: &TrainConfig, step: u64) -> f64 {
    step as f64 / train.steps.max(1) as f64
}
