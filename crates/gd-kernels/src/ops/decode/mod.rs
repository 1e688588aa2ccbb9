//! `decode` and `scan_select`: the key of lowest energy of every query and its value row, for inference.

#[cfg(feature = "gpu")]
pub(crate) mod gpu;

use candle_core::Tensor;

use crate::backend::check::{check_head, dims4};
use crate::backend::dispatch::on_cpu;
#[cfg(feature = "gpu")]
use crate::backend::dispatch::{on_gpu, refused};
use crate::cache::paged::{PagedCache, gather_pages};
use crate::cache::{CachedKeys, Int8Keys};
use crate::error::{Error, Result};
#[cfg(feature = "gpu")]
use crate::ops::scan::Candidates;
use crate::ops::scan::options::Scan;
#[cfg(feature = "gpu")]
use crate::ops::scan::overflow;
#[cfg(feature = "gpu")]
use crate::ops::scan::rescored::Rescored;
use crate::ops::scan::scan;
#[cfg(feature = "gpu")]
use crate::ops::select::check_sizes;
use crate::ops::select::{Select, Selected, select};

/// Most queries per sequence of the decoding kernels on a GPU.
pub(crate) const MAX_QUERIES: usize = 16;

/// One decoding step: the key of lowest energy of every query and its value row.
///
/// q is `[B, Hq, N, D]` with one or a few queries per sequence, k `[B, Hk, M, D]` and v `[B, Hk, M, Dv]` a key-value
/// cache, on the CPU in f16 or bf16 also where q is in f32; the mask says which keys are filled and visible. Data derived from the keys is passed as
/// [`Scan::cached`](crate::Scan::cached) and makes the step faster; what of it is read, and which code runs, is decided
/// here:
///
/// * On the CPU the keys are split over threads, and 8-bit keys are read instead of k, for any number of candidates.
///   The winner is the candidate of lowest energy among `scan.candidates` and, with several candidates, the keys of
///   `scan.protected`.
/// * On a GPU, up to 16 queries run with a kernel that splits the keys over blocks and finds only the winner, from the
///   cached biases or the 8-bit keys; more queries run as [`scan`](crate::scan) and [`select`](crate::select).
///
/// All of these return the same winner, except for energies that are equal up to rounding. Candidates with more energy
/// than `threshold`, `[Hq]` or per query `[B, Hq, N]`, are excluded; a query without an admitted key abstains (index -1,
/// y = 0).
/// The result has no gradient. `scan.protected` is read where several candidates are found
/// ([`decode_reads_protected`]); a search for the winner only does not need it, because protection does not change which
/// key has the lowest energy.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use gd_kernels::{DecodeUse, KeyCache, Mask, Scan, Score, SequenceCache, decode};
///
/// # fn main() -> gd_kernels::Result<()> {
/// let device = Device::Cpu;
/// let random = |shape: (usize, usize, usize, usize)| Tensor::randn(0f32, 1.0, shape, &device);
/// let (q, k, v) = (random((1, 4, 1, 16))?, random((1, 2, 300, 16))?, random((1, 2, 300, 16))?);
/// let beta = Tensor::full(0.5f32, 4, &device)?;
/// let mask = Mask::none();
/// let mut scan = Scan::new(&beta, &mask, 1);
/// let mut cache = KeyCache::for_decoding(&k, Score::Energy, None, DecodeUse::Winner)?;
/// if let Some(cache) = &mut cache {
///     cache.append(&k)?;
/// }
/// if let Some(cache) = &cache {
///     scan = scan.with_cached(cache);
/// }
/// let winner = decode(&q, &k, &v, &scan, None)?;
/// assert_eq!(winner.y.dims(), [1, 4, 1, 16]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`scan`](crate::scan) and [`select`](crate::select); cached data of other keys than k.
pub fn decode(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scan: &Scan,
    threshold: Option<&Tensor>,
) -> Result<Selected> {
    match decode_reads_protected(q, scan.candidates)? {
        true => select_winner([q, k, v], scan, threshold),
        false => scan_select(q, k, v, scan, threshold),
    }
}

