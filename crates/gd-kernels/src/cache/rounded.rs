//! Rows in f32 that a cache stores in 16 bits.

use candle_core::{DType, Tensor};

use crate::backend::cpu::view::with_slices;
use crate::backend::dispatch::on_cpu;
use crate::error::{Error, Result};

/// Rows that a cache of dtype `dtype` stores: those in f32 rounded to the nearest numbers of f16 or bf16, others as they are.
/// The result has no gradient.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
///
/// let k = Tensor::new(&[[[[1f32, 1.0001]]]], &Device::Cpu)?;
/// let stored = gd_kernels::rounded_for_cache(&k, DType::F16)?;
/// assert_eq!(stored.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?, [1.0, 1.0]);
/// assert!(gd_kernels::rounded_for_cache(&(k * 1e5)?, DType::F16).is_err());
/// # Ok::<(), gd_kernels::Error>(())
/// ```
///
/// # Errors
/// On the CPU, a finite number that would be rounded to infinity.
pub fn rounded_for_cache(rows: &Tensor, dtype: DType) -> Result<Tensor> {
    let Some(limit) = overflow(dtype).filter(|_| rows.dtype() == DType::F32) else {
        return Ok(rows.detach());
    };
    if on_cpu(rows.device()) {
        let too_large = with_slices([rows], |[rows]: [&[f32]; 1]| {
            rows.iter().copied().find(|x| x.is_finite() && x.abs() >= limit)
        })?;
        if let Some(x) = too_large {
            return Err(Error::Invalid(format!(
                "{x:e} of a key or value cannot be cached in {dtype:?}, whose greatest number is {:e}; cache in another dtype",
                greatest(dtype)
            )));
        }
    }
    Ok(rows.detach().to_dtype(dtype)?)
}

/// The least number that is rounded to infinity, halfway between the greatest number and the one that would follow it.
fn overflow(dtype: DType) -> Option<f32> {
    match dtype {
        DType::F16 => Some(65_520.0),
        DType::BF16 => Some(f32::from_bits(0x7f7f_8000)),
        _ => None,
    }
}

/// The greatest number of f16 or bf16.
fn greatest(dtype: DType) -> f32 {
    if dtype == DType::F16 { half::f16::MAX.to_f32() } else { half::bf16::MAX.to_f32() }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn the_limits_are_those_of_the_conversions() {
        let before = |x: f32| f32::from_bits(x.to_bits() - 1);
        let [of_f16, of_bf16] = [DType::F16, DType::BF16].map(|dtype| overflow(dtype).unwrap());
        assert!(f16::from_f32(of_f16).is_infinite() && f16::from_f32(before(of_f16)) == f16::MAX);
        assert!(bf16::from_f32(of_bf16).is_infinite() && bf16::from_f32(before(of_bf16)) == bf16::MAX);
    }

    #[test]
    fn numbers_beyond_the_dtype_are_refused_and_infinities_are_stored() {
        let row = |x: f32| Tensor::new(&[1.0, x], &Device::Cpu).unwrap();
        for (dtype, fits, too_large) in [(DType::F16, 65_519.0, -65_520.0), (DType::BF16, 3.38e38, 3.4e38)] {
            assert_eq!(rounded_for_cache(&row(fits), dtype).unwrap().dtype(), dtype);
            let error = rounded_for_cache(&row(too_large), dtype).unwrap_err().to_string();
            assert!(
                error.contains(&format!("{too_large:e}")) && error.contains(&format!("{dtype:?}")),
                "{error}"
            );
            let infinite =
                rounded_for_cache(&row(f32::INFINITY), dtype).unwrap().to_dtype(DType::F32).unwrap();
            assert_eq!(infinite.to_vec1::<f32>().unwrap()[1], f32::INFINITY);
        }
        assert_eq!(rounded_for_cache(&row(1e30), DType::F32).unwrap().dtype(), DType::F32);
    }
}
