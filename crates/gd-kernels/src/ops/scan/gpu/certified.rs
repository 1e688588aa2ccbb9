//! `scan` and `scan_select` at certified precision on CUDA: plan and launch.
//!
//! The kernel reads the keys as 8-bit integers ([`crate::cache::int8_keys::launch`]), and the original keys only where the
//! bounds leave more than one. Its outputs have the bits of the native kernels.
//!
//! q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`; index, energy `[B, Hq, N, K + P]`.

use bytemuck::bytes_of;

use crate::backend::gpu::kernel::{KernelOp, Variant, padded_dim};
use crate::backend::gpu::params::CertifiedParams;
use crate::backend::gpu::{Arch, Constants, Gpu, Launch, Slice, mask};
use crate::cache::int8_keys::launch::{BOUNDS_BYTES, Int8Slices};
use crate::cache::key_bias::launch::key_bias;
use crate::error::{Error, Result};
use crate::ops::scan::gpu::launch::{GpuScanPlan, Inputs, Outputs, STATIC_SHARED_BYTES, Values, params};
use crate::ops::scan::problem::Problem;
use crate::options::Precision;

/// Greatest number of candidates per row: its list has 64 entries, of which 32 are free for new keys after it is pruned.
pub const MAX_CANDIDATES: usize = 32;
/// Keys of a tile.
const TILE_KEYS: usize = 64;
/// Keys must be below this, because the upper bits of an entry mark its state.
const MAX_KEYS: usize = 1 << 28;
/// Bytes per row besides its list.
const ROW_BYTES: usize = 20;

/// The plan of a certified scan whose sizes [`GpuScanPlan::new`] has checked.
pub(super) fn plan(problem: &Problem, protected: usize, prior: bool, arch: &Arch) -> Result<GpuScanPlan> {
    let Problem { dtype, head_dim, candidates, keys, .. } = *problem;
    let refuse = |what: String| Err(Error::Unsupported(format!("scan at certified precision: {what}")));
    if arch.is_metal() {
        return refuse("Metal; it runs on CUDA and on the CPU".into());
    }
    if candidates > MAX_CANDIDATES {
        return refuse(format!("{candidates} candidates on a GPU; 1 to {MAX_CANDIDATES} are supported"));
    }
    if keys >= MAX_KEYS {
        return refuse(format!("{keys} keys on a GPU; fewer than {MAX_KEYS} are supported"));
    }
    let (variant, padded) = (Variant::new("scan", dtype, arch)?, padded_dim("scan", head_dim)?);
    let warp_rows = if padded <= 128 { 32 } else { 16 };
    // As in scan_certified.cuh: two tiles of integers with their bounds, and one list per row.
    let entries = if candidates == 1 && protected == 0 { 40 } else { 64 };
    let tiles = 2 * TILE_KEYS * (padded + 16 + BOUNDS_BYTES);
    let shared = |warps: usize| tiles + warps * warp_rows * (entries * 8 + ROW_BYTES);
    let pack = if prior { 1 } else { problem.group() };
    let (rows, available) =
        (problem.queries * pack, (arch.shared_bytes as usize).saturating_sub(STATIC_SHARED_BYTES));
    // At least two warps process the keys of a tile.
    let fits = |w: &usize| shared(*w) <= available && (*w == 2 || (w / 2) * warp_rows < rows);
    let Some(warps) = [8, 4, 2].into_iter().find(fits) else {
        return refuse(format!(
            "head_dim {head_dim} needs {} bytes of shared memory; the device has {}",
            shared(2),
            arch.shared_bytes
        ));
    };
    Ok(GpuScanPlan {
        kernel: variant.sized(KernelOp::ScanCertified, padded),
        padded_dim: padded,
        warps,
        loaders: 0,
        warp_rows,
        tile_keys: TILE_KEYS,
        pack,
        shared_bytes: shared(warps),
    })
}

/// The inputs of a certified scan in addition to those of a native one.
#[derive(Debug)]
pub struct Certified<'a, B> {
    /// The keys as 8-bit integers, with a capacity of at least M.
    pub keys: Int8Slices<'a, B>,
    /// Output: per row, the number of keys scored in full precision and of visible keys, u32 `[B, Hq, N, 2]`.
    pub rescored: Slice<'a, B>,
}

/// Finds the candidates of every query, and with `values` their value rows, with the results of
/// [`scan`](crate::ops::scan::gpu::launch::scan) or [`scan_select`](crate::ops::scan::gpu::launch::scan_select).
///
/// # Errors
/// As those, and 8-bit keys of too small a capacity.
pub fn scan_certified<G: Gpu>(
    gpu: &G,
    plan: &GpuScanPlan,
    problem: &Problem,
    x: &Inputs<'_, G::Buffer>,
    certified: &Certified<'_, G::Buffer>,
    out: &Outputs<'_, G::Buffer>,
    values: Option<&Values<'_, G::Buffer>>,
) -> Result<()> {
    let Certified { keys, rescored } = certified;
    let fitting = keys.capacity >= problem.keys && keys.capacity.is_multiple_of(TILE_KEYS);
    if problem.precision != Precision::Certified || !fitting {
        return Err(Error::Invalid(format!(
            "scan at {:?} precision of {} keys with {} 8-bit keys, of which there must be a multiple of {TILE_KEYS}",
            problem.precision, problem.keys, keys.capacity
        )));
    }
    if values.is_some() && (problem.candidates != 1 || x.protected.is_some()) {
        return Err(Error::Invalid("scan_select: one candidate and no protected keys".into()));
    }
    let (mask, table) = mask::upload(gpu, x.mask, problem.batch, problem.queries, problem.keys)?;
    let scan = params(plan, problem, x, values, mask)?;
    let bias = key_bias(gpu, &problem.key_shape(), problem.keys, &x.bias_inputs(problem.q_heads))?;
    gpu.launch(&Launch {
        kernel: plan.kernel,
        grid: plan.grid(problem)?,
        block: 32 * plan.warps as u32,
        shared_bytes: plan.shared_bytes as u32,
        params: bytes_of(&CertifiedParams { scan, capacity: keys.capacity as u32 }).to_vec(),
        constants: Constants::default(),
        buffers: vec![
            Some(x.q.data),
            Some(x.k.data),
            Some((&bias).into()),
            Some(keys.values),
            Some(keys.bounds),
            Some(x.beta),
            x.prior.as_ref().map(|p| p.data),
            table.as_ref().map(Slice::from),
            Some(out.index),
            Some(out.energy),
            values.map(|v| v.v.data),
            values.and_then(|v| v.threshold),
            values.map(|v| v.y),
            x.protected.as_ref().map(|p| p.data),
            out.flags,
            Some(*rescored),
        ],
    })
}
