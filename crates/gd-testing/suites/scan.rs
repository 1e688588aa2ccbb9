//! `scan` and `scan_select`: the candidates of every row against the energies of all keys in the reference.

use crate::target::{Buffer, TestGpu};
use candle_core::DType;
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::scan::{GpuScanPlan, Inputs, Outputs, Prior, Protected, Values, scan, scan_select};
use gd_kernels::reference::scan as reference_scan;
use gd_kernels::{Precision, Problem, TieBreak};

use crate::tensors::{DeviceTensor, integers, numbers};
use gd_testing::ensure;
use gd_testing::problems::{Case, Kind, Spec, values};
use gd_testing::suite::Verdict;

/// head_dims: of every kernel one that fits and one that is padded.
const DIMS: [usize; 12] = [8, 24, 32, 40, 64, 72, 96, 104, 128, 136, 192, 256];
/// Products B Hq N M D of a problem.
const LIMIT: usize = 600_000;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The problem of a seed; every second one has one candidate and no protected keys.
fn case(gpu: &TestGpu, seed: u64) -> Case {
    let mut spec = Spec::with_dims(seed, LIMIT, &DIMS);
    let dtype = DTYPES[(seed / 2 % 3) as usize];
    if gpu.arch().is_metal() || dtype == DType::F32 && spec.raw.dim > 192 {
        // Metal's lists have 64 entries; those of 128 do not fit beside such keys in the shared memory of a small
        // part.
        spec.candidates = spec.candidates.min(32);
    }
    if seed.is_multiple_of(2) {
        (spec.candidates, spec.protected) = (1, None);
    }
    spec.build(dtype)
}

pub(crate) fn problem(case: &Case) -> Problem {
    let p = &case.problem;
    Problem {
        batch: p.batch,
        q_heads: p.q_heads,
        kv_heads: p.kv_heads,
        queries: p.queries,
        keys: p.keys,
        head_dim: p.dim,
        candidates: case.spec.candidates,
        dtype: case.dtype,
        key_dtype: case.dtype,
        score: p.score,
        tie: p.tie,
        precision: Precision::Native,
    }
}

/// The candidates of all rows, `[B, Hq, N, slots]`, with 1 as the flag of a protected one.
pub(crate) struct ScanResult {
    pub(crate) slots: usize,
    pub(crate) index: Vec<i32>,
    pub(crate) energy: Vec<f64>,
    pub(crate) flags: Vec<f64>,
}

/// The inputs of a case on the device.
pub(crate) struct Uploaded {
    pub(crate) q: DeviceTensor,
    pub(crate) k: DeviceTensor,
    pub(crate) v: DeviceTensor,
    pub(crate) beta: DeviceTensor,
    prior: Option<DeviceTensor>,
    protected: Option<DeviceTensor>,
}

impl Uploaded {
    pub(crate) fn new(gpu: &TestGpu, case: &Case) -> Self {
        let wide = |t: &candle_core::Tensor| DeviceTensor::new(gpu, &t.to_dtype(DType::F32).unwrap());
        Self {
            q: DeviceTensor::new(gpu, &case.q.tensor()),
            k: DeviceTensor::new(gpu, &case.k.tensor()),
            v: DeviceTensor::new(gpu, &case.v.tensor()),
            beta: wide(&case.beta),
            prior: case.prior.as_ref().map(wide),
            protected: case.protected.as_ref().map(|t| DeviceTensor::new(gpu, t)),
        }
    }

    pub(crate) fn inputs<'a>(&'a self, case: &'a Case) -> Inputs<'a, Buffer> {
        let prior = case.prior.as_ref().zip(self.prior.as_ref());
        let protected = case.protected.as_ref().zip(self.protected.as_ref());
        Inputs {
            q: self.q.tensor4(),
            k: self.k.tensor4(),
            beta: self.beta.slice(),
            prior: prior
                .map(|(t, uploaded)| Prior { data: uploaded.slice(), dims: [t.dims()[0], t.dims()[1]] }),
            protected: protected.map(|(t, uploaded)| Protected {
                data: uploaded.slice(),
                dims: t.dims().try_into().unwrap(),
            }),
            mask: &case.problem.mask,
        }
    }
}

