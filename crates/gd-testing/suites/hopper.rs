//! `scan` and `scan_select` by Hopper's kernel: several tiles and blocks, every head_dim, mask and layout that the
//! TMA unit loads.

use crate::target::TestGpu;
use candle_core::DType;
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::kernel::KernelTarget;

use crate::scan::{
    DIFFERENCE_SLACK, SCORE_SLACK, Uploaded, check_case, check_result, make_infinite, plan, problem, run,
};
use gd_testing::ensure;
use gd_testing::problems::{Case, Spec, View};
use gd_testing::suite::Verdict;

/// head_dims: of every kernel one that fits and one that is padded.
const DIMS: [usize; 12] = [16, 24, 32, 40, 64, 72, 96, 104, 128, 136, 192, 256];
/// Around the 64 rows of a matrix and the 128 or 256 of a block.
const QUERIES: [usize; 10] = [33, 65, 66, 127, 128, 129, 150, 200, 257, 300];
/// Around a tile of 128 keys, and more tiles than a ring has stages.
const KEYS: [usize; 14] = [1, 2, 63, 64, 65, 127, 128, 129, 200, 300, 511, 640, 777, 1000];
/// Products B Hq N M D of a problem.
const LIMIT: usize = 6_000_000;

/// The problem of a seed, of a size and layout for which the plan is Hopper's kernel.
fn case(seed: u64, views: &[View]) -> Case {
    let specs =
        (0..).map(|x| Spec::with_sizes(60_000 + 1000 * seed + x, LIMIT, &DIMS, Some([&QUERIES, &KEYS])));
    let mut spec = specs
        .map(|mut spec| {
            spec.candidates = spec.candidates.min(32);
            // Three of four problems have one candidate and no protected keys.
            if !seed.is_multiple_of(4) {
                (spec.candidates, spec.protected) = (1, None);
            }
            spec
        })
        .find(|s| {
            let pack = if s.prior.is_some() { 1 } else { s.raw.q_heads / s.raw.kv_heads };
            let list = s.candidates > 1 || s.protected.is_some();
            s.raw.queries * pack > 64 && (!list || s.raw.dim <= 192)
        })
        .unwrap();
    for (index, view) in spec.views[..2].iter_mut().enumerate() {
        *view = views[(seed as usize + index) % views.len()];
    }
    spec.build([DType::F16, DType::BF16][((seed / 4 + seed) % 2) as usize])
}

/// One problem with one schedule.
pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = case(seed, &[View::Plain, View::Heads, View::Turned]);
    let uploaded = Uploaded::new(gpu, &case);
    let plan = plan(gpu, &problem(&case), &uploaded.inputs(&case))?;
    let expected = gpu.arch().compute != 90 || plan.kernel.target() == KernelTarget::Sm90a;
    ensure!(expected, "{plan} instead of Hopper's kernel: {}", case.name());
    check_case(gpu, &case)
}

#[test]
fn candidates_are_those_of_the_reference() {
    crate::suite("scan on Hopper", 80, |seed| check(&TestGpu::new(seed).on_hopper(), seed));
}

#[test]
fn schedules_do_not_change_a_bit() {
    crate::suite("scan on Hopper, three schedules", 8, |seed| {
        let case = case(seed + 500, &[View::Plain]);
        let first = run(&TestGpu::new(1).on_hopper(), &case)?;
        check_result(&case, &first)?;
        for schedule in 2..4 {
            let again = run(&TestGpu::new(schedule).on_hopper(), &case)?;
            let same =
                first.index == again.index && first.energy == again.energy && first.flags == again.flags;
            ensure!(same, "schedule {schedule} differs: {}", case.name());
        }
        Ok(())
    });
}

#[test]
fn offsets_do_not_change_the_candidates() {
    crate::suite("scan on Hopper, offsets", 20, |seed| {
        let case = case(seed + 1100, &[View::Plain]);
        let (spec, by_differences) = Spec { protected: None, ..case.spec }.with_offset_of(seed);
        let (gpu, case) = (TestGpu::new(seed).on_hopper(), spec.build(case.dtype));
        let result = run(&gpu, &case)?;
        let slack = if by_differences { DIFFERENCE_SLACK } else { SCORE_SLACK };
        case.check_by_differences(&result.index, &result.energy, result.slots, slack)
    });
}

#[test]
fn infinite_keys_are_no_candidates() {
    crate::suite("scan on Hopper, infinite keys", 12, |seed| {
        let mut case = case(seed + 700, &[View::Plain]);
        make_infinite(&mut case);
        let gpu = TestGpu::new(seed).on_hopper();
        check_result(&case, &run(&gpu, &case)?)
    });
}

#[test]
fn tensors_that_tma_cannot_load_have_the_portable_kernel() {
    // Parts of larger tensors begin at odd addresses.
    crate::suite("scan on Hopper, odd addresses", 6, |seed| {
        let case = case(seed + 900, &[View::Part]);
        let gpu = TestGpu::new(seed).on_hopper();
        let uploaded = Uploaded::new(&gpu, &case);
        let plan = plan(&gpu, &problem(&case), &uploaded.inputs(&case))?;
        ensure!(plan.kernel.target() == KernelTarget::Sm80, "{plan}: {}", case.name());
        check_case(&gpu, &case)
    });
}
