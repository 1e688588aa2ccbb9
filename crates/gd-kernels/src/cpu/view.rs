//! Read access to tensors on the CPU: any strides, contiguous last dimension.

use candle_core::{CpuStorage, Layout, Storage, Tensor};

use crate::element::Element;
use crate::error::{Error, Result};

/// A `[d0, d1, d2, len]` tensor whose rows are slices.
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T> {
    data: &'a [T],
    start: usize,
    strides: [usize; 3],
    /// The shape.
    pub(crate) dims: [usize; 4],
}

impl<'a, T: Element> View<'a, T> {
    /// Fails unless the tensor has rank 4, element type `T` and a contiguous last dimension.
    pub(crate) fn new(storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let &[d0, d1, d2, len] = layout.dims() else {
            return Err(Error::Invalid(format!("a tensor of rank 4 is expected, not {:?}", layout.dims())));
        };
        let &[s0, s1, s2, last] = layout.stride() else { unreachable!("rank 4") };
        if last != 1 && len > 1 {
            return Err(Error::Invalid(format!("the last dimension has stride {last}, not 1")));
        }
        let data = T::cpu_storage_as_slice(storage)?;
        Ok(Self { data, start: layout.start_offset(), strides: [s0, s1, s2], dims: [d0, d1, d2, len] })
    }

    /// Row `(a, b, c)`.
    #[inline(always)]
    pub(crate) fn row(&self, a: usize, b: usize, c: usize) -> &'a [T] {
        let at = self.start + a * self.strides[0] + b * self.strides[1] + c * self.strides[2];
        &self.data[at..at + self.dims[3]]
    }
}

/// The CPU storage behind a guard.
pub(crate) fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(s) => Ok(s),
        _ => Err(Error::Unsupported("the CPU kernels were handed a tensor of another device".into())),
    }
}

/// Runs `f` with a view of a tensor.
pub(crate) fn with_view<T: Element, R>(t: &Tensor, f: impl FnOnce(View<'_, T>) -> Result<R>) -> Result<R> {
    let (guard, layout) = t.storage_and_layout();
    f(View::new(cpu(&guard)?, layout)?)
}

/// The elements of a contiguous tensor.
pub(crate) fn flat<'a, T: candle_core::WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => {
            Err(Error::Invalid(format!("a contiguous tensor is expected, not strides {:?}", layout.stride())))
        }
    }
}
