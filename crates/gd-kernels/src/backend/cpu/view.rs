//! Read access to tensors on the CPU: any strides, contiguous last dimension.

use candle_core::{CpuStorage, Layout, Storage, Tensor, bail};

use crate::backend::cpu::element::Element;
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
        _ => Err(Error::Unsupported("the CPU kernels were called with a tensor on another device".into())),
    }
}

/// Runs `f` with a view of a tensor.
pub(crate) fn with_view<T: Element, R>(t: &Tensor, f: impl FnOnce(View<'_, T>) -> Result<R>) -> Result<R> {
    let (guard, layout) = t.storage_and_layout();
    f(View::new(cpu(&guard)?, layout)?)
}

/// The CPU elements behind a tensor's storage guard.
pub(crate) fn cpu_slice<T: Element>(storage: &Storage) -> candle_core::Result<&[T]> {
    match storage {
        Storage::Cpu(s) => s.as_slice::<T>(),
        other => bail!("a tensor on the CPU was expected, but it is on {:?}", other.device().location()),
    }
}

/// Calls `f` with the elements of tensors in row-major order.
///
/// # Errors
/// Another dtype or device.
pub(crate) fn with_slices<T: Element, R, const N: usize>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[T]; N]) -> R,
) -> candle_core::Result<R> {
    let tensors = tensors.iter().map(|t| t.detach().contiguous());
    let tensors = tensors.collect::<candle_core::Result<Vec<_>>>()?;
    let stored: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let mut slices = [&[][..]; N];
    for ((slice, (storage, layout)), t) in slices.iter_mut().zip(&stored).zip(&tensors) {
        *slice = &cpu_slice::<T>(storage)?[layout.start_offset()..][..t.elem_count()];
    }
    Ok(f(slices))
}

/// The rows (last dimension) of a tensor of any strides, numbered in row-major order.
pub(crate) struct Rows<'a, T> {
    data: &'a [T],
    start: usize,
    len: usize,
    count: usize,
    // (size, stride) of the leading dimensions, outermost first, merged where strides allow.
    outer: Vec<(usize, usize)>,
}

impl<'a, T: Element> Rows<'a, T> {
    /// Reads `storage` through `layout`.
    ///
    /// # Errors
    /// Wrong dtype, not on the CPU, rank 0, or a strided last dimension
    /// (see [`with_contiguous_rows`](crate::backend::graph::with_contiguous_rows)).
    pub(crate) fn new(storage: &'a Storage, layout: &Layout) -> candle_core::Result<Self> {
        let data = cpu_slice::<T>(storage)?;
        let (Some((&len, dims)), Some((&stride, strides))) =
            (layout.dims().split_last(), layout.stride().split_last())
        else {
            bail!("a tensor with at least one dimension was expected")
        };
        if stride != 1 && len > 1 {
            bail!("the last dimension of shape {:?} has stride {stride} instead of 1", layout.dims());
        }
        let mut outer: Vec<(usize, usize)> = Vec::with_capacity(dims.len());
        for (&size, &stride) in dims.iter().zip(strides).filter(|(size, _)| **size != 1) {
            match outer.last_mut() {
                Some(last) if last.1 == size * stride => *last = (last.0 * size, stride),
                _ => outer.push((size, stride)),
            }
        }
        Ok(Self { data, start: layout.start_offset(), len, count: dims.iter().product(), outer })
    }

    /// The number of rows.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Elements in a row.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Row `i`.
    #[inline(always)]
    pub(crate) fn row(&self, i: usize) -> &'a [T] {
        let mut at = self.start;
        let mut rest = i;
        for (d, &(size, stride)) in self.outer.iter().enumerate().rev() {
            // The outermost index needs no remainder: `i` is below the row count.
            let index = if d == 0 { rest } else { rest % size };
            at += index * stride;
            rest = if d == 0 { 0 } else { rest / size };
        }
        &self.data[at..at + self.len]
    }
}
