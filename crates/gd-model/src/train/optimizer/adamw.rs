//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) with moments of its own precision.
//!
//! Moments are f32 (f64 for f64 parameters) whatever the parameter's dtype. A bf16 or f16 parameter is the
//! rounding of an f32 master weight that lives here, so that updates below its resolution add up. On the
//! CPU one fused pass updates a parameter in place, in parallel over fixed pieces, so that the result does
//! not depend on the number of threads; on a GPU one launch does (`gd_kernels::adamw`), which knows how the
//! gradients are clipped, and whether the update is to be skipped, from memory of the GPU.

use std::cell::RefCell;
use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Shape, Tensor, Var, WithDType};
use gd_kernels::adamw::{self, Updated};
use gd_kernels::element::{Element, Real};
use gd_kernels::on_cpu;
use rayon::prelude::*;

use super::groups::Group;
use super::parameter::{PIECE, check_gradient, check_step, named, nothing_left, take, wide_dtype};
use crate::config::AdamWConfig;
use crate::error::{Error, Result};

/// What is kept of one parameter.
#[derive(Debug)]
pub(super) enum Kept {
    F32 {
        m: Vec<f32>,
        v: Vec<f32>,
    },
    F64 {
        m: Vec<f64>,
        v: Vec<f64>,
    },
    /// Of a bf16 or f16 parameter.
    Half {
        m: Vec<f32>,
        v: Vec<f32>,
        master: Vec<f32>,
    },
    /// Off the CPU: f32 or f64 tensors on the parameter's device.
    Device {
        m: Tensor,
        v: Tensor,
        master: Option<Tensor>,
    },
}

impl Kept {
    /// Moments of zero for a parameter of a dtype that [`named`] has admitted.
    fn new(var: &Var) -> Result<Self> {
        let (n, wide) = (var.elem_count(), wide_dtype(var));
        let half = var.dtype() != wide;
        Ok(match (on_cpu(var.device()), var.dtype()) {
            (true, DType::F64) => Self::F64 { m: vec![0.0; n], v: vec![0.0; n] },
            (true, DType::F32) => Self::F32 { m: vec![0.0; n], v: vec![0.0; n] },
            (true, _) => {
                let master = values(&var.as_detached_tensor().to_dtype(wide)?)?;
                Self::Half { m: vec![0.0; n], v: vec![0.0; n], master }
            }
            (false, DType::F64) => {
                let place = var.device().location();
                return Err(Error::Invalid(format!("AdamW on {place:?} updates f32, f16 and bf16, not f64")));
            }
            (false, _) => {
                let zeros = || Tensor::zeros(var.shape(), wide, var.device());
                let master = half.then(|| var.as_detached_tensor().to_dtype(wide)).transpose()?;
                Self::Device { m: zeros()?, v: zeros()?, master }
            }
        })
    }

    /// Moments and master weight as tensors of the parameter's shape.
    fn tensors(&self, shape: &Shape) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let f32s = |x: &[f32]| Tensor::from_slice(x, shape, &Device::Cpu);
        let f64s = |x: &[f64]| Tensor::from_slice(x, shape, &Device::Cpu);
        Ok(match self {
            Self::F32 { m, v } => (f32s(m)?, f32s(v)?, None),
            Self::F64 { m, v } => (f64s(m)?, f64s(v)?, None),
            Self::Half { m, v, master } => (f32s(m)?, f32s(v)?, Some(f32s(master)?)),
            Self::Device { m, v, master } => {
                // Updates are made in place.
                let kept = |t: &Tensor| elsewhere(t, &Device::Cpu);
                (kept(m)?, kept(v)?, master.as_ref().map(kept).transpose()?)
            }
        })
    }

    fn from_tensors(var: &Var, m: &Tensor, v: &Tensor, master: Option<&Tensor>) -> Result<Self> {
        Ok(match (on_cpu(var.device()), master) {
            (true, Some(master)) => Self::Half { m: values(m)?, v: values(v)?, master: values(master)? },
            (true, None) if var.dtype() == DType::F64 => Self::F64 { m: values(m)?, v: values(v)? },
            (true, None) => Self::F32 { m: values(m)?, v: values(v)? },
            (false, master) => Self::Device {
                m: elsewhere(m, var.device())?,
                v: elsewhere(v, var.device())?,
                master: master.map(|t| elsewhere(t, var.device())).transpose()?,
            },
        })
    }
}

