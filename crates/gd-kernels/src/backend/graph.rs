//! Attaches a hand-written backward pass to a result that is already computed.
//!
//! A custom operator of candle returns one tensor and keeps no state. Here an operator first computes its results, on
//! any device, and [`attach1`], [`attach2`] or [`attach3`] then enter the main result into the autograd graph,
//! together with a closure that owns what the backward pass needs.

use std::sync::Mutex;

use crate::backend::cpu::element::Element;
use crate::backend::span::{Pass, operator_span};
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape, Storage,
    Tensor, bail,
};

/// `t` itself if its last dimension is contiguous, or else a (differentiable) contiguous copy.
pub(crate) fn with_contiguous_rows(t: &Tensor) -> Result<Tensor> {
    let last = t.rank().wrapping_sub(1);
    match (t.dims().get(last), t.stride().get(last)) {
        (Some(&len), Some(&stride)) if stride == 1 || len <= 1 => Ok(t.clone()),
        _ => t.contiguous(),
    }
}

/// A finished result: its elements, on whichever device, and their shape.
#[derive(Debug)]
pub(crate) struct Finished {
    storage: Storage,
    shape: Shape,
}

impl Finished {
    /// Contiguous elements of `shape` in `storage`, from its start.
    #[cfg(feature = "gpu")]
    pub(crate) fn new(storage: Storage, shape: Shape) -> Self {
        Self { storage, shape }
    }

    /// A copy of a small result that tensor operations have computed.
    ///
    /// # Errors
    /// Errors of the copy.
    pub(crate) fn copy_of(t: &Tensor) -> Result<Self> {
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

/// A computed result and its backward pass, for the operator that enters them into the graph.
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
            None => bail!("{}: the result has already been taken", self.name),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            Finished { storage: Storage::Cpu(s), shape } => Ok((s, shape)),
            Finished { storage, .. } => self.device_mismatch(&storage),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            Finished { storage: Storage::Cuda(s), shape } => Ok((s, shape)),
            Finished { storage, .. } => self.device_mismatch(&storage),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.take()? {
            Finished { storage: Storage::Metal(s), shape } => Ok((s, shape)),
            Finished { storage, .. } => self.device_mismatch(&storage),
        }
    }

    fn device_mismatch<R>(&self, storage: &Storage) -> Result<R> {
        bail!("{}: the result is on {:?}, but its arguments are not", self.name, storage.device().location())
    }
}

impl<F> CustomOp1 for Attached<F>
where
    F: Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
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

    fn bwd(&self, a: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let _span = operator_span(self.name, Pass::Backward);
        (self.backward)(a, result, grad).map(Some)
    }
}

impl<F> CustomOp2 for Attached<F>
where
    F: Fn(&Tensor, &Tensor, &Tensor) -> Result<[Option<Tensor>; 2]>,
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
        let _span = operator_span(self.name, Pass::Backward);
        let [da, db] = (self.backward)(a, b, grad)?;
        Ok((tracked(a, da), tracked(b, db)))
    }
}

impl<F> CustomOp3 for Attached<F>
where
    F: Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<[Option<Tensor>; 3]>,
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
        let _span = operator_span(self.name, Pass::Backward);
        let [da, db, dc] = (self.backward)([a, b, c], result, grad)?;
        Ok((tracked(a, da), tracked(b, db), tracked(c, dc)))
    }
}

// Boxed, so that the operator is compiled once for each number of arguments and not for each backward pass.
type Backward1 = Box<dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync>;
type Backward2 = Box<dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<[Option<Tensor>; 2]> + Send + Sync>;
type Backward3 = Box<dyn Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<[Option<Tensor>; 3]> + Send + Sync>;

/// The gradient of an argument, if a variable depends on it. candle would store it otherwise, too: with frozen weights,
/// gradients as large as the model.
fn tracked(argument: &Tensor, gradient: Option<Tensor>) -> Option<Tensor> {
    gradient.filter(|_| argument.track_op())
}

/// `result` as a function of `a`; `backward(a, result, grad)` gives the gradient of `a`.
pub(crate) fn attach1(
    name: &'static str,
    a: &Tensor,
    result: impl Into<Finished>,
    backward: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let backward: Backward1 = Box::new(backward);
    a.apply_op1(Attached::new(name, result, backward))
}

/// `result` as a function of `a` and `b`; `backward(a, b, grad)` gives their gradients, and may leave out those of
/// arguments that no variable contributes to ([`Tensor::track_op`]).
pub(crate) fn attach2<G: Into<Option<Tensor>>>(
    name: &'static str,
    a: &Tensor,
    b: &Tensor,
    result: impl Into<Finished>,
    backward: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<[G; 2]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let backward: Backward2 = Box::new(move |a, b, grad| Ok(backward(a, b, grad)?.map(Into::into)));
    a.apply_op2(b, Attached::new(name, result, backward))
}

/// `result` as a function of three arguments; `backward(args, result, grad)` gives their gradients, as for [`attach2`].
pub(crate) fn attach3<G: Into<Option<Tensor>>>(
    name: &'static str,
    [a, b, c]: [&Tensor; 3],
    result: impl Into<Finished>,
    backward: impl Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<[G; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    let backward: Backward3 =
        Box::new(move |args, result, grad| Ok(backward(args, result, grad)?.map(Into::into)));
    a.apply_op3(b, c, Attached::new(name, result, backward))
}

/// `result`, which has been computed from `inputs` without a graph, as a function of them: `backward(inputs, grad)` gives one
/// gradient per input, in its shape. With it an operation stores its inputs alone and computes the rest again in the backward
/// pass. The inputs are of one dtype.
///
/// # Errors
/// Inputs of several dtypes or devices; in the backward pass those of `backward`.
///
/// # Examples
/// ```
/// use candle_core::{Device, Var};
/// use gd_kernels::with_backward;
///
/// let x = Var::new(&[1f32, 2.0], &Device::Cpu)?;
/// // A square whose backward pass is written by hand.
/// let y = with_backward("square", &[x.as_tensor()], &x.detach().sqr()?, |x, grad| Ok(vec![((&x[0] * 2.0)? * grad)?]))?;
/// let grads = y.sum_all()?.backward()?;
/// assert_eq!(grads.get(&x).unwrap().to_vec1::<f32>()?, [2.0, 4.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn with_backward(
    name: &'static str,
    inputs: &[&Tensor],
    result: &Tensor,
    backward: impl Fn(&[Tensor], &Tensor) -> Result<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    // An operator of candle has at most three arguments. Side by side, the inputs are one.
    let shapes: Vec<Shape> = inputs.iter().map(|t| t.shape().clone()).collect();
    let flat = inputs.iter().map(|t| t.flatten_all()).collect::<Result<Vec<_>>>()?;
    let flat = Tensor::cat(&flat, 0)?;
    attach1(name, &flat, Finished::copy_of(result)?, move |flat, _, grad| {
        let (flat, mut start) = (flat.detach(), 0);
        let part = |shape: &Shape| {
            let part = flat.narrow(0, start, shape.elem_count())?.reshape(shape);
            start += shape.elem_count();
            part
        };
        let parts = shapes.iter().map(part).collect::<Result<Vec<_>>>()?;
        let grads = backward(&parts, grad)?;
        Tensor::cat(&grads.iter().map(Tensor::flatten_all).collect::<Result<Vec<_>>>()?, 0)
    })
}
