//! Energies outside of the range of their dtype: counted, or refused in checked mode.
//!
//! Such an energy is stored as the greatest number of the dtype, with its sign.

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};

/// The greatest number of the dtype of energies.
fn greatest(energy: &Tensor) -> f64 {
    if energy.dtype() == DType::F64 { f64::MAX } else { f64::from(f32::MAX) }
}

/// The elements of energies in row-major order that overflowed. On a GPU this waits for the device.
fn positions(energy: &Tensor) -> Result<Vec<usize>> {
    let values =
        energy.detach().to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let greatest = greatest(energy);
    Ok((0..values.len()).filter(|&at| values[at].abs() == greatest).collect())
}

/// The number of energies that overflowed.
pub(crate) fn count(energy: &Tensor) -> Result<usize> {
    Ok(positions(energy)?.len())
}

/// Refuses energies `[B, Hq, N, ..]` of the keys `index`, of the same shape, if one overflowed.
pub(crate) fn refuse(energy: &Tensor, index: &Tensor) -> Result<()> {
    let overflowed = positions(energy)?;
    let Some(&first) = overflowed.first() else { return Ok(()) };
    let (rows, heads, queries) =
        (energy.dim(0)? * energy.dim(1)? * energy.dim(2)?, energy.dim(1)?, energy.dim(2)?);
    let row = first / (energy.elem_count() / rows);
    let key = index.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<i32>()?[first];
    Err(Error::Invalid(format!(
        "the energy of query q[{}, {}, {}] and key {key} overflows {}: its magnitude exceeds {:.1e} ({} of the energies \
         do so); scale q and k, or beta, down",
        row / queries / heads,
        row / queries % heads,
        row % queries,
        energy.dtype().as_str(),
        greatest(energy),
        overflowed.len(),
    )))
}
