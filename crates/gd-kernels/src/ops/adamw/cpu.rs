//! The CPU implementation of AdamW: one pass over a parameter, its gradient and its moments, in parallel over chunks of
//! a fixed size; and the sum of the squares of a gradient.

use std::cell::RefCell;

use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Shape, Tensor, Var, WithDType};

use super::{SavedState, Step};
use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::parallel::{par_items, par_map};
use crate::error::{Error, Result};

/// Elements per task.
const TASK_ELEMENTS: usize = 16 * 1024;

/// The moments of one parameter.
#[derive(Debug)]
pub(super) enum State {
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
}

impl State {
    /// Moments of zero.
    pub(super) fn new(parameter: &Var) -> Result<Self> {
        let n = parameter.elem_count();
        Ok(match parameter.dtype() {
            DType::F64 => Self::F64 { m: vec![0.0; n], v: vec![0.0; n] },
            DType::F32 => Self::F32 { m: vec![0.0; n], v: vec![0.0; n] },
            DType::F16 | DType::BF16 => {
                let master = values(&parameter.as_detached_tensor().to_dtype(DType::F32)?)?;
                Self::Half { m: vec![0.0; n], v: vec![0.0; n], master }
            }
            other => {
                return Err(Error::Unsupported(format!(
                    "adamw: a parameter {other:?} (f64, f32, f16 and bf16 are supported)"
                )));
            }
        })
    }

    /// The state as tensors of the parameter's shape.
    pub(super) fn save(&self, shape: &Shape) -> candle_core::Result<SavedState> {
        let f32s = |x: &[f32]| Tensor::from_slice(x, shape, &Device::Cpu);
        let f64s = |x: &[f64]| Tensor::from_slice(x, shape, &Device::Cpu);
        Ok(match self {
            Self::F32 { m, v } => SavedState { m: f32s(m)?, v: f32s(v)?, master: None },
            Self::F64 { m, v } => SavedState { m: f64s(m)?, v: f64s(v)?, master: None },
            Self::Half { m, v, master } => {
                SavedState { m: f32s(m)?, v: f32s(v)?, master: Some(f32s(master)?) }
            }
        })
    }

    /// The state of validated tensors.
    pub(super) fn restore(parameter: &Var, saved: &SavedState) -> Result<Self> {
        let SavedState { m, v, master } = saved;
        Ok(match master {
            Some(master) => Self::Half { m: values(m)?, v: values(v)?, master: values(master)? },
            None if parameter.dtype() == DType::F64 => Self::F64 { m: values(m)?, v: values(v)? },
            None => Self::F32 { m: values(m)?, v: values(v)? },
        })
    }

    /// One update of `parameter` in place, with its gradient times `scale`.
    pub(super) fn update(
        &mut self,
        parameter: &Var,
        gradient: &Tensor,
        step: &Step,
        scale: f64,
    ) -> Result<()> {
        let update = Update { state: RefCell::new(self), step, scale };
        Ok(parameter.inplace_op2(&gradient.contiguous()?, &update)?)
    }
}

fn values<T: WithDType>(t: &Tensor) -> Result<Vec<T>> {
    Ok(t.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}

/// The update of one parameter (first tensor) by its gradient (second).
struct Update<'a> {
    /// candle passes the operation by shared reference.
    state: RefCell<&'a mut State>,
    step: &'a Step,
    scale: f64,
}

impl InplaceOp2 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw"
    }

    fn cpu_fwd(
        &self,
        parameter: &mut CpuStorage,
        parameter_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> candle_core::Result<()> {
        use CpuStorage::{BF16, F16, F32, F64};
        let (Some(at), Some(from)) =
            (parameter_layout.contiguous_offsets(), gradient_layout.contiguous_offsets())
        else {
            candle_core::bail!("adamw needs a contiguous parameter and gradient");
        };
        let (at, from) = (at.0..at.1, from.0..from.1);
        match (parameter, gradient, &mut **self.state.borrow_mut()) {
            (F32(p), F32(g), State::F32 { m, v }) => {
                update(&mut p[at], &g[from], m, v, &Coefficients::new(self.step, self.scale));
            }
            (F64(p), F64(g), State::F64 { m, v }) => {
                update(&mut p[at], &g[from], m, v, &Coefficients::new(self.step, self.scale));
            }
            (BF16(p), BF16(g), State::Half { m, v, master }) => {
                update_half(&mut p[at], &g[from], [m, v, master], &Coefficients::new(self.step, self.scale));
            }
            (F16(p), F16(g), State::Half { m, v, master }) => {
                update_half(&mut p[at], &g[from], [m, v, master], &Coefficients::new(self.step, self.scale));
            }
            _ => candle_core::bail!("adamw: parameter, gradient and moments differ in dtype"),
        }
        Ok(())
    }
}

