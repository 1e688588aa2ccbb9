//! Energies of finite numbers that exceed the range of f32: their candidates are in the order of the energies, and the
//! first of them is selected.

use candle_core::DType;
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::select::{Candidates, Record, Rule, SelectPlan, choose};
use gd_kernels::reference::scan as reference_scan;

use crate::scan::{DIFFERENCE_SLACK, Uploaded, run};
use crate::select::sizes;
use crate::target::TestGpu;
use crate::tensors::integers;
use gd_testing::ensure;
use gd_testing::problems::{Case, Kind, Spec, roundoff};
use gd_testing::suite::Verdict;

/// head_dims: some that fit a kernel and some that are padded.
const DIMS: [usize; 5] = [8, 24, 64, 104, 128];
/// Products B Hq N M D of a problem.
const LIMIT: usize = 200_000;
/// Magnitudes of queries and keys, and beta. The last overflows by beta alone, in every dtype.
const SCALES: [(f64, f64); 5] = [(5e18, 1.0), (1e19, 1.0), (1e25, 1.0), (1e36, 1.0), (4096.0, 1e31)];

/// The problem of a seed.
fn case(seed: u64) -> Case {
    let (scale, beta) = SCALES[(seed % 5) as usize];
    let mut spec = Spec::with_dims(80_000 + seed, LIMIT, &DIMS);
    spec.candidates = if seed.is_multiple_of(3) { 1 } else { spec.candidates.clamp(2, 32) };
    spec.kind = Kind::Plain;
    for x in spec.raw.q.iter_mut().chain(&mut spec.raw.k) {
        *x *= scale;
    }
    spec.raw.beta.fill(beta);
    // The others are beyond f16.
    let dtype = match (beta > 1.0, seed / 5 % 3) {
        (true, 0) => DType::F16,
        (_, 1) => DType::BF16,
        _ => DType::F32,
    };
    spec.build(dtype)
}

/// The slots of a choice of the first candidates, without a threshold.
fn selected(
    gpu: &TestGpu,
    case: &Case,
    index: &[i32],
    energy: &[f64],
    slots: usize,
) -> Result<Vec<i32>, String> {
    let fail = |e: gd_kernels::Error| e.to_string();
    let (s, p) = (sizes(case, slots), &case.problem);
    let rule = Rule { score: p.score, tie: p.tie, ..Rule::default() };
    let plan = SelectPlan::new(&s, &rule, &gpu.arch()).map_err(fail)?;
    let energy: Vec<f32> = energy.iter().map(|e| *e as f32).collect();
    let threshold = vec![f32::INFINITY; p.q_heads];
    let upload = |x: &[u8]| gpu.upload(x).map_err(fail);
    let (index, energy) = (upload(bytemuck::cast_slice(index))?, upload(bytemuck::cast_slice(&energy))?);
    let threshold = upload(bytemuck::cast_slice(&threshold))?;
    let out = (0..6).map(|_| gpu.allocate(s.rows() * 4).map_err(fail)).collect::<Result<Vec<_>, _>>()?;
    let record = Record {
        slot: (&out[0]).into(),
        index: (&out[1]).into(),
        nearest: (&out[2]).into(),
        energy: (&out[3]).into(),
        margin: (&out[4]).into(),
        gate: (&out[5]).into(),
    };
    let candidates =
        Candidates { energy: (&energy).into(), index: (&index).into(), threshold: (&threshold).into() };
    let uploaded = Uploaded::new(gpu, case);
    choose(gpu, &plan, &candidates, &uploaded.v.tensor4(), Some(&record), None).map_err(fail)?;
    Ok(integers(gpu, &out[1], s.rows()))
}

/// Checks one problem with one schedule.
pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = case(seed);
    let p = &case.problem;
    let result = run(gpu, &case)?;
    let (want, all) = (reference_scan(p, case.spec.candidates), reference_scan(p, p.keys));
    ensure!(want.width == result.slots, "{} slots instead of {}", result.slots, want.width);
    let winners = selected(gpu, &case, &result.index, &result.energy, result.slots)?;
    let greatest = f64::from(f32::MAX);
    for (row, (b, h, i)) in p.rows() {
        let at = |text: String| format!("{text}, row {b} {h} {i} of {}", case.name());
        let slots = row * want.width..(row + 1) * want.width;
        let (index, energy) = (&result.index[slots.clone()], &result.energy[slots.clone()]);
        let query = &p.q[p.q_at(b, h, i)];
        // The rounding errors of the score by which a key was ranked and of its energy.
        let bound = |j: usize| {
            let steps = (p.dim + 4) as f64 * roundoff(DType::F32);
            case.rank_bound(query, (b, h), j) + DIFFERENCE_SLACK * steps * case.energy_size(query, (b, h), j)
        };
        for ((&got, &e), slot) in index.iter().zip(energy).zip(slots) {
            let key = want.index[slot];
            if got == key && key < 0 {
                continue;
            }
            let wrong = at(format!("key {got} instead of {key} in {index:?}"));
            let listed = all.index[row * all.width..(row + 1) * all.width].iter().position(|j| *j == got);
            let Some(place) = listed.filter(|_| got >= 0 && key >= 0) else { return Err(wrong) };
            let exact = all.energy[row * all.width + place];
            let off = (exact - want.energy[slot]).abs();
            ensure!(off <= bound(got as usize) + bound(key as usize), "{wrong}");
            let limited = exact.clamp(-greatest, greatest);
            let close = (e - limited).abs() <= 1e-4 * limited.abs();
            ensure!(close, "{}", at(format!("energy {e} instead of {limited}")));
        }
        let winner = winners[row];
        ensure!(winner == index[0], "{}", at(format!("key {winner} is selected instead of {}", index[0])));
    }
    Ok(())
}

#[test]
fn candidates_are_in_the_order_of_energies_that_overflow() {
    crate::suites("scan, overflow", [45, 45], 0, check);
}

#[test]
fn energies_of_the_problems_overflow() {
    let energies = |seed| {
        let case = case(seed);
        let all = reference_scan(&case.problem, case.problem.keys);
        let used = all.index.iter().zip(all.energy).filter(|(j, _)| **j >= 0).map(|(_, e)| e);
        used.map(|e| e.abs() > f64::from(f32::MAX)).collect::<Vec<bool>>()
    };
    let (above, all) = (0..45).flat_map(energies).fold((0, 0), |(a, n), x| (a + usize::from(x), n + 1));
    assert!(above > all / 2 && above < all, "{above} of {all} energies");
}
