//! `scan` and `scan_select` on a GPU: plan and launches.
//!
//! Two kernels run: one computes the bias of every key (`-|k|^2 / 2` and the prior as scores), the other scans. For one
//! candidate the scan has a running maximum and finds its key at the end; for more, every row has a list in shared memory,
//! and scores are compared with its last entry. On compute capability 9.0 both have a variant that loads keys with TMA,
//! for tensors that TMA supports.
//!
//! q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`; index, energy `[B, Hq, N, K + P]`.

use std::fmt;

use bytemuck::bytes_of;
use candle_core::DType;

use crate::backend::gpu::kernel::{Kernel, KernelOp, Variant, padded_dim};
use crate::backend::gpu::params::{MaskParams, ScanParams, ScoreCode, TieCode};
use crate::backend::gpu::{
    Arch, Constants, Gpu, Launch, Prior, Slice, Tensor4, TensorMap, elements, grid, mask, tensor_map,
};
use crate::cache::key_bias::bias_row;
use crate::cache::key_bias::launch::{BiasInputs, key_bias};
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::ops::scan::gpu::certified as scan_certified;
use crate::ops::scan::problem::Problem;
use crate::options::Precision;

/// Greatest number of candidates per row.
pub const MAX_CANDIDATES: usize = 64;
/// The same on Metal, where lists have 64 entries.
const MAX_CANDIDATES_METAL: usize = 32;
/// Greatest number of protected keys per row.
pub const MAX_PROTECTED: usize = 32;
/// Static shared memory of the kernels, in bytes: the visible ranges of 256 rows.
pub(super) const STATIC_SHARED_BYTES: usize = 2304;
/// Keys of a tile of the kernel for Hopper.
const HOPPER_TILE_KEYS: usize = 128;
/// Alignment of its shared memory, in bytes.
const HOPPER_ALIGNMENT_BYTES: usize = 1024;
/// Rows up to which the smaller blocks of the portable kernel are faster.
const HOPPER_MIN_ROWS: usize = 64;

/// How a scan is launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuScanPlan {
    /// The kernel.
    pub kernel: Kernel,
    /// head_dim of the kernel.
    pub padded_dim: usize,
    /// Warps of a block that hold query rows.
    pub warps: usize,
    /// Additional warps that load keys with TMA; 0 if all warps load.
    pub loaders: usize,
    /// Query rows of a warp.
    pub warp_rows: usize,
    /// Keys that are loaded at a time.
    pub tile_keys: usize,
    /// Query heads of a group that share a block.
    pub pack: usize,
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
}

impl fmt::Display for GpuScanPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GpuScanPlan { kernel, warps, warp_rows, tile_keys, pack, shared_bytes, .. } = self;
        let rows = warps * warp_rows;
        write!(f, "{kernel}: {rows} query rows x {tile_keys} keys, {pack} heads packed, {shared_bytes} bytes")
    }
}

/// Bytes of the list of a row in shared memory: 64 or 128 entries of score and key.
fn list_bytes(candidates: usize) -> usize {
    if candidates > 32 { 1024 } else { 512 }
}

/// Shared memory of two tiles of keys with their biases: one is loaded while the other is read.
pub(crate) fn tile_bytes(dtype: DType, padded_dim: usize, keys: usize) -> usize {
    // Rows are padded by 16 bytes, so that consecutive rows are in different banks.
    2 * keys * (padded_dim * dtype.size_in_bytes() + 16 + 4)
}

/// The tiles of a block of a scan.
struct Tiling {
    warp_rows: usize,
    keys: usize,
    // Shared memory of the keys, and of each warp.
    bytes: usize,
    warp_bytes: usize,
    max_warps: usize,
}

impl Tiling {
    /// `list`: bytes of the list of a row, 0 for one candidate.
    fn new(dtype: DType, padded: usize, list: usize, arch: &Arch) -> Self {
        let (half, max_warps) = (dtype != DType::F32, if list > 0 { 4 } else { 8 });
        if arch.is_metal() {
            // One tile of f16 or f32 (bf16 is widened), through which the queries are first loaded to registers. A warp
            // stores its scores between the matrix product and the search.
            let warp_rows = if list == 0 && padded <= 128 { 16 } else { 8 };
            let keys = if padded <= 128 { 32 } else { 16 };
            let size = if dtype == DType::F16 { 2 } else { 4 };
            let bytes = keys * (padded * size + 16 + 4);
            let warp_bytes = warp_rows * (keys * 4 + 16 + list);
            return Self { warp_rows, keys, bytes, warp_bytes, max_warps };
        }
        let warp_rows = if half && list == 0 && padded <= 128 { 32 } else { 16 };
        let keys = if half { 64 } else { 32 };
        // Without tensor cores, queries are read from shared memory.
        let queries = if half { 0 } else { padded * 4 + 16 };
        let warp_bytes = warp_rows * (queries + list);
        Self { warp_rows, keys, bytes: tile_bytes(dtype, padded, keys), warp_bytes, max_warps }
    }
}

