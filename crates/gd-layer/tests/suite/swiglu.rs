//! swiglu against its formula, finite differences and itself in other dtypes and thread counts.

use candle_core::{DType, Device, Tensor};
use gd_kernels::swiglu;

use gd_testing::tensors::*;

#[test]
fn follows_the_formula_and_saturates() {
    let gate = Tensor::new(&[[0.0f32, 1.0, -1.0, 200.0, -200.0]], &Device::Cpu).unwrap();
    let up = Tensor::new(&[[5.0f32, 2.0, 2.0, 1.0, 1.0]], &Device::Cpu).unwrap();
    let s = 1.0 / (1.0 + (-1f64).exp());
    let want = [0.0, 2.0 * s, -2.0 * (1.0 - s), 200.0, 0.0];
    for (got, want) in values(&swiglu(&gate, &up).unwrap()).iter().zip(want) {
        assert!((got - want).abs() < 1e-6, "{got} instead of {want}");
    }
}

#[test]
fn gradients_match_finite_differences() {
    for shape in [vec![1], vec![7, 33], vec![2, 3, 64]] {
        check_gradients(&[noise(1, &shape, 4.0), noise(2, &shape, 2.0)], |t| Ok(swiglu(&t[0], &t[1])?));
    }
}

#[test]
fn gradients_reach_the_halves_of_one_projection() {
    check_gradients(&[noise(1, &[3, 5, 14], 3.0)], |t| {
        Ok(swiglu(&t[0].narrow(2, 0, 7)?, &t[0].narrow(2, 7, 7)?)?)
    });
    check_gradients(&[noise(1, &[6, 4], 3.0), noise(2, &[4, 6], 3.0)], |t| Ok(swiglu(&t[0].t()?, &t[1])?));
}

#[test]
fn low_precision_stays_near_f64() {
    check_dtypes(&[noise(1, &[9, 65], 4.0), noise(2, &[9, 65], 2.0)], |t| Ok(swiglu(&t[0], &t[1])?));
}

#[test]
fn bits_do_not_depend_on_the_thread_count() {
    let inputs = [1, 2].map(|seed| noise(seed, &[517, 96], 4.0).to_dtype(DType::F32).unwrap());
    same_bits(|| with_gradients(&inputs, |t| Ok(swiglu(&t[0], &t[1])?)));
}

#[test]
fn errors_name_the_shapes() {
    let e = swiglu(&noise(1, &[3, 8], 1.0), &noise(2, &[3, 7], 1.0)).unwrap_err().to_string();
    assert!(e.contains("[3, 8]") && e.contains("[3, 7]"), "{e}");
}
