//! `scan` and `scan_select`: every list against all energies of the reference.

use crate::target::{Buffer, TestGpu};
use candle_core::DType;
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::scan::{GpuScanPlan, Inputs, Outputs, Prior, Protected, Values, scan, scan_select};
use gd_kernels::reference::scan as reference_scan;
use gd_kernels::{Precision, Problem, TieBreak};

use crate::tensors::{Held, integers, numbers};
use gd_testing::ensure;
use gd_testing::problems::{Case, Kind, Spec, values};
use gd_testing::suite::Verdict;

/// head_dims: of every kernel one that fits and one that is padded.
const DIMS: [usize; 12] = [8, 24, 32, 40, 64, 72, 96, 104, 128, 136, 192, 256];
/// Products B Hq N M D of a problem.
const LIMIT: usize = 600_000;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The problem of a seed; every second one keeps one candidate and nothing protected.
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
        score: p.score,
        tie: p.tie,
        precision: Precision::Native,
    }
}

/// What the device found, `[B, Hq, N, slots]`.
pub(crate) struct Found {
    pub(crate) slots: usize,
    pub(crate) index: Vec<i32>,
    pub(crate) energy: Vec<f64>,
    pub(crate) flags: Vec<f64>,
}

/// The inputs of a case on the device.
pub(crate) struct Uploaded {
    pub(crate) q: Held,
    pub(crate) k: Held,
    pub(crate) v: Held,
    pub(crate) beta: Held,
    prior: Option<Held>,
    protected: Option<Held>,
}

impl Uploaded {
    pub(crate) fn new(gpu: &TestGpu, case: &Case) -> Self {
        let wide = |t: &candle_core::Tensor| Held::new(gpu, &t.to_dtype(DType::F32).unwrap());
        Self {
            q: Held::new(gpu, &case.q.tensor()),
            k: Held::new(gpu, &case.k.tensor()),
            v: Held::new(gpu, &case.v.tensor()),
            beta: wide(&case.beta),
            prior: case.prior.as_ref().map(wide),
            protected: case.protected.as_ref().map(|t| Held::new(gpu, t)),
        }
    }

    pub(crate) fn inputs<'a>(&'a self, case: &'a Case) -> Inputs<'a, Buffer> {
        let prior = case.prior.as_ref().zip(self.prior.as_ref());
        let protected = case.protected.as_ref().zip(self.protected.as_ref());
        Inputs {
            q: self.q.tensor4(),
            k: self.k.tensor4(),
            beta: self.beta.slice(),
            prior: prior.map(|(t, held)| Prior { data: held.slice(), dims: [t.dims()[0], t.dims()[1]] }),
            protected: protected
                .map(|(t, held)| Protected { data: held.slice(), dims: t.dims().try_into().unwrap() }),
            mask: &case.problem.mask,
        }
    }
}

/// The plan for a device: Hopper's kernel where there is one and the tensors suit it.
pub(crate) fn plan(gpu: &TestGpu, p: &Problem, x: &Inputs<'_, Buffer>) -> Result<GpuScanPlan, String> {
    let extra = x.protected.as_ref().map_or(0, |p| p.dims[3]);
    let plan = GpuScanPlan::new(p, extra, x.prior.is_some(), &gpu.arch()).map_err(|e| e.to_string())?;
    Ok(if x.tma_loadable(p) { plan.on_hopper(p, &gpu.arch()) } else { plan })
}

/// Runs the scan of a case.
pub(crate) fn run(gpu: &TestGpu, case: &Case) -> Result<Found, String> {
    let p = problem(case);
    let held = Uploaded::new(gpu, case);
    let x = held.inputs(case);
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
    Ok(Found {
        slots,
        index: integers(gpu, &index, count),
        energy: numbers(gpu, &energy, count, DType::F32),
        flags: if extra > 0 { numbers(gpu, &flags, count, DType::U8) } else { vec![0.0; count] },
    })
}

