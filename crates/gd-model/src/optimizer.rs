//! AdamW with moments of its own precision, gradient norm and accumulation.
//!
//! Moments are f32 (f64 for f64 parameters) whatever the parameter's dtype. On the CPU one fused pass
//! updates a parameter in place, in parallel over fixed pieces, so that the result does not depend on the
//! number of threads; elsewhere the same formula is composed of tensor operations.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Add, Div, Mul, Sub};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Tensor, Var, WithDType};
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::state::{State, Stateful};

/// Elements that one thread updates at a time; also the pieces in which norms are summed.
const PIECE: usize = 16 * 1024;

/// Settings of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamWConfig {
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the root of the second moment; above 0.
    pub eps: f64,
    /// Decoupled decay, times the learning rate, of parameters with two or more dimensions; at least 0.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 }
    }
}

impl AdamWConfig {
    /// Fails with the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        let checks = [
            ("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "in [0, 1)"),
            ("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "in [0, 1)"),
            ("eps", self.eps, self.eps > 0.0 && self.eps.is_finite(), "above 0"),
            (
                "weight_decay",
                self.weight_decay,
                self.weight_decay >= 0.0 && self.weight_decay.is_finite(),
                "at least 0",
            ),
        ];
        match checks.into_iter().find(|c| !c.2) {
            Some((name, value, _, range)) => {
                Err(Error::Invalid(format!("{name} must be {range}, not {value}")))
            }
            None => Ok(()),
        }
    }
}

/// First and second moment of one parameter.
#[derive(Debug)]
enum Moments {
    F32(Vec<f32>, Vec<f32>),
    F64(Vec<f64>, Vec<f64>),
    /// Off the CPU: f32 or f64 tensors on the parameter's device.
    Device(Tensor, Tensor),
}

#[derive(Debug)]
struct Parameter {
    name: String,
    var: Var,
    /// Updates so far. It counts for itself, since a parameter without a gradient is passed over, and the
    /// bias correction of the first one it gets must be that of a first step.
    step: u32,
    moments: Moments,
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
    pub fn new(mut vars: Vec<(String, Var)>, config: AdamWConfig) -> Result<Self> {
        config.validate()?;
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some(pair) = vars.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Error::Invalid(format!("the parameter name {} is given twice", pair[0].0)));
        }
        let parameters = vars
            .into_iter()
            .map(|(name, var)| {
                let n = var.elem_count();
                let moments = match (var.dtype(), var.device()) {
                    (DType::F64, Device::Cpu) => Moments::F64(vec![0.0; n], vec![0.0; n]),
                    (DType::F32 | DType::BF16 | DType::F16, Device::Cpu) => {
                        Moments::F32(vec![0.0; n], vec![0.0; n])
                    }
                    (DType::F64 | DType::F32 | DType::BF16 | DType::F16, device) => {
                        let zeros = || Tensor::zeros(var.shape(), moment_dtype(&var), device);
                        Moments::Device(zeros()?, zeros()?)
                    }
                    (other, _) => {
                        return Err(Error::Invalid(format!("{name}: AdamW cannot update dtype {other:?}")));
                    }
                };
                Ok(Parameter { name, var, step: 0, moments })
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, parameters })
    }

    /// Updates every parameter that has a gradient, with the gradients times `scale` (for clipping and
    /// averaging) at learning rate `lr`.
    pub fn step(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        if !(lr >= 0.0 && lr.is_finite() && scale.is_finite()) {
            return Err(Error::Invalid(format!(
                "AdamW cannot step with learning rate {lr} and scale {scale}"
            )));
        }
        for parameter in &mut self.parameters {
            if let Some(grad) = grads.get(&parameter.var) {
                parameter.update(grad, &self.config, lr, scale)?;
            }
        }
        Ok(())
    }

    /// The moments (in their own dtype) and step counts, as `NAME.exp_avg`, `NAME.exp_avg_sq` and
    /// `NAME.step` (u32 scalar): with the parameters, all that an exact continuation needs.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = BTreeMap::new();
        for Parameter { name, var, step, moments } in &self.parameters {
            let shape = var.shape();
            let (first, second) = match moments {
                Moments::F32(m, v) => {
                    (Tensor::from_slice(m, shape, &Device::Cpu)?, Tensor::from_slice(v, shape, &Device::Cpu)?)
                }
                Moments::F64(m, v) => {
                    (Tensor::from_slice(m, shape, &Device::Cpu)?, Tensor::from_slice(v, shape, &Device::Cpu)?)
                }
                Moments::Device(m, v) => (m.clone(), v.clone()),
            };
            state.insert(format!("{name}.exp_avg"), first);
            state.insert(format!("{name}.exp_avg_sq"), second);
            state.insert(format!("{name}.step"), Tensor::new(*step, &Device::Cpu)?);
        }
        Ok(state)
    }

    /// Takes over what [`AdamW::state`] gave for the same parameters. After an error nothing has changed.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut loaded = Vec::with_capacity(self.parameters.len());
        for Parameter { name, var, .. } in &self.parameters {
            let take = |part: &str, dtype: DType, dims: &[usize]| {
                let key = format!("{name}.{part}");
                let tensor = state
                    .get(&key)
                    .ok_or_else(|| Error::Invalid(format!("the optimizer state has no {key}")))?;
                if tensor.dtype() != dtype || tensor.dims() != dims {
                    return Err(Error::Invalid(format!(
                        "the optimizer state has {key} as {:?} {:?}, but the parameter needs {dtype:?} {dims:?}",
                        tensor.dtype(),
                        tensor.dims()
                    )));
                }
                Ok(tensor)
            };
            let dtype = moment_dtype(var);
            let (m, v) = (take("exp_avg", dtype, var.dims())?, take("exp_avg_sq", dtype, var.dims())?);
            let moments = match (var.device(), dtype) {
                (Device::Cpu, DType::F64) => Moments::F64(values(m)?, values(v)?),
                (Device::Cpu, _) => Moments::F32(values(m)?, values(v)?),
                (device, _) => Moments::Device(m.to_device(device)?, v.to_device(device)?),
            };
            loaded.push((take("step", DType::U32, &[])?.to_scalar::<u32>()?, moments));
        }
        if state.len() != 3 * loaded.len() {
            return Err(Error::Invalid(format!(
                "the optimizer state has {} tensors, but {} parameters need {}",
                state.len(),
                loaded.len(),
                3 * loaded.len()
            )));
        }
        for (parameter, (step, moments)) in self.parameters.iter_mut().zip(loaded) {
            (parameter.step, parameter.moments) = (step, moments);
        }
        Ok(())
    }
}

