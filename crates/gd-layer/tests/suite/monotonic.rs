//! Monotonic attention and MoChA: the recurrence by loops, hard decoding as the limit of large energies, and what holds for
//! the sums.

use candle_core::{DType, Device, Result, Tensor};
use gd_layer::mechanisms::{
    AttentionMechanism, Inputs, Mocha, Monotonic, mocha_hard, mocha_weights, monotonic_hard,
    monotonic_weights,
};
use gd_testing::properties;
use gd_testing::tensors::*;
use proptest::prelude::*;

/// α by the recurrence, for p `[N][M]`.
fn by_loops(p: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let m = p[0].len();
    let mut before: Vec<f64> = (0..m).map(|j| if j == 0 { 1.0 } else { 0.0 }).collect();
    let row = |p: &Vec<f64>| {
        let mut q = 0.0;
        let alpha: Vec<f64> = (0..m)
            .map(|j| {
                q = if j == 0 { before[0] } else { (1.0 - p[j - 1]) * q + before[j] };
                p[j] * q
            })
            .collect();
        before = alpha.clone();
        alpha
    };
    p.iter().map(row).collect()
}

/// t by the definition, for energies `[N][M]`.
fn hard_by_loops(energies: &[Vec<f64>]) -> Vec<i64> {
    let mut start = Some(0);
    let row = |e: &Vec<f64>| {
        start = start.and_then(|start: usize| (start..e.len()).find(|&j| e[j] > 0.0));
        start.map_or(-1, |j| j as i64)
    };
    energies.iter().map(row).collect()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn check(b: usize, n: usize, m: usize, window: usize, seed: u64) -> Result<()> {
    let energies = noise(seed, &[b, n, m], 3.0);
    let alpha = monotonic_weights(&energies, None)?;
    let p = candle_nn::ops::sigmoid(&energies)?.to_vec3::<f64>()?;
    let expected: Vec<f64> = p.iter().flat_map(|p| by_loops(p).concat()).collect();
    let expected = Tensor::from_vec(expected, (b, n, m), &Device::Cpu)?;
    assert!(largest_difference(&alpha, &expected) < 1e-14);
    let totals = values(&alpha.sum(2)?);
    assert!(values(&alpha).iter().all(|&a| a >= 0.0) && totals.iter().all(|&total| total <= 1.0 + 1e-12));

    let u = noise(seed + 1, &[b, n, m], 4.0);
    assert!(largest_difference(&mocha_weights(&alpha, &u, 1)?, &alpha) < 1e-15);
    let beta = mocha_weights(&alpha, &u, window)?;
    assert!(largest_difference(&beta.sum(2)?, &alpha.sum(2)?) < 1e-13);

    // Energies of ±80 decide: α is the one-hot of the key that hard decoding selects.
    let decided = (energies.sign()? * 80.0)?;
    let t = monotonic_hard(&energies)?;
    let expected: Vec<i64> = energies.to_vec3::<f64>()?.iter().flat_map(|e| hard_by_loops(e)).collect();
    assert_eq!(t.flatten_all()?.to_vec1::<i64>()?, expected);
    let keys = Tensor::arange(0, m as i64, &Device::Cpu)?;
    let one_hot = t.unsqueeze(2)?.broadcast_eq(&keys)?.to_dtype(DType::F64)?;
    let limit = monotonic_weights(&decided, None)?;
    assert!(largest_difference(&limit, &one_hot) < 1e-12);
    assert!(largest_difference(&mocha_weights(&limit, &u, window)?, &mocha_hard(&t, &u, window)?) < 1e-12);
    Ok(())
}

proptest! {
    #![proptest_config(properties(64))]

    #[test]
    fn weights_follow_the_recurrence(
        b in 1usize..3, n in 1usize..7, m in 1usize..9, window in 1usize..11, seed in any::<u64>(),
    ) {
        check(b, n, m, window, seed >> 1).unwrap();
    }
}

#[test]
fn gradients_match_finite_differences() {
    let shapes: [&[usize]; 8] = [&[2, 3, 4], &[2, 5, 3], &[6, 4], &[6, 3], &[6], &[6], &[1], &[1]];
    let names = ["q", "k", "W", "V", "b", "vec", "g", "r"];
    let tensors: Vec<Tensor> =
        shapes.iter().enumerate().map(|(i, shape)| noise(i as u64, shape, 1.0)).collect();
    check_gradients(&tensors, |t| {
        let inputs = names.iter().zip(t).fold(Inputs::new(), |inputs, (name, t)| inputs.with(name, t));
        let inputs = inputs.with("noise", &noise(50, &[2, 3, 5], 1.0));
        AttentionMechanism::Monotonic(Monotonic::default()).attend(&inputs)?.get("out").cloned()
    });
    check_gradients(
        &[noise(1, &[2, 3, 5], 1.0), noise(2, &[2, 3, 5], 2.0), noise(3, &[2, 5, 4], 1.0)],
        |t| {
            let inputs = Inputs::new().with("e", &t[0]).with("u", &t[1]).with("v", &t[2]);
            AttentionMechanism::Mocha(Mocha { w: 3, hard: false }).attend(&inputs)?.get("out").cloned()
        },
    );
}

#[test]
fn windows_far_below_the_maximum_do_not_underflow() -> Result<()> {
    let alpha = Tensor::new(&[[[0.5, 0.25, 0.125]]], &Device::Cpu)?;
    let u = Tensor::new(&[[[-2000.0, -2001.0, 0.0]]], &Device::Cpu)?;
    let beta = values(&mocha_weights(&alpha, &u, 2)?);
    let share = 1.0 / (1.0 + (-1f64).exp());
    let expected = [0.5 + 0.25 * share, 0.25 * (1.0 - share), 0.125];
    assert!(beta.iter().zip(expected).all(|(b, e)| (b - e).abs() < 1e-12), "{beta:?}");
    Ok(())
}

#[test]
fn a_window_of_no_keys_is_refused() {
    let mechanism = AttentionMechanism::Mocha(Mocha { w: 0, hard: false });
    let error = mechanism.attend(&Inputs::new()).unwrap_err().to_string();
    assert!(error.contains("w 0"), "{error}");
}
