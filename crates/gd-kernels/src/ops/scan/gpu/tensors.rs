//! `scan` of tensors on a GPU.

use candle_core::{DType, Device, Tensor};

use crate::backend::check::check_head;
use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::backend::gpu::{Prior, Slice};
use crate::cache::CachedKeys;
use crate::cache::int8_keys::gpu::Int8Rows;
use crate::error::Result;
use crate::ops::scan::Candidates;
use crate::ops::scan::cpu::check_on_host::check_on_host;
use crate::ops::scan::gpu::certified::{Certified, scan_certified};
use crate::ops::scan::gpu::launch::{self, GpuScanPlan};
use crate::ops::scan::options::Scan;
use crate::ops::scan::problem::Problem;
use crate::ops::scan::rescored::Rescored;
use crate::options::Precision;

/// The buffers of a scan's arguments, which live as long as its launches need them.
pub(crate) struct Operands<B> {
    pub(crate) device: Device,
    q: Rows<B>,
    k: Rows<B>,
    beta: Vector<B>,
    prior: Option<(Vector<B>, [usize; 3])>,
    protected: Option<(Vector<B>, [usize; 4])>,
}

impl<B: From<Tensor>> Operands<B> {
    /// Checks the shapes of beta, prior and protected keys, and in checked mode all values.
    pub(crate) fn new(problem: &Problem, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<Self> {
        check_head("beta", scan.beta, problem.q_heads)?;
        let prior = |t: &Tensor| -> Result<_> { Ok((Vector::new(t, DType::F32)?, problem.prior_dims(t)?)) };
        let protected =
            |t: &Tensor| -> Result<_> { Ok((Vector::new(t, DType::I32)?, problem.protected_dims(t)?)) };
        if scan.checked {
            check_on_host(problem, q, k, scan)?;
        }
        Ok(Self {
            device: q.device().clone(),
            q: Rows::new(q)?,
            k: Rows::new(k)?,
            beta: Vector::new(scan.beta, DType::F32)?,
            prior: scan.prior.map(prior).transpose()?,
            protected: scan.protected.map(protected).transpose()?,
        })
    }

    /// The arguments as the launches take them.
    pub(crate) fn inputs<'a>(&'a self, scan: &'a Scan) -> launch::Inputs<'a, B> {
        launch::Inputs {
            q: self.q.tensor4(),
            k: self.k.tensor4(),
            beta: self.beta.slice(),
            prior: self.prior.as_ref().map(|(p, [b, h, _])| Prior { data: p.slice(), dims: [*b, *h] }),
            protected: self
                .protected
                .as_ref()
                .map(|(p, dims)| launch::Protected { data: p.slice(), dims: *dims }),
            mask: scan.mask,
        }
    }
}

/// Runs a certified scan; returns the counts of [`Certified::rescored`].
pub(crate) fn certified<G: TensorGpu>(
    gpu: &G,
    (problem, plan): (&Problem, &GpuScanPlan),
    operands: &Operands<G::Buffer>,
    scan: &Scan,
    out: &launch::Outputs<'_, G::Buffer>,
    values: Option<&launch::Values<'_, G::Buffer>>,
) -> Result<G::Buffer> {
    let x = operands.inputs(scan);
    let cached = match scan.cached {
        Some(CachedKeys::Int8(keys)) => Some(keys),
        _ => None,
    };
    let keys = (problem.key_shape(), problem.keys);
    let int8 = Int8Rows::of(gpu, &operands.device, keys, &x.k, cached)?;
    let rescored = gpu.allocate(8 * problem.batch * problem.q_heads * problem.queries)?;
    let certified = Certified { keys: int8.slices(), rescored: (&rescored).into() };
    scan_certified(gpu, plan, problem, &x, &certified, out, values)?;
    Ok(rescored)
}

/// Runs a planned scan.
pub(crate) fn scan<G: TensorGpu>(
    problem: &Problem,
    plan: &GpuScanPlan,
    q: &Tensor,
    k: &Tensor,
    scan: &Scan,
) -> Result<Candidates> {
    let gpu = G::of(q.device())?;
    let operands = Operands::<G::Buffer>::new(problem, q, k, scan)?;
    let slots = problem.candidates + operands.protected.as_ref().map_or(0, |(_, dims)| dims[3]);
    let shape = (problem.batch, problem.q_heads, problem.queries, slots);
    let n = problem.batch * problem.q_heads * problem.queries * slots;
    let (index, energy) = (gpu.allocate(4 * n)?, gpu.allocate(4 * n)?);
    let flags = operands.protected.as_ref().map(|_| gpu.allocate(n)).transpose()?;
    let out = launch::Outputs {
        index: (&index).into(),
        energy: (&energy).into(),
        flags: flags.as_ref().map(Slice::from),
    };
    let rescored = match problem.precision {
        Precision::Native => {
            launch::scan(&gpu, plan, problem, &operands.inputs(scan), &out)?;
            Rescored::ALL
        }
        Precision::Certified => {
            let counts = certified(&gpu, (problem, plan), &operands, scan, &out, None)?;
            let shape = (problem.batch, problem.q_heads, problem.queries, 2);
            Rescored::from_counts(gpu.tensor(counts, DType::U32, shape)?)
        }
    };
    Ok(Candidates {
        index: gpu.tensor(index, DType::I32, shape)?,
        energy: gpu.tensor(energy, DType::F32, shape)?,
        protected: flags.map(|flags| gpu.tensor(flags, DType::U8, shape)).transpose()?,
        rescored,
    })
}
