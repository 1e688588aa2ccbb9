//! Chooses between the CPU and a GPU by the device of a tensor.

use candle_core::{Device, Tensor};

#[cfg(feature = "emulate")]
pub(crate) use crate::backend::gpu::emulated;
use crate::error::{Error, Result};

/// Evaluates `$body` with `$gpu` as the backend of `$device` and returns it from the function around; goes on where
/// no backend of this build covers the device.
macro_rules! on_gpu {
    ($device:expr, $gpu:ident => $body:expr) => {
        #[cfg(feature = "cuda")]
        if $device.is_cuda() {
            type $gpu = crate::backend::cuda::Cuda;
            return $body;
        }
        #[cfg(feature = "metal")]
        if $device.is_metal() {
            type $gpu = crate::backend::metal::Metal;
            return $body;
        }
        #[cfg(feature = "emulate")]
        if !crate::backend::dispatch::on_cpu($device) {
            type $gpu = crate::backend::gpu::Emulated;
            return $body;
        }
    };
}
pub(crate) use on_gpu;

/// Whether operators on tensors of `device` run on the CPU. All code that does one thing there and another on a
/// GPU asks here, since tests have GPUs stand for the CPU (feature `emulate`).
pub fn on_cpu(device: &Device) -> bool {
    #[cfg(feature = "emulate")]
    if emulated().is_some() {
        return false;
    }
    device.is_cpu()
}

/// The error of an operator that runs on a GPU alone.
pub(crate) fn refused<T>(op: &str, t: &Tensor) -> Result<T> {
    let device = t.device().location();
    Err(Error::Unsupported(format!("{op} on {device:?}: no GPU of this build")))
}
