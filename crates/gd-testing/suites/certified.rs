//! Scans with 8-bit keys against native scans of the same keys: candidates, bits of energies, flags and value rows are
//! the same. Also against the reference.

use crate::target::{Buffer, TestGpu};
use candle_core::{DType, Device, Tensor};
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::scan::{GpuScanPlan, Inputs, Outputs, Values, scan, scan_select};
use gd_kernels::gpu::scan_certified::{Certified, scan_certified};
use gd_kernels::reference::scan::may_see;
use gd_kernels::{Precision, Problem};

use crate::decode::Int8Cache;
use crate::scan::{DIFFERENCE_SLACK, SCORE_SLACK, ScanResult, Uploaded, check_result, problem};
use crate::tensors::{integers, numbers};
use gd_testing::ensure;
use gd_testing::problems::{Case, Kind, Spec, View};
use gd_testing::suite::Verdict;

/// head_dims: of every kernel one that fits and one that is padded.
const DIMS: [usize; 12] = [8, 24, 32, 40, 64, 72, 96, 104, 128, 136, 192, 256];
/// Around the 32 rows of a warp and the 64 or more of a block.
const QUERIES: [usize; 10] = [1, 17, 31, 33, 63, 65, 90, 129, 150, 260];
/// Around a tile of 64 keys, and more keys than a list has entries.
const KEYS: [usize; 12] = [1, 2, 31, 33, 63, 64, 65, 127, 129, 200, 300, 450];
/// Products B Hq N M D of a problem.
const LIMIT: usize = 900_000;
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

/// The problem of a seed; every second one has one candidate and no protected keys.
fn spec(seed: u64) -> Spec {
    let mut spec = Spec::with_sizes(80_000 + seed, LIMIT, &DIMS, Some([&QUERIES, &KEYS]));
    spec.candidates = spec.candidates.min(32);
    if seed.is_multiple_of(2) {
        (spec.candidates, spec.protected) = (1, None);
    }
    spec
}

fn dtype(seed: u64) -> DType {
    DTYPES[(seed / 2 % 3) as usize]
}

