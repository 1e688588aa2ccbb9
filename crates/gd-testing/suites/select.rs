//! The steps of `select`, forward and backward, against the reference: the choice with its barrier and all gradients,
//! then residual queries and the density by themselves.
//!
//! Rows in which rounding may change the choice or its weights are not compared and get no gradient.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::target::{Buffer, TestGpu};
use candle_core::{DType, Device, Tensor};
use gd_kernels::gpu::inverse::InverseIndex;
use gd_kernels::gpu::scan::Prior;
use gd_kernels::gpu::select::{
    Candidates, PairGradients, Pairs, Record, Rule, SelectPlan, Sizes, barrier, barrier_backward, choose,
    choose_backward, density, density_backward, energy, energy_backward, residual, residual_backward,
};
use gd_kernels::gpu::{Gpu, Slice};
use gd_kernels::reference::refine::{residual_query, residual_query_backward};
use gd_kernels::reference::theory;
use gd_kernels::reference::{
    Candidates as Listed, Params, backward, distance2, dot, scan as reference_scan,
    select as reference_select,
};
use gd_kernels::{Estimator, Gate};

use crate::scan::Uploaded;
use crate::tensors::{DeviceTensor, integers, numbers};
use gd_testing::ensure;
use gd_testing::problems::choices::{Choice, ESTIMATORS, uncertainty};
use gd_testing::problems::{Case, Kind, Spec, rng, roundoff, uniform};
use gd_testing::suite::Verdict;

const DIMS: [usize; 6] = [8, 24, 40, 64, 128, 136];
const LIMIT: usize = 200_000;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Number of rows of all problems, and of those that are certain: rounding cannot change their choice.
static ROWS: AtomicUsize = AtomicUsize::new(0);
static CERTAIN_ROWS: AtomicUsize = AtomicUsize::new(0);

/// A problem without huge or tiny numbers, whose gradients leave the range of f16.
fn case(seed: u64) -> Case {
    let mut at = 20_000 + seed;
    let mut spec = Spec::with_dims(at, LIMIT, &DIMS);
    while matches!(spec.kind, Kind::Huge | Kind::Tiny) {
        at += 1_000;
        spec = Spec::with_dims(at, LIMIT, &DIMS);
    }
    spec.candidates = spec.candidates.min(32);
    spec.build(DTYPES[(seed % 3) as usize])
}

pub(crate) fn sizes(case: &Case, slots: usize) -> Sizes {
    let p = &case.problem;
    Sizes {
        batch: p.batch,
        q_heads: p.q_heads,
        kv_heads: p.kv_heads,
        queries: p.queries,
        keys: p.keys,
        head_dim: p.dim,
        value_dim: p.value_dim,
        slots,
        dtype: case.dtype,
    }
}

/// Fails unless every element is within two roundings of the dtype, `relative` of the greatest magnitude, and `floor`.
fn check_close(
    what: &str,
    case: &Case,
    got: &[f64],
    want: &[f64],
    dtype: DType,
    (relative, floor): (f64, f64),
) -> Verdict {
    ensure!(got.len() == want.len(), "{what}: {} elements instead of {}", got.len(), want.len());
    let greatest = want.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        // f16 has an absolute error below its smallest normal number.
        let bound = 2.0 * roundoff(dtype) * w.abs() + relative * greatest + floor + 6e-8;
        ensure!((g - w).abs() <= bound, "{what} {i}: {g} instead of {w} (bound {bound}), {}", case.name());
    }
    Ok(())
}

struct Out<'a> {
    gpu: &'a TestGpu,
    buffer: Buffer,
    count: usize,
    dtype: DType,
}

impl<'a> Out<'a> {
    fn new(gpu: &'a TestGpu, count: usize, dtype: DType) -> Self {
        Self { gpu, buffer: gpu.allocate(count * dtype.size_in_bytes()).unwrap(), count, dtype }
    }

    fn at(&self) -> Slice<'_, Buffer> {
        (&self.buffer).into()
    }

    fn values(&self) -> Vec<f64> {
        numbers(self.gpu, &self.buffer, self.count, self.dtype)
    }
}

fn fail(e: gd_kernels::Error) -> String {
    e.to_string()
}

