//! Decoding on a GPU: 1 to 16 queries per sequence against a long cache, which is contiguous or paged.
//!
//! q is `[B, Hq, N, D]`. The cache is k `[B, Hk, M, D]` and v `[B, Hk, M, Dv]`, or pages `[pages, Hk, page, D|Dv]` with a
//! block table `[B, pages per sequence]`. The kernel also reads the biases of the keys without a prior, f32
//! `[B|pages, Hk, capacity]` (`cache::key_bias`), or, for certified decoding, the keys as 8-bit integers
//! ([`crate::cache::int8_keys::launch`]) and of the original keys only those that the bounds do not exclude. index and
//! energy are `[B, Hq, N]`, y `[B, Hq, N, Dv]`, with the bits of a scan with one candidate and a threshold.

use std::fmt;

use bytemuck::bytes_of;
use candle_core::DType;

use crate::backend::gpu::kernel::{Kernel, KernelOp, Variant, padded_dim};
use crate::backend::gpu::params::{DecodeParams, ScoreCode, TieCode};
use crate::backend::gpu::{Arch, Constants, Gpu, Launch, Prior, Slice, Tensor4, elements, grid, mask};
use crate::cache::int8_keys::launch::{BOUNDS_BYTES, Int8Slices};
use crate::cache::key_bias::KEY_PADDING;
use crate::error::{Error, Result};
use crate::mask::Mask;
use crate::ops::decode::MAX_QUERIES;
use crate::ops::scan::gpu::launch::tile_bytes;
use crate::ops::scan::problem::Problem;
use crate::options::Precision;

/// Rows of a block.
const ROWS: usize = 16;
/// Warps of a block.
const WARPS: u32 = 4;
/// Blocks per multiprocessor that saturate the memory bandwidth.
const BLOCKS_PER_PROCESSOR: usize = 4;
/// Minimum number of tiles per split.
const MIN_TILES_PER_SPLIT: usize = 2;
/// Static shared memory of the kernel, in bytes.
const STATIC_SHARED_BYTES: usize = 1024;
/// Entries, of 8 bytes, of the candidate list of a warp in certified decoding.
const WARP_LIST_ENTRIES: usize = 256;
/// Candidates per row tile and split that the workspace can hold; further ones are scored immediately.
const CANDIDATES_PER_SPLIT: usize = 64;
/// Keys must be below this in certified decoding, so that key and row of a candidate fit in 4 bytes.
const MAX_CERTIFIED_KEYS: usize = 1 << 28;

/// How a decoding step is launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodePlan {
    /// The kernel.
    pub kernel: Kernel,
    /// Keys that are loaded at a time.
    pub tile_keys: usize,
    /// Query heads whose rows share a block.
    pub pack: usize,
    /// Blocks of 16 rows of a packed group of heads.
    pub row_tiles: usize,
    /// Blocks that share the keys of a row.
    pub splits: usize,
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
    /// The kernel that merges the results of the splits, on Metal, which has no 64-bit atomics.
    pub merge: Option<Kernel>,
    /// Candidates that the workspace of a row tile can hold, in certified decoding; 0 otherwise.
    pub capacity: usize,
}

impl fmt::Display for DecodePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DecodePlan { kernel, tile_keys, pack, row_tiles, splits, shared_bytes, .. } = self;
        write!(
            f,
            "{kernel}: {row_tiles} x {ROWS} rows, {pack} heads packed, {splits} splits x {tile_keys} keys, \
             {shared_bytes} bytes"
        )
    }
}