/// A copy on `device`.
fn elsewhere(t: &Tensor, device: &Device) -> candle_core::Result<Tensor> {
    if t.device().same_device(device) { t.copy() } else { t.to_device(device) }
}

/// Which parameters an update has moved, for [`AdamW::take_back`].
#[derive(Debug, Clone, Default)]
pub struct Moved(Vec<usize>);

/// What a GPU knows about an update.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The verdict on it.
    pub verdict: &'a Tensor,
    /// That on the update before, where the host has not read it yet.
    pub before: Option<(&'a Tensor, &'a Moved)>,
}

#[derive(Debug)]
struct Parameter {
    name: String,
    var: Var,
    decays: bool,
    /// Updates so far. It counts for itself, since a parameter without a gradient is passed over, and the
    /// bias correction of the first one it gets must be that of a first step.
    step: u32,
    kept: Kept,
}

/// Adam with decoupled weight decay.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// By name.
    parameters: Vec<Parameter>,
}

impl AdamW {
    /// An optimizer over named parameters, in f32, f64, bf16 or f16.
    ///
    /// # Errors
    /// A setting outside its range, a name given twice, or another dtype.
    pub fn new(vars: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        config.validate()?;
        let parameter = |(name, var): (String, Var)| {
            let decays = Group::of(&name, var.rank()).decays();
            Ok(Parameter { kept: Kept::new(&var)?, step: 0, decays, name, var })
        };
        Ok(Self { config, parameters: named(vars)?.into_iter().map(parameter).collect::<Result<_>>()? })
    }

    /// Updates every parameter that has a gradient, with the gradients times `scale` (for clipping and
    /// averaging) at learning rate `lr`.
    ///
    /// # Errors
    /// A rate or scale that is no number, or a gradient of another shape or dtype than its parameter.
    pub fn step(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        check_step(lr, scale)?;
        let on_gpu = self.parameters.iter().find(|p| matches!(p.kept, Kept::Device { .. }));
        if let Some(first) = on_gpu {
            let verdict = Tensor::new(&[0f32, 0.0, scale as f32], first.var.device())?;
            return self.step_known(grads, lr, &Known { verdict: &verdict, before: None }).map(drop);
        }
        for parameter in &mut self.parameters {
            if let Some(grad) = grads.get(&parameter.var) {
                parameter.update(grad, &self.config, lr, scale)?;
            }
        }
        Ok(())
    }

    /// The same on a GPU, with what only that knows: the factor of the gradients, or that nothing is to change. If
    /// the host learns later that nothing has, it calls [`AdamW::take_back`].
    ///
    /// # Errors
    /// A rate that is no number, parameters on the CPU, or a gradient of another shape or dtype than its parameter.
    pub fn step_known(&mut self, grads: &GradStore, lr: f64, known: &Known<'_>) -> Result<Moved> {
        check_step(lr, 1.0)?;
        let mut moved = Moved::default();
        for (at, parameter) in self.parameters.iter_mut().enumerate() {
            if let Some(grad) = grads.get(&parameter.var) {
                let before = known.before.filter(|(_, moved)| moved.0.binary_search(&at).is_ok());
                let verdicts = (known.verdict, before.map(|(verdict, _)| verdict));
                parameter.update_known(grad, &self.config, lr, verdicts)?;
                moved.0.push(at);
            }
        }
        Ok(moved)
    }

    /// An update did not take place after all: it counts no more.
    pub fn take_back(&mut self, moved: &Moved) {
        for &at in &moved.0 {
            self.parameters[at].step -= 1;
        }
    }