/// The plan for a device: with Hopper's kernel on Hopper if TMA can load the tensors.
pub(crate) fn plan(gpu: &TestGpu, p: &Problem, x: &Inputs<'_, Buffer>) -> Result<GpuScanPlan, String> {
    let extra = x.protected.as_ref().map_or(0, |p| p.dims[3]);
    let plan = GpuScanPlan::new(p, extra, x.prior.is_some(), &gpu.arch()).map_err(|e| e.to_string())?;
    Ok(if x.tma_loadable(p) { plan.on_hopper(p, &gpu.arch()) } else { plan })
}

/// Runs the scan of a case.
pub(crate) fn run(gpu: &TestGpu, case: &Case) -> Result<ScanResult, String> {
    let p = problem(case);
    let uploaded = Uploaded::new(gpu, case);
    let x = uploaded.inputs(case);
    let extra = x.protected.as_ref().map_or(0, |p| p.dims[3]);
    let plan = plan(gpu, &p, &x)?;
    let slots = p.candidates + extra;
    let count = p.batch * p.q_heads * p.queries * slots;
    let fail = |e: gd_kernels::Error| e.to_string();
    let (index, energy) = (gpu.allocate(count * 4).map_err(fail)?, gpu.allocate(count * 4).map_err(fail)?);
    let flags = gpu.allocate(count).map_err(fail)?;
    let out = Outputs {
        index: (&index).into(),
        energy: (&energy).into(),
        flags: (extra > 0).then(|| (&flags).into()),
    };
    scan(gpu, &plan, &p, &x, &out).map_err(fail)?;
    Ok(ScanResult {
        slots,
        index: integers(gpu, &index, count),
        energy: numbers(gpu, &energy, count, DType::F32),
        flags: if extra > 0 { numbers(gpu, &flags, count, DType::U8) } else { vec![0.0; count] },
    })
}

/// Fails unless every list is sorted, padded and complete, and no key that is not listed has a lower energy, up to the
/// error bounds.
pub(crate) fn check_result(case: &Case, result: &ScanResult) -> Verdict {
    let (p, candidates) = (&case.problem, case.spec.candidates);
    let all = reference_scan(p, p.keys);
    for (row, (b, h, i)) in p.rows() {
        let at = |text: &str| format!("{text}, row {b} {h} {i} of {}", case.name());
        let row_slots = row * all.width..(row + 1) * all.width;
        // For every key that may be a candidate: its energy and whether it is protected.
        let mut rank = vec![None; p.keys];
        for slot in row_slots.filter(|&s| all.index[s] >= 0) {
            rank[all.index[slot] as usize] = Some((all.energy[slot], all.protected[slot]));
        }
        let list = row * result.slots..(row + 1) * result.slots;
        let (index, energy, flags) =
            (&result.index[list.clone()], &result.energy[list.clone()], &result.flags[list]);
        let used = index.iter().take_while(|j| **j >= 0).count();
        ensure!(
            (used..result.slots).all(|s| index[s] == -1 && energy[s] == f64::INFINITY && flags[s] == 0.0),
            "padding {index:?} {energy:?} {flags:?}, {}",
            at("")
        );
        let query = &p.q[p.q_at(b, h, i)];
        let bound = |j: usize| case.rank_bound(query, (b, h), j);
        let mut listed = vec![false; p.keys];
        for slot in 0..used {
            let j = index[slot] as usize;
            let Some((e, protected)) = rank.get(j).copied().flatten() else {
                return Err(format!("key {j} is no candidate, {}", at("")));
            };
            ensure!(!listed[j], "key {j} twice, {}", at(""));
            listed[j] = true;
            ensure!((flags[slot] == 1.0) == protected, "flag of {j}, {}", at(""));
            let off = (energy[slot] - e).abs();
            ensure!(
                off <= case.energy_bound(query, (b, h), j),
                "energy of {j}: {} instead of {e}, {}",
                energy[slot],
                at("")
            );
            if slot > 0 {
                let rises = (index[slot - 1] < index[slot]) == (p.tie == TieBreak::First);
                let (a, b) = (energy[slot - 1], energy[slot]);
                ensure!(a < b || a == b && rises, "order {index:?} {energy:?}, {}", at(""));
            }
        }
        let free = (0..used).filter(|&s| flags[s] == 0.0).count();
        let possible = rank.iter().flatten().count();
        ensure!(
            free <= candidates && used >= candidates.min(possible),
            "{used} of {possible} keys, {}",
            at("")
        );
        for omitted in (0..p.keys).filter(|&j| rank[j].is_some() && !listed[j]) {
            let Some((e, protected)) = rank[omitted] else { continue };
            ensure!(!protected, "protected key {omitted} is missing, {}", at(""));
            for &j in &index[..used] {
                let j = j as usize;
                let Some((listed_energy, false)) = rank[j] else { continue };
                let difference = listed_energy - e;
                ensure!(
                    difference <= bound(j) + bound(omitted),
                    "key {j} is listed and {omitted} is not, whose energy is {difference} lower, {}",
                    at("")
                );
                if case.same_key(b, h, j, omitted) {
                    ensure!(
                        (j < omitted) == (p.tie == TieBreak::First),
                        "key {j} is listed instead of the identical key {omitted}, {}",
                        at("")
                    );
                }
            }
        }
        // Exact scores determine the list: by energy, then by index.
        if case.exact() {
            let order: Vec<i32> = all.index[row * all.width..(row + 1) * all.width].to_vec();
            let want: Vec<i32> = (0..p.keys)
                .map(|r| order[r])
                .take_while(|j| *j >= 0)
                .enumerate()
                .filter(|(r, j)| *r < candidates || rank[*j as usize].is_some_and(|x| x.1))
                .map(|(_, j)| j)
                .collect();
            ensure!(index[..used] == want, "{index:?} instead of {want:?}, {}", at(""));
        }
    }
    Ok(())
}

