//! Plumbing of the fused operators: read the rows of strided tensors on the CPU, fill an output in
//! parallel, and attach a hand-written backward pass to a finished result.
//!
//! candle's custom operators return one tensor and keep nothing. Here an operator computes whatever
//! it likes first, on any device, and [`attach1`] .. [`attach3`] then put its main result into the
//! graph together with a closure that owns what the backward pass needs.

use std::sync::Mutex;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape, Storage,
    Tensor, bail,
};
use rayon::prelude::*;

use crate::element::Element;

/// Below this many output elements a loop stays on the calling thread.
const SERIAL: usize = 1 << 13;

/// Rows that one task handles: about 8192 elements. It depends on the row length alone, so that
/// partial sums over chunks are the same on every machine.
pub fn rows_per_chunk(row_len: usize) -> usize {
    (8192 / row_len.max(1)).clamp(1, 256)
}

/// Runs `f` compiled for the widest vectors of this machine (inlined loops only).
#[inline(always)]
pub fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Calls `f(i, chunk i of out)` for all chunks, in parallel where it pays. May be nested.
pub fn for_chunks<T: Send>(out: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let chunk = chunk.max(1);
    if out.len() < SERIAL {
        out.chunks_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    } else {
        out.par_chunks_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    }
}

/// As [`for_chunks`] over two outputs with chunk lengths of their own and the same number of chunks.
pub fn for_chunks2<T: Send, U: Send>(
    (a, a_chunk): (&mut [T], usize),
    (b, b_chunk): (&mut [U], usize),
    f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let (a_chunk, b_chunk) = (a_chunk.max(1), b_chunk.max(1));
    if a.len() + b.len() < SERIAL {
        a.chunks_mut(a_chunk).zip(b.chunks_mut(b_chunk)).enumerate().for_each(|(i, (a, b))| f(i, a, b));
    } else {
        let chunks = a.par_chunks_mut(a_chunk).zip(b.par_chunks_mut(b_chunk));
        chunks.enumerate().for_each(|(i, (a, b))| f(i, a, b));
    }
}

/// Adds the equally long rows of `parts`, first to last.
pub fn sum_rows<T: crate::element::Real>(parts: &[T], len: usize) -> Vec<T> {
    let mut total = vec![T::zero(); len];
    for part in parts.chunks_exact(len.max(1)) {
        total.iter_mut().zip(part).for_each(|(t, &p)| *t += p);
    }
    total
}

/// The CPU elements behind a tensor's storage guard.
pub fn cpu_slice<T: Element>(storage: &Storage) -> Result<&[T]> {
    match storage {
        Storage::Cpu(s) => s.as_slice::<T>(),
        other => bail!("a CPU tensor was expected, this one lies on {:?}", other.device().location()),
    }
}

/// `t` itself if its last dimension is contiguous, or else a (differentiable) contiguous copy.
pub fn with_contiguous_rows(t: &Tensor) -> Result<Tensor> {
    let last = t.rank().wrapping_sub(1);
    match (t.dims().get(last), t.stride().get(last)) {
        (Some(&len), Some(&stride)) if stride == 1 || len <= 1 => Ok(t.clone()),
        _ => t.contiguous(),
    }
}

/// The rows (last dimension) of a tensor of any strides, numbered in row-major order.
pub struct Rows<'a, T> {
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
    /// (see [`with_contiguous_rows`]).
    pub fn new(storage: &'a Storage, layout: &Layout) -> Result<Self> {
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
    pub fn count(&self) -> usize {
        self.count
    }

    /// Elements in a row.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Row `i`.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [T] {
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

/// A finished result: its elements, on whichever device, and their shape.
#[derive(Debug)]
pub struct Finished {
    storage: Storage,
    shape: Shape,
}

impl Finished {
    /// Contiguous elements of `shape` in `storage`, from its start.
    pub fn new(storage: Storage, shape: Shape) -> Self {
        Self { storage, shape }
    }

    /// A copy of a small result that tensor operations have computed.
    ///
    /// # Errors
    /// Whatever copying reports.
    pub fn copy_of(t: &Tensor) -> Result<Self> {
        let t = t.detach().force_contiguous()?;
        let storage = {
            let (storage, layout) = t.storage_and_layout();
            storage.try_clone(layout)?
        };
        Ok(Self { storage, shape: t.shape().clone() })
    }
}

impl<T: Element> From<(Vec<T>, Shape)> for Finished {
    fn from((values, shape): (Vec<T>, Shape)) -> Self {
        Self { storage: Storage::Cpu(T::to_cpu_storage_owned(values)), shape }
    }
}

/// A finished result on its way into the graph, with its backward pass.
struct Attached<F> {
    name: &'static str,
    // Taken by the one forward call that candle makes.
    result: Mutex<Option<Finished>>,
    backward: F,
}

impl<F> Attached<F> {
    fn new(name: &'static str, result: impl Into<Finished>, backward: F) -> Self {
        Self { name, result: Mutex::new(Some(result.into())), backward }
    }

    fn take(&self) -> Result<Finished> {
        let result = self.result.lock().ok().and_then(|mut r| r.take());
        match result {
            Some(result) => Ok(result),
            None => bail!("{}: the result was taken before", self.name),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Finished { storage: Storage::Cpu(s), shape } => Ok((s, shape)),
            Finished { storage, .. } => self.elsewhere(&storage),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            Finished { storage: Storage::Cuda(s), shape } => Ok((s, shape)),
            Finished { storage, .. } => self.elsewhere(&storage),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.take()? {
            Finished { storage: Storage::Metal(s), shape } => Ok((s, shape)),
            Finished { storage, .. } => self.elsewhere(&storage),
        }
    }

    fn elsewhere<R>(&self, storage: &Storage) -> Result<R> {
        bail!("{}: the result lies on {:?}, its arguments do not", self.name, storage.device().location())
    }
}

impl<F> CustomOp1 for Attached<F>
where
    F: Fn(&Tensor, &Tensor) -> Result<Tensor>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(&self, a: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        (self.backward)(a, grad).map(Some)
    }
}

impl<F> CustomOp2 for Attached<F>
where
    F: Fn(&Tensor, &Tensor, &Tensor) -> Result<[Tensor; 2]>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = (self.backward)(a, b, grad)?;
        Ok((Some(da), Some(db)))
    }
}

impl<F> CustomOp3 for Attached<F>
where
    F: Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<[Tensor; 3]>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = (self.backward)([a, b, c], result, grad)?;
        Ok((Some(da), Some(db), Some(dc)))
    }
}

/// `result` as a function of `a`; `backward(a, grad)` gives the gradient of `a`.
pub fn attach1(
    name: &'static str,
    a: &Tensor,
    result: impl Into<Finished>,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    a.apply_op1(Attached::new(name, result, backward))
}

/// `result` as a function of `a` and `b`; `backward(a, b, grad)` gives their gradients.
pub fn attach2(
    name: &'static str,
    a: &Tensor,
    b: &Tensor,
    result: impl Into<Finished>,
    backward: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<[Tensor; 2]> + Send + Sync + 'static,
) -> Result<Tensor> {
    a.apply_op2(b, Attached::new(name, result, backward))
}

/// `result` as a function of three arguments; `backward(args, result, grad)` gives their gradients.
pub fn attach3(
    name: &'static str,
    [a, b, c]: [&Tensor; 3],
    result: impl Into<Finished>,
    backward: impl Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<[Tensor; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    a.apply_op3(b, c, Attached::new(name, result, backward))
}
