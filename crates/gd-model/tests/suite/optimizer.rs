//! AdamW against a plain f64 implementation, Muon against its definition, master weights, exact resumption, clipping and
//! accumulation.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use gd_kernels::newton_schulz;
use gd_model::config::{AdamWConfig, MuonConfig};
use gd_model::train::optimizer::{AdamW, Optimizer, accumulate, clip_scale, global_norm, not_finite};

const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

/// Irregular numbers in [-1.7, 1.7] that follow from `seed`.
fn numbers(n: usize, seed: f64) -> Vec<f64> {
    (0..n).map(|i| ((i as f64 + seed) * 12.9898).sin() * 1.7).collect()
}

/// Parameters of rank 0 to 3 in `dtype`, some larger than one chunk of the parallel update.
fn vars(dtype: DType) -> Vec<(String, Var)> {
    let shapes: [(&str, &[usize]); 4] =
        [("w", &[200, 180]), ("bias", &[40]), ("a.cube", &[2, 3, 5]), ("scalar", &[])];
    let var = |(i, (name, shape)): (usize, &(&str, &[usize]))| {
        let n = shape.iter().product();
        let t = Tensor::from_vec(numbers(n, 100.0 * i as f64), *shape, &Device::Cpu).unwrap();
        (name.to_string(), Var::from_tensor(&t.to_dtype(dtype).unwrap()).unwrap())
    };
    shapes.iter().enumerate().map(var).collect()
}

/// Gradients that depend on the step: those of the loss Σ w·c with constants c of the step.
fn grads(vars: &[(String, Var)], step: usize, skip: Option<&str>) -> GradStore {
    let terms = vars.iter().filter(|(name, _)| Some(name.as_str()) != skip).map(|(name, var)| {
        let c = numbers(var.elem_count(), step as f64 * 7.0 + name.len() as f64);
        let c = Tensor::from_vec(c, var.shape(), &Device::Cpu).unwrap().to_dtype(var.dtype()).unwrap();
        (var.as_tensor() * c).unwrap().sum_all().unwrap()
    });
    terms.reduce(|a, b| (a + b).unwrap()).unwrap().backward().unwrap()
}

fn read(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn all(vars: &[(String, Var)]) -> Vec<Vec<f64>> {
    vars.iter().map(|(_, v)| read(v)).collect()
}

/// AdamW as in its definition, element by element.
struct Naive {
    p: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    t: i32,
}

impl Naive {
    fn new(p: Vec<f64>) -> Self {
        Self { m: vec![0.0; p.len()], v: vec![0.0; p.len()], p, t: 0 }
    }

    fn step(&mut self, g: &[f64], lr: f64, scale: f64, decay: f64) {
        self.t += 1;
        for (i, g) in g.iter().enumerate() {
            let g = g * scale;
            self.p[i] -= lr * decay * self.p[i];
            self.m[i] = CONFIG.beta1 * self.m[i] + (1.0 - CONFIG.beta1) * g;
            self.v[i] = CONFIG.beta2 * self.v[i] + (1.0 - CONFIG.beta2) * g * g;
            let m = self.m[i] / (1.0 - CONFIG.beta1.powi(self.t));
            let v = self.v[i] / (1.0 - CONFIG.beta2.powi(self.t));
            self.p[i] -= lr * m / (v.sqrt() + CONFIG.eps);
        }
    }
}

/// The maximal error of twenty steps with changing rate and scale. One parameter has no gradient in the first five.
fn greatest_error(dtype: DType) -> f64 {
    let vars = vars(dtype);
    let mut adam = AdamW::new(vars.clone(), CONFIG).unwrap();
    let mut naive: Vec<Naive> = all(&vars).into_iter().map(Naive::new).collect();
    for step in 0..20 {
        let (lr, scale) = (0.02 / (1.0 + step as f64), 0.25 + 0.05 * step as f64);
        let grads = grads(&vars, step, (step < 5).then_some("bias"));
        for ((_, var), naive) in vars.iter().zip(&mut naive) {
            if let Some(g) = grads.get(var) {
                naive.step(&read(g), lr, scale, if var.rank() >= 2 { CONFIG.weight_decay } else { 0.0 });
            }
        }
        adam.step(&grads, lr, scale).unwrap();
    }
    let pairs = all(&vars).into_iter().zip(naive).flat_map(|(a, b)| a.into_iter().zip(b.p));
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |a, b| if b <= a { a } else { b })
}