impl DecodePlan {
    /// The plan for `problem`, whose keys are those that the cache can hold.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the value that the kernels do not cover.
    pub fn new(problem: &Problem, prior: bool, arch: &Arch) -> Result<Self> {
        let Problem { dtype, head_dim, queries, batch, q_heads, keys, .. } = *problem;
        let variant = Variant::new("decode", dtype, arch)?;
        let padded = padded_dim("decode", head_dim)?;
        if queries == 0 || queries > MAX_QUERIES {
            return Err(Error::Unsupported(format!(
                "decode: {queries} queries; 1 to {MAX_QUERIES} are supported"
            )));
        }
        if problem.candidates != 1 {
            return Err(Error::Unsupported(format!(
                "decode: {} candidates; 1 is supported",
                problem.candidates
            )));
        }
        let certified = problem.precision == Precision::Certified;
        let (half, metal) = (dtype != DType::F32, arch.is_metal());
        if certified && metal {
            return Err(Error::Unsupported(
                "decode: certified precision on Metal; native is supported".into(),
            ));
        }
        if certified && keys >= MAX_CERTIFIED_KEYS {
            return Err(Error::Unsupported(format!(
                "decode: {keys} keys at certified precision; fewer than {MAX_CERTIFIED_KEYS} are supported"
            )));
        }
        let tile_keys = if half || metal || certified { 64 } else { 32 };
        let pack = if prior { 1 } else { problem.group() };
        let row_tiles = (queries * pack).div_ceil(ROWS);
        let row_bytes = padded * dtype.size_in_bytes() + 16;
        // Without tensor cores, queries are read from shared memory; on Metal they are widened.
        let queries_bytes = if half && !metal { 0 } else { ROWS * (padded * 4 + 16) };
        let shared_bytes = queries_bytes
            + if certified {
                let gathered = if half { 16 } else { 8 };
                // Two tiles of integers with their bounds, lists and gathered keys of every warp, and the rows.
                (2 * tile_keys + ROWS) * (padded + 16)
                    + 2 * tile_keys * BOUNDS_BYTES
                    + WARPS as usize * (WARP_LIST_ENTRIES * 8 + gathered * row_bytes)
            } else if metal {
                // Every simdgroup reads its keys directly from memory.
                0
            } else {
                tile_bytes(dtype, padded, tile_keys)
            };
        let available = arch.shared_bytes as usize - STATIC_SHARED_BYTES;
        if shared_bytes > available {
            return Err(Error::Unsupported(format!(
                "decode: head_dim {head_dim} in {} needs {shared_bytes} bytes of shared memory; {available} are available",
                dtype.as_str()
            )));
        }
        let row_tile_count = batch * (q_heads / pack) * row_tiles;
        let wanted = (arch.processors as usize * BLOCKS_PER_PROCESSOR).div_ceil(row_tile_count);
        let splits = wanted.min(keys.div_ceil(tile_keys * MIN_TILES_PER_SPLIT)).max(1);
        let op = if certified { KernelOp::DecodeCertified } else { KernelOp::Decode };
        let kernel = variant.sized(op, padded);
        let merge = metal.then(|| variant.kernel(KernelOp::DecodeMerge));
        let capacity = if certified { splits * CANDIDATES_PER_SPLIT } else { 0 };
        let plan = Self { kernel, tile_keys, pack, row_tiles, splits, shared_bytes, merge, capacity };
        grid("decode", plan.total_row_tiles(problem) as u128 * splits as u128)?;
        Ok(plan)
    }

    /// Row tiles of all packed groups of heads and batch entries.
    fn total_row_tiles(&self, problem: &Problem) -> usize {
        problem.batch * (problem.q_heads / self.pack) * self.row_tiles
    }

    /// Bytes of the workspace of a problem.
    pub fn workspace_bytes(&self, problem: &Problem) -> usize {
        self.workspace(problem).1
    }

    /// The offsets of the parts of the workspace after the first, and its size in bytes. The parts are the greatest score
    /// with its key per row and a count of finished splits; on Metal the scores and keys of every split; in certified
    /// decoding also lower bounds, counters and candidates.
    fn workspace(&self, problem: &Problem) -> (Vec<usize>, usize) {
        let row_tile_count = self.total_row_tiles(problem);
        let sizes: &[usize] = match (&self.merge, self.capacity) {
            (Some(_), _) => &[self.splits * ROWS * 8],
            (None, 0) => &[ROWS * 8, 4],
            (None, capacity) => &[ROWS * 8, ROWS * 4, 8, capacity * 8],
        };
        let mut ends: Vec<usize> = Vec::new();
        for size in sizes {
            ends.push(ends.last().unwrap_or(&0) + row_tile_count * size);
        }
        let end = ends.pop().unwrap_or(0);
        (ends, end)
    }
}