/// The coefficients of a [`Step`] and the scale of its gradients, in the precision of the update.
struct Coefficients<A> {
    scale: A,
    weight_scale: A,
    step_size: A,
    root_scale: A,
    eps: A,
    beta1: A,
    one_minus_beta1: A,
    beta2: A,
    one_minus_beta2: A,
}

impl<A: Real> Coefficients<A> {
    fn new(step: &Step, scale: f64) -> Self {
        Self {
            scale: A::of(scale),
            weight_scale: A::of(step.weight_scale()),
            step_size: A::of(step.step_size(step.number)),
            root_scale: A::of(step.root_scale(step.number)),
            eps: A::of(step.eps),
            beta1: A::of(step.beta1),
            one_minus_beta1: A::of(1.0 - step.beta1),
            beta2: A::of(step.beta2),
            one_minus_beta2: A::of(1.0 - step.beta2),
        }
    }

    /// The new value of weight `w` with gradient `g`.
    #[inline(always)]
    fn apply(&self, w: A, g: A, m: &mut A, v: &mut A) -> A {
        let g = g * self.scale;
        *m = *m * self.beta1 + g * self.one_minus_beta1;
        *v = *v * self.beta2 + g * g * self.one_minus_beta2;
        w * self.weight_scale - self.step_size * *m / (v.sqrt() * self.root_scale + self.eps)
    }
}

/// Parameters `p`, gradients `g` and moments `m`, `v`, all of one length.
fn update<A: Real>(p: &mut [A], g: &[A], m: &mut [A], v: &mut [A], coefficients: &Coefficients<A>) {
    let tasks = p
        .chunks_mut(TASK_ELEMENTS)
        .zip(g.chunks(TASK_ELEMENTS))
        .zip(m.chunks_mut(TASK_ELEMENTS).zip(v.chunks_mut(TASK_ELEMENTS)));
    par_items(tasks.collect(), &|_, ((p, g), (m, v))| {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *p = coefficients.apply(*p, g, m, v);
        }
    });
}

/// As [`update`], for parameters that are roundings of their master weights `w`.
fn update_half<P: Element<Acc = f32>>(
    p: &mut [P],
    g: &[P],
    [m, v, w]: [&mut [f32]; 3],
    coefficients: &Coefficients<f32>,
) {
    let tasks = p
        .chunks_mut(TASK_ELEMENTS)
        .zip(g.chunks(TASK_ELEMENTS))
        .zip(m.chunks_mut(TASK_ELEMENTS).zip(v.chunks_mut(TASK_ELEMENTS)))
        .zip(w.chunks_mut(TASK_ELEMENTS));
    par_items(tasks.collect(), &|_, (((p, g), (m, v)), w)| {
        for ((((p, &g), m), v), w) in p.iter_mut().zip(g).zip(m).zip(v).zip(w) {
            *w = coefficients.apply(*w, g.up(), m, v);
            *p = P::down(*w);
        }
    });
}

/// The sum of the squares of a gradient, in f64: within a chunk in order, then over the chunks in order.
pub(super) fn square_sum(gradient: &Tensor) -> Result<f64> {
    let t = gradient.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        return Err(Error::Invalid("a CPU tensor without CPU storage".into()));
    };
    let range = layout.start_offset()..layout.start_offset() + t.elem_count();
    match storage {
        CpuStorage::F32(x) => Ok(sum_chunks(&x[range], f64::from)),
        CpuStorage::F64(x) => Ok(sum_chunks(&x[range], |x| x)),
        CpuStorage::BF16(x) => Ok(sum_chunks(&x[range], half::bf16::to_f64)),
        CpuStorage::F16(x) => Ok(sum_chunks(&x[range], half::f16::to_f64)),
        _ => Err(Error::Unsupported(format!("a gradient of dtype {:?} has no norm", t.dtype()))),
    }
}

fn sum_chunks<T: Copy + Sync>(x: &[T], wide: impl Fn(T) -> f64 + Sync) -> f64 {
    let chunk = |_, x: &[T]| x.iter().map(|&x| wide(x) * wide(x)).sum::<f64>();
    par_map(x.chunks(TASK_ELEMENTS).collect(), &chunk).iter().sum()
}