    /// The moments (in their own dtype), step counts and master weights, as `NAME.exp_avg`,
    /// `NAME.exp_avg_sq`, `NAME.step` (u32 scalar) and, for bf16 and f16, `NAME.master`: with the
    /// parameters, all that an exact continuation needs.
    ///
    /// # Errors
    /// Whatever copying a tensor reports.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for Parameter { name, var, step, kept, .. } in &self.parameters {
            let (m, v, master) = kept.tensors(var.shape())?;
            state.insert(format!("{name}.exp_avg"), m);
            state.insert(format!("{name}.exp_avg_sq"), v);
            state.insert(format!("{name}.step"), Tensor::new(*step, &Device::Cpu)?);
            state.extend(master.map(|w| (format!("{name}.master"), w)));
        }
        Ok(state)
    }

    /// Takes over what [`AdamW::state`] gave for the same parameters. After an error nothing has changed.
    ///
    /// # Errors
    /// Names the tensor that is missing, superfluous, or of another shape or dtype.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let loaded = self.read(state.clone())?;
        self.adopt(loaded);
        Ok(())
    }

    /// What [`AdamW::state`] gave for the same parameters, checked.
    pub(super) fn read(&self, mut state: BTreeMap<String, Tensor>) -> Result<Loaded> {
        let mut loaded = Vec::with_capacity(self.parameters.len());
        for Parameter { name, var, .. } in &self.parameters {
            let wide = wide_dtype(var);
            let m = take(&mut state, name, "exp_avg", wide, var.dims())?;
            let v = take(&mut state, name, "exp_avg_sq", wide, var.dims())?;
            let step = take(&mut state, name, "step", DType::U32, &[])?.to_scalar::<u32>()?;
            let master = match var.dtype() == wide {
                true => None,
                false => Some(take(&mut state, name, "master", wide, var.dims())?),
            };
            loaded.push((step, Kept::from_tensors(var, &m, &v, master.as_ref())?));
        }
        nothing_left(&state)?;
        Ok(loaded)
    }

    /// Goes on from what was read.
    pub(super) fn adopt(&mut self, loaded: Loaded) {
        for (parameter, (step, kept)) in self.parameters.iter_mut().zip(loaded) {
            (parameter.step, parameter.kept) = (step, kept);
        }
    }
}

/// Step and moments of every parameter.
type Loaded = Vec<(u32, Kept)>;

fn values<T: WithDType>(t: &Tensor) -> Result<Vec<T>> {
    Ok(t.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}

/// One update: p ← keep·p − rate·m / (√v·root + eps), after m and v have moved toward the scaled gradient.
#[derive(Clone, Copy, Debug)]
struct Coefficients {
    scale: f64,
    beta1: f64,
    beta2: f64,
    keep: f64,
    rate: f64,
    root: f64,
    eps: f64,
}

impl Parameter {
    fn update(&mut self, grad: &Tensor, config: &AdamWConfig, lr: f64, scale: f64) -> Result<()> {
        check_gradient(&self.name, &self.var, grad)?;
        self.step += 1;
        let t = f64::from(self.step);
        let decay = if self.decays { config.weight_decay } else { 0.0 };
        let c = Coefficients {
            scale,
            beta1: config.beta1,
            beta2: config.beta2,
            keep: 1.0 - lr * decay,
            rate: lr / (1.0 - config.beta1.powf(t)),
            root: (1.0 - config.beta2.powf(t)).sqrt().recip(),
            eps: config.eps,
        };
        let update = Update { kept: RefCell::new(&mut self.kept), c };
        Ok(self.var.inplace_op2(&grad.contiguous()?, &update)?)
    }

    fn update_known(
        &mut self,
        grad: &Tensor,
        config: &AdamWConfig,
        lr: f64,
        (verdict, before): (&Tensor, Option<&Tensor>),
    ) -> Result<()> {
        check_gradient(&self.name, &self.var, grad)?;
        let Kept::Device { m, v, master } = &self.kept else {
            return Err(Error::Invalid(format!("{}: a parameter on the CPU has no verdict", self.name)));
        };
        self.step += 1;
        let step = adamw::Step {
            number: self.step,
            lr,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.eps,
            weight_decay: if self.decays { config.weight_decay } else { 0.0 },
        };
        let parameter = self.var.as_detached_tensor();
        let x = Updated { parameter: &parameter, m, v, master: master.as_ref(), gradient: grad };
        Ok(adamw::update(&step, verdict, before, &x)?)
    }
}

/// The fused CPU update of one parameter (first tensor) by its gradient (second).
struct Update<'a> {
    /// candle hands an operation out shared, though it runs once.
    kept: RefCell<&'a mut Kept>,
    c: Coefficients,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        param_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<()> {
        use CpuStorage::{BF16, F16, F32, F64};
        let (Some(at), Some(from)) = (param_layout.contiguous_offsets(), grad_layout.contiguous_offsets())
        else {
            candle_core::bail!("adamw needs a contiguous parameter and gradient");
        };
        let (at, from) = (at.0..at.1, from.0..from.1);
        match (param, grad, &mut **self.kept.borrow_mut()) {
            (F32(p), F32(g), Kept::F32 { m, v }) => fused(&mut p[at], &g[from], m, v, &self.c),
            (F64(p), F64(g), Kept::F64 { m, v }) => fused(&mut p[at], &g[from], m, v, &self.c),
            (BF16(p), BF16(g), Kept::Half { m, v, master }) => {
                fused_half(&mut p[at], &g[from], m, v, master, &self.c);
            }
            (F16(p), F16(g), Kept::Half { m, v, master }) => {
                fused_half(&mut p[at], &g[from], m, v, master, &self.c);
            }
            _ => candle_core::bail!("adamw: parameter, gradient and moments differ in dtype"),
        }
        Ok(())
    }
}

