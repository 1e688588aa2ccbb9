//! Chooses between the CPU and a GPU by the device of a tensor.

use candle_core::{Device, Tensor};

#[cfg(feature = "emulate")]
pub(crate) use crate::backend::gpu::emulated;
use crate::error::{Error, Result};

/// If a GPU backend of this build covers `$device`, evaluates `$body` with the type `$gpu` of that backend and returns
/// the value from the enclosing function.
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

/// Whether operators on tensors of `device` run on the CPU. Code that depends on the device calls this and not
/// [`Device::is_cpu`], because with the feature `emulate` tensors on the CPU can be those of an emulated GPU.
pub(crate) fn on_cpu(device: &Device) -> bool {
    #[cfg(feature = "emulate")]
    if emulated().is_some() {
        return false;
    }
    device.is_cpu()
}

/// The error of an operator that runs on GPUs only.
pub(crate) fn refused<T>(op: &str, t: &Tensor) -> Result<T> {
    let device = t.device().location();
    Err(Error::Unsupported(format!("{op} on {device:?}, which is not a GPU that this build supports")))
}