#[test]
fn adamw_follows_its_definition() {
    for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 2e-6)] {
        let error = greatest_error(dtype);
        assert!(error <= bound, "{dtype:?}: {error:e}");
    }
}

#[test]
fn half_precision_parameters_are_roundings_of_their_masters() {
    // One rounding of numbers up to 4, whatever the number of steps: half an ulp is 2⁻⁹ · 4 in bf16 and
    // 2⁻¹² · 4 in f16.
    for (dtype, half_ulp) in [(DType::BF16, 2f64.powi(-7)), (DType::F16, 2f64.powi(-10))] {
        let error = greatest_error(dtype);
        assert!(error > 0.0 && error <= half_ulp, "{dtype:?}: {error:e}");
    }
}

#[test]
fn updates_below_the_resolution_add_up() {
    let name = "model.layers.0.mlp.up_proj.weight";
    for dtype in [DType::BF16, DType::F16] {
        for muon in [None, Some(MuonConfig { weight_decay: 0.0, ..MuonConfig::default() })] {
            let var = Var::ones((4, 4), dtype, &Device::Cpu).unwrap();
            let config = AdamWConfig { weight_decay: 0.0, ..CONFIG };
            let mut optimizer = Optimizer::new(vec![(name.into(), var.clone())], config, muon).unwrap();
            // Muon's step has an entry of about 0.2 sqrt(4) sqrt(1/4) where AdamW's has 1.
            let lr = if muon.is_some() { 5e-4 } else { 1e-4 };
            let sign = Tensor::eye(4, dtype, &Device::Cpu).unwrap();
            let mut store = var.as_tensor().sum_all().unwrap().backward().unwrap();
            store.insert(&var, sign);
            let diagonal = |var: &Var| (0..4).map(|i| read(var)[5 * i]).sum::<f64>() / 4.0;
            optimizer.step(&store, lr, 1.0).unwrap();
            assert_eq!(diagonal(&var), 1.0, "{dtype:?}: one step of 1e-4 is below the resolution");
            for _ in 0..199 {
                optimizer.step(&store, lr, 1.0).unwrap();
            }
            let moved = 1.0 - diagonal(&var);
            assert!((0.01..0.05).contains(&moved), "{dtype:?}, {muon:?}: {moved}");
        }
    }
}

#[test]
fn decay_is_for_matrices_only() {
    let vars = vars(DType::F64);
    let before = all(&vars);
    let config = AdamWConfig { weight_decay: 0.5, ..CONFIG };
    let mut adam = AdamW::new(vars.clone(), config).unwrap();
    // A scale of 0 leaves nothing but the decay.
    adam.step(&grads(&vars, 0, None), 0.1, 0.0).unwrap();
    for (((name, var), before), after) in vars.iter().zip(&before).zip(all(&vars)) {
        let keep = if var.rank() >= 2 { 0.95 } else { 1.0 };
        assert!(before.iter().zip(&after).all(|(b, a)| (a - keep * b).abs() <= 1e-15), "{name}");
    }
}

#[test]
fn same_bits_for_any_number_of_threads() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let vars = vars(DType::F32);
            let mut adam = AdamW::new(vars.clone(), CONFIG).unwrap();
            let mut norms = vec![];
            for step in 0..5 {
                let grads = grads(&vars, step, None);
                norms.push(global_norm(&vars, &grads).unwrap().to_bits());
                adam.step(&grads, 0.01, 0.7).unwrap();
            }
            (norms, all(&vars))
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(3));
}

#[test]
fn adamw_resumes_from_its_state_to_the_bit() {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let straight = vars(dtype);
        let mut adam = AdamW::new(straight.clone(), CONFIG).unwrap();
        let resumed = vars(dtype);
        let mut saved = None;
        for step in 0..6 {
            adam.step(&grads(&straight, step, None), 0.01, 1.0).unwrap();
            if step == 2 {
                saved = Some(adam.state().unwrap());
                for ((_, to), (_, from)) in resumed.iter().zip(&straight) {
                    to.set(&from.copy().unwrap()).unwrap();
                }
            }
        }
        // The state is written to a file and read, and the parameters are in another order.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        gd_model::io::checkpoint::write_tensors(&path, &saved.unwrap()).unwrap();
        let state = gd_model::io::checkpoint::load_tensors(&path, &Device::Cpu).unwrap();
        assert_eq!(state["w.exp_avg"].dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });
        let mut adam = AdamW::new(resumed.iter().rev().cloned().collect(), CONFIG).unwrap();
        adam.load_state(&state).unwrap();
        for step in 3..6 {
            adam.step(&grads(&resumed, step, None), 0.01, 1.0).unwrap();
        }
        assert_eq!(all(&straight), all(&resumed), "{dtype:?}");
    }
}