impl GpuScanPlan {
    /// The plan of a scan with `protected` protected keys a row; `prior` is whether there is one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the value that the kernels do not cover.
    pub fn new(problem: &Problem, protected: usize, prior: bool, arch: &Arch) -> Result<Self> {
        let Problem { dtype, head_dim, candidates, .. } = *problem;
        let variant = Variant::new("scan", dtype, arch)?;
        let padded = padded_dim("scan", head_dim)?;
        let max_candidates = if arch.is_metal() { MAX_CANDIDATES_METAL } else { MAX_CANDIDATES };
        if candidates == 0 || candidates > max_candidates {
            return Err(Error::Unsupported(format!(
                "scan: {candidates} candidates on a GPU of this kind; 1 to {max_candidates} are supported"
            )));
        }
        if protected > MAX_PROTECTED {
            return Err(Error::Unsupported(format!(
                "scan: {protected} protected keys a row on a GPU; at most {MAX_PROTECTED} are supported"
            )));
        }
        if problem.precision == Precision::Certified {
            let plan = scan_certified::plan(problem, protected, prior, arch)?;
            return plan.checked(problem, protected, prior);
        }
        let list = candidates > 1 || protected > 0;
        let Tiling { warp_rows, keys: tile_keys, bytes, warp_bytes, max_warps } =
            Tiling::new(dtype, padded, if list { list_bytes(candidates) } else { 0 }, arch);
        let pack = if prior { 1 } else { problem.group() };
        let shared = |warps: usize| bytes + warps * warp_bytes;
        let rows = problem.queries * pack;
        let available = arch.shared_bytes as usize - STATIC_SHARED_BYTES;
        let fits = |w: &usize| shared(*w) <= available && (*w == 1 || (w / 2) * warp_rows < rows);
        let Some(warps) =
            [max_warps, max_warps / 2, max_warps / 4, 1].into_iter().find(|w| *w > 0 && fits(w))
        else {
            return Err(Error::Unsupported(format!(
                "scan: head_dim {head_dim} in {} needs {} bytes of shared memory; the device has {}",
                dtype.as_str(),
                shared(1),
                arch.shared_bytes
            )));
        };
        let op = if list { KernelOp::ScanTopK } else { KernelOp::ScanTop1 };
        let plan = Self {
            kernel: variant.sized(op, padded),
            padded_dim: padded,
            warps,
            loaders: 0,
            warp_rows,
            tile_keys,
            pack,
            shared_bytes: shared(warps),
        };
        plan.checked(problem, protected, prior)
    }

    /// Checks that the grid and 31-bit indices suffice.
    fn checked(self, problem: &Problem, protected: usize, prior: bool) -> Result<Self> {
        self.grid(problem)?;
        let rows = problem.batch as u128 * problem.q_heads as u128 * problem.queries as u128;
        elements("index", rows * (problem.candidates + protected) as u128)?;
        let heads = if prior { problem.q_heads } else { problem.kv_heads };
        elements("bias", problem.batch as u128 * heads as u128 * bias_row(problem.keys) as u128)?;
        Ok(self)
    }

    /// The plan for the Hopper kernel if there is one for this problem: compute capability 9.0, 16-bit elements, for lists a
    /// head dimension up to 192 and up to 32 candidates. Its blocks have at least 128 rows, so it is used for many rows.
    #[must_use]
    pub fn on_hopper(self, problem: &Problem, arch: &Arch) -> Self {
        let Problem { queries, keys, candidates, precision, .. } = *problem;
        let list = self.kernel.op() == KernelOp::ScanTopK;
        // As in scan_hopper.cuh: matrices of 64 rows per warpgroup, and stages of the ring of tiles.
        let (matrices, stages) = match (list, self.padded_dim) {
            (false, ..=128) => (2, 4),
            (false, 192) => (2, 2),
            (false, _) => (1, 2),
            (true, ..=128) if candidates <= 32 => (1, 3),
            (true, 192) if candidates <= 32 => (1, 2),
            (true, _) => return self,
        };
        let suits = arch.compute == 90 && precision == Precision::Native;
        let large = queries * self.pack > HOPPER_MIN_ROWS && keys > 0;
        let Some(kernel) = self.kernel.on_hopper().filter(|_| suits && large) else {
            return self;
        };
        let row_bytes = self.padded_dim.next_multiple_of(64) * 2;
        let stage = HOPPER_TILE_KEYS * (row_bytes + 4) + 16;
        let list_bytes = if list { list_bytes(candidates) } else { 0 };
        let shared_bytes =
            HOPPER_ALIGNMENT_BYTES + 128 * matrices * (row_bytes + list_bytes) + stages * stage;
        if shared_bytes + STATIC_SHARED_BYTES > arch.shared_bytes as usize {
            return self;
        }
        Self {
            kernel,
            warps: 8,
            loaders: 4,
            warp_rows: 16 * matrices,
            tile_keys: HOPPER_TILE_KEYS,
            shared_bytes,
            ..self
        }
    }