fn tensor(values: &[f64], dims: &[usize], dtype: DType) -> Tensor {
    Tensor::from_vec(values.to_vec(), dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// Checks one problem: statistics, output and all gradients of the choice.
pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = case(seed);
    let p = &case.problem;
    let listed = reference_scan(p, case.spec.candidates);
    let mut params: Params = Choice::new(seed, &case, &listed.energy).params;
    params.estimator = match ESTIMATORS[(seed / 3 % ESTIMATORS.len() as u64) as usize] {
        Estimator::Dense => Estimator::Candidates,
        other => other,
    };
    (params.rounds, params.alpha) = (None, None);
    if params.gate == Gate::Coherence {
        params.gate = Gate::None;
    }
    let s = sizes(&case, listed.width);
    let rule = Rule {
        score: p.score,
        tie: p.tie,
        estimator: params.estimator,
        temperature: params.temperature,
        preserve_floor: params.preserve_floor,
        gradient: params.gradient,
        value_floor: params.value_floor,
        hardness: params.hardness,
        gate_temperature: if let Gate::Energy { temperature } = params.gate {
            Some(temperature)
        } else {
            None
        },
        picks: params.picks,
        admission: params.gate.admission(params.exclude_below),
        barrier: params.barrier,
        ..Rule::default()
    };
    let plan = SelectPlan::new(&s, &rule, &gpu.arch()).map_err(fail)?;
    let uploaded = Uploaded::new(gpu, &case);
    let x = uploaded.inputs(&case);
    let index = gpu.upload(bytemuck::cast_slice(&listed.index)).map_err(fail)?;
    let flags: Vec<u8> = listed.protected.iter().map(|&f| u8::from(f)).collect();
    let flags = gpu.upload(&flags).map_err(fail)?;
    let tau: Vec<f32> =
        (0..p.q_heads).map(|h| params.threshold.as_ref().map_or(f32::INFINITY, |t| t[h] as f32)).collect();
    let tau = gpu.upload(bytemuck::cast_slice(&tau)).map_err(fail)?;
    let slots = listed.index.len();

    // Forward.
    let pairs = Pairs { q: x.q, k: x.k, beta: x.beta, index: (&index).into() };
    let raw = Out::new(gpu, slots, DType::F32);
    energy(gpu, &plan, &pairs, x.prior.as_ref(), raw.at()).map_err(fail)?;
    let lifted = Out::new(gpu, slots, DType::F32);
    let before = [raw.at(), (&index).into(), (&flags).into()];
    if params.barrier.is_some() {
        barrier(gpu, &plan, before, lifted.at()).map_err(fail)?;
    }
    let compared = if params.barrier.is_some() { lifted.at() } else { raw.at() };
    let rows = s.rows();
    let ints: Vec<Out<'_>> = (0..3).map(|_| Out::new(gpu, rows, DType::I32)).collect();
    let floats: Vec<Out<'_>> = (0..3).map(|_| Out::new(gpu, rows, DType::F32)).collect();
    let record = Record {
        slot: ints[0].at(),
        index: ints[1].at(),
        nearest: ints[2].at(),
        energy: floats[0].at(),
        margin: floats[1].at(),
        gate: floats[2].at(),
    };
    let candidates = Candidates { energy: compared, index: (&index).into(), threshold: (&tau).into() };
    let y = Out::new(gpu, rows * p.value_dim, case.dtype);
    let v = uploaded.v.tensor4();
    choose(gpu, &plan, &candidates, &v, Some(&record), Some(y.at())).map_err(fail)?;

    let want = reference_select(p, &listed, &params);
    let uncertainties: Vec<_> = (0..rows).map(|row| uncertainty(&case, &params, &listed, row)).collect();
    let is_certain = |row: usize| {
        !uncertainties[row].first && !uncertainties[row].hidden && uncertainties[row].relative < 1e-4
    };
    let largest = |x: &[f64]| x.iter().filter(|x| x.is_finite()).fold(0f64, |m, x| m.max(x.abs()));
    let (got_y, got_index) = (y.values(), integers(gpu, &ints[1].buffer, rows));
    let [got_energy, got_margin, got_gate] = [0, 1, 2].map(|f| floats[f].values());
    ROWS.fetch_add(rows, Ordering::Relaxed);
    for row in (0..rows).filter(|&r| is_certain(r)) {
        CERTAIN_ROWS.fetch_add(1, Ordering::Relaxed);
        let text = || format!("row {row} of {}", case.name());
        ensure!(
            got_index[row] == want.index[row],
            "index {} instead of {}, {}",
            got_index[row],
            want.index[row],
            text()
        );
        let bound = 2.0 * uncertainties[row].bounds.iter().fold(0f64, |m, x| m.max(*x))
            + 1e-6 * want.energy[row].abs();
        let close = |g: f64, w: f64, by: f64| g == w || (g - w).abs() <= by;
        ensure!(close(got_energy[row], want.energy[row], bound), "energy, {}", text());
        let scale = if want.margin[row].is_finite() { want.margin[row].abs() } else { 0.0 };
        let by = 2.0 * bound + 1e-6 * scale;
        ensure!(
            uncertainties[row].margin || close(got_margin[row], want.margin[row], by),
            "margin, {}",
            text()
        );
        ensure!(
            close(got_gate[row], want.gate[row], 1e-4),
            "gate {} instead of {}, {}",
            got_gate[row],
            want.gate[row],
            text()
        );
        let at = row * p.value_dim..(row + 1) * p.value_dim;
        check_close("y", &case, &got_y[at.clone()], &want.y[at], case.dtype, (0.0, 4e-4 * largest(&p.v)))?;
    }

    // Backward.
    let mut rng = rng(seed ^ 77);
    let mut dy = uniform(&mut rng, rows * p.value_dim);
    for row in (0..rows).filter(|&r| !is_certain(r)) {
        dy[row * p.value_dim..(row + 1) * p.value_dim].fill(0.0);
    }
    let dims = [p.batch, p.q_heads, p.queries, p.value_dim];
    // Strided: heads after queries.
    let dy_tensor = tensor(&dy, &dims, case.dtype).transpose(1, 2).unwrap().contiguous().unwrap();
    let dy_tensor = dy_tensor.transpose(1, 2).unwrap();
    let dy = gd_testing::problems::values(&dy_tensor);
    let dy_on_device = DeviceTensor::new(gpu, &dy_tensor);
    let inverse = InverseIndex::new(gpu, &s, (&index).into()).map_err(fail)?;
    let de = Out::new(gpu, slots, DType::F32);
    let dv = Out::new(gpu, p.v.len(), case.dtype);
    let dtau = Out::new(gpu, p.q_heads, DType::F32);
    let dy_at = dy_on_device.tensor4();
    choose_backward(gpu, &plan, &candidates, &v, &dy_at, &inverse, [de.at(), dv.at(), dtau.at()])
        .map_err(fail)?;
    let unlifted = Out::new(gpu, slots, DType::F32);
    if params.barrier.is_some() {
        barrier_backward(gpu, &plan, before, de.at(), unlifted.at()).map_err(fail)?;
    }
    let gradient = if params.barrier.is_some() { unlifted.at() } else { de.at() };
    let (dq, dk) = (Out::new(gpu, p.q.len(), case.dtype), Out::new(gpu, p.k.len(), case.dtype));
    let dbeta = Out::new(gpu, p.q_heads, DType::F32);
    let prior_dims = x.prior.as_ref().map_or([0, 0], |p| p.dims);
    let dprior = Out::new(gpu, (prior_dims[0] * prior_dims[1] * p.keys).max(1), DType::F32);
    let prior = x.prior.as_ref().map(|_| Prior { data: dprior.at(), dims: prior_dims });
    let out = PairGradients { q: dq.at(), k: dk.at(), beta: dbeta.at(), prior };
    energy_backward(gpu, &plan, &pairs, gradient, &inverse, &out).map_err(fail)?;

    // Value rows of keys that no row selects are NaN in the reference; their gradients are not compared.
    let want = backward(p, &listed, &params, &dy);
    // Error bounds of sums that cancel: products of the greatest factors.
    let strength = params.barrier.map_or(0.0, |b| b.strength);
    let a =
        (1.0 + strength) * p.value_dim as f64 * largest(&p.v) * largest(&dy) / params.temperature.min(1.0);
    let beta = largest(&p.beta);
    let reach = largest(&p.q) + largest(&p.k);
    let rows_a_key = (rows as f64).sqrt();
    let tol = 6e-4;
    check_close("dv", &case, &dv.values(), &want.v, case.dtype, (tol, 1e-5 * largest(&dy) * rows_a_key))?;
    check_close("dtau", &case, &dtau.values(), &want.threshold, DType::F32, (tol, 2e-5 * a * rows_a_key))?;
    check_close("dq", &case, &dq.values(), &want.q, case.dtype, (tol, 4e-6 * a * beta * reach))?;
    check_close("dk", &case, &dk.values(), &want.k, case.dtype, (tol, 4e-6 * a * beta * reach * rows_a_key))?;
    let form = reach * reach * p.dim as f64;
    check_close(
        "dbeta",
        &case,
        &dbeta.values(),
        &want.beta,
        DType::F32,
        (tol, 4e-6 * a * form * rows_a_key),
    )?;
    if case.prior.is_some() {
        let folded = case.fold_prior(&want.prior);
        check_close("dprior", &case, &dprior.values(), &folded, DType::F32, (tol, 4e-6 * a * rows_a_key))?;
    }
    Ok(())
}

/// Checks residual queries and the density with one key per query, with gradients.
pub(crate) fn check_single(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = case(seed + 300);
    let p = &case.problem;
    let listed: Listed = reference_scan(p, 1);
    // The first slot of each row; some rows have none.
    let index: Vec<i32> = listed.index.iter().copied().step_by(listed.width).collect();
    let s = sizes(&case, 1);
    let passage = seed.is_multiple_of(3);
    let mode = if passage { gd_kernels::CoherenceMode::Passage } else { gd_kernels::CoherenceMode::Global };
    let plan =
        SelectPlan::new(&s, &Rule { coherence: mode, ..Rule::default() }, &gpu.arch()).map_err(fail)?;
    let uploaded = Uploaded::new(gpu, &case);
    let x = uploaded.inputs(&case);
    let index_on_device = gpu.upload(bytemuck::cast_slice(&index)).map_err(fail)?;
    let pairs = Pairs { q: x.q, k: x.k, beta: x.beta, index: (&index_on_device).into() };
    let inverse = InverseIndex::new(gpu, &s, (&index_on_device).into()).map_err(fail)?;
    let (rows, d) = (s.rows(), p.dim);
    let mut rng = rng(seed ^ 99);
    let alpha: Vec<f32> = (0..p.q_heads).map(|h| [0.5, 0.2, 0.9, 0.35][(h + seed as usize) % 4]).collect();
    let alpha_on_device = gpu.upload(bytemuck::cast_slice(&alpha)).map_err(fail)?;
    let dr = tensor(&uniform(&mut rng, rows * d), &[p.batch, p.q_heads, p.queries, d], case.dtype);
    let (dr_on_device, dr) = (DeviceTensor::new(gpu, &dr), gd_testing::problems::values(&dr));
    let grad: Vec<f32> = uniform(&mut rng, rows).into_iter().map(|x| x as f32).collect();
    let grad_on_device = gpu.upload(bytemuck::cast_slice(&grad)).map_err(fail)?;

    let mut want_r = p.q.clone();
    let (mut want_dq, mut want_dk) = (dr.clone(), vec![0.0; p.k.len()]);
    let (mut rho, mut point) = (vec![0.0; rows], vec![0.0; rows]);
    let (mut by_q, mut by_k) = (vec![0.0; p.q.len()], vec![0.0; p.k.len()]);
    let (mut by_beta, mut by_alpha) = (vec![0.0; p.q_heads], vec![0.0; p.q_heads]);
    let mut steepest = 1f64;
    for (row, (b, h, i)) in p.rows().filter(|(row, _)| index[*row] >= 0) {
        let (at, kat) = (p.q_at(b, h, i), p.k_at(b, h, index[row] as usize));
        let (q, k, g) = (&p.q[at.clone()], &p.k[kat.clone()], &dr[at.clone()]);
        want_r[at.clone()].copy_from_slice(&residual_query(q, k));
        let (dq, dk) = residual_query_backward(q, k, g);
        want_dq[at.clone()].copy_from_slice(&dq);
        want_dk[kat.clone()].iter_mut().zip(&dk).for_each(|(x, y)| *x += y);
        let jump = distance2(q, k).sqrt();
        if jump > 0.0 {
            let size = dot(q, q).sqrt();
            steepest = steepest.max((1.0 + size / jump) * (1.0 + size / jump) * (1.0 + 1.0 / jump));
        }
        let (dist, beta, alpha) = (distance2(q, k), p.beta[h], f64::from(alpha[h]));
        let x = theory::density(beta * dist, alpha, mode);
        (rho[row], point[row]) = (x.value, theory::coherence(beta * dist, alpha, mode).u);
        let g = f64::from(grad[row]);
        by_beta[h] += g * x.d_t * dist;
        by_alpha[h] += g * x.d_alpha;
        for (e, (a, b)) in q.iter().zip(k).enumerate() {
            let c = g * x.d_t * 2.0 * beta * (a - b);
            by_q[at.start + e] += c;
            by_k[kat.start + e] -= c;
        }
    }
    let largest = |x: &[f64]| x.iter().filter(|x| x.is_finite()).fold(0f64, |m, x| m.max(x.abs()));
    let [got_r, got_dq] = [(); 2].map(|()| Out::new(gpu, p.q.len(), case.dtype));
    let got_dk = Out::new(gpu, p.k.len(), case.dtype);
    residual(gpu, &plan, &pairs, got_r.at()).map_err(fail)?;
    residual_backward(gpu, &plan, &pairs, &dr_on_device.tensor4(), &inverse, [got_dq.at(), got_dk.at()])
        .map_err(fail)?;
    // Queries without a visible key are NaN, and stay so; they are not compared.
    let without_nan = |x: Vec<f64>, nan: &[f64]| {
        x.iter().zip(nan).map(|(x, n)| if n.is_nan() { 0.0 } else { *x }).collect::<Vec<_>>()
    };
    let loose = 4e-7 * steepest * (d as f64);
    let (r, want_r) = (without_nan(got_r.values(), &p.q), without_nan(want_r, &p.q));
    check_close("residual", &case, &r, &want_r, case.dtype, (0.0, loose * largest(&p.q)))?;
    check_close(
        "residual dq",
        &case,
        &got_dq.values(),
        &want_dq,
        case.dtype,
        (1e-5, loose * largest(&p.q).max(1.0)),
    )?;
    let many = loose * largest(&p.q).max(1.0) * (rows as f64).sqrt();
    check_close("residual dk", &case, &got_dk.values(), &want_dk, case.dtype, (1e-5, many))?;

    let [got_rho, got_point] = [(); 2].map(|()| Out::new(gpu, rows, DType::F32));
    let alpha_at = Slice::from(&alpha_on_device);
    density(gpu, &plan, &pairs, alpha_at, Some(got_rho.at()), Some(got_point.at())).map_err(fail)?;
    check_close("rho", &case, &got_rho.values(), &rho, DType::F32, (0.0, 1e-6))?;
    // At alpha 1/2 and t = 2 two roots coincide, so a small error of t is a large one of u.
    check_close("u", &case, &got_point.values(), &point, DType::F32, (0.0, 1e-5))?;
    let [dbeta, dalpha] = [(); 2].map(|()| Out::new(gpu, p.q_heads, DType::F32));
    let (dq, dk) = (Out::new(gpu, p.q.len(), case.dtype), Out::new(gpu, p.k.len(), case.dtype));
    let out = PairGradients { q: dq.at(), k: dk.at(), beta: dbeta.at(), prior: None };
    let grad_at = Slice::from(&grad_on_device);
    density_backward(gpu, &plan, &pairs, alpha_at, grad_at, &inverse, (&out, dalpha.at())).map_err(fail)?;
    check_close("density dq", &case, &dq.values(), &by_q, case.dtype, (1e-5, 0.0))?;
    check_close(
        "density dk",
        &case,
        &dk.values(),
        &by_k,
        case.dtype,
        (1e-5, 1e-6 * largest(&by_q) * rows as f64),
    )?;
    check_close("density dbeta", &case, &dbeta.values(), &by_beta, DType::F32, (1e-5, 1e-5 * largest(&p.q)))?;
    check_close("density dalpha", &case, &dalpha.values(), &by_alpha, DType::F32, (1e-5, 1e-5))
}

#[test]
fn choices_and_gradients_match_the_reference() {
    crate::suites("select", [75, 60], 3, check);
    let (rows, certain) = (ROWS.load(Ordering::Relaxed), CERTAIN_ROWS.load(Ordering::Relaxed));
    println!("{certain} of {rows} rows are certain");
    assert!(certain * 2 > rows, "only {certain} of {rows} rows are certain");
}

#[test]
fn residuals_and_densities_match_the_reference() {
    crate::suites("select, one key a query", [30, 30], 5, check_single);
}
