//! AdamW against a plain f64 version, its exact continuation, clipping and accumulation.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use gd_model::optimizer::{AdamW, AdamWConfig, accumulate, clip_scale, global_norm};

const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };

/// Smooth numbers without a pattern that arithmetic could hide behind.
fn numbers(n: usize, seed: f64) -> Vec<f64> {
    (0..n).map(|i| ((i as f64 + seed) * 12.9898).sin() * 1.7).collect()
}

/// Parameters of rank 0 to 3, larger than one parallel piece, all in `dtype`.
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

/// Gradients given by number: the loss is Σ w·c with c depending on the step.
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

/// The textbook's update, one number at a time.
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

/// Twenty steps with changing rate and scale, one parameter passed over for the first five.
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
fn follows_the_naive_version() {
    for (dtype, bound) in [(DType::F64, 1e-14), (DType::F32, 2e-6)] {
        let error = greatest_error(dtype);
        assert!(error <= bound, "{dtype:?}: {error:e}");
    }
}

#[test]
fn half_precision_parameters_round_once_a_step() {
    // 20 roundings of numbers up to 2: half an ulp is 2⁻⁸ · 2 in bf16 and 2⁻¹¹ · 2 in f16 at the worst.
    for (dtype, half_ulp) in [(DType::BF16, 2f64.powi(-8)), (DType::F16, 2f64.powi(-11))] {
        let error = greatest_error(dtype);
        assert!(error > 0.0 && error <= 20.0 * half_ulp, "{dtype:?}: {error:e}");
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
fn continues_from_its_state_to_the_bit() {
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
        // Through a file and back, and with the parameters in another order.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        gd_model::checkpoint::write_tensors(&path, &saved.unwrap()).unwrap();
        let state = gd_model::checkpoint::load_tensors(&path, &Device::Cpu).unwrap();
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
fn a_state_that_does_not_fit_is_refused_whole() {
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
    let cases = [(missing, "no w.step"), (shape, "[180, 200]"), (dtype, "F64"), (more, "13 tensors")];
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
fn bad_gradients_and_settings_are_named() {
    let vars = vars(DType::F32);
    let mut store = grads(&vars, 0, None);
    for bad in [f32::NAN, f32::INFINITY] {
        store.insert(&vars[1].1, Tensor::full(bad, 40, &Device::Cpu).unwrap());
        let error = global_norm(&vars, &store).unwrap_err().to_string();
        assert_eq!(error, "the gradient of bias is not finite");
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
        assert!(AdamW::new(vars.clone(), config).unwrap_err().to_string().starts_with(name));
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
