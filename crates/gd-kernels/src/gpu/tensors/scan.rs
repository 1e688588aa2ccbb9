//! `scan` and `scan_select` of tensors.

use candle_core::{DType, Tensor};

use super::{Rows, TensorGpu, Vector};
use crate::error::Result;
use crate::gpu::decode::{self, MAX_QUERIES};
use crate::gpu::{Slice, scan as gpu};
use crate::plan::Problem;
use crate::scan::{Candidates, Scan, check_head, check_values, prior_dims, protected_dims};
use crate::select::Selected;

/// The operands of a scan, held as long as its launches need them.
struct Operands<B> {
    q: Rows<B>,
    k: Rows<B>,
    beta: Vector<B>,
    prior: Option<(Vector<B>, [usize; 3])>,
    protected: Option<(Vector<B>, [usize; 4])>,
}

impl<B: From<Tensor>> Operands<B> {
    fn new(problem: &Problem, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Self> {
        check_head("beta", scan.beta, problem.q_heads)?;
        let prior = |t: &Tensor| -> Result<_> { Ok((Vector::new(t, DType::F32)?, prior_dims(t, problem)?)) };
        let protected =
            |t: &Tensor| -> Result<_> { Ok((Vector::new(t, DType::I32)?, protected_dims(t, problem)?)) };
        if scan.checked {
            check_values(problem, q, k, scan)?;
        }
        Ok(Self {
            q: Rows::new(q)?,
            k: Rows::new(k)?,
            beta: Vector::new(scan.beta, DType::F32)?,
            prior: scan.prior.map(prior).transpose()?,
            protected: scan.protected.map(protected).transpose()?,
        })
    }

    fn inputs<'a>(&'a self, scan: &'a Scan) -> gpu::Inputs<'a, B> {
        gpu::Inputs {
            q: self.q.tensor4(),
            k: self.k.tensor4(),
            beta: self.beta.slice(),
            prior: self.prior.as_ref().map(|(p, [b, h, _])| gpu::Prior { data: p.slice(), dims: [*b, *h] }),
            protected: self
                .protected
                .as_ref()
                .map(|(p, dims)| gpu::Protected { data: p.slice(), dims: *dims }),
            mask: scan.mask,
        }
    }

    /// The same without a prior, which decoding adds by itself.
    fn without_prior<'a>(&'a self, scan: &'a Scan) -> gpu::Inputs<'a, B> {
        gpu::Inputs { prior: None, ..self.inputs(scan) }
    }
}

/// The scan of a planned problem.
pub(crate) fn scan<G: TensorGpu>(
    problem: &Problem,
    plan: &gpu::Plan,
    q: &Tensor,
    k: &Tensor,
    scan: &Scan,
) -> Result<Candidates> {
    let device = G::of(q.device())?;
    let operands = Operands::<G::Buffer>::new(problem, q, k, scan)?;
    let slots = problem.candidates + operands.protected.as_ref().map_or(0, |(_, dims)| dims[3]);
    let shape = (problem.batch, problem.q_heads, problem.queries, slots);
    let n = problem.batch * problem.q_heads * problem.queries * slots;
    let (index, energy) = (device.allocate(4 * n)?, device.allocate(4 * n)?);
    let flags = operands.protected.as_ref().map(|_| device.allocate(n)).transpose()?;
    let out = gpu::Outputs {
        index: (&index).into(),
        energy: (&energy).into(),
        flags: flags.as_ref().map(Slice::from),
    };
    gpu::scan(&device, plan, problem, &operands.inputs(scan), &out)?;
    Ok(Candidates {
        index: device.tensor(index, DType::I32, shape)?,
        energy: device.tensor(energy, DType::F32, shape)?,
        protected: flags.map(|flags| device.tensor(flags, DType::U8, shape)).transpose()?,
        rescored: 1.0,
    })
}

/// The winner of every query and its value row: for a few queries by decoding, which splits the keys over
/// blocks, else by the fused scan.
pub(crate) fn scan_select<G: TensorGpu>(
    problem: &Problem,
    plan: &gpu::Plan,
    [q, k, v]: [&Tensor; 3],
    scan: &Scan,
    threshold: Option<&Tensor>,
) -> Result<Selected> {
    let device = G::of(q.device())?;
    let operands = Operands::<G::Buffer>::new(problem, q, k, scan)?;
    let v = Rows::new(v)?;
    let threshold = threshold.map(|t| Vector::new(t, DType::F32)).transpose()?;
    let shape = (problem.batch, problem.q_heads, problem.queries);
    let rows = problem.batch * problem.q_heads * problem.queries;
    let (index, energy) = (device.allocate(4 * rows)?, device.allocate(4 * rows)?);
    let y = device.allocate(rows * v.dim() * problem.dtype.size_in_bytes())?;
    let x = operands.inputs(scan);
    let threshold = threshold.as_ref().map(Vector::slice);
    if problem.queries <= MAX_QUERIES {
        let plan = decode::Plan::new(problem, x.prior.is_some(), &device.arch())?;
        let workspace = device.zeros(plan.workspace_bytes(problem))?;
        let own = match scan.key_bias {
            Some(_) => None,
            None => Some(Vector::owned(gpu::key_bias(&device, problem, &operands.without_prior(scan))?)),
        };
        let kept = scan.key_bias.map(|kept| kept.of(problem)).transpose()?;
        let Some(bias) = kept.as_ref().or(own.as_ref()) else { unreachable!("one of the two") };
        let out = decode::Outputs { index: (&index).into(), energy: (&energy).into(), y: (&y).into() };
        let inputs = decode::Inputs {
            q: x.q,
            k: x.k,
            v: v.tensor4(),
            value_dim: v.dim(),
            bias: bias.slice(),
            pages: None,
            beta: x.beta,
            prior: x.prior,
            threshold,
            mask: scan.mask,
            workspace: (&workspace).into(),
        };
        decode::decode(&device, &plan, problem, &inputs, &out)?;
    } else {
        let out = gpu::Outputs { index: (&index).into(), energy: (&energy).into(), flags: None };
        let values = gpu::Values { v: v.tensor4(), dim: v.dim(), threshold, y: (&y).into() };
        gpu::scan_select(&device, plan, problem, &x, &values, &out)?;
    }
    let index = device.tensor(index, DType::I32, shape)?;
    let energy = device.tensor(energy, DType::F32, shape)?;
    Ok(Selected {
        y: device.tensor(y, problem.dtype, (problem.batch, problem.q_heads, problem.queries, v.dim()))?,
        // candle has no operations on i32 there; the energy of a row that abstains is infinite.
        gate: energy.lt(f32::INFINITY)?.to_dtype(DType::F32)?,
        margin: Tensor::full(f32::INFINITY, shape, index.device())?,
        compared: energy.unsqueeze(3)?,
        index,
        energy,
        coherence: None,
        later: Vec::new(),
    })
}