/// Whether the lists are right: sorted, padded, complete, no better key left out beyond the error bounds.
pub(crate) fn judge(case: &Case, found: &Found) -> Verdict {
    let (p, keep) = (&case.problem, case.spec.candidates);
    let all = reference_scan(p, p.keys);
    for (row, (b, h, i)) in p.rows() {
        let at = |text: &str| format!("{text}, row {b} {h} {i} of {}", case.name());
        let known = row * all.width..(row + 1) * all.width;
        // Of every key its energy and whether it is protected, if it may be a candidate.
        let mut rank = vec![None; p.keys];
        for slot in known.filter(|&s| all.index[s] >= 0) {
            rank[all.index[slot] as usize] = Some((all.energy[slot], all.protected[slot]));
        }
        let list = row * found.slots..(row + 1) * found.slots;
        let (index, energy, flags) =
            (&found.index[list.clone()], &found.energy[list.clone()], &found.flags[list]);
        let used = index.iter().take_while(|j| **j >= 0).count();
        ensure!(
            (used..found.slots).all(|s| index[s] == -1 && energy[s] == f64::INFINITY && flags[s] == 0.0),
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
                "energy of {j} {} not {e}, {}",
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
        ensure!(free <= keep && used >= keep.min(possible), "{used} of {possible} keys, {}", at(""));
        for left in (0..p.keys).filter(|&j| rank[j].is_some() && !listed[j]) {
            let Some((e, protected)) = rank[left] else { continue };
            ensure!(!protected, "protected key {left} is missing, {}", at(""));
            for &j in &index[..used] {
                let j = j as usize;
                let Some((kept, false)) = rank[j] else { continue };
                let lead = kept - e;
                ensure!(
                    lead <= bound(j) + bound(left),
                    "{j} kept, {left} left out: {lead} better, {}",
                    at("")
                );
                if case.same_key(b, h, j, left) {
                    ensure!(
                        (j < left) == (p.tie == TieBreak::First),
                        "{j} instead of the same {left}, {}",
                        at("")
                    );
                }
            }
        }
        // Of exact scores the list is known: by energy, then by index.
        if case.exact() {
            let order: Vec<i32> = all.index[row * all.width..(row + 1) * all.width].to_vec();
            let want: Vec<i32> = (0..p.keys)
                .map(|r| order[r])
                .take_while(|j| *j >= 0)
                .enumerate()
                .filter(|(r, j)| *r < keep || rank[*j as usize].is_some_and(|x| x.1))
                .map(|(_, j)| j)
                .collect();
            ensure!(index[..used] == want, "{index:?} not {want:?}, {}", at(""));
        }
    }
    Ok(())
}

/// The fused scan and selection against the plain scan: the same key and bits, and its value row.
fn fused(gpu: &TestGpu, case: &Case, found: &Found) -> Verdict {
    let (p, plain) = (problem(case), &case.problem);
    let held = Uploaded::new(gpu, case);
    let x = held.inputs(case);
    let fail = |e: gd_kernels::Error| e.to_string();
    let plan = plan(gpu, &p, &x)?;
    let (rows, dim) = (p.batch * p.q_heads * p.queries, plain.value_dim);
    // Every head's threshold is the energy of one of its rows, so that some are admitted.
    let tau: Vec<f32> = (0..p.q_heads)
        .map(|h| {
            let own = (0..rows).filter(|r| r / p.queries % p.q_heads == h).map(|r| found.energy[r]);
            let own: Vec<f64> = own.filter(|e| e.is_finite()).collect();
            own.get(own.len() / 2).map_or(0.0, |e| *e as f32)
        })
        .collect();
    let threshold = gpu.upload(bytemuck::cast_slice(&tau)).map_err(fail)?;
    let index = gpu.allocate(rows * 4).map_err(fail)?;
    let energy = gpu.allocate(rows * 4).map_err(fail)?;
    let y = gpu.allocate(rows * dim * case.dtype.size_in_bytes()).map_err(fail)?;
    let values = Values { v: held.v.tensor4(), dim, threshold: Some((&threshold).into()), y: (&y).into() };
    let out = Outputs { index: (&index).into(), energy: (&energy).into(), flags: None };
    scan_select(gpu, &plan, &p, &x, &values, &out).map_err(fail)?;
    let (index, energy) = (integers(gpu, &index, rows), numbers(gpu, &energy, rows, DType::F32));
    let y = numbers(gpu, &y, rows * dim, case.dtype);
    for (row, (b, h, i)) in plain.rows() {
        let admitted = found.index[row] >= 0 && found.energy[row] <= f64::from(tau[h]);
        let want = if admitted { (found.index[row], found.energy[row]) } else { (-1, f64::INFINITY) };
        ensure!(
            (index[row], energy[row]) == want,
            "fused {} {} not {want:?}, row {b} {h} {i}",
            index[row],
            energy[row]
        );
        let zeros = vec![0.0; dim];
        let value = if admitted { &plain.v[plain.v_at(b, h, want.0 as usize)] } else { &zeros[..] };
        ensure!(y[row * dim..(row + 1) * dim] == *value, "fused value, row {b} {h} {i} of {}", case.name());
    }
    Ok(())
}

/// One problem with one schedule.
pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    check_case(gpu, &case(gpu, seed))
}

/// The same of any problem.
pub(crate) fn check_case(gpu: &TestGpu, case: &Case) -> Verdict {
    let found = run(gpu, case)?;
    judge(case, &found)?;
    if case.spec.candidates == 1 && case.spec.protected.is_none() {
        fused(gpu, case, &found)?;
    }
    Ok(())
}

#[test]
fn lists_are_those_of_the_reference() {
    crate::suites("scan", [150, 100], 0, check);
}

#[test]
fn schedules_do_not_change_a_bit() {
    crate::suites("scan, three schedules", [12, 12], 0, |gpu, seed| {
        let case = case(gpu, seed + 500);
        let first = run(gpu, &case)?;
        judge(&case, &first)?;
        for schedule in 2..4 {
            let again = run(&gpu.twin(schedule), &case)?;
            let same =
                first.index == again.index && first.energy == again.energy && first.flags == again.flags;
            ensure!(same, "schedule {schedule} differs: {}", case.name());
        }
        Ok(())
    });
}

/// Gives every third key an infinite coordinate: its scores are infinite or NaN, and it is no candidate, nor does
/// it hide one. Keys and values lie contiguously.
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
    judge(&case, &run(gpu, &case)?)
}

#[test]
fn infinite_keys_are_no_candidates() {
    crate::suites("scan, infinite keys", [30, 30], 0, check_infinite);
}

#[test]
fn ties_are_seen() {
    let gpu = TestGpu::new(0);
    // The generator must make enough problems in which ties decide.
    let specs: Vec<Spec> = (0..150).map(|seed| case(&gpu, seed).spec).collect();
    assert!(specs.iter().filter(|s| matches!(s.kind, Kind::Integer | Kind::Duplicates)).count() > 20);
    // And enough with lists of 128.
    assert!(specs.iter().filter(|s| s.candidates == 64).count() > 5);
    assert!(values(&case(&gpu, 0).beta).iter().all(|b| *b > 0.0));
}