/// Whether [`decode`] for the queries q `[B, Hq, N, D]` scans for several candidates, and then reads `scan.protected`:
/// with more than one candidate, on the CPU and for more than 16 queries on a GPU.
///
/// # Errors
/// A tensor of another rank, or an empty one.
pub fn decode_reads_protected(q: &Tensor, candidates: usize) -> Result<bool> {
    let winner_only = !on_cpu(q.device()) && dims4("q", q)?.2 <= MAX_QUERIES;
    Ok(candidates != 1 && !winner_only)
}

/// The key of lowest energy of every query and its value row: a scan with one candidate and the threshold, fused on a
/// GPU. It suits a prefill; [`decode`] suits few queries.
///
/// `scan.candidates` and `scan.protected` are not used. The margin is not computed on a GPU and is +inf. The result has no
/// gradient.
///
/// # Errors
/// As [`scan`](crate::scan) and [`select`](crate::select).
pub fn scan_select(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    scan: &Scan,
    threshold: Option<&Tensor>,
) -> Result<Selected> {
    let one = Scan { candidates: 1, protected: None, ..scan.clone() };
    #[cfg(feature = "gpu")]
    if !on_cpu(q.device()) {
        let (q, k, v) = (q.detach(), k.detach(), v.detach());
        let threshold = threshold.map(Tensor::detach);
        check_sizes(&q, &k, &v)?;
        // The kernels have thresholds per head; those per query are compared with the winners.
        let per_head = threshold.as_ref().filter(|tau| tau.rank() == 1);
        let winners = checked(&one, fused([&q, &k, &v], &one, per_head)?)?;
        return match threshold.as_ref().filter(|tau| tau.rank() != 1) {
            Some(tau) => admitted([&q, &k, &v], &one, &winners, tau),
            None => Ok(winners),
        };
    }
    select_winner([q, k, v], &one, threshold)
}

/// The winners that thresholds `[B, Hq, N]` admit, with their value rows.
#[cfg(feature = "gpu")]
fn admitted(
    [q, k, v]: [&Tensor; 3],
    scan: &Scan,
    winners: &Selected,
    threshold: &Tensor,
) -> Result<Selected> {
    let candidates = Candidates {
        index: winners.index.unsqueeze(3)?,
        energy: winners.energy.unsqueeze(3)?,
        protected: None,
        rescored: Rescored::ALL,
    };
    let (beta, Scan { score, tie, .. }) = (scan.beta.detach(), scan);
    let how = Select { score: *score, tie: *tie, threshold: Some(threshold), ..Select::new(&beta) };
    let selected = select(q, k, v, &candidates, &how)?;
    Ok(Selected { compared: selected.energy.unsqueeze(3)?, ..selected })
}

/// Scan and selection by one kernel, and by the decoding kernels for few queries.
#[cfg(feature = "gpu")]
fn fused([q, k, v]: [&Tensor; 3], scan: &Scan, threshold: Option<&Tensor>) -> Result<Selected> {
    on_gpu!(q.device(), G => gpu::tensors::scan_select::<G>([q, k, v], scan, threshold));
    refused("scan_select", q)
}

/// In checked mode, refuses a winner whose energy overflowed.
#[cfg(feature = "gpu")]
fn checked(scan: &Scan, selected: Selected) -> Result<Selected> {
    if scan.checked {
        overflow::refuse(&selected.energy, &selected.index)?;
    }
    Ok(selected)
}

/// Scans for candidates and selects the winner, without gradients.
fn select_winner([q, k, v]: [&Tensor; 3], options: &Scan, threshold: Option<&Tensor>) -> Result<Selected> {
    let (q, k, v) = (q.detach(), k.detach(), v.detach());
    let (beta, prior) = (options.beta.detach(), options.prior.map(Tensor::detach));
    let threshold = threshold.map(Tensor::detach);
    let candidates = scan(&q, &k, options)?;
    let how = Select {
        prior: prior.as_ref(),
        score: options.score,
        tie: options.tie,
        threshold: threshold.as_ref(),
        ..Select::new(&beta)
    };
    let selected = select(&q, &k, &v, &candidates, &how)?;
    Ok(Selected { compared: selected.energy.unsqueeze(3)?, ..selected })
}

