//! What a step cost: utilisation and memory, beside what the trainer reports.

use candle_core::Device;
use serde::Serialize;

use super::Event;
use crate::config::Recipe;
use crate::config::device;
use crate::error::Result;
use crate::model::flops;
use crate::train::memory;
use crate::train::step::Step;

/// The line of a step.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    /// What the trainer reports.
    #[serde(flatten)]
    pub step: &'a Step,
    /// Model FLOPs utilisation: operations a second, as [`flops::per_token`] counts them, over the
    /// rate of a matrix product.
    pub mfu: f64,
    /// Resident memory of the process, MiB; null where the system does not tell.
    pub resident_mib: Option<f64>,
    /// Its peak so far.
    pub peak_mib: Option<f64>,
}

/// Knows what a token costs and what the device could do.
#[derive(Debug, Default)]
pub struct Meter {
    flops_per_token: f64,
    peak_flops: f64,
    device: String,
}

impl Meter {
    /// Measures the device, in a fraction of a second. With several processes the others' devices are
    /// taken to be as fast.
    ///
    /// # Errors
    /// What the device reports.
    pub fn new(recipe: &Recipe, device: &Device, processes: usize) -> Result<Self> {
        Ok(Self {
            flops_per_token: flops::per_token(&recipe.model, recipe.train.context),
            peak_flops: flops::peak(recipe.train.precision(device).dtype(), device)? * processes as f64,
            device: device::name(device),
        })
    }

    /// The event with which a run begins or goes on.
    pub(super) fn start(&self, parameters: usize, seed: u64) -> Event {
        Event::Start {
            version: env!("CARGO_PKG_VERSION"),
            device: self.device.clone(),
            threads: rayon::current_num_threads(),
            parameters,
            seed,
            peak_flops: self.peak_flops,
            flops_per_token: self.flops_per_token,
        }
    }

    /// The line of a step.
    pub(super) fn line<'a>(&self, step: &'a Step) -> Line<'a> {
        let (resident_mib, peak_mib) = (memory::resident(), memory::peak());
        let mfu = step.tokens_per_second * self.flops_per_token / self.peak_flops;
        Line { step, mfu, resident_mib, peak_mib }
    }
}
