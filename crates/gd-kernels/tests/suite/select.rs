//! `select`, forward and backward, against the naive f64 reference on generated problems.
//!
//! Both choose among the same candidates, those of the operator's scan. A row in which rounding may
//! decide (see [`gd_testing::problems::choices::uncertainty`]) gets no gradient on either side; if its winner differs,
//! the winner's reference energy must lie within the bounds. Such rows are counted.

use candle_core::{DType, Device, Tensor, Var};
use gd_kernels::reference::select::estimator_candidates;
use gd_kernels::reference::{
    Candidates as ReferenceCandidates, Gradients, backward, select as reference_select,
};
use gd_kernels::{Candidates, Estimator, Gate, Select, scan, scan_all, select};
use gd_testing::problems::choices::{Choice, Uncertainty, estimator, uncertainty};
use gd_testing::problems::{Case, Kind, Spec, acc, pools, rng, roundoff, uniform, values};

/// Problems per dtype.
const PROBLEMS: u64 = 1024;
/// Maximum number of products B Hq N M D of a problem.
const LIMIT: usize = 60_000;

/// The results of one forward and backward pass.
struct Run {
    /// y, index, energy, margin, gate, coherence.
    record: [Vec<f64>; 6],
    /// Gradients by name, in the shapes of the inputs.
    gradients: Vec<(&'static str, Vec<f64>)>,
}

impl Run {
    fn bits(&self) -> Vec<u64> {
        let all = self.record.iter().chain(self.gradients.iter().map(|g| &g.1));
        all.flatten().map(|x| x.to_bits()).collect()
    }
}

fn run(case: &Case, choice: &Choice, scanned: &Candidates, dy: Option<&Tensor>) -> Run {
    let leaf = |t: &Tensor| Var::from_tensor(t).unwrap();
    let optional = |t: &Option<Tensor>| t.as_ref().map(leaf);
    let [q, k, v, beta] = [&case.q.base, &case.k.base, &case.v.base, &case.beta].map(leaf);
    let [prior, threshold, alpha, rounds] =
        [&case.prior, &choice.threshold, &choice.alpha, &choice.rounds].map(optional);
    let p = &case.problem;
    let options = Select {
        prior: prior.as_deref(),
        threshold: threshold.as_deref(),
        alpha: alpha.as_deref(),
        rounds: rounds.as_deref(),
        ..choice.select(case, &beta)
    };
    let [qt, kt, vt] = [(&case.q, &q), (&case.k, &k), (&case.v, &v)].map(|(s, t)| s.view.of(t));
    let out = select(&qt, &kt, &vt, scanned, &options)
        .unwrap_or_else(|e| panic!("{} {}: {e}", case.name(), choice.name()));
    assert_eq!(out.y.dtype(), case.dtype);
    assert_eq!(out.y.dims(), [p.batch, p.q_heads, p.queries, p.value_dim]);
    assert_eq!((out.index.dtype(), out.energy.dtype()), (DType::I32, acc(case.dtype)));
    let record = [&out.y, &out.index, &out.energy, &out.margin, &out.gate].map(values);
    let [y, index, energy, margin, gate] = record;
    let coherence = out.coherence.as_ref().map(values).unwrap_or_default();
    let mut gradients = vec![];
    if let Some(dy) = dy {
        let grads = (&out.y * dy).unwrap().sum_all().unwrap().backward().unwrap();
        let of = |t: &Tensor| grads.get(t).cloned().unwrap_or_else(|| t.zeros_like().unwrap());
        gradients = vec![
            ("q", values(&case.q.view.of(&of(&q)))),
            ("k", values(&case.k.view.of(&of(&k)))),
            ("v", values(&case.v.view.of(&of(&v)))),
            ("beta", values(&of(&beta))),
        ];
        for (name, t) in
            [("prior", &prior), ("threshold", &threshold), ("alpha", &alpha), ("rounds", &rounds)]
        {
            gradients.extend(t.as_ref().map(|t| (name, values(&of(t)))));
        }
    }
    Run { record: [y, index, energy, margin, gate, coherence], gradients }
}

/// The candidates of the operator in the type of the reference.
fn convert(scanned: &Candidates) -> ReferenceCandidates {
    let index: Vec<i32> = scanned.index.flatten_all().unwrap().to_vec1().unwrap();
    let protected = scanned
        .protected
        .as_ref()
        .map_or(vec![false; index.len()], |t| values(t).iter().map(|x| *x == 1.0).collect());
    ReferenceCandidates { width: scanned.index.dims()[3], energy: values(&scanned.energy), index, protected }
}

#[derive(Default)]
struct Tally {
    rows: usize,
    abstained: usize,
    /// Rows without ties on purpose, with one round; those among them that rounding may decide; the
    /// same for more rounds.
    plain: [usize; 2],
    doubtful: [usize; 2],
    differing: usize,
    lifted: usize,
    /// Greatest gradient error, in units of its tolerance.
    worst: f64,
}

/// The error of u* by that of `t`: `du/dt = u (1 - u) (2u - 1) / (1 - 2 t u (1 - u))`.
fn coherence_bound(t: f64, u: f64, unit: f64) -> f64 {
    let flow = u * (1.0 - u);
    let slope = (1.0 - 2.0 * t * flow).abs().max(1e-6);
    2.0 * unit + 1e-13 * (1.0 + t * flow / slope) / slope.min(1.0)
}

/// Compares record and y of a row that rounding does not decide.
fn judge_row(
    case: &Case,
    choice: &Choice,
    got: &Run,
    want: &gd_kernels::reference::Selected,
    row: usize,
    d: &Uncertainty,
) {
    let (p, params) = (&case.problem, &choice.params);
    let name = || format!("{} {} row {row}", case.name(), choice.name());
    let unit = roundoff(acc(case.dtype));
    let [y, index, energy, margin, gate, coherence] = &got.record;
    assert_eq!(index[row], f64::from(want.index[row]), "{}", name());
    let reach = d.bounds.iter().copied().fold(0.0, f64::max);
    let near = |what: &str, x: f64, y: f64, bound: f64| {
        assert!(x == y || (x - y).abs() <= bound, "{}: {what} is {x}, not {y} (bound {bound})", name());
    };
    near("energy", energy[row], want.energy[row], reach + 2.0 * unit * want.energy[row].abs());
    if !d.margin {
        near("margin", margin[row], want.margin[row], 2.0 * reach + 2.0 * unit * want.margin[row].abs());
    }
    let gate_bound = match params.gate {
        Gate::Energy { temperature } => reach / temperature,
        // The threshold, too, is rounded: it is that of the head plus the energy of the runner-up.
        Gate::Margin { temperature } => {
            let (energy, margin) = (want.energy[row], want.margin[row]);
            let size = 1.0 + if margin.is_finite() { energy.abs() + margin } else { 0.0 };
            (2.0 * reach + 4.0 * unit * size) / temperature
        }
        // The weight of the first of several picks.
        _ if params.picks > 1 => reach,
        _ => 0.0,
    };
    near("gate", gate[row], want.gate[row], gate_bound + 4.0 * unit + 1e-12);
    if let (Some(u), Some(alpha)) = (&want.coherence, &params.alpha) {
        let per_head = p.queries;
        let h = row / per_head % p.q_heads;
        if want.index[row] >= 0 {
            let b = row / per_head / p.q_heads;
            let (q, j) = (p.q_at(b, h, row % per_head), want.index[row] as usize);
            let t = p.beta[h] * gd_kernels::reference::distance2(&p.q[q], &p.k[p.k_at(b, h, j)]);
            near(
                &format!("u* at alpha {}", alpha[h]),
                coherence[row],
                u[row],
                coherence_bound(t, u[row], unit),
            );
        } else {
            assert_eq!(coherence[row], 0.0, "{}", name());
        }
    }
    let weights: f64 = params.rounds.as_ref().map_or(1.0, |w| {
        let r = params.round_count(p.q_heads);
        w[row / p.queries % p.q_heads * r..][..r].iter().map(|w| w.abs()).sum()
    });
    let largest = if case.exact() { 2.0 } else { 1.0 };
    let bound = largest * weights * (64.0 * roundoff(case.dtype) + d.relative.min(1.0)) + 1e-12;
    let at = row * p.value_dim..(row + 1) * p.value_dim;
    for (&got, &want) in y[at.clone()].iter().zip(&want.y[at]) {
        near("y", got, want, bound);
    }
}

/// The gradients of the reference by name, in the shapes of the inputs.
fn expected(case: &Case, choice: &Choice, g: Gradients) -> Vec<(&'static str, Vec<f64>)> {
    let mut out = vec![("q", g.q), ("k", g.k), ("v", g.v), ("beta", g.beta)];
    out.extend(case.prior.is_some().then(|| ("prior", case.fold_prior(&g.prior))));
    out.extend(choice.threshold.is_some().then_some(("threshold", g.threshold)));
    out.extend(choice.alpha.is_some().then_some(("alpha", g.alpha)));
    out.extend(choice.rounds.is_some().then_some(("rounds", g.rounds)));
    out
}

/// One problem: forward, backward, determinism.
fn examine(seed: u64, dtype: DType, tally: &mut Tally) {
    let mut case = Spec::new(seed, LIMIT).build(dtype);
    if case.spec.kind == Kind::Huge && !case.spec.scaled {
        // At beta 1 energies of 1e30 differ by far more than any temperature; that is a test of its own.
        case = Spec { scaled: true, ..case.spec }.build(dtype);
    }
    let (q, k) = (case.q.tensor(), case.k.tensor());
    let scanned = match estimator(seed) {
        Estimator::Dense => scan_all(&q, &k, &case.scan()),
        _ => scan(&q, &k, &case.scan()),
    }
    .unwrap();
    case.poison_unread_values(&scanned);
    let choice = Choice::new(seed, &case, &values(&scanned.energy));
    let choice = if seed.is_multiple_of(3) { choice.with_threshold_per_query(seed, &case) } else { choice };
    let choice = if seed.is_multiple_of(4) { choice.with_margin_gate(seed, &case) } else { choice };
    let (p, params) = (&case.problem, &choice.params);
    let name = || format!("{} {}", case.name(), choice.name());
    let converted = convert(&scanned);
    let want = reference_select(p, &converted, params);
    let got = run(&case, &choice, &scanned, None);
    let playing = estimator_candidates(p, &converted, params);

    let mut dy = uniform(&mut rng(seed ^ 0xd1), p.batch * p.q_heads * p.queries * p.value_dim);
    let several = usize::from(params.round_count(p.q_heads) > 1);
    let ties = matches!(case.spec.kind, Kind::Duplicates | Kind::Integer);
    let mut relative = 0f64;
    for (row, (b, h, i)) in p.rows() {
        let d = uncertainty(&case, params, &playing, row);
        let (index, wanted) = (got.record[1][row] as i32, want.index[row]);
        tally.rows += 1;
        tally.abstained += usize::from(wanted < 0);
        tally.plain[several] += usize::from(!ties);
        if index == wanted && !d.hidden {
            judge_row(&case, &choice, &got, &want, row, &d);
            relative = relative.max(d.relative);
            continue;
        }
        assert!(d.first || d.hidden, "{}, row {row}: {index} instead of {wanted}", name());
        tally.doubtful[several] += usize::from(!ties);
        tally.differing += usize::from(index != wanted);
        if params.barrier.is_none() && index >= 0 && wanted >= 0 {
            let query = &p.q[p.q_at(b, h, i)];
            let energy = |j: i32| {
                let (key, prior) = (&p.k[p.k_at(b, h, j as usize)], p.prior_of(b, h, j as usize));
                gd_kernels::reference::scan::energy(query, key, p.beta[h], prior, p.score)
            };
            let reach = 2.0 * d.bounds.iter().copied().fold(0.0, f64::max);
            assert!(energy(index) - energy(wanted) <= reach, "{}, row {row}: {index} for {wanted}", name());
        }
        dy[row * p.value_dim..(row + 1) * p.value_dim].fill(0.0);
    }

    let dims = [p.batch, p.q_heads, p.queries, p.value_dim];
    let (dy, dy_values) = gd_testing::problems::rounded(&dy, &dims, dtype);
    let want = expected(&case, &choice, backward(p, &converted, params, &dy_values));
    let got = run(&case, &choice, &scanned, Some(&dy));
    let unit = roundoff(dtype);
    // Every round of refinement starts from the rounded query of the one before.
    let rounds = params.round_count(p.q_heads) as f64;
    let rate = if dtype == DType::F64 {
        1e-9
    } else {
        2.0 * rounds * rounds * (48.0 * unit + 6.0 * relative.min(1.0))
    };
    // The subnormal numbers of a dtype have no relative precision.
    let floor = match dtype {
        DType::F16 => 2e-7,
        DType::F64 => 1e-290,
        _ => 1e-35,
    };
    for ((what, x), (_, y)) in got.gradients.iter().zip(&want) {
        assert_eq!(x.len(), y.len(), "{}: d{what}", name());
        let greatest = |x: &[f64]| x.iter().filter(|x| x.is_finite()).fold(0f64, |m, x| m.max(x.abs()));
        // Sums over all rows of a head may cancel to nothing: their error is one of their terms, which
        // are <dy, v> times a share, and for beta times a squared distance.
        let reading = greatest(&dy_values) * greatest(&p.v);
        let term = match *what {
            "beta" => reading * p.dim as f64 * (greatest(&p.q) + greatest(&p.k)).powi(2),
            "alpha" | "threshold" | "rounds" => reading,
            _ => 0.0,
        };
        let size = greatest(y).max(term);
        let bound = rate * size + floor;
        for (at, (x, y)) in x.iter().zip(y).enumerate() {
            let error = (x - y).abs();
            assert!(
                error <= bound,
                "{}: d{what}[{at}] is {x}, not {y}: off by {:.2e} of the greatest {size}, {rate:.2e} allowed",
                name(),
                error / size
            );
            tally.worst = tally.worst.max(error / bound);
        }
    }
    let first = got.bits();
    for pool in pools() {
        let again = pool.install(|| run(&case, &choice, &scanned, Some(&dy)).bits());
        assert_eq!(first, again, "{}: {} threads", name(), pool.current_num_threads());
    }
    tally.lifted += usize::from(params.barrier.is_some());
}

/// The suite in one dtype.
fn suite(dtype: DType) {
    let mut tally = Tally::default();
    for seed in 0..PROBLEMS {
        examine(100_000 + seed, dtype, &mut tally);
    }
    let Tally { rows, abstained, plain, doubtful, differing, lifted, worst } = tally;
    println!(
        "{dtype:?}: {rows} rows, {abstained} abstain; rounding may decide {} of {} rows with one round and {} of {} \
         with more, {differing} differ; {lifted} problems with a barrier; greatest gradient error {worst:.2} of \
         what is allowed",
        doubtful[0], plain[0], doubtful[1], plain[1]
    );
    assert!(abstained > rows / 50 && lifted > 100);
    assert!(doubtful[0] * 100 < plain[0], "{} of {} rows", doubtful[0], plain[0]);
    // Residual queries are stored in the tensors' dtype, so half precision decides more often.
    let share = if matches!(dtype, DType::F16 | DType::BF16) { 2 } else { 100 };
    assert!(doubtful[1] * share < plain[1], "{} of {} rows with rounds", doubtful[1], plain[1]);
    gd_testing::log_cases("select", PROBLEMS as usize);
}

#[test]
fn generated_problems_f32() {
    suite(DType::F32);
}

#[test]
fn generated_problems_f16() {
    suite(DType::F16);
}

#[test]
fn generated_problems_bf16() {
    suite(DType::BF16);
}

#[test]
fn generated_problems_f64() {
    suite(DType::F64);
}

#[test]
fn numbers_of_1e15_at_bandwidth_1_stay_finite() {
    for seed in 0..2000u64 {
        let spec = Spec::new(200_000 + seed, 20_000);
        if spec.kind != Kind::Huge {
            continue;
        }
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            let mut case = Spec { scaled: false, ..spec.clone() }.build(dtype);
            let (q, k) = (case.q.tensor(), case.k.tensor());
            let scanned = match estimator(seed) {
                Estimator::Dense => scan_all(&q, &k, &case.scan()),
                _ => scan(&q, &k, &case.scan()),
            }
            .unwrap();
            case.poison_unread_values(&scanned);
            let choice = Choice::new(seed, &case, &values(&scanned.energy));
            let p = &case.problem;
            let dy = Tensor::ones((p.batch, p.q_heads, p.queries, p.value_dim), dtype, &Device::Cpu).unwrap();
            let out = run(&case, &choice, &scanned, Some(&dy));
            assert!(out.record[0].iter().all(|x| x.is_finite()), "{} {}", case.name(), choice.name());
            for (what, g) in &out.gradients {
                assert!(g.iter().all(|x| x.is_finite()), "{} {}: d{what}", case.name(), choice.name());
            }
        }
    }
}