impl Stateful for AdamW {
    fn save(&self) -> Result<State> {
        Ok(State { tensors: self.state()?, ..State::default() })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.load_state(&state.tensors)
    }
}

fn moment_dtype(var: &Var) -> DType {
    if var.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

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
        if grad.dims() != self.var.dims() || grad.dtype() != self.var.dtype() {
            return Err(Error::Invalid(format!(
                "{}: the gradient is {:?} {:?}, the parameter {:?} {:?}",
                self.name,
                grad.dtype(),
                grad.dims(),
                self.var.dtype(),
                self.var.dims()
            )));
        }
        self.step += 1;
        let t = f64::from(self.step);
        let decay = if self.var.rank() >= 2 { config.weight_decay } else { 0.0 };
        let c = Coefficients {
            scale,
            beta1: config.beta1,
            beta2: config.beta2,
            keep: 1.0 - lr * decay,
            rate: lr / (1.0 - config.beta1.powf(t)),
            root: (1.0 - config.beta2.powf(t)).sqrt().recip(),
            eps: config.eps,
        };
        if let Moments::Device(m, v) = &mut self.moments {
            let g = (grad.to_dtype(m.dtype())? * c.scale)?.detach();
            *m = ((&*m * c.beta1)? + (&g * (1.0 - c.beta1))?)?;
            *v = ((&*v * c.beta2)? + (g.sqr()? * (1.0 - c.beta2))?)?;
            let change = ((&*m * c.rate)? / ((v.sqrt()? * c.root)? + c.eps)?)?;
            let new = ((self.var.detach().to_dtype(m.dtype())? * c.keep)? - change)?;
            self.var.set(&new.to_dtype(self.var.dtype())?)?;
            return Ok(());
        }
        let update = Update { moments: RefCell::new(&mut self.moments), c };
        Ok(self.var.inplace_op2(&grad.contiguous()?, &update)?)
    }
}

/// The fused CPU update of one parameter (first tensor) by its gradient (second).
struct Update<'a> {
    /// candle hands an operation out shared, though it runs once.
    moments: RefCell<&'a mut Moments>,
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
        match (param, grad, &mut **self.moments.borrow_mut()) {
            (F32(p), F32(g), Moments::F32(m, v)) => fused(&mut p[at], &g[from], m, v, &self.c, |x| x, |x| x),
            (F64(p), F64(g), Moments::F64(m, v)) => fused(&mut p[at], &g[from], m, v, &self.c, |x| x, |x| x),
            (BF16(p), BF16(g), Moments::F32(m, v)) => {
                fused(&mut p[at], &g[from], m, v, &self.c, half::bf16::to_f32, half::bf16::from_f32);
            }
            (F16(p), F16(g), Moments::F32(m, v)) => {
                fused(&mut p[at], &g[from], m, v, &self.c, half::f16::to_f32, half::f16::from_f32);
            }
            _ => candle_core::bail!("adamw: parameter, gradient and moments differ in dtype"),
        }
        Ok(())
    }
}

