//! `scan` and `scan_select` of tensors.

use candle_core::{DType, Device, Tensor};

use crate::backend::check::check_head;
use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::backend::gpu::{Prior, Slice};
use crate::cache::int8_keys::gpu::Codes;
use crate::cache::key_bias::bias_row;
use crate::cache::key_bias::launch::key_bias;
use crate::error::Result;
use crate::ops::decode::MAX_QUERIES;
use crate::ops::decode::gpu::launch as decode;
use crate::ops::decode::paged::PagedCache;
use crate::ops::scan::gpu::certified::{Certified, scan_certified};
use crate::ops::scan::gpu::launch as gpu;
use crate::ops::scan::problem::{Problem, prior_dims, problem, protected_dims};
use crate::ops::scan::rescored::Rescored;
use crate::ops::scan::{Candidates, Scan, check_values, plan_of};
use crate::ops::select::Selected;
use crate::options::Precision;

/// The operands of a scan, held as long as its launches need them.
struct Operands<B> {
    device: Device,
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
            device: q.device().clone(),
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
            prior: self.prior.as_ref().map(|(p, [b, h, _])| Prior { data: p.slice(), dims: [*b, *h] }),
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

/// A certified scan of a planned problem; returns the counts of [`Certified::rescored`].
fn certified<G: TensorGpu>(
    device: &G,
    (problem, plan): (&Problem, &gpu::Plan),
    operands: &Operands<G::Buffer>,
    scan: &Scan,
    out: &gpu::Outputs<'_, G::Buffer>,
    values: Option<&gpu::Values<'_, G::Buffer>>,
) -> Result<G::Buffer> {
    let x = operands.inputs(scan);
    let codes = Codes::of(device, &operands.device, problem, &x.k, scan.quantized)?;
    let rescored = device.allocate(8 * problem.batch * problem.q_heads * problem.queries)?;
    let beside = Certified { keys: codes.slices(), rescored: (&rescored).into() };
    scan_certified(device, plan, problem, &x, &beside, out, values)?;
    Ok(rescored)
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
    let rescored = match problem.precision {
        Precision::Native => {
            gpu::scan(&device, plan, problem, &operands.inputs(scan), &out)?;
            Rescored::ALL
        }
        Precision::Certified => {
            let counts = certified(&device, (problem, plan), &operands, scan, &out, None)?;
            let shape = (problem.batch, problem.q_heads, problem.queries, 2);
            Rescored::counted(device.tensor(counts, DType::U32, shape)?)
        }
    };
    Ok(Candidates {
        index: device.tensor(index, DType::I32, shape)?,
        energy: device.tensor(energy, DType::F32, shape)?,
        protected: flags.map(|flags| device.tensor(flags, DType::U8, shape)).transpose()?,
        rescored,
    })
}

/// The winner of every query and its value row: for a few queries by decoding, which splits the keys over
/// blocks, else by the fused scan.
pub(crate) fn scan_select<G: TensorGpu>(
    [q, k, v]: [&Tensor; 3],
    scan: &Scan,
    threshold: Option<&Tensor>,
) -> Result<Selected> {
    let device = G::of(q.device())?;
    let problem = &problem(q, k, scan)?;
    let operands = Operands::<G::Buffer>::new(problem, q, k, scan)?;
    let winners = Winners::<G>::new(&device, problem, v, threshold)?;
    if problem.queries <= MAX_QUERIES {
        let pieces = [problem.batch, problem.keys];
        winners.decode(&device, problem, &operands, scan, None, pieces)?;
    } else {
        let plan = plan_of(problem, q, k, scan)?;
        let x = operands.inputs(scan);
        let out =
            gpu::Outputs { index: (&winners.index).into(), energy: (&winners.energy).into(), flags: None };
        let values = gpu::Values {
            v: winners.v.tensor4(),
            dim: winners.v.dim(),
            threshold: winners.threshold.as_ref().map(Vector::slice),
            y: (&winners.y).into(),
        };
        let plan = plan.gpu()?;
        match problem.precision {
            Precision::Native => gpu::scan_select(&device, plan, problem, &x, &values, &out)?,
            Precision::Certified => {
                certified(&device, (problem, plan), &operands, scan, &out, Some(&values))?;
            }
        }
    }
    winners.finish(&device, problem)
}

/// The same over a cache in pages, for a table with room for `keys` keys a sequence in pages of `page`.
pub(crate) fn scan_select_paged<G: TensorGpu>(
    q: &Tensor,
    cache: &PagedCache,
    [keys, page]: [usize; 2],
    scan: &Scan,
    threshold: Option<&Tensor>,
) -> Result<Selected> {
    let ((batch, q_heads, queries, head_dim), (count, kv_heads, _, _)) = (q.dims4()?, cache.k.dims4()?);
    let problem = Problem {
        batch,
        q_heads,
        kv_heads,
        queries,
        keys,
        head_dim,
        candidates: 1,
        dtype: q.dtype(),
        score: scan.score,
        tie: scan.tie,
        precision: scan.precision,
    };
    let device = G::of(q.device())?;
    let operands =
        Operands::<G::Buffer>::new(&problem, q, cache.k, &Scan { checked: false, ..scan.clone() })?;
    let winners = Winners::<G>::new(&device, &problem, cache.v, threshold)?;
    // candle has no conversion to i32 there; ids are below 2^31, whatever the sign of their type.
    let ids = if cache.table.dtype() == DType::I64 { DType::U32 } else { cache.table.dtype() };
    let table = Vector::new(cache.table, ids)?;
    let pages = decode::Pages { table: table.slice(), row: keys / page, keys: page, count };
    winners.decode(&device, &problem, &operands, scan, Some(pages), [count, page])?;
    winners.finish(&device, &problem)
}

/// The winners of a fused selection, while they are found.
struct Winners<G: TensorGpu> {
    v: Rows<G::Buffer>,
    threshold: Option<Vector<G::Buffer>>,
    index: G::Buffer,
    energy: G::Buffer,
    y: G::Buffer,
}

impl<G: TensorGpu> Winners<G> {
    fn new(device: &G, problem: &Problem, v: &Tensor, threshold: Option<&Tensor>) -> Result<Self> {
        let v = Rows::new(v)?;
        let rows = problem.batch * problem.q_heads * problem.queries;
        Ok(Self {
            threshold: threshold.map(|t| Vector::new(t, DType::F32)).transpose()?,
            index: device.allocate(4 * rows)?,
            energy: device.allocate(4 * rows)?,
            y: device.allocate(rows * v.dim() * problem.dtype.size_in_bytes())?,
            v,
        })
    }

