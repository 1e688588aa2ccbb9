//! `scan` on the CPU: blocked and threaded, with the same bits for any number of threads and every instruction set.
//!
//! A task holds a block of query rows of one head and visits the keys of its key-value head. Scores live in registers
//! and in a tile on the stack of the task, never in an N x M buffer. Keys are ranked by
//! `<q, k> - |k|^2 / 2 + b / (2 beta)`; the energies of the remaining candidates are then computed from differences.
//!
//! `dense` scores every key. `certified` finds the keys that can be candidates with 8-bit integers and error bounds;
//! `decode` does so for few queries with fast f32 scores; `rescore` then scores those keys as `dense` does. Rows for which
//! the rounding errors of the scores are too large are ranked again by `ill_conditioned`.

pub(crate) mod arguments;
pub(crate) mod block;
mod bounded_lists;
mod certified;
mod check;
#[cfg(feature = "gpu")]
pub(crate) mod check_on_host;
mod decode;
mod dense;
mod ill_conditioned;
mod int8;
mod pack;
mod rescore;
mod tile;
mod top_k;

use candle_core::Tensor;
use num_traits::Float;

use crate::backend::check::{head_values, positive};
use crate::backend::cpu::element::{Element, acc_dtype, by_float};
use crate::backend::cpu::parallel::{par_items, par_map};
use crate::backend::cpu::view::with_view;
use crate::backend::graph::with_contiguous_rows;
use crate::cache::int8_keys::cpu::Int8Panels;
use crate::error::Result;
use crate::ops::scan::Candidates;
use crate::ops::scan::cpu::arguments::{Arguments, cached_int8, prior_values, protected_keys};
use crate::ops::scan::cpu::block::Block;
use crate::ops::scan::cpu::certified::Certified;
use crate::ops::scan::cpu::dense::Dense;
use crate::ops::scan::cpu::int8::Int8Path;
use crate::ops::scan::cpu::pack::PackedKeys;
use crate::ops::scan::cpu::rescore::{Rescore, Rescoring};
use crate::ops::scan::options::Scan;
use crate::ops::scan::plan::{CpuScanPlan, Walk};
use crate::ops::scan::problem::Problem;
use crate::ops::scan::rescored::Rescored;
use crate::options::Precision;

/// Candidates `[B, Hq, N, slots]`: key or -1, energy or +inf, and whether the key is protected.
struct Outputs<A> {
    slots: usize,
    index: Vec<i32>,
    energy: Vec<A>,
    protected: Vec<u8>,
    /// Share of the visible pairs that were scored in full precision.
    rescored: f64,
}

/// The candidates of a planned scan of tensors.
pub(crate) fn scan(
    problem: &Problem,
    plan: &CpuScanPlan,
    q: &Tensor,
    k: &Tensor,
    scan: &Scan,
) -> Result<Candidates> {
    let q = with_contiguous_rows(&q.detach().to_dtype(acc_dtype(problem.dtype))?)?;
    let k = with_contiguous_rows(k)?;
    let protected = scan.protected.map(|p| protected_keys(p, problem)).transpose()?;
    let int8 = cached_int8(scan, problem)?;
    by_float!("scan", problem.key_dtype, T => {
        type A = <T as Element>::Acc;
        let beta = head_values::<A>("beta", scan.beta, problem.q_heads)?;
        positive("beta", &beta)?;
        let prior = scan.prior.map(|p| prior_values(p, problem)).transpose()?;
        let out = with_view::<A, _>(&q, |q| with_view::<T, _>(&k, |k| {
            let x = Arguments {
                q, k, beta: &beta, prior: prior.as_ref(), protected: protected.as_ref(), mask: scan.mask, int8,
            };
            if scan.checked {
                check::rows(problem, &x)?;
            }
            Ok(run(problem, plan, &x))
        }))?;
        let shape = (problem.batch, problem.q_heads, problem.queries, out.slots);
        let flags = protected.is_some().then(|| Tensor::from_vec(out.protected, shape, q.device()));
        Ok(Candidates {
            index: Tensor::from_vec(out.index, shape, q.device())?,
            energy: Tensor::from_vec(out.energy, shape, q.device())?,
            protected: flags.transpose()?,
            rescored: Rescored::from_share(out.rescored),
        })
    })
}