#[test]
fn a_state_of_another_model_is_refused_without_any_change() {
    let vars = vars(DType::F32);
    let mut adam = AdamW::new(vars.clone(), CONFIG).unwrap();
    adam.step(&grads(&vars, 0, None), 0.01, 1.0).unwrap();
    let before: Vec<Vec<f64>> = adam.state().unwrap().values().map(read).collect();
    let good = AdamW::new(vars.clone(), CONFIG).unwrap().state().unwrap();
    let mut missing = good.clone();
    missing.remove("w.step");
    let mut shape = good.clone();
    shape.insert("w.exp_avg".into(), Tensor::zeros((180, 200), DType::F32, &Device::Cpu).unwrap());
    let mut dtype = good.clone();
    dtype.insert("w.exp_avg_sq".into(), Tensor::zeros((200, 180), DType::F64, &Device::Cpu).unwrap());
    let mut more = good.clone();
    more.insert("x.step".into(), Tensor::new(0u32, &Device::Cpu).unwrap());
    let cases = [
        (missing, "no w.step"),
        (shape, "[180, 200]"),
        (dtype, "F64"),
        (more, "x.step, which no parameter needs"),
    ];
    for (state, expected) in cases {
        let error = adam.load_state(&state).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(before, adam.state().unwrap().values().map(read).collect::<Vec<_>>());
    }
    adam.load_state(&good).unwrap();
}

#[test]
fn norm_and_clipping() {
    let vars = vars(DType::F32);
    let grads = grads(&vars, 3, Some("bias"));
    let expected: f64 =
        vars.iter().filter_map(|(_, v)| grads.get(v)).flat_map(read).map(|g| g * g).sum::<f64>().sqrt();
    let norm = global_norm(&vars, &grads).unwrap();
    assert!((norm - expected).abs() < 1e-9 * expected, "{norm} {expected}");
    assert_eq!(clip_scale(norm, norm * 2.0).unwrap(), 1.0);
    assert!((clip_scale(norm, 1.0).unwrap() * norm - 1.0).abs() < 1e-12);
    for (norm, max) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (1.0, 0.0), (1.0, f64::NAN)] {
        assert!(clip_scale(norm, max).is_err());
    }
    // Half precision: the squares of 300 overflow f16, their sum here does not.
    let var = Var::zeros(100, DType::F16, &Device::Cpu).unwrap();
    let named = [("h".to_string(), var)];
    let loss = (named[0].1.as_tensor() * 300.0).unwrap().sum_all().unwrap();
    assert_eq!(global_norm(&named, &loss.backward().unwrap()).unwrap(), 3000.0);
}

#[test]
fn invalid_gradients_and_settings_are_named() {
    let vars = vars(DType::F32);
    let mut store = grads(&vars, 0, None);
    assert_eq!(not_finite(&vars, &store).unwrap(), None);
    for bad in [f32::NAN, f32::INFINITY] {
        store.insert(&vars[1].1, Tensor::full(bad, 40, &Device::Cpu).unwrap());
        assert!(!global_norm(&vars, &store).unwrap().is_finite());
        assert_eq!(not_finite(&vars, &store).unwrap(), Some("bias"));
    }
    let mut adam = AdamW::new(vars.clone(), CONFIG).unwrap();
    for (lr, scale) in [(f64::NAN, 1.0), (-1.0, 1.0), (0.1, f64::INFINITY)] {
        assert!(adam.step(&store, lr, scale).is_err());
    }
    store.insert(&vars[1].1, Tensor::zeros(41, DType::F32, &Device::Cpu).unwrap());
    let error = adam.step(&store, 0.1, 1.0).unwrap_err().to_string();
    assert!(error.contains("bias") && error.contains("[41]") && error.contains("[40]"), "{error}");
    let cases = [
        (AdamWConfig { beta1: 1.0, ..CONFIG }, "beta1"),
        (AdamWConfig { beta2: f64::NAN, ..CONFIG }, "beta2"),
        (AdamWConfig { eps: 0.0, ..CONFIG }, "eps"),
        (AdamWConfig { weight_decay: -0.1, ..CONFIG }, "weight_decay"),
    ];
    for (config, name) in cases {
        assert!(
            AdamW::new(vars.clone(), config)
                .unwrap_err()
                .to_string()
                .starts_with(&format!("adamw.{name} must be"))
        );
    }
    let twice = vec![vars[0].clone(), vars[0].clone()];
    assert!(AdamW::new(twice, CONFIG).unwrap_err().to_string().contains("w is given twice"));
    let whole = Var::zeros(2, DType::U32, &Device::Cpu).unwrap();
    assert!(AdamW::new(vec![("ids".into(), whole)], CONFIG).unwrap_err().to_string().contains("U32"));
}