/// [`decode`] over a paged cache: q is `[B, Hq, N, D]`, the number of keys of every sequence is in the mask
/// ([`Mask::kv_len`](crate::Mask::kv_len)), and a prior is `[B|1, Hq|Hk, pages per sequence * page]`. The indices are
/// positions in the sequences. [`Scan::cached`](crate::Scan::cached) is data derived from the keys of the pages, a
/// [`KeyCache`](crate::KeyCache) that [`PagedCache::write`] keeps up to date.
///
/// On a GPU the pages are read in place, by up to 16 queries per sequence. The values of the block table are checked in
/// checked mode only, because that waits for the device: without it, an id that names no page reads another page. On the
/// CPU the pages are copied together first. Without cached data, the biases, or at certified precision the 8-bit keys,
/// are computed in every call, on a GPU for all pages.
///
/// # Errors
/// As [`decode`]; thresholds that are not `[Hq]`; pages that are not a multiple of 64 keys, a table of another dtype or
/// shape, a table that names pages that do not exist; cached data of other pages.
pub fn decode_paged(
    q: &Tensor,
    cache: &PagedCache,
    scan: &Scan,
    threshold: Option<&Tensor>,
) -> Result<Selected> {
    let [keys, page] = cache.sizes()?;
    check_paged(q, cache, scan, keys)?;
    threshold.map_or(Ok(()), |tau| check_head("threshold", tau, q.dim(1)?))?;
    let whole = [keys];
    let lengths = scan.mask.lengths().unwrap_or(&whole);
    #[cfg(feature = "gpu")]
    if !on_cpu(q.device()) {
        if scan.checked {
            use crate::ops::scan::cpu::check_on_host::check_on_host;
            use crate::ops::scan::plan_of;
            use crate::ops::scan::problem::Problem;
            let k = gather_pages(cache.k, &cache.host_table(lengths, page)?)?;
            let one = Scan { candidates: 1, ..scan.clone() };
            let problem = Problem::new(q, &k, &one)?;
            plan_of(&problem, q, &k, &one)?;
            check_on_host(&problem, q, &k, scan)?;
        }
        return checked(scan, fused_paged(q, cache, [keys, page], scan, threshold)?);
    }
    let table = cache.host_table(lengths, page)?;
    let int8: Option<Int8Keys> = match scan.cached {
        Some(CachedKeys::Int8(int8)) => Some(int8.gather_pages(cache.k, scan.score, &table)?),
        _ => None,
    };
    let scan = Scan { cached: int8.as_ref().map(CachedKeys::from), ..scan.clone() };
    scan_select(q, &gather_pages(cache.k, &table)?, &gather_pages(cache.v, &table)?, &scan, threshold)
}

/// [`decode_paged`] by the decoding kernels.
#[cfg(feature = "gpu")]
fn fused_paged(
    q: &Tensor,
    cache: &PagedCache,
    sizes: [usize; 2],
    scan: &Scan,
    threshold: Option<&Tensor>,
) -> Result<Selected> {
    on_gpu!(q.device(), G => gpu::tensors::decode_paged::<G>(q, cache, sizes, scan, threshold));
    refused("decode_paged", q)
}

/// Checks queries and mask against a paged cache.
fn check_paged(q: &Tensor, cache: &PagedCache, scan: &Scan, keys: usize) -> Result<()> {
    let (batch, q_heads, _, head_dim) = dims4("q", q)?;
    let (_, kv_heads, _, k_dim) = dims4("k", cache.k)?;
    if cache.table.dim(0)? != batch
        || k_dim != head_dim
        || q_heads % kv_heads != 0
        || q.dtype() != cache.k.dtype()
    {
        return Err(Error::Invalid(format!(
            "q {:?} {:?} for pages {:?} {:?} and a block table of {:?}",
            q.dims(),
            q.dtype(),
            cache.k.dims(),
            cache.k.dtype(),
            cache.table.dims()
        )));
    }
    for (name, t) in [("the pages", cache.k), ("the values", cache.v), ("the block table", cache.table)] {
        if !t.device().same_device(q.device()) {
            return Err(Error::Invalid(format!("q and {name} are on different devices")));
        }
    }
    scan.mask.validate(batch, keys)
}