/// Fails unless the fused scan and selection has the keys and bits of the plain scan, and the value rows of these keys.
fn check_fused(gpu: &TestGpu, case: &Case, result: &ScanResult) -> Verdict {
    let (p, plain) = (problem(case), &case.problem);
    let uploaded = Uploaded::new(gpu, case);
    let x = uploaded.inputs(case);
    let fail = |e: gd_kernels::Error| e.to_string();
    let plan = plan(gpu, &p, &x)?;
    let (rows, dim) = (p.batch * p.q_heads * p.queries, plain.value_dim);
    // Every head's threshold is the energy of one of its rows, so that some are admitted.
    let tau: Vec<f32> = (0..p.q_heads)
        .map(|h| {
            let head = (0..rows).filter(|r| r / p.queries % p.q_heads == h).map(|r| result.energy[r]);
            let head: Vec<f64> = head.filter(|e| e.is_finite()).collect();
            head.get(head.len() / 2).map_or(0.0, |e| *e as f32)
        })
        .collect();
    let threshold = gpu.upload(bytemuck::cast_slice(&tau)).map_err(fail)?;
    let index = gpu.allocate(rows * 4).map_err(fail)?;
    let energy = gpu.allocate(rows * 4).map_err(fail)?;
    let y = gpu.allocate(rows * dim * case.dtype.size_in_bytes()).map_err(fail)?;
    let values =
        Values { v: uploaded.v.tensor4(), dim, threshold: Some((&threshold).into()), y: (&y).into() };
    let out = Outputs { index: (&index).into(), energy: (&energy).into(), flags: None };
    scan_select(gpu, &plan, &p, &x, &values, &out).map_err(fail)?;
    let (index, energy) = (integers(gpu, &index, rows), numbers(gpu, &energy, rows, DType::F32));
    let y = numbers(gpu, &y, rows * dim, case.dtype);
    for (row, (b, h, i)) in plain.rows() {
        let admitted = result.index[row] >= 0 && result.energy[row] <= f64::from(tau[h]);
        let want = if admitted { (result.index[row], result.energy[row]) } else { (-1, f64::INFINITY) };
        ensure!(
            (index[row], energy[row]) == want,
            "fused {} {} instead of {want:?}, row {b} {h} {i}",
            index[row],
            energy[row]
        );
        let zeros = vec![0.0; dim];
        let value = if admitted { &plain.v[plain.v_at(b, h, want.0 as usize)] } else { &zeros[..] };
        ensure!(y[row * dim..(row + 1) * dim] == *value, "fused value, row {b} {h} {i} of {}", case.name());
    }
    Ok(())
}

/// Checks one problem with one schedule.
pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    check_case(gpu, &case(gpu, seed))
}

