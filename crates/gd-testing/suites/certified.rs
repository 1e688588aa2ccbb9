//! Scans with 8-bit keys against the native scan of the same keys: the same keys, bits, flags and value rows; and
//! against the reference.

use crate::target::{Buffer, TestGpu};
use candle_core::{DType, Device, Tensor};
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::scan::{GpuScanPlan, Inputs, Outputs, Values, scan, scan_select};
use gd_kernels::gpu::scan_certified::{Certified, scan_certified};
use gd_kernels::reference::scan::may_see;
use gd_kernels::{Precision, Problem};

use crate::decode::Codes;
use crate::scan::{Found, Uploaded, judge, problem};
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

/// The problem of a seed; every second one keeps one candidate and nothing protected.
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

/// Gives a case, whose tensors lie contiguously, the queries and keys of its problem.
fn restore(case: &mut Case) {
    let (p, dtype) = (&mut case.problem, case.dtype);
    let tensor = |values: &[f64], heads: usize, rows: usize| {
        let dims = [p.batch, heads, rows, p.dim];
        Tensor::from_vec(values.to_vec(), &dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    };
    let (q, k) = (tensor(&p.q, p.q_heads, p.queries), tensor(&p.k, p.kv_heads, p.keys));
    // The reference sees what the dtype keeps.
    let back = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    (p.q, p.k) = (back(&q), back(&k));
    (case.q.base, case.k.base) = (q, k);
}

/// Kinds of [`adverse`] problems, and of them those that the reference has energies for.
const ADVERSE: u64 = 8;
const FINITE: u64 = 5;

/// A problem in which bounds help little or not at all.
fn adverse(seed: u64) -> Case {
    let mut spec = Spec { views: [View::Plain; 3], ..spec(seed + 3000) };
    if seed % ADVERSE < 5 {
        spec.prior = None;
    }
    let mut case = spec.build(dtype(seed / ADVERSE));
    if case.exact() {
        // What follows leaves no integers.
        case.spec.kind = Kind::Plain;
    }
    let (dim, keys) = (case.problem.dim, case.problem.keys);
    let most = if case.dtype == DType::F16 { 6e4 } else { 1e17 };
    let p = &mut case.problem;
    let first = p.k[..dim].iter().map(|x| if x.is_finite() { *x } else { 0.5 }).collect::<Vec<_>>();
    for (row, key) in p.k.chunks_mut(dim).enumerate() {
        let j = row % keys;
        match seed % ADVERSE {
            // All keys equal, or nearly so: no bound tells them apart, and every list overflows.
            0 => key.copy_from_slice(&first),
            1 => (0..dim).for_each(|d| key[d] = first[d] * (1.0 + 1e-3 * ((j * 7 + d * 3) % 5) as f64)),
            // A single large coordinate leaves the others few of the integers.
            2 if j % 5 == 2 => key[j % dim] = (300.0 * key[j % dim]).clamp(-most, most),
            // Every key is better than the ones before, or equal to every third.
            3 => (0..dim).for_each(|d| key[d] = first[d] * (1.0 + j as f64 / keys as f64)),
            4 => (0..dim).for_each(|d| key[d] = first[d] * (1.0 + (j % 3) as f64)),
            // No bounds at all, for some keys.
            5 if j % 7 == 1 => key[row % dim] = if row % 2 == 0 { f64::INFINITY } else { f64::NEG_INFINITY },
            5 if j % 11 == 4 => key[row % dim] = f64::NAN,
            6 if j % 3 == 1 => key[row % dim] = most,
            6 if j % 3 == 2 => key.fill(0.0),
            _ => {}
        }
    }
    for (row, query) in p.q.chunks_mut(dim).enumerate() {
        match seed % ADVERSE {
            2 if row % 9 == 4 => query[row % dim] = (300.0 * query[row % dim]).clamp(-most, most),
            // No bounds, for some rows.
            7 if row % 4 == 1 => query[row % dim] = most,
            7 if row % 4 == 2 => query[row % dim] = f64::INFINITY,
            7 if row % 4 == 3 => query.fill(0.0),
            _ => {}
        }
    }
    restore(&mut case);
    case
}

/// What a scan gives.
struct Whole {
    found: Found,
    y: Vec<f64>,
    /// Scored and visible keys of each row, of a certified scan.
    counts: Vec<i32>,
}

/// The thresholds of all heads: one of the head's energies, so that some rows are admitted.
fn thresholds(p: &Problem, energy: &[f64]) -> Vec<f32> {
    let of = |h: usize| {
        let own = (0..energy.len()).filter(|r| r / p.queries % p.q_heads == h).map(|r| energy[r]);
        let own: Vec<f64> = own.filter(|e| e.is_finite()).collect();
        own.get(own.len() / 2).map_or(0.0, |e| *e as f32)
    };
    (0..p.q_heads).map(of).collect()
}

/// One scan by the portable kernels; with thresholds the fused one.
fn run(gpu: &TestGpu, case: &Case, precision: Precision, tau: Option<&[f32]>) -> Result<Whole, String> {
    let p = Problem { precision, ..problem(case) };
    let fail = |e: gd_kernels::Error| e.to_string();
    let held = Uploaded::new(gpu, case);
    let x: Inputs<'_, Buffer> = held.inputs(case);
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
        v: held.v.tensor4(),
        dim,
        threshold: Some((&threshold).into()),
        y: (&y).into(),
    });
    let certified = precision == Precision::Certified;
    if certified {
        let keys = Codes::new(gpu, &p, &x.k, [p.batch, p.keys]).map_err(fail)?;
        let beside = Certified { keys: keys.slices(), rescored: (&counts).into() };
        scan_certified(gpu, &plan, &p, &x, &beside, &out, values.as_ref()).map_err(fail)?;
    } else {
        match &values {
            Some(values) => scan_select(gpu, &plan, &p, &x, values, &out),
            None => scan(gpu, &plan, &p, &x, &out),
        }
        .map_err(fail)?;
    }
    Ok(Whole {
        found: Found {
            slots,
            index: integers(gpu, &index, count),
            energy: numbers(gpu, &energy, count, DType::F32),
            flags: if extra > 0 { numbers(gpu, &flags, count, DType::U8) } else { vec![0.0; count] },
        },
        y: if tau.is_some() { numbers(gpu, &y, rows * dim, case.dtype) } else { Vec::new() },
        counts: if certified { integers(gpu, &counts, 2 * rows) } else { Vec::new() },
    })
}

