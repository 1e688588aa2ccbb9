//! The candidates of the next round of refinement: all but the winner, none for a row that abstained.

use crate::target::TestGpu;
use candle_core::DType;
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::select::{Rule, SelectPlan, Sizes, remaining};
use rand::RngExt;

use crate::tensors::integers;
use gd_testing::ensure;
use gd_testing::problems::rng;
use gd_testing::suite::Verdict;

pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut rng = rng(seed ^ 0x2e57);
    let [batch, kv_heads, queries, keys, slots] = [3, 2, 40, 90, 64].map(|max| rng.random_range(1..=max));
    let q_heads = kv_heads * rng.random_range(1..=3);
    let (head_dim, value_dim, dtype) = (8, 8, DType::F32);
    let sizes = Sizes { batch, q_heads, kv_heads, queries, keys, head_dim, value_dim, slots, dtype };
    let fail = |e: gd_kernels::Error| e.to_string();
    let plan = SelectPlan::new(&sizes, &Rule::default(), &gpu.arch()).map_err(fail)?;
    let rows = batch * q_heads * queries;
    let index: Vec<i32> = (0..rows * slots).map(|_| rng.random_range(-1..keys as i32)).collect();
    let slot: Vec<i32> = (0..rows).map(|_| rng.random_range(-1..slots as i32)).collect();
    let [index_at, slot_at] = [&index, &slot].map(|x| gpu.upload(bytemuck::cast_slice(x)).map_err(fail));
    let (index_at, slot_at, out) = (index_at?, slot_at?, gpu.allocate(rows * slots * 4).map_err(fail)?);
    remaining(gpu, &plan, (&index_at).into(), (&slot_at).into(), (&out).into()).map_err(fail)?;
    let got = integers(gpu, &out, rows * slots);
    for row in 0..rows {
        for s in 0..slots {
            let removed = slot[row] == -1 || slot[row] == s as i32;
            let want = if removed { -1 } else { index[row * slots + s] };
            let key = got[row * slots + s];
            ensure!(
                key == want,
                "row {row}, slot {s} of {slots}: key {key} instead of {want}, winner {}",
                slot[row]
            );
        }
    }
    Ok(())
}

#[test]
fn the_next_round_has_all_candidates_but_the_winner() {
    crate::suites("refinement rounds", [20, 20], 0, check);
}