#[test]
fn parts_of_a_batch_add_up() {
    let vars = vars(DType::F64);
    let mut total = grads(&vars, 0, Some("bias"));
    let parts = [grads(&vars, 1, None), grads(&vars, 2, Some("w"))];
    for part in &parts {
        accumulate(&vars, &mut total, part).unwrap();
    }
    let first = grads(&vars, 0, Some("bias"));
    for (name, var) in &vars {
        let sum: Vec<Vec<f64>> =
            [&first, &parts[0], &parts[1]].iter().filter_map(|g| g.get(var)).map(read).collect();
        let expected: Vec<f64> = (0..var.elem_count()).map(|i| sum.iter().map(|g| g[i]).sum()).collect();
        assert_eq!(read(total.get(var).unwrap()), expected, "{name}");
    }
}

#[test]
fn a_transposed_gradient_lands_in_place() {
    let var = Var::from_vec(numbers(6, 0.0), (2, 3), &Device::Cpu).unwrap();
    let c = Tensor::from_vec(numbers(6, 9.0), (3, 2), &Device::Cpu).unwrap();
    let before = read(&var);
    let mut adam = AdamW::new(vec![("w".into(), var.clone())], CONFIG).unwrap();
    let loss = (var.t().unwrap() * &c).unwrap().sum_all().unwrap();
    let grads = loss.backward().unwrap();
    let mut naive = Naive::new(before);
    naive.step(&read(&c.t().unwrap().contiguous().unwrap()), 0.1, 1.0, CONFIG.weight_decay);
    adam.step(&grads, 0.1, 1.0).unwrap();
    assert!(read(&var).iter().zip(&naive.p).all(|(a, b)| (a - b).abs() <= 1e-15));
}

/// Two matrices of a block, wide and tall, and parameters that AdamW updates.
fn block(dtype: DType) -> Vec<(String, Var)> {
    let shapes: [(&str, &[usize]); 5] = [
        ("model.layers.0.mlp.down_proj.weight", &[6, 10]),
        ("model.layers.0.self_attn.q_proj.weight", &[12, 5]),
        ("model.layers.0.self_attn.q_norm.weight", &[5]),
        ("model.layers.0.self_attn.beacon.memory.weight", &[6, 5]),
        ("model.embed_tokens.weight", &[9, 5]),
    ];
    let var = |(i, (name, shape)): (usize, &(&str, &[usize]))| {
        let t = Tensor::from_vec(numbers(shape.iter().product(), 31.0 * i as f64), *shape, &Device::Cpu);
        (name.to_string(), Var::from_tensor(&t.unwrap().to_dtype(dtype).unwrap()).unwrap())
    };
    shapes.iter().enumerate().map(var).collect()
}

#[test]
fn orthogonalised_matrices_have_singular_values_near_one_and_the_same_directions() {
    for dims in [(5, 5), (4, 40), (30, 6)] {
        // Plain sines would give a matrix of rank 2.
        let entries = numbers(dims.0 * dims.1, 3.0).into_iter().map(|x| (x * 1e4).sin()).collect();
        let x = Tensor::from_vec::<_, f64>(entries, dims, &Device::Cpu).unwrap();
        let y = newton_schulz(&x).unwrap();
        assert_eq!(y.dims(), x.dims());
        let gram = |a: &Tensor, b: &Tensor| {
            let (a, b) =
                if dims.0 > dims.1 { (a.t().unwrap(), b.clone()) } else { (a.clone(), b.t().unwrap()) };
            a.contiguous().unwrap().matmul(&b.contiguous().unwrap()).unwrap()
        };
        // The trace of Y Yᵀ is the sum of the squared singular values; the eigenvalues of a symmetric matrix
        // lie within its norm of one, and X Yᵀ is symmetric where X and Y share their singular vectors.
        let short = dims.0.min(dims.1) as f64;
        let trace: f64 = read(&y).iter().map(|v| v * v).sum();
        assert!((0.5 * short..1.5 * short).contains(&trace), "{dims:?}: {trace}");
        let away = (gram(&y, &y) - Tensor::eye(short as usize, DType::F64, &Device::Cpu).unwrap()).unwrap();
        let away = read(&away).iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!(away < 0.45 * short.sqrt(), "{dims:?}: {away}");
        let cross = gram(&x, &y);
        let skew = (&cross - cross.t().unwrap()).unwrap();
        assert!(read(&skew).iter().all(|v| v.abs() < 1e-9), "{dims:?}");
        assert!(read(&cross).iter().step_by(short as usize + 1).all(|&v| v > 0.0), "{dims:?}");
    }
    let zeros = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
    assert!(read(&newton_schulz(&zeros).unwrap()).iter().all(|&v| v == 0.0));
}