/// Rounds queries and keys of a case's problem to its dtype, and stores them in its tensors, which are contiguous.
fn restore(case: &mut Case) {
    let (p, dtype) = (&mut case.problem, case.dtype);
    let tensor = |values: &[f64], heads: usize, rows: usize| {
        let dims = [p.batch, heads, rows, p.dim];
        Tensor::from_vec(values.to_vec(), &dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    };
    let (q, k) = (tensor(&p.q, p.q_heads, p.queries), tensor(&p.k, p.kv_heads, p.keys));
    // The reference gets the rounded values.
    let back = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    (p.q, p.k) = (back(&q), back(&k));
    (case.q.base, case.k.base) = (q, k);
}

/// Number of kinds of [`adverse`] problems; the first `FINITE_KINDS` have finite energies, which the reference can
/// check.
const ADVERSE_KINDS: u64 = 8;
const FINITE_KINDS: u64 = 5;

/// A problem whose error bounds rule out few keys or none.
fn adverse(seed: u64) -> Case {
    let mut spec = Spec { views: [View::Plain; 3], ..spec(seed + 3000) };
    if seed % ADVERSE_KINDS < 5 {
        spec.prior = None;
    }
    let mut case = spec.build(dtype(seed / ADVERSE_KINDS));
    if case.exact() {
        // The values below are no integers.
        case.spec.kind = Kind::Plain;
    }
    let (dim, keys) = (case.problem.dim, case.problem.keys);
    let max = if case.dtype == DType::F16 { 6e4 } else { 1e17 };
    let p = &mut case.problem;
    let first = p.k[..dim].iter().map(|x| if x.is_finite() { *x } else { 0.5 }).collect::<Vec<_>>();
    for (row, key) in p.k.chunks_mut(dim).enumerate() {
        let j = row % keys;
        match seed % ADVERSE_KINDS {
            // All keys equal, or nearly so: no bound tells them relative_difference, and every list overflows.
            0 => key.copy_from_slice(&first),
            1 => (0..dim).for_each(|d| key[d] = first[d] * (1.0 + 1e-3 * ((j * 7 + d * 3) % 5) as f64)),
            // A single large coordinate leaves few integer levels for the others.
            2 if j % 5 == 2 => key[j % dim] = (300.0 * key[j % dim]).clamp(-max, max),
            // Every key scores higher than the ones before, or the same as every third.
            3 => (0..dim).for_each(|d| key[d] = first[d] * (1.0 + j as f64 / keys as f64)),
            4 => (0..dim).for_each(|d| key[d] = first[d] * (1.0 + (j % 3) as f64)),
            // Some keys have no bounds.
            5 if j % 7 == 1 => key[row % dim] = if row % 2 == 0 { f64::INFINITY } else { f64::NEG_INFINITY },
            5 if j % 11 == 4 => key[row % dim] = f64::NAN,
            6 if j % 3 == 1 => key[row % dim] = max,
            6 if j % 3 == 2 => key.fill(0.0),
            _ => {}
        }
    }
    for (row, query) in p.q.chunks_mut(dim).enumerate() {
        match seed % ADVERSE_KINDS {
            2 if row % 9 == 4 => query[row % dim] = (300.0 * query[row % dim]).clamp(-max, max),
            // Some rows have no bounds.
            7 if row % 4 == 1 => query[row % dim] = max,
            7 if row % 4 == 2 => query[row % dim] = f64::INFINITY,
            7 if row % 4 == 3 => query.fill(0.0),
            _ => {}
        }
    }
    restore(&mut case);
    case
}

/// The results of a scan.
struct FullResult {
    scan: ScanResult,
    y: Vec<f64>,
    /// Scored and visible keys of each row, of a certified scan.
    counts: Vec<i32>,
}

/// A threshold for each head: one of its energies, so that some rows are admitted.
fn thresholds(p: &Problem, energy: &[f64]) -> Vec<f32> {
    let of = |h: usize| {
        let head = (0..energy.len()).filter(|r| r / p.queries % p.q_heads == h).map(|r| energy[r]);
        let head: Vec<f64> = head.filter(|e| e.is_finite()).collect();
        head.get(head.len() / 2).map_or(0.0, |e| *e as f32)
    };
    (0..p.q_heads).map(of).collect()
}

/// Runs a scan by the portable kernels; with thresholds the fused one.
fn run(gpu: &TestGpu, case: &Case, precision: Precision, tau: Option<&[f32]>) -> Result<FullResult, String> {
    let p = Problem { precision, ..problem(case) };
    let fail = |e: gd_kernels::Error| e.to_string();
    let uploaded = Uploaded::new(gpu, case);
    let x: Inputs<'_, Buffer> = uploaded.inputs(case);
    let extra = x.protected.as_ref().map_or(0, |p| p.dims[3]);
    let plan = GpuScanPlan::new(&p, extra, x.prior.is_some(), &gpu.arch()).map_err(fail)?;
    let (rows, slots, dim) = (p.batch * p.q_heads * p.queries, p.candidates + extra, case.problem.value_dim);
    let count = rows * slots;
    let (index, energy) = (gpu.allocate(count * 4).map_err(fail)?, gpu.allocate(count * 4).map_err(fail)?);
    let (flags, counts) = (gpu.allocate(count).map_err(fail)?, gpu.allocate(8 * rows).map_err(fail)?);
    let y = gpu.allocate(rows * dim * case.dtype.size_in_bytes()).map_err(fail)?;
    let threshold = gpu.upload(bytemuck::cast_slice(tau.unwrap_or(&[]))).map_err(fail)?;
    let out = Outputs {
        index: (&index).into(),
        energy: (&energy).into(),
        flags: (extra > 0).then(|| (&flags).into()),
    };
    let values = tau.map(|_| Values {
        v: uploaded.v.tensor4(),
        dim,
        threshold: Some((&threshold).into()),
        y: (&y).into(),
    });
    let certified = precision == Precision::Certified;
    if certified {
        let keys = Int8Cache::new(gpu, &p, &x.k, [p.batch, p.keys]).map_err(fail)?;
        let beside = Certified { keys: keys.slices(), rescored: (&counts).into() };
        scan_certified(gpu, &plan, &p, &x, &beside, &out, values.as_ref()).map_err(fail)?;
    } else {
        match &values {
            Some(values) => scan_select(gpu, &plan, &p, &x, values, &out),
            None => scan(gpu, &plan, &p, &x, &out),
        }
        .map_err(fail)?;
    }
    Ok(FullResult {
        scan: ScanResult {
            slots,
            index: integers(gpu, &index, count),
            energy: numbers(gpu, &energy, count, DType::F32),
            flags: if extra > 0 { numbers(gpu, &flags, count, DType::U8) } else { vec![0.0; count] },
        },
        y: if tau.is_some() { numbers(gpu, &y, rows * dim, case.dtype) } else { Vec::new() },
        counts: if certified { integers(gpu, &counts, 2 * rows) } else { Vec::new() },
    })
}

/// Fails unless two scans have the same bits.
fn check_same_bits(case: &Case, native: &FullResult, certified: &FullResult) -> Verdict {
    let slots = native.scan.slots;
    for (row, (b, h, i)) in case.problem.rows() {
        let at = row * slots..(row + 1) * slots;
        let of = |x: &FullResult| (x.scan.index[at.clone()].to_vec(), x.scan.energy[at.clone()].to_vec());
        let (want, got) = (of(native), of(certified));
        ensure!(got == want, "{got:?} instead of {want:?}, row {b} {h} {i} of {}", case.name());
        let (visible, keys) = (certified.counts[2 * row + 1], case.problem.keys);
        let expected = (0..keys).filter(|&j| may_see(&case.problem.mask, b, i, j, keys)).count();
        ensure!(
            visible == expected as i32,
            "{visible} visible keys instead of {expected}, row {b} {h} {i} of {}",
            case.name()
        );
        let scored = certified.counts[2 * row];
        ensure!(
            (0..=visible).contains(&scored),
            "{scored} of {visible} scored, row {b} {h} {i} of {}",
            case.name()
        );
    }
    ensure!(native.scan.flags == certified.scan.flags, "flags of {}", case.name());
    // Compared as bits, since selected value rows may hold NaN.
    let bits = |y: &[f64]| y.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    ensure!(bits(&native.y) == bits(&certified.y), "values of {}", case.name());
    Ok(())
}

/// Compares the native scan of a problem with the one with 8-bit keys, which is returned.
fn check_case(gpu: &TestGpu, seed: u64, case: &Case) -> Result<FullResult, String> {
    let other = gpu.twin(seed + 1);
    let native = run(&other, case, Precision::Native, None)?;
    let certified = run(gpu, case, Precision::Certified, None)?;
    check_same_bits(case, &native, &certified)?;
    if case.spec.candidates == 1 && case.spec.protected.is_none() {
        let tau = thresholds(&problem(case), &native.scan.energy);
        let native = run(&other, case, Precision::Native, Some(&tau))?;
        check_same_bits(case, &native, &run(gpu, case, Precision::Certified, Some(&tau))?)?;
    }
    Ok(certified)
}

/// Checks one problem with one schedule.
pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = spec(seed).build(dtype(seed));
    let certified = check_case(gpu, seed, &case)?;
    check_result(&case, &certified.scan)
}