    /// Blocks of rows of a packed group of heads.
    fn row_blocks(&self, problem: &Problem) -> usize {
        (problem.queries * self.pack).div_ceil(self.warps * self.warp_rows)
    }

    pub(super) fn grid(&self, problem: &Problem) -> Result<[u32; 3]> {
        let groups = problem.batch as u128 * (problem.q_heads / self.pack) as u128;
        grid("scan", groups * self.row_blocks(problem) as u128)
    }
}

/// Protected keys, i32 `[B|1, Hq|Hk|1, N|1, P]`, contiguous, negative where unused.
#[derive(Debug)]
pub struct Protected<'a, B> {
    /// The keys.
    pub data: Slice<'a, B>,
    /// Its shape.
    pub dims: [usize; 4],
}

/// The inputs of a scan.
#[derive(Debug)]
pub struct Inputs<'a, B> {
    /// `[B, Hq, N, D]`.
    pub q: Tensor4<'a, B>,
    /// `[B, Hk, M, D]`.
    pub k: Tensor4<'a, B>,
    /// f32 `[Hq]`, > 0.
    pub beta: Slice<'a, B>,
    /// The prior.
    pub prior: Option<Prior<'a, B>>,
    /// Keys that are candidates for any energy.
    pub protected: Option<Protected<'a, B>>,
    /// Which keys are visible to each query; validated for the problem.
    pub mask: &'a Mask,
}

impl<'a, B> Inputs<'a, B> {
    /// What the biases of the keys are computed from.
    pub(crate) fn bias_inputs(&self, q_heads: usize) -> BiasInputs<'a, B> {
        BiasInputs { k: self.k, q_heads, beta: self.beta, prior: self.prior }
    }

    /// Whether TMA can load q and k, as [`GpuScanPlan::on_hopper`] requires.
    pub fn tma_loadable(&self, problem: &Problem) -> bool {
        let Problem { batch, q_heads, kv_heads, queries, keys, head_dim, dtype, .. } = *problem;
        let suits = |t: &Tensor4<'_, B>, heads: usize, rows: usize| {
            tensor_map::suits(dtype, [batch, heads, rows, head_dim], t.strides, t.data.offset).is_ok()
        };
        suits(&self.q, q_heads, queries) && suits(&self.k, kv_heads, keys)
    }
}

/// The outputs of a scan: `[B, Hq, N, K + P]`, contiguous.
#[derive(Debug)]
pub struct Outputs<'a, B> {
    /// i32, -1 in unused slots.
    pub index: Slice<'a, B>,
    /// f32, +inf in unused slots.
    pub energy: Slice<'a, B>,
    /// u8, 1 where protected; needed if there are protected keys.
    pub flags: Option<Slice<'a, B>>,
}

/// The values of a fused scan and selection.
#[derive(Debug)]
pub struct Values<'a, B> {
    /// `[B, Hk, M, Dv]`, of the dtype of q.
    pub v: Tensor4<'a, B>,
    /// Dv.
    pub dim: usize,
    /// f32 `[Hq]`; without it every winner is admitted.
    pub threshold: Option<Slice<'a, B>>,
    /// `[B, Hq, N, Dv]`, contiguous: the winner's value row, or zeros.
    pub y: Slice<'a, B>,
}

/// Finds the candidates of every query; the same contract as [`scan`](crate::scan).
///
/// # Errors
/// Tensors of 2^31 elements or more, and errors of the launch.
pub fn scan<G: Gpu>(
    gpu: &G,
    plan: &GpuScanPlan,
    problem: &Problem,
    x: &Inputs<'_, G::Buffer>,
    out: &Outputs<'_, G::Buffer>,
) -> Result<()> {
    launch(gpu, plan, problem, x, out, None)
}

/// The key of least energy of every query and its value row: `index` -1, energy +inf and zeros where
/// no key is admitted. The plan is that of one candidate without protected keys.
///
/// # Errors
/// As [`scan`].
pub fn scan_select<G: Gpu>(
    gpu: &G,
    plan: &GpuScanPlan,
    problem: &Problem,
    x: &Inputs<'_, G::Buffer>,
    values: &Values<'_, G::Buffer>,
    out: &Outputs<'_, G::Buffer>,
) -> Result<()> {
    if problem.candidates != 1 || x.protected.is_some() {
        return Err(Error::Invalid("scan_select: one candidate and no protected keys".into()));
    }
    launch(gpu, plan, problem, x, out, Some(values))
}

