//! `decode` and `scan_select` of tensors on a GPU.

use candle_core::{DType, Tensor};

use crate::backend::gpu::tensors::{Rows, TensorGpu, Vector};
use crate::cache::int8_keys::gpu::{Int8Buffers, Int8Rows};
use crate::cache::key_bias::bias_row;
use crate::cache::key_bias::launch::{BiasInputs, key_bias};
use crate::cache::{CachedKeys, KeyShape, PagedCache};
use crate::error::Result;
use crate::ops::decode::MAX_QUERIES;
use crate::ops::decode::gpu::launch::{self, DecodePlan};
use crate::ops::scan::gpu::launch as scan_launch;
use crate::ops::scan::gpu::tensors::{Operands, certified};
use crate::ops::scan::options::Scan;
use crate::ops::scan::plan_of;
use crate::ops::scan::problem::Problem;
use crate::ops::select::Selected;
use crate::options::Precision;

/// The winner of every query and its value row: up to [`MAX_QUERIES`] queries with the decoding kernel, which splits the
/// keys over blocks, more with the fused scan.
pub(crate) fn scan_select<G: TensorGpu>(
    [q, k, v]: [&Tensor; 3],
    scan: &Scan,
    threshold: Option<&Tensor>,
) -> Result<Selected> {
    let gpu = G::of(q.device())?;
    let problem = Problem::new(q, k, scan)?;
    if problem.queries <= MAX_QUERIES {
        let problem = Problem { precision: decode_precision(scan), ..problem };
        let operands = Operands::<G::Buffer>::new(&problem, q, k, scan)?;
        let winners = Winners::<G>::new(&gpu, &problem, v, threshold)?;
        winners.decode(&gpu, &problem, &operands, scan, None, (problem.key_shape(), problem.keys))?;
        return winners.into_selected(&gpu, &problem);
    }
    let operands = Operands::<G::Buffer>::new(&problem, q, k, scan)?;
    let winners = Winners::<G>::new(&gpu, &problem, v, threshold)?;
    let plan = plan_of(&problem, q, k, scan)?;
    let plan = plan.gpu()?;
    let x = operands.inputs(scan);
    let out = scan_launch::Outputs {
        index: (&winners.index).into(),
        energy: (&winners.energy).into(),
        flags: None,
    };
    let values = scan_launch::Values {
        v: winners.v.tensor4(),
        dim: winners.v.dim(),
        threshold: winners.threshold.as_ref().map(Vector::slice),
        y: (&winners.y).into(),
    };
    match problem.precision {
        Precision::Native => scan_launch::scan_select(&gpu, plan, &problem, &x, &values, &out)?,
        Precision::Certified => {
            certified(&gpu, (&problem, plan), &operands, scan, &out, Some(&values))?;
        }
    }
    winners.into_selected(&gpu, &problem)
}

/// The same over a paged cache, whose table has entries for `keys` keys per sequence in pages of `page` keys.
pub(crate) fn decode_paged<G: TensorGpu>(
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
        key_dtype: q.dtype(),
        score: scan.score,
        tie: scan.tie,
        precision: decode_precision(scan),
    };
    let gpu = G::of(q.device())?;
    let operands =
        Operands::<G::Buffer>::new(&problem, q, cache.k, &Scan { checked: false, ..scan.clone() })?;
    let winners = Winners::<G>::new(&gpu, &problem, cache.v, threshold)?;
    // candle has no conversion to i32 on a GPU; ids are below 2^31, so the signedness of their type does not matter.
    let ids = if cache.table.dtype() == DType::I64 { DType::U32 } else { cache.table.dtype() };
    let table = Vector::new(cache.table, ids)?;
    let pages = launch::Pages { table: table.slice(), row: keys / page, keys: page, count };
    let shape = KeyShape { sequences: count, ..problem.key_shape() };
    winners.decode(&gpu, &problem, &operands, scan, Some(pages), (shape, page))?;
    winners.into_selected(&gpu, &problem)
}

/// The precision of the decoding kernel: that of the cached data, if there is any.
fn decode_precision(scan: &Scan) -> Precision {
    match scan.cached {
        Some(CachedKeys::Int8(_)) => Precision::Certified,
        Some(CachedKeys::Bias(_)) => Precision::Native,
        None => scan.precision,
    }
}

/// The buffers of the data derived from the keys, for the time of a launch.
enum KeyBuffers<B> {
    Int8(Int8Buffers<B>),
    /// Biases, and the length of a row of biases.
    Bias(Vector<B>, usize),
}

