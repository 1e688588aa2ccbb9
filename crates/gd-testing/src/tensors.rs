//! Deterministic tensors, finite differences and comparisons for the tests of operators.

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The dtypes of the operators, each with the bound on its error relative to `1 + |value|`.
pub const DTYPES: [(DType, f64); 4] =
    [(DType::F64, 1e-12), (DType::F32, 4e-6), (DType::F16, 6e-3), (DType::BF16, 5e-2)];

/// Uniform values in `-scale..scale`.
pub fn noise(seed: u64, shape: &[usize], scale: f64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f64> =
        (0..shape.iter().product::<usize>()).map(|_| rng.random_range(-scale..scale)).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The elements of a tensor of any float type, in order.
pub fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Fails where `|a - b| > bound (1 + |b|)`, or on NaN.
pub fn assert_close(what: &str, a: &Tensor, b: &Tensor, bound: f64) {
    assert_eq!(a.dims(), b.dims(), "{what}");
    for (i, (a, b)) in values(a).iter().zip(values(b)).enumerate() {
        assert!((a - b).abs() <= bound * (1.0 + b.abs()), "{what}, element {i}: {a} instead of {b}");
    }
}

/// The result of `f`, followed by the gradients of `sum(result * fixed noise)` with respect to all inputs.
pub fn with_gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Vec<Tensor> {
    let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(t).unwrap()).collect();
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = f(&tensors).unwrap();
    let grads = objective(&y).backward().unwrap();
    let mut all = vec![y.detach()];
    for (i, t) in tensors.iter().enumerate() {
        all.push(grads.get(t).unwrap_or_else(|| panic!("input {i} got no gradient")).clone());
    }
    all
}

fn objective(y: &Tensor) -> Tensor {
    let weights = noise(4242, y.dims(), 1.0).to_dtype(y.dtype()).unwrap();
    (y * weights).unwrap().sum_all().unwrap()
}

/// Compares every gradient with central differences in f64 (eps 1e-6, atol 1e-5, rtol 1e-3), at up
/// to 200 elements of each input.
pub fn check_gradients(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    const EPS: f64 = 1e-6;
    let grads = with_gradients(inputs, &f);
    for (which, input) in inputs.iter().enumerate() {
        assert_eq!(input.dtype(), DType::F64);
        let (base, grad) = (values(input), values(&grads[which + 1]));
        assert_eq!(base.len(), grad.len());
        for i in (0..base.len()).step_by(base.len().div_ceil(200).max(1)) {
            let value_at = |delta: f64| {
                let mut changed = base.clone();
                changed[i] += delta;
                let mut inputs = inputs.to_vec();
                inputs[which] = Tensor::from_vec(changed, input.shape(), &Device::Cpu).unwrap();
                objective(&f(&inputs).unwrap()).to_scalar::<f64>().unwrap()
            };
            let want = (value_at(EPS) - value_at(-EPS)) / (2.0 * EPS);
            let got = grad[i];
            assert!(
                (got - want).abs() <= 1e-5 + 1e-3 * want.abs(),
                "input {which}, element {i}: gradient {got}, finite difference {want}"
            );
        }
    }
}

/// Fails unless result and gradients in every dtype are within its bound of those in f64, for inputs rounded to the
/// dtype.
pub fn check_dtypes(inputs: &[Tensor], f: impl Fn(&[Tensor]) -> Result<Tensor>) {
    for (dtype, bound) in DTYPES {
        let low: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(dtype).unwrap()).collect();
        let rounded: Vec<Tensor> = low.iter().map(|t| t.to_dtype(DType::F64).unwrap()).collect();
        let want = with_gradients(&rounded, &f);
        for (i, (got, want)) in with_gradients(&low, &f).iter().zip(&want).enumerate() {
            assert_eq!(got.dtype(), dtype);
            assert_close(&format!("{dtype:?}, result {i}"), got, want, bound);
        }
    }
}

/// Fails unless `f` gives the same bits on 1, 2 and 3 threads.
pub fn same_bits(f: impl Fn() -> Vec<Tensor> + Sync) {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let results = pool.install(&f);
        results.iter().flat_map(values).map(f64::to_bits).collect::<Vec<u64>>()
    };
    let one = run(1);
    assert!(!one.is_empty());
    assert_eq!(one, run(2), "2 threads");
    assert_eq!(one, run(3), "3 threads");
}
