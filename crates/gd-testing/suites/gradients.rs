//! Gradients on the device against finite differences of its own results, for all options whose gradient is exact while
//! the discrete choice does not change.

use candle_core::{DType, Device, Tensor, Var};
use gd_kernels::{
    Error, Estimator, Gate, Mask, Scan, Select, Selected, causal_conv, embedding, running_average, scan,
    select,
};

use crate::graph::noise;
use crate::targets;
use gd_testing::problems::values;

/// Step of the central differences: large against the rounding of f32.
const STEP: f64 = 2e-3;
/// Greatest error, relative to the norm of the gradient.
const BOUND: f64 = 1e-2;

/// Compares the derivative along a random direction for each input. `run` returns the result, and the selected keys,
/// which must not change within a step.
fn check(
    what: &str,
    inputs: &[Tensor],
    run: impl Fn(&[Tensor]) -> std::result::Result<(Tensor, Option<Tensor>), Error>,
) {
    let inputs: Vec<Tensor> = inputs.iter().map(|t| t.to_dtype(DType::F32).unwrap()).collect();
    let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for target in targets() {
        let on = |t: &Tensor| t.to_device(target.device()).unwrap();
        let host = |t: &Tensor| values(&t.to_device(&Device::Cpu).unwrap());
        target.run(|| {
            let at = |inputs: &[Tensor]| -> (f64, Vec<f64>) {
                let inputs: Vec<Tensor> = inputs.iter().map(on).collect();
                let (y, keys) = run(&inputs).unwrap_or_else(|e| panic!("{what}: {e}"));
                (sum(&host(&y), &values(&noise(99, y.dims()))), keys.as_ref().map(host).unwrap_or_default())
            };
            let vars: Vec<Var> = inputs.iter().map(|t| Var::from_tensor(&on(t)).unwrap()).collect();
            let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            let (y, _) = run(&tensors).unwrap_or_else(|e| panic!("{what}: {e}"));
            let weights = on(&noise(99, y.dims()).to_dtype(DType::F32).unwrap());
            let grads = (y * weights).unwrap().sum_all().unwrap().backward().unwrap();
            for (i, var) in vars.iter().enumerate() {
                let grad = grads.get(var).unwrap_or_else(|| panic!("{what}: input {i} got no gradient"));
                let (grad, direction) = (host(grad), noise(200 + i as u64, inputs[i].dims()));
                let moved = |step: f64| {
                    let mut inputs = inputs.clone();
                    let wide = inputs[i].to_dtype(DType::F64).unwrap();
                    inputs[i] = (wide + (&direction * step).unwrap()).unwrap().to_dtype(DType::F32).unwrap();
                    at(&inputs)
                };
                let ((above, keys), (below, others)) = (moved(STEP), moved(-STEP));
                assert_eq!(keys, others, "{what}, input {i}: a choice changed within a step");
                let (want, got) = ((above - below) / (2.0 * STEP), sum(&grad, &values(&direction)));
                let norm = sum(&grad, &grad).sqrt();
                let close = (want - got).abs() <= BOUND * norm && norm > 1e-3;
                assert!(
                    close,
                    "{what}, input {i}: derivative {got}, finite difference {want}, gradient norm {norm}"
                );
            }
        });
        target.count();
    }
}

/// Checks `select` with gradients of q, k, v, beta, threshold and prior; no row abstains.
fn selections(what: &str, change: fn(&mut Select)) {
    let [b, hq, hk, n, m, d, dv] = [1, 4, 2, 3, 8, 16, 8];
    let inputs = [
        noise(11, &[b, hq, n, d]),
        noise(12, &[b, hk, m, d]),
        noise(13, &[b, hk, m, dv]),
        noise(14, &[hq]).abs().unwrap().affine(0.2, 0.1).unwrap(),
        noise(15, &[hq]).affine(0.2, 3.0).unwrap(),
        (noise(16, &[b, hk, m]) * 0.3).unwrap(),
    ];
    let mask = Mask::none();
    check(what, &inputs, |x| {
        let prior = Some(&x[5]);
        // Every key is a candidate.
        let candidates = scan(&x[0], &x[1], &Scan { prior, ..Scan::new(&x[3], &mask, 8) })?;
        let mut how = Select { prior, threshold: Some(&x[4]), ..Select::new(&x[3]) };
        change(&mut how);
        let Selected { y, index, .. } = select(&x[0], &x[1], &x[2], &candidates, &how)?;
        Ok((y, (how.hardness > 0.0).then_some(index)))
    });
}

#[test]
fn gradients_are_those_of_finite_differences() {
    selections("a blend", |s| (s.estimator, s.hardness) = (Estimator::Blend, 0.0));
    selections("a winner behind the energy gate", |s| {
        (s.estimator, s.gate) = (Estimator::Winner, Gate::Energy { temperature: 2.0 });
    });
    check("a convolution", &[noise(1, &[2, 9, 24]), noise(2, &[24, 4])], |x| {
        Ok((causal_conv(&x[0], &x[1], None)?.0, None))
    });
    let inputs = [noise(1, &[1, 4, 37]), noise(2, &[1, 4, 37]), noise(3, &[1, 2, 37, 16])];
    check("an average", &inputs, |x| Ok((running_average(&x[0], &x[1], &x[2], None)?.0, None)));
    check("an embedding", &[noise(1, &[5, 24])], |x| {
        let ids = Tensor::new(&[3u32, 0, 3, 4, 3], x[0].device())?;
        Ok((embedding(&x[0], &ids)?, None))
    });
}

#[test]
fn the_coherence_gate_has_the_gradient_of_its_density() {
    // Without a threshold and a prior, on which the density does not depend.
    let [b, hq, hk, n, m, d] = [1, 4, 2, 3, 8, 16];
    let k = noise(12, &[b, hk, m, d]);
    // Every query lies near a key, so that no step changes the selected key.
    let near = k.narrow(2, 3, n).unwrap().unsqueeze(2).unwrap().broadcast_as((b, hk, hq / hk, n, d)).unwrap();
    let near = near.reshape((b, hq, n, d)).unwrap();
    let inputs = [
        ((near * 0.7).unwrap() + (noise(11, &[b, hq, n, d]) * 0.4).unwrap()).unwrap(),
        k,
        noise(13, &[b, hk, m, 8]),
        noise(14, &[hq]).abs().unwrap().affine(0.2, 0.1).unwrap(),
        noise(17, &[hq]).affine(0.2, 0.4).unwrap(),
    ];
    let mask = Mask::none();
    check("a winner behind the coherence gate", &inputs, |x| {
        let candidates = scan(&x[0], &x[1], &Scan::new(&x[3], &mask, 8))?;
        let how = Select {
            alpha: Some(&x[4]),
            estimator: Estimator::Winner,
            gate: Gate::Coherence,
            ..Select::new(&x[3])
        };
        let s = select(&x[0], &x[1], &x[2], &candidates, &how)?;
        Ok((s.y, Some(s.index)))
    });
}