    /// One decoding step over keys in `pieces` pieces (batch entries or pages) of a number of keys.
    fn decode(
        &self,
        device: &G,
        problem: &Problem,
        operands: &Operands<G::Buffer>,
        scan: &Scan,
        pages: Option<decode::Pages<'_, G::Buffer>>,
        [pieces, piece_keys]: [usize; 2],
    ) -> Result<()> {
        let x = operands.inputs(scan);
        let plan = decode::Plan::new(problem, x.prior.is_some(), &device.arch())?;
        let workspace = device.zeros(plan.workspace_bytes(problem))?;
        let piece = Problem { batch: pieces, keys: piece_keys, ..problem.clone() };
        let (kept, lent, bias): (Vector<G::Buffer>, _, _);
        let known = match (problem.precision, scan.quantized, scan.key_bias) {
            (Precision::Certified, quantized, _) => {
                lent = Codes::of(device, &operands.device, &piece, &x.k, quantized)?;
                decode::Known::Quantized(lent.slices())
            }
            (Precision::Native, _, Some(key_bias)) => {
                let Problem { batch, kv_heads, keys, head_dim, score, .. } = piece;
                let biases = key_bias.of([batch, kv_heads, keys, head_dim], score)?;
                kept = Vector::strided(biases.clone());
                decode::Known::Bias(kept.slice(), biases.dim(2)?)
            }
            (Precision::Native, _, None) => {
                bias = key_bias(device, &piece, &operands.without_prior(scan))?;
                decode::Known::Bias((&bias).into(), bias_row(piece_keys))
            }
        };
        let inputs = decode::Inputs {
            q: x.q,
            k: x.k,
            v: self.v.tensor4(),
            value_dim: self.v.dim(),
            known,
            pages,
            beta: x.beta,
            prior: x.prior,
            threshold: self.threshold.as_ref().map(Vector::slice),
            mask: scan.mask,
            workspace: (&workspace).into(),
        };
        let out = decode::Outputs {
            index: (&self.index).into(),
            energy: (&self.energy).into(),
            y: (&self.y).into(),
        };
        decode::decode(device, &plan, problem, &inputs, &out)
    }

    fn finish(self, device: &G, problem: &Problem) -> Result<Selected> {
        let shape = (problem.batch, problem.q_heads, problem.queries);
        let value_shape = (problem.batch, problem.q_heads, problem.queries, self.v.dim());
        let index = device.tensor(self.index, DType::I32, shape)?;
        let energy = device.tensor(self.energy, DType::F32, shape)?;
        Ok(Selected {
            y: device.tensor(self.y, problem.dtype, value_shape)?,
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
}