/// The arithmetic the update needs, in f32 or f64.
trait Real:
    Copy + Send + Sync + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    fn of(x: f64) -> Self;
    fn root(self) -> Self;
}

impl Real for f32 {
    fn of(x: f64) -> Self {
        x as f32
    }
    fn root(self) -> Self {
        self.sqrt()
    }
}

impl Real for f64 {
    fn of(x: f64) -> Self {
        x
    }
    fn root(self) -> Self {
        self.sqrt()
    }
}

/// Parameters `p`, gradients `g` and moments `m`, `v`, all of one length.
fn fused<P: Copy + Send + Sync, A: Real>(
    p: &mut [P],
    g: &[P],
    m: &mut [A],
    v: &mut [A],
    c: &Coefficients,
    wide: impl Fn(P) -> A + Sync,
    narrow: impl Fn(A) -> P + Sync,
) {
    let [scale, keep, rate, root, eps] = [c.scale, c.keep, c.rate, c.root, c.eps].map(A::of);
    let [beta1, gain1, beta2, gain2] = [c.beta1, 1.0 - c.beta1, c.beta2, 1.0 - c.beta2].map(A::of);
    let pieces = p
        .par_chunks_mut(PIECE)
        .zip(g.par_chunks(PIECE))
        .zip(m.par_chunks_mut(PIECE).zip(v.par_chunks_mut(PIECE)));
    pieces.for_each(|((p, g), (m, v))| {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = wide(g) * scale;
            *m = *m * beta1 + g * gain1;
            *v = *v * beta2 + g * g * gain2;
            *p = narrow(wide(*p) * keep - rate * *m / (v.root() * root + eps));
        }
    });
}

/// Euclidean norm of all gradients together, in f64, the same for any number of threads. A gradient that is
/// not finite is an error that names its parameter.
pub fn global_norm(vars: &[(String, Var)], grads: &GradStore) -> Result<f64> {
    let mut squares = BTreeMap::new();
    for (name, var) in vars {
        let Some(grad) = grads.get(var) else { continue };
        let sum = square_sum(grad)?;
        if !sum.is_finite() {
            return Err(Error::Invalid(format!("the gradient of {name} is not finite")));
        }
        squares.insert(name, sum);
    }
    Ok(squares.values().sum::<f64>().sqrt())
}

fn square_sum(t: &Tensor) -> Result<f64> {
    if !t.device().is_cpu() {
        // Squares of half-precision numbers overflow in their own dtype.
        let wide = if t.dtype() == DType::F64 { t.clone() } else { t.to_dtype(DType::F32)? };
        return Ok(wide.detach().sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar()?);
    }
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        return Err(Error::Invalid("a CPU tensor without CPU storage".into()));
    };
    let range = layout.start_offset()..layout.start_offset() + t.elem_count();
    match storage {
        CpuStorage::F32(x) => Ok(sum_pieces(&x[range], f64::from)),
        CpuStorage::F64(x) => Ok(sum_pieces(&x[range], |x| x)),
        CpuStorage::BF16(x) => Ok(sum_pieces(&x[range], half::bf16::to_f64)),
        CpuStorage::F16(x) => Ok(sum_pieces(&x[range], half::f16::to_f64)),
        _ => Err(Error::Invalid(format!("a gradient of dtype {:?} has no norm", t.dtype()))),
    }
}

/// Sum of squares: within a piece in order, then over the pieces in order.
fn sum_pieces<T: Copy + Sync>(x: &[T], wide: impl Fn(T) -> f64 + Sync) -> f64 {
    let piece = |x: &[T]| x.iter().map(|&x| wide(x) * wide(x)).sum::<f64>();
    x.par_chunks(PIECE).map(piece).collect::<Vec<_>>().iter().sum()
}

/// The factor that brings a gradient of this norm down to `max_norm`; 1 where it is no longer than that.
pub fn clip_scale(norm: f64, max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0.0 || !norm.is_finite() {
        return Err(Error::Invalid(format!("a gradient of norm {norm} cannot be clipped to {max_norm}")));
    }
    Ok(if norm > max_norm { max_norm / norm } else { 1.0 })
}

/// Adds the gradients of `vars` in `more` to those in `total`, for batches in several parts.
pub fn accumulate(vars: &[(String, Var)], total: &mut GradStore, more: &GradStore) -> Result<()> {
    for (_, var) in vars {
        if let Some(grad) = more.get(var) {
            let sum = match total.get(var) {
                Some(sum) => (sum + grad)?.detach(),
                None => grad.clone(),
            };
            total.insert(var, sum);
        }
    }
    Ok(())
}
