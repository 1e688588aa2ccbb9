//! Chooses between the CPU and a GPU by the device of a tensor.

use candle_core::{Device, Tensor};

use crate::backend::cpu::awake::Awake;
use crate::backend::cpu::product::{MatmulPrecision, with_matmul_precision};
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

/// Runs a pass of many operators on tensors of `device`: on the CPU, on a thread of rayon's pool, which starts the parallel
/// loops of the operators itself. Any other thread sleeps in each of these loops until the pool has run it, and is woken then.
/// The other threads of the pool look for work until the pass ends, and do not sleep between its loops; where they find none
/// for long, they offer their cores to other threads, and sleep after about a millisecond.
///
/// The result is that of `pass` alone; products have the [`MatmulPrecision`] of the calling thread.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
///
/// let (x, weight) = (Tensor::ones((1, 2), DType::F32, &Device::Cpu)?, Tensor::ones((3, 2), DType::F32, &Device::Cpu)?);
/// let y = gd_kernels::on_pool(x.device(), || gd_kernels::linear(&x, &weight, None))?;
/// assert_eq!(y.to_vec2::<f32>()?, [[2.0; 3]]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn on_pool<R: Send>(device: &Device, pass: impl FnOnce() -> R + Send) -> R {
    if !on_cpu(device) {
        return pass();
    }
    let precision = MatmulPrecision::current();
    rayon::scope(|_| {
        let _awake = Awake::new();
        with_matmul_precision(precision, pass)
    })
}

/// The error of an operator that runs on GPUs only.
pub(crate) fn refused<T>(op: &str, t: &Tensor) -> Result<T> {
    let device = t.device().location();
    Err(Error::Unsupported(format!("{op} on {device:?}, which is not a GPU that this build supports")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_on_the_pool_has_the_precision_of_its_caller() {
        let within = || (rayon::current_thread_index().is_some(), MatmulPrecision::current());
        assert_eq!(on_pool(&Device::Cpu, within), (true, MatmulPrecision::F32));
        let rounded = with_matmul_precision(MatmulPrecision::Bf16, || on_pool(&Device::Cpu, within));
        assert_eq!(rounded, (true, MatmulPrecision::Bf16));
        assert_eq!(on_pool(&Device::Cpu, within), (true, MatmulPrecision::F32));
    }
}