/// Checks any problem.
pub(crate) fn check_case(gpu: &TestGpu, case: &Case) -> Verdict {
    let result = run(gpu, case)?;
    check_result(case, &result)?;
    if case.spec.candidates == 1 && case.spec.protected.is_none() {
        check_fused(gpu, case, &result)?;
    }
    Ok(())
}

#[test]
fn candidates_are_those_of_the_reference() {
    crate::suites("scan", [150, 100], 0, check);
}

#[test]
fn schedules_do_not_change_a_bit() {
    crate::suites("scan, three schedules", [12, 12], 0, |gpu, seed| {
        let case = case(gpu, seed + 500);
        let first = run(gpu, &case)?;
        check_result(&case, &first)?;
        for schedule in 2..4 {
            let again = run(&gpu.twin(schedule), &case)?;
            let same =
                first.index == again.index && first.energy == again.energy && first.flags == again.flags;
            ensure!(same, "schedule {schedule} differs: {}", case.name());
        }
        Ok(())
    });
}

/// Gives every third key an infinite coordinate: its scores are infinite or NaN, and it is no candidate, and it
/// must not hide one. Keys and values are contiguous.
pub(crate) fn make_infinite(case: &mut Case) {
    let (p, dim) = (&mut case.problem, case.spec.raw.dim);
    for (row, key) in p.k.chunks_mut(dim).enumerate().filter(|(row, _)| row % 3 == 1) {
        key[row % dim] = if row % 2 == 0 { f64::INFINITY } else { f64::NEG_INFINITY };
    }
    let dims = [p.batch, p.kv_heads, p.keys, dim];
    let k = candle_core::Tensor::from_vec(p.k.clone(), &dims, &candle_core::Device::Cpu).unwrap();
    case.k.base = k.to_dtype(case.dtype).unwrap();
}

fn check_infinite(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut spec = Spec::with_dims(seed + 40_000, LIMIT / 4, &DIMS);
    spec.views = [gd_testing::problems::View::Plain; 3];
    spec.candidates = spec.candidates.min(32);
    if seed.is_multiple_of(2) {
        (spec.candidates, spec.protected) = (1, None);
    }
    let mut case = spec.build(DTYPES[(seed / 2 % 3) as usize]);
    make_infinite(&mut case);
    check_result(&case, &run(gpu, &case)?)
}

#[test]
fn infinite_keys_are_no_candidates() {
    crate::suites("scan, infinite keys", [30, 30], 0, check_infinite);
}

/// How many times the bound of differences the candidates may be off in rows that are ranked by differences, in f32 on
/// Metal, and in others, by scores.
pub(crate) const DIFFERENCE_SLACK: f64 = 16.0;
pub(crate) const SCORE_SLACK: f64 = 300.0;

/// Checks one problem whose values have an offset.
pub(crate) fn check_offset(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut spec = Spec::with_dims(seed + 50_000, LIMIT / 2, &DIMS);
    spec.candidates = if seed.is_multiple_of(2) { 1 } else { spec.candidates.min(32) };
    spec.protected = None;
    // Each pair of seeds has one offset.
    let (spec, by_differences) = spec.with_offset_of(seed / 2);
    let case = spec.build(DTYPES[(seed / 2 % 3) as usize]);
    let result = run(gpu, &case)?;
    let slack = if by_differences { DIFFERENCE_SLACK } else { SCORE_SLACK };
    case.check_by_differences(&result.index, &result.energy, result.slots, slack)?;
    if case.spec.candidates == 1 { check_fused(gpu, &case, &result) } else { Ok(()) }
}

#[test]
fn offsets_do_not_change_the_candidates() {
    crate::suites("scan, offsets", [80, 80], 0, check_offset);
}

#[test]
fn ties_and_long_lists_occur_in_the_problems() {
    let gpu = TestGpu::new(0);
    // The generator must make enough problems with ties.
    let specs: Vec<Spec> = (0..150).map(|seed| case(&gpu, seed).spec).collect();
    assert!(specs.iter().filter(|s| matches!(s.kind, Kind::Integer | Kind::Duplicates)).count() > 20);
    // And enough with lists of 128.
    assert!(specs.iter().filter(|s| s.candidates == 64).count() > 5);
    assert!(values(&case(&gpu, 0).beta).iter().all(|b| *b > 0.0));
}