/// Runs a planned scan.
fn run<T: Element>(problem: &Problem, plan: &CpuScanPlan, x: &Arguments<'_, T>) -> Outputs<T::Acc> {
    let slots = problem.candidates + x.protected.map_or(0, |p| p.slots());
    let rows = problem.batch * problem.q_heads * problem.queries;
    let mut out = Outputs {
        slots,
        index: vec![-1i32; rows * slots],
        energy: vec![T::Acc::infinity(); rows * slots],
        protected: vec![0u8; if x.protected.is_some() { rows * slots } else { 0 }],
        rescored: 1.0,
    };
    let mut blocks = blocks(problem, plan, x, &mut out);
    if plan.walk == Walk::Blocks {
        // Under a causal mask the last blocks see the most keys: start with them.
        blocks.reverse();
    }
    let Some(arch) = plan.isa.arch() else { unreachable!("a plan names an available instruction set") };
    let (dense, rescored) = rescore_blocks(problem, plan, x, blocks, arch);
    if !dense.is_empty() {
        let packed = PackedKeys::new(x.k, plan.panel_keys, problem.score);
        par_items(dense, &|_, block| arch.dispatch(Dense { block, packed: &packed }));
    }
    Outputs { rescored: rescored.unwrap_or(1.0), ..out }
}

/// Splits the outputs into blocks of query rows, in the order of heads and rows.
fn blocks<'a, T: Element>(
    problem: &'a Problem,
    plan: &CpuScanPlan,
    x: &'a Arguments<'a, T>,
    out: &'a mut Outputs<T::Acc>,
) -> Vec<Block<'a, T>> {
    let (n, slots) = (problem.queries, out.slots);
    let mut blocks = Vec::new();
    let mut flags = out.protected.chunks_mut((n * slots).max(1));
    let heads = out.index.chunks_mut(n * slots).zip(out.energy.chunks_mut(n * slots));
    for (head, (index, energy)) in heads.enumerate() {
        let mut flags = flags.next().unwrap_or_default().chunks_mut(plan.block_rows * slots);
        let rows = index.chunks_mut(plan.block_rows * slots).zip(energy.chunks_mut(plan.block_rows * slots));
        for (block, (index, energy)) in rows.enumerate() {
            let first = block * plan.block_rows;
            let rows = first..n.min(first + plan.block_rows);
            let (b, h) = (head / problem.q_heads, head % problem.q_heads);
            let flags = flags.next().unwrap_or_default();
            blocks.push(Block { problem, x, b, h, rows, slots, index, energy, flags, common_offset: None });
        }
    }
    blocks
}

/// Finds the candidates of the blocks from bounds of the scores where the plan says so. Returns the blocks that are to be
/// scanned densely, and the share of pairs that a certified scan scored in full precision.
fn rescore_blocks<'a, T: Element>(
    problem: &Problem,
    plan: &CpuScanPlan,
    x: &Arguments<'_, T>,
    blocks: Vec<Block<'a, T>>,
    arch: pulp::Arch,
) -> (Vec<Block<'a, T>>, Option<f64>) {
    let certified = plan.precision == Precision::Certified;
    let quantized = (certified && x.int8.is_none()).then(|| Int8Panels::of(x.k, problem.score));
    let int8 = x.int8.or(quantized.as_ref()).filter(|_| certified);
    let path = Int8Path::of(plan.isa);
    let rescored: Vec<Rescoring<Block<'a, T>>> = match (plan.walk, int8) {
        (Walk::Decode, int8) => decode::run(arch, problem, int8, path, blocks),
        (Walk::Blocks, Some(int8)) => {
            let certify = |_, block| {
                let bounded = arch.dispatch(Certified { block: &block, int8, path, keys: 0..problem.keys });
                let bounded = bounded.as_ref().map(|bounded| vec![bounded]);
                arch.dispatch(Rescore { block, bounded, int8: Some(int8) })
            };
            par_map(blocks, &certify)
        }
        (Walk::Blocks, None) => return (blocks, None),
    };
    let (mut scored, mut visible, mut dense) = (0, 0, Vec::new());
    for one in rescored {
        scored += one.scored;
        visible += one.visible;
        dense.extend(one.unresolved);
    }
    let share = (certified && visible > 0).then(|| scored as f64 / visible as f64);
    (dense, share)
}