/// [`Coefficients`] in the precision of the update.
struct Step<A> {
    scale: A,
    keep: A,
    rate: A,
    root: A,
    eps: A,
    beta1: A,
    gain1: A,
    beta2: A,
    gain2: A,
}

impl<A: Real> Step<A> {
    fn new(c: &Coefficients) -> Self {
        Self {
            scale: A::of(c.scale),
            keep: A::of(c.keep),
            rate: A::of(c.rate),
            root: A::of(c.root),
            eps: A::of(c.eps),
            beta1: A::of(c.beta1),
            gain1: A::of(1.0 - c.beta1),
            beta2: A::of(c.beta2),
            gain2: A::of(1.0 - c.beta2),
        }
    }

    /// The new value of weight `w` with gradient `g`.
    #[inline(always)]
    fn apply(&self, w: A, g: A, m: &mut A, v: &mut A) -> A {
        let g = g * self.scale;
        *m = *m * self.beta1 + g * self.gain1;
        *v = *v * self.beta2 + g * g * self.gain2;
        w * self.keep - self.rate * *m / (v.sqrt() * self.root + self.eps)
    }
}

/// Parameters `p`, gradients `g` and moments `m`, `v`, all of one length.
fn fused<A: Real>(p: &mut [A], g: &[A], m: &mut [A], v: &mut [A], c: &Coefficients) {
    let step = Step::new(c);
    let pieces = p
        .par_chunks_mut(PIECE)
        .zip(g.par_chunks(PIECE))
        .zip(m.par_chunks_mut(PIECE).zip(v.par_chunks_mut(PIECE)));
    pieces.for_each(|((p, g), (m, v))| {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *p = step.apply(*p, g, m, v);
        }
    });
}

/// The same for parameters that are roundings of their master weights `w`.
fn fused_half<P: Element<Acc = f32>>(
    p: &mut [P],
    g: &[P],
    m: &mut [f32],
    v: &mut [f32],
    w: &mut [f32],
    c: &Coefficients,
) {
    let step = Step::new(c);
    let pieces = p
        .par_chunks_mut(PIECE)
        .zip(g.par_chunks(PIECE))
        .zip(m.par_chunks_mut(PIECE).zip(v.par_chunks_mut(PIECE)))
        .zip(w.par_chunks_mut(PIECE));
    pieces.for_each(|(((p, g), (m, v)), w)| {
        for ((((p, &g), m), v), w) in p.iter_mut().zip(g).zip(m).zip(v).zip(w) {
            *w = step.apply(*w, g.up(), m, v);
            *p = P::down(*w);
        }
    });
}