/// Checks one adverse problem with one schedule.
pub(crate) fn check_adverse(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = adverse(seed);
    let certified = check_case(gpu, seed, &case)?;
    if seed % ADVERSE_KINDS < FINITE_KINDS {
        check_result(&case, &certified.scan)?;
    }
    Ok(())
}

/// Checks one problem whose values have an offset.
fn check_offset(gpu: &TestGpu, seed: u64) -> Verdict {
    let (spec, by_differences) = Spec { protected: None, ..spec(seed + 5000) }.with_offset_of(seed);
    let case = spec.build(dtype(seed));
    let ScanResult { index, energy, slots, .. } = check_case(gpu, seed, &case)?.scan;
    let slack = if by_differences { DIFFERENCE_SLACK } else { SCORE_SLACK };
    case.check_by_differences(&index, &energy, slots, slack)
}

#[test]
fn offsets_do_not_change_the_candidates() {
    crate::suite("scan, 8-bit keys, offsets", 40, |seed| check_offset(&TestGpu::new(seed + 600), seed));
}

#[test]
fn certified_scans_have_the_bits_of_the_native_scan() {
    crate::suite("scan, 8-bit keys", 120, |seed| check(&TestGpu::new(seed + 300), seed));
}

#[test]
fn keys_that_bounds_cannot_tell_apart_are_scored() {
    crate::suite("scan, 8-bit keys, adverse", 64, |seed| check_adverse(&TestGpu::new(seed + 900), seed));
}

#[test]
fn most_keys_are_ruled_out() {
    // Many keys, whose scores differ by more than their bounds.
    let sizes: [&[usize]; 2] = [&[40], &[2000]];
    for (candidates, max_share) in [(1, 0.03), (8, 0.1)] {
        let mut spec = Spec::with_sizes(7, 10_000_000, &[64], Some(sizes));
        (spec.candidates, spec.protected, spec.prior) = (candidates, None, None);
        spec.raw.mask = gd_kernels::Mask::none();
        let case = spec.build(DType::BF16);
        let result = run(&TestGpu::new(5), &case, Precision::Certified, None).unwrap();
        let total = |at: usize| result.counts.iter().skip(at).step_by(2).map(|x| i64::from(*x)).sum::<i64>();
        let share = total(0) as f64 / total(1) as f64;
        println!("{candidates} candidates: {share:.4} of {} pairs scored, {}", total(1), case.name());
        assert!(share > 0.0 && share < max_share, "{share}");
    }
}