impl<B: From<Tensor>> KeyBuffers<B> {
    /// The cached data, or data that is computed from the keys now.
    fn new<G: TensorGpu<Buffer = B>>(
        gpu: &G,
        precision: Precision,
        operands: &Operands<B>,
        scan: &Scan,
        (shape, keys): (KeyShape, usize),
    ) -> Result<Self> {
        let x = operands.inputs(scan);
        match (precision, scan.cached) {
            (Precision::Certified, cached) => {
                let cached = match cached {
                    Some(CachedKeys::Int8(keys)) => Some(keys),
                    _ => None,
                };
                Ok(Self::Int8(Int8Rows::of(gpu, &operands.device, (shape, keys), &x.k, cached)?))
            }
            (Precision::Native, Some(CachedKeys::Bias(bias))) => {
                let bias = bias.tensor(&shape, keys)?;
                Ok(Self::Bias(Vector::strided(bias.clone()), bias.dim(2)?))
            }
            (Precision::Native, _) => {
                // The decoding kernel adds the prior itself.
                let x = BiasInputs { k: x.k, q_heads: scan.beta.elem_count(), beta: x.beta, prior: None };
                let bias = key_bias(gpu, &shape, keys, &x)?;
                Ok(Self::Bias(Vector::owned(bias), bias_row(keys)))
            }
        }
    }

    fn slices(&self) -> launch::KeyData<'_, B> {
        match self {
            Self::Int8(int8) => launch::KeyData::Int8(int8.slices()),
            Self::Bias(bias, row) => launch::KeyData::Bias(bias.slice(), *row),
        }
    }
}

/// The outputs of a fused selection.
struct Winners<G: TensorGpu> {
    v: Rows<G::Buffer>,
    threshold: Option<Vector<G::Buffer>>,
    index: G::Buffer,
    energy: G::Buffer,
    y: G::Buffer,
}

impl<G: TensorGpu> Winners<G> {
    fn new(gpu: &G, problem: &Problem, v: &Tensor, threshold: Option<&Tensor>) -> Result<Self> {
        let v = Rows::new(v)?;
        let rows = problem.batch * problem.q_heads * problem.queries;
        Ok(Self {
            threshold: threshold.map(|t| Vector::new(t, DType::F32)).transpose()?,
            index: gpu.allocate(4 * rows)?,
            energy: gpu.allocate(4 * rows)?,
            y: gpu.allocate(rows * v.dim() * problem.dtype.size_in_bytes())?,
            v,
        })
    }

    /// Runs one decoding step over keys of this shape and number per sequence or page.
    fn decode(
        &self,
        gpu: &G,
        problem: &Problem,
        operands: &Operands<G::Buffer>,
        scan: &Scan,
        pages: Option<launch::Pages<'_, G::Buffer>>,
        keys: (KeyShape, usize),
    ) -> Result<()> {
        let x = operands.inputs(scan);
        let plan = DecodePlan::new(problem, x.prior.is_some(), &gpu.arch())?;
        let workspace = gpu.zeros(plan.workspace_bytes(problem))?;
        let key_data = KeyBuffers::new(gpu, problem.precision, operands, scan, keys)?;
        let inputs = launch::Inputs {
            q: x.q,
            k: x.k,
            v: self.v.tensor4(),
            value_dim: self.v.dim(),
            key_data: key_data.slices(),
            pages,
            beta: x.beta,
            prior: x.prior,
            threshold: self.threshold.as_ref().map(Vector::slice),
            mask: scan.mask,
            workspace: (&workspace).into(),
        };
        let out = launch::Outputs {
            index: (&self.index).into(),
            energy: (&self.energy).into(),
            y: (&self.y).into(),
        };
        launch::decode(gpu, &plan, problem, &inputs, &out)
    }

    fn into_selected(self, gpu: &G, problem: &Problem) -> Result<Selected> {
        let shape = (problem.batch, problem.q_heads, problem.queries);
        let value_shape = (problem.batch, problem.q_heads, problem.queries, self.v.dim());
        let index = gpu.tensor(self.index, DType::I32, shape)?;
        let energy = gpu.tensor(self.energy, DType::F32, shape)?;
        Ok(Selected {
            y: gpu.tensor(self.y, problem.dtype, value_shape)?,
            // candle has no operations on i32 on a GPU; the energy of a row that abstains is infinite.
            gate: energy.lt(f32::INFINITY)?.to_dtype(DType::F32)?,
            margin: Tensor::full(f32::INFINITY, shape, index.device())?,
            compared: energy.unsqueeze(3)?,
            index,
            energy,
            coherence: None,
            later: Vec::new(),
            picks: Vec::new(),
        })
    }
}
