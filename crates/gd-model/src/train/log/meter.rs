//! The line of a step in the log: the report of the trainer with utilization and memory.

use candle_core::Device;
use gd_kernels::with_matmul_precision;
use serde::Serialize;

use super::Event;
use crate::config::Recipe;
use crate::config::device;
use crate::error::Result;
use crate::model::{adapter, flops};
use crate::train::memory;
use crate::train::step::Step;

/// The line of a step in the log.
#[derive(Debug, Serialize)]
pub struct Line<'a> {
    /// The report of the trainer.
    #[serde(flatten)]
    pub step: &'a Step,
    /// Model FLOPs utilization: the operations per second, as [`flops::per_token`] counts them, divided by the rate of a
    /// matrix product on the device.
    pub mfu: f64,
    /// The resident memory of the process in MiB; `None` if the system does not report it.
    pub resident_mib: Option<f64>,
    /// The peak of the resident memory in MiB so far.
    pub peak_mib: Option<f64>,
}

/// Measures the utilization of the device.
#[derive(Debug, Default)]
pub struct Meter {
    flops_per_token: f64,
    peak_flops: f64,
    device: String,
    precision: &'static str,
}

impl Meter {
    /// Measures the rate of matrix products on the device, which takes a fraction of a second. The devices of other
    /// processes are assumed to be equally fast.
    ///
    /// # Errors
    /// An error of the device.
    pub fn new(recipe: &Recipe, device: &Device, processes: usize) -> Result<Self> {
        let precision = recipe.train.precision(device);
        let peak_flops =
            with_matmul_precision(precision.matmul(), || flops::peak(precision.dtype(), device))?;
        let (model, context) = (&recipe.model, recipe.train.context);
        let flops_per_token = match &recipe.train.lora {
            Some(lora) => flops::per_token_of_adapter(model, context, adapter::size(lora, model)?),
            None => flops::per_token(model, context),
        };
        Ok(Self {
            flops_per_token,
            peak_flops: peak_flops * processes as f64,
            precision: precision.name(),
            device: device::name(device),
        })
    }

    /// The event at the start or the resumption of a run.
    pub(super) fn start(&self, parameters: usize, seed: u64) -> Event {
        Event::Start {
            version: env!("CARGO_PKG_VERSION"),
            device: self.device.clone(),
            precision: self.precision,
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