#[test]
fn muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest() {
    let (config, lr) = (MuonConfig { momentum: 0.9, weight_decay: 0.5 }, 0.01);
    let (vars, plain) = (block(DType::F64), block(DType::F64));
    let mut optimizer = Optimizer::new(vars.clone(), CONFIG, Some(config)).unwrap();
    let mut adamw = AdamW::new(plain.clone(), CONFIG).unwrap();
    let mut naive: Vec<(Tensor, Tensor)> =
        vars.iter().map(|(_, v)| (v.copy().unwrap(), v.zeros_like().unwrap())).collect();
    for step in 0..4 {
        let store = grads(&vars, step, None);
        optimizer.step(&store, lr, 0.5).unwrap();
        adamw.step(&grads(&plain, step, None), lr, 0.5).unwrap();
        for ((_, var), (w, m)) in vars.iter().zip(&mut naive).take(2) {
            let g = (store.get(var).unwrap() * 0.5).unwrap();
            *m = ((&*m * 0.9).unwrap() + &g).unwrap();
            let o = newton_schulz(&(g + (&*m * 0.9).unwrap()).unwrap()).unwrap();
            let (rows, columns) = var.dims2().unwrap();
            let rate = 0.2 * lr * (rows.max(columns) as f64).sqrt();
            *w = ((&*w * (1.0 - lr * 0.5)).unwrap() - (o * rate).unwrap()).unwrap();
        }
    }
    for (i, ((name, var), (_, plain))) in vars.iter().zip(&plain).enumerate() {
        let expected = if i < 2 { read(&naive[i].0) } else { read(plain) };
        let pairs = read(var).into_iter().zip(expected);
        assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-12), "{name}");
    }
    assert!(optimizer.state().unwrap().contains_key("model.layers.0.mlp.down_proj.weight.momentum"));
    assert!(optimizer.state().unwrap().contains_key("model.embed_tokens.weight.exp_avg"));
}

#[test]
fn muon_resumes_from_its_state_to_the_bit_and_refuses_another() {
    let config = Some(MuonConfig::default());
    for dtype in [DType::F32, DType::BF16] {
        let (straight, resumed) = (block(dtype), block(dtype));
        let mut optimizer = Optimizer::new(straight.clone(), CONFIG, config).unwrap();
        let mut other = Optimizer::new(resumed.clone(), CONFIG, config).unwrap();
        for step in 0..3 {
            optimizer.step(&grads(&straight, step, None), 0.01, 1.0).unwrap();
        }
        let state = optimizer.state().unwrap();
        for key in ["model.layers.0.mlp.down_proj.weight.momentum", "model.embed_tokens.weight.step"] {
            let mut broken = state.clone();
            broken.remove(key);
            assert!(other.load_state(&broken).unwrap_err().to_string().contains(key));
            let untouched = other.state().unwrap();
            assert!(
                untouched
                    .iter()
                    .filter(|(k, _)| !k.ends_with("master"))
                    .all(|(_, t)| read(t).iter().all(|&x| x == 0.0))
            );
        }
        other.load_state(&state).unwrap();
        for ((_, to), (_, from)) in resumed.iter().zip(&straight) {
            to.set(&from.copy().unwrap()).unwrap();
        }
        for step in 3..6 {
            optimizer.step(&grads(&straight, step, None), 0.01, 1.0).unwrap();
            other.step(&grads(&resumed, step, None), 0.01, 1.0).unwrap();
        }
        assert_eq!(all(&straight), all(&resumed), "{dtype:?}");
    }
    for (config, name) in [
        (MuonConfig { momentum: 1.0, ..MuonConfig::default() }, "muon.momentum"),
        (MuonConfig { weight_decay: f64::NAN, ..MuonConfig::default() }, "muon.weight_decay"),
    ] {
        let error = Optimizer::new(block(DType::F32), CONFIG, Some(config)).unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    }
}