/// The pages of a cache.
#[derive(Debug)]
pub struct Pages<'a, B> {
    /// i32 `[B, row]`: the pages of every sequence.
    pub table: Slice<'a, B>,
    /// Entries per sequence in the table.
    pub row: usize,
    /// Keys of a page, a multiple of 64.
    pub keys: usize,
    /// Pages in all.
    pub count: usize,
}

/// Data derived from cached keys.
#[derive(Debug)]
pub enum KeyData<'a, B> {
    /// Their biases without a prior, for native precision, and the capacity of a sequence or page in keys, a multiple of
    /// 64.
    Bias(Slice<'a, B>, usize),
    /// The keys as 8-bit integers, for certified precision.
    Int8(Int8Slices<'a, B>),
}

/// The inputs of decoding.
#[derive(Debug)]
pub struct Inputs<'a, B> {
    /// `[B, Hq, N, D]`.
    pub q: Tensor4<'a, B>,
    /// `[B, Hk, M, D]`, or `[pages, Hk, page, D]`.
    pub k: Tensor4<'a, B>,
    /// `[B, Hk, M, Dv]`, or `[pages, Hk, page, Dv]`.
    pub v: Tensor4<'a, B>,
    /// Dv.
    pub value_dim: usize,
    /// Data derived from the keys, for the precision of the problem.
    pub key_data: KeyData<'a, B>,
    /// The pages of a paged cache.
    pub pages: Option<Pages<'a, B>>,
    /// f32 `[Hq]`, > 0.
    pub beta: Slice<'a, B>,
    /// The prior.
    pub prior: Option<Prior<'a, B>>,
    /// f32 `[Hq]`; without it every winner is admitted.
    pub threshold: Option<Slice<'a, B>>,
    /// Which keys are visible to each query; its key lengths say how much of the cache is filled.
    pub mask: &'a Mask,
    /// [`DecodePlan::workspace_bytes`] zeros, which are zeros again after the launch, so that all steps of a stream can
    /// share it. On Metal the contents do not matter.
    pub workspace: Slice<'a, B>,
}

/// The outputs of decoding.
#[derive(Debug)]
pub struct Outputs<'a, B> {
    /// i32 `[B, Hq, N]`, -1 where no key is admitted.
    pub index: Slice<'a, B>,
    /// f32 `[B, Hq, N]`, +inf there.
    pub energy: Slice<'a, B>,
    /// `[B, Hq, N, Dv]`, zeros there.
    pub y: Slice<'a, B>,
}