/// Whether two scans give the same bits.
fn same(case: &Case, native: &Whole, certified: &Whole) -> Verdict {
    let slots = native.found.slots;
    for (row, (b, h, i)) in case.problem.rows() {
        let at = row * slots..(row + 1) * slots;
        let of = |x: &Whole| (x.found.index[at.clone()].to_vec(), x.found.energy[at.clone()].to_vec());
        let (want, got) = (of(native), of(certified));
        ensure!(got == want, "{got:?} not {want:?}, row {b} {h} {i} of {}", case.name());
        let (seen, keys) = (certified.counts[2 * row + 1], case.problem.keys);
        let visible = (0..keys).filter(|&j| may_see(&case.problem.mask, b, i, j, keys)).count();
        ensure!(seen == visible as i32, "{seen} of {visible} visible, row {b} {h} {i} of {}", case.name());
        let scored = certified.counts[2 * row];
        ensure!(
            (0..=seen).contains(&scored),
            "{scored} of {seen} scored, row {b} {h} {i} of {}",
            case.name()
        );
    }
    ensure!(native.found.flags == certified.found.flags, "flags of {}", case.name());
    // NaN of a value row that is selected is the same NaN.
    let bits = |y: &[f64]| y.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    ensure!(bits(&native.y) == bits(&certified.y), "values of {}", case.name());
    Ok(())
}

/// A problem natively and with 8-bit keys.
fn check_case(gpu: &TestGpu, seed: u64, case: &Case) -> Result<Whole, String> {
    let other = gpu.twin(seed + 1);
    let native = run(&other, case, Precision::Native, None)?;
    let certified = run(gpu, case, Precision::Certified, None)?;
    same(case, &native, &certified)?;
    if case.spec.candidates == 1 && case.spec.protected.is_none() {
        let tau = thresholds(&problem(case), &native.found.energy);
        let native = run(&other, case, Precision::Native, Some(&tau))?;
        same(case, &native, &run(gpu, case, Precision::Certified, Some(&tau))?)?;
    }
    Ok(certified)
}

/// One problem with one schedule.
pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = spec(seed).build(dtype(seed));
    let certified = check_case(gpu, seed, &case)?;
    judge(&case, &certified.found)
}

/// One adverse problem with one schedule.
pub(crate) fn check_adverse(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = adverse(seed);
    let certified = check_case(gpu, seed, &case)?;
    if seed % ADVERSE < FINITE {
        judge(&case, &certified.found)?;
    }
    Ok(())
}

#[test]
fn certified_scans_are_the_native_scan_to_the_bit() {
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
    for (candidates, most) in [(1, 0.03), (8, 0.1)] {
        let mut spec = Spec::with_sizes(7, 10_000_000, &[64], Some(sizes));
        (spec.candidates, spec.protected, spec.prior) = (candidates, None, None);
        spec.raw.mask = gd_kernels::Mask::none();
        let case = spec.build(DType::BF16);
        let found = run(&TestGpu::new(5), &case, Precision::Certified, None).unwrap();
        let total = |at: usize| found.counts.iter().skip(at).step_by(2).map(|x| i64::from(*x)).sum::<i64>();
        let share = total(0) as f64 / total(1) as f64;
        println!("{candidates} candidates: {share:.4} of {} pairs scored, {}", total(1), case.name());
        assert!(share > 0.0 && share < most, "{share}");
    }
}
