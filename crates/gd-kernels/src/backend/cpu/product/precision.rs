//! The precision of products of f32 matrices.

use std::cell::Cell;

/// The precision in which f32 matrices are multiplied on the CPU.
///
/// See [`with_matmul_precision`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MatmulPrecision {
    /// The elements as they are.
    #[default]
    F32,
    /// The elements of both factors rounded to bf16, with sums in f32.
    Bf16,
}

thread_local! {
    static CURRENT: Cell<MatmulPrecision> = const { Cell::new(MatmulPrecision::F32) };
}

impl MatmulPrecision {
    /// The faster one on this machine: bf16 on x86-64 processors with AMX, else f32.
    pub fn fastest() -> Self {
        #[cfg(target_arch = "x86_64")]
        if crate::backend::cpu::amx::available() {
            return Self::Bf16;
        }
        Self::F32
    }

    /// That of the products which this thread starts now.
    pub(crate) fn current() -> Self {
        CURRENT.get()
    }
}

/// Calls `f`; products of f32 matrices that it starts on this thread have this precision.
///
/// This is the mixed precision of PyTorch's `torch.autocast` with f32 results: it concerns [`linear`](crate::linear) and
/// the products of [`cross_entropy`](crate::cross_entropy) on f32 tensors of the CPU with 32 rows or more, in the forward
/// pass and in the gradients that belong to it, wherever these are computed. Inputs, results and gradients stay f32. With
/// AMX, bf16 products are several times as fast as f32; other machines compute them in f32 from rounded elements, which is
/// not faster. The results do not depend on the number of threads, but the order of additions differs with and without AMX.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_kernels::{MatmulPrecision, with_matmul_precision};
///
/// let x = (Tensor::ones((32, 2), DType::F32, &Device::Cpu)? * (1.0 + 1.0 / 1024.0))?;
/// let weight = Tensor::ones((3, 2), DType::F32, &Device::Cpu)?;
/// // bf16 has 8 bits of precision.
/// let y = with_matmul_precision(MatmulPrecision::Bf16, || gd_kernels::linear(&x, &weight, None))?;
/// assert_eq!(y.to_vec2::<f32>()?[0], [2.0; 3]);
/// # Ok::<(), gd_kernels::Error>(())
/// ```
pub fn with_matmul_precision<R>(precision: MatmulPrecision, f: impl FnOnce() -> R) -> R {
    /// Restores the precision, also after a panic.
    struct Restore(MatmulPrecision);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let _restore = Restore(CURRENT.replace(precision));
    f()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_precision_is_that_of_the_innermost_scope() {
        with_matmul_precision(MatmulPrecision::Bf16, || {
            let panicked = std::panic::catch_unwind(|| {
                with_matmul_precision(MatmulPrecision::F32, || {
                    assert_eq!(MatmulPrecision::current(), MatmulPrecision::F32);
                    std::panic::resume_unwind(Box::new("ends the scope"));
                })
            });
            assert!(panicked.is_err());
            assert_eq!(MatmulPrecision::current(), MatmulPrecision::Bf16);
        });
        assert_eq!(MatmulPrecision::current(), MatmulPrecision::F32);
    }
}