/// One decoding step.
///
/// # Errors
/// Pages that are not a multiple of a tile, tensors of 2^31 elements or more, and errors of the launch.
pub fn decode<G: Gpu>(
    gpu: &G,
    plan: &DecodePlan,
    problem: &Problem,
    x: &Inputs<'_, G::Buffer>,
    out: &Outputs<'_, G::Buffer>,
) -> Result<()> {
    let Problem { batch, q_heads, kv_heads, queries, keys, head_dim, dtype, .. } = *problem;
    let (sequences, sequence_keys) = x.pages.as_ref().map_or((batch, keys), |p| (p.count, p.keys));
    if let Some(p) = &x.pages
        && (p.keys == 0 || p.keys % KEY_PADDING != 0 || p.row * p.keys < keys)
    {
        return Err(Error::Invalid(format!(
            "decode: {} pages of {} keys for {keys} keys; pages are multiples of {KEY_PADDING}",
            p.row, p.keys
        )));
    }
    let q_dims = [batch, q_heads, queries, head_dim];
    let k_dims = [sequences, kv_heads, sequence_keys, head_dim];
    let [q_batch, q_head, q_row] = x.q.checked("q", q_dims)?;
    let [k_batch, k_head, k_row] = x.k.checked("k", k_dims)?;
    let [v_batch, v_head, v_row] = x.v.checked("v", [sequences, kv_heads, sequence_keys, x.value_dim])?;
    let bias_row = match &x.key_data {
        KeyData::Bias(_, row) => *row,
        KeyData::Int8(int8) => int8.capacity,
    };
    let certified = matches!(x.key_data, KeyData::Int8(_));
    let fits = bias_row >= sequence_keys && bias_row.is_multiple_of(KEY_PADDING);
    if certified != (problem.precision == Precision::Certified) || !fits {
        return Err(Error::Invalid(format!(
            "decode: {:?} precision with {} for {bias_row} of {sequence_keys} keys",
            problem.precision,
            if certified { "8-bit keys" } else { "biases" }
        )));
    }
    elements("bias", (sequences * kv_heads) as u128 * bias_row as u128)?;
    let (mask, table) = mask::upload(gpu, x.mask, batch, queries, keys)?;
    let [prior_batch, prior_heads] = Prior::sizes(x.prior.as_ref());
    let params = DecodeParams {
        batch: batch as u32,
        q_heads: q_heads as u32,
        kv_heads: kv_heads as u32,
        queries: queries as u32,
        keys: keys as u32,
        head_dim: head_dim as u32,
        value_dim: x.value_dim as u32,
        q_batch,
        q_head,
        q_row,
        k_batch,
        k_head,
        k_row,
        v_batch,
        v_head,
        v_row,
        vector_loads: u32::from(x.q.is_aligned(dtype, q_dims) && x.k.is_aligned(dtype, k_dims)),
        pack: plan.pack as u32,
        row_tiles: plan.row_tiles as u32,
        splits: plan.splits as u32,
        page_keys: x.pages.as_ref().map_or(0, |p| p.keys as u32),
        table_row: x.pages.as_ref().map_or(0, |p| p.row as u32),
        pages: x.pages.as_ref().map_or(0, |p| p.count as u32),
        bias_row: bias_row as u32,
        prior_batch,
        prior_heads,
        score: ScoreCode::from(problem.score) as u32,
        tie: TieCode::from(problem.tie) as u32,
        candidate_capacity: plan.capacity as u32,
        mask,
    };
    let row_tile_count = plan.total_row_tiles(problem);
    let mut constants = Constants::new(&mask, params.vector_loads != 0, x.prior.is_some());
    constants.rows = (queries * plan.pack).min(ROWS) as u32;
    let launch = |kernel: Kernel, blocks: usize, shared_bytes: usize, buffers| {
        gpu.launch(&Launch {
            kernel,
            grid: grid("decode", blocks as u128)?,
            block: 32 * WARPS,
            shared_bytes: shared_bytes as u32,
            params: bytes_of(&params).to_vec(),
            constants,
            buffers,
        })
    };
    let mut buffers = vec![Some(x.q.data), Some(x.k.data)];
    match &x.key_data {
        KeyData::Bias(bias, _) => buffers.push(Some(*bias)),
        KeyData::Int8(int8) => buffers.extend([Some(int8.values), Some(int8.bounds)]),
    }
    let scales = [
        Some(x.beta),
        x.prior.as_ref().map(|p| p.data),
        table.as_ref().map(Slice::from),
        x.pages.as_ref().map(|p| p.table),
    ];
    let results = [Some(x.v.data), x.threshold, Some(x.workspace)];
    let outputs = [out.index, out.energy, out.y].map(Some);
    let Some(merge) = plan.merge else {
        let (parts, _) = plan.workspace(problem);
        let rest = parts
            .iter()
            .map(|at| Some(Slice { buffer: x.workspace.buffer, offset: x.workspace.offset + at }));
        buffers.extend(scales.into_iter().chain(results).chain(rest).chain(outputs));
        return launch(plan.kernel, row_tile_count * plan.splits, plan.shared_bytes, buffers);
    };
    let merged = [buffers[0], buffers[1]].into_iter().chain(scales).chain(results).chain(outputs).collect();
    buffers.extend(scales.into_iter().chain([Some(x.workspace)]));
    launch(plan.kernel, row_tile_count * plan.splits, plan.shared_bytes, buffers)?;
    launch(merge, row_tile_count, 0, merged)
}