/// The parameters of a scan; refuses tensors that 31 bits cannot address.
pub(super) fn params<B>(
    plan: &GpuScanPlan,
    problem: &Problem,
    x: &Inputs<'_, B>,
    values: Option<&Values<'_, B>>,
    mask: MaskParams,
) -> Result<ScanParams> {
    let Problem { batch, q_heads, kv_heads, queries, keys, head_dim, dtype, .. } = *problem;
    let (q_dims, k_dims) = ([batch, q_heads, queries, head_dim], [batch, kv_heads, keys, head_dim]);
    let [q_batch, q_head, q_row] = x.q.checked("q", q_dims)?;
    let [k_batch, k_head, k_row] = x.k.checked("k", k_dims)?;
    let [v_batch, v_head, v_row] = match values {
        Some(v) => v.v.checked("v", [batch, kv_heads, keys, v.dim])?,
        None => [0; 3],
    };
    if let Some(v) = values {
        elements("y", (batch * q_heads) as u128 * queries as u128 * v.dim as u128)?;
    }
    let [prior_batch, prior_heads] = Prior::sizes(x.prior.as_ref());
    let protected = x.protected.as_ref().map_or([0; 4], |p| p.dims.map(|n| n as u32));
    Ok(ScanParams {
        batch: batch as u32,
        q_heads: q_heads as u32,
        kv_heads: kv_heads as u32,
        queries: queries as u32,
        keys: keys as u32,
        head_dim: head_dim as u32,
        q_batch,
        q_head,
        q_row,
        k_batch,
        k_head,
        k_row,
        vector_loads: u32::from(x.q.is_aligned(dtype, q_dims) && x.k.is_aligned(dtype, k_dims)),
        pack: plan.pack as u32,
        row_blocks: plan.row_blocks(problem) as u32,
        bias_heads: if x.prior.is_some() { q_heads } else { kv_heads } as u32,
        bias_row: bias_row(keys) as u32,
        prior_batch,
        prior_heads,
        score: ScoreCode::from(problem.score) as u32,
        tie: TieCode::from(problem.tie) as u32,
        candidates: problem.candidates as u32,
        slots: problem.candidates as u32 + protected[3],
        protected_batch: protected[0],
        protected_heads: protected[1],
        protected_queries: protected[2],
        protected_slots: protected[3],
        value_dim: values.map_or(0, |v| v.dim as u32),
        v_batch,
        v_head,
        v_row,
        mask,
    })
}

fn launch<G: Gpu>(
    gpu: &G,
    plan: &GpuScanPlan,
    problem: &Problem,
    x: &Inputs<'_, G::Buffer>,
    out: &Outputs<'_, G::Buffer>,
    values: Option<&Values<'_, G::Buffer>>,
) -> Result<()> {
    let Problem { batch, q_heads, kv_heads, queries, keys, head_dim, dtype, .. } = *problem;
    if problem.precision != Precision::Native {
        return Err(Error::Invalid(format!("scan at {:?} precision without 8-bit keys", problem.precision)));
    }
    let (mask, table) = mask::upload(gpu, x.mask, batch, queries, keys)?;
    let params = params(plan, problem, x, values, mask)?;
    let map = if plan.loaders > 0 {
        // Queries are loaded as plain rows with the alignment of keys.
        TensorMap::new("q", &x.q, dtype, [batch, q_heads, queries, head_dim], plan.tile_keys)?;
        Some(TensorMap::new("k", &x.k, dtype, [batch, kv_heads, keys, head_dim], plan.tile_keys)?)
    } else {
        None
    };
    let bias = key_bias(gpu, &problem.key_shape(), keys, &x.bias_inputs(q_heads))?;
    let mut buffers = vec![
        Some(x.q.data),
        Some(x.k.data),
        Some((&bias).into()),
        Some(x.beta),
        x.prior.as_ref().map(|p| p.data),
        table.as_ref().map(Slice::from),
        Some(out.index),
        Some(out.energy),
    ];
    if plan.kernel.op() == KernelOp::ScanTopK {
        buffers.extend([x.protected.as_ref().map(|p| p.data), out.flags]);
    } else {
        buffers.extend([values.map(|v| v.v.data), values.and_then(|v| v.threshold), values.map(|v| v.y)]);
    }
    let launch = Launch {
        kernel: plan.kernel,
        grid: plan.grid(problem)?,
        block: 32 * (plan.warps + plan.loaders) as u32,
        shared_bytes: plan.shared_bytes as u32,
        params: bytes_of(&params).to_vec(),
        constants: Constants::new(&mask, params.vector_loads != 0, x.prior.is_some()),
        buffers,
    };
    match map {
        Some(map) => gpu.launch_mapped(&map, &launch),
        None => gpu.launch(&launch),
    }
}
