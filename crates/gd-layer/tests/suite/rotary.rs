//! Rotary embedding: the rotation itself, its gradients, views, dtypes, threads and limits.

use candle_core::{D, DType, Device, Tensor};
use gd_layer::{RopeScaling, Rotary};

use gd_testing::tensors::*;

fn rotary(head_dim: usize, positions: usize, dtype: DType) -> Rotary {
    Rotary::new(head_dim, positions, 1e4, RopeScaling::None, dtype, &Device::Cpu).unwrap()
}

#[test]
fn rotates_pairs_of_the_two_halves() {
    let x = Tensor::new(&[[[[1.0f64, 2.0, 3.0, 4.0]]]], &Device::Cpu).unwrap();
    let y = values(&rotary(4, 10, DType::F64).apply(&x, 5).unwrap());
    let (a, b) = (5f64, 5.0 * 1e4f64.powf(-0.5));
    let want = [
        a.cos() - 3.0 * a.sin(),
        2.0 * b.cos() - 4.0 * b.sin(),
        3.0 * a.cos() + a.sin(),
        4.0 * b.cos() + 2.0 * b.sin(),
    ];
    for (got, want) in y.iter().zip(want) {
        assert!((got - want).abs() < 1e-14, "{got} instead of {want}");
    }
}

#[test]
fn dot_products_depend_on_the_distance_alone() {
    let r = rotary(16, 100, DType::F64);
    let (q, k) = (noise(1, &[1, 1, 1, 16], 1.0), noise(2, &[1, 1, 1, 16], 1.0));
    let dot = |i: usize, j: usize| -> f64 {
        let product = (r.apply(&q, i).unwrap() * r.apply(&k, j).unwrap()).unwrap();
        values(&product.sum_all().unwrap())[0]
    };
    assert!((dot(7, 3) - dot(90, 86)).abs() < 1e-12);
    assert!((dot(7, 3) - dot(7, 4)).abs() > 1e-3);
}

#[test]
fn gradients_match_finite_differences() {
    let r = rotary(6, 80, DType::F64);
    for (shape, offset) in [([1, 1, 1, 6], 0), ([2, 3, 5, 6], 7), ([1, 2, 65, 6], 15)] {
        check_gradients(&[noise(1, &shape, 2.0)], |t| r.apply(&t[0], offset));
    }
    check_gradients(&[noise(1, &[2, 5, 3, 8], 2.0)], |t| r.apply(&t[0].narrow(3, 1, 6)?.transpose(1, 2)?, 2));
    check_gradients(&[noise(1, &[2, 5, 6, 3], 2.0)], |t| r.apply(&t[0].transpose(2, 3)?, 2));
}

#[test]
fn gradient_of_a_broadcast_sum_arrives() {
    // The gradient of `sum_all` is a broadcast view, the one that reaches training code first.
    let x = candle_core::Var::from_tensor(&noise(1, &[1, 2, 3, 4], 1.0)).unwrap();
    let y = rotary(4, 9, DType::F64).apply(&x, 1).unwrap().sum_all().unwrap();
    let grad = y.backward().unwrap().get(&x).unwrap().clone();
    let ones = x.ones_like().unwrap();
    let norms = |t: &Tensor| t.sqr().unwrap().sum_keepdim(D::Minus1).unwrap();
    assert_close("norm of the gradient", &norms(&grad), &norms(&ones), 1e-12);
}

#[test]
fn offset_continues_a_sequence() {
    let (r, x) = (rotary(8, 70, DType::F64), noise(1, &[2, 3, 70, 8], 1.0));
    let whole = r.apply(&x, 0).unwrap();
    let tail = r.apply(&x.narrow(2, 33, 37).unwrap(), 33).unwrap();
    assert_eq!(values(&whole.narrow(2, 33, 37).unwrap()), values(&tail));
}

#[test]
fn low_precision_stays_near_f64() {
    let wide = rotary(16, 64, DType::F64);
    let narrow = rotary(16, 64, DType::F32);
    check_dtypes(&[noise(1, &[2, 3, 64, 16], 2.0)], |t| match t[0].dtype() {
        DType::F64 => wide.apply(&t[0], 0),
        _ => narrow.apply(&t[0], 0),
    });
}

#[test]
fn bits_do_not_depend_on_the_thread_count() {
    let (r, x) = (rotary(32, 130, DType::F32), noise(1, &[3, 130, 4, 32], 2.0).to_dtype(DType::F32).unwrap());
    same_bits(|| with_gradients(std::slice::from_ref(&x), |t| r.apply(&t[0].transpose(1, 2)?, 0)));
}

#[test]
fn scaled_positions_have_the_angles_of_other_positions() {
    let scaled = |scaling| Rotary::new(8, 64, 1e4, scaling, DType::F64, &Device::Cpu);
    let x = noise(1, &[1, 2, 1, 8], 1.0);
    let plain = |at| values(&rotary(8, 64, DType::F64).apply(&x, at).unwrap());
    let close =
        |a: &[f64], b: &[f64]| assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12), "{a:?} {b:?}");
    let linear = scaled(RopeScaling::Linear { factor: 4.0 }).unwrap();
    close(&values(&linear.apply(&x, 20).unwrap()), &plain(5));
    // Frequencies 1, 0.1, 0.01, 0.001: 10.2, 1.02, 0.1 and 0.01 turns within 64 positions. The first is not
    // scaled, the second by a mix with weight (1.02 - 1) / (4 - 1), the others are divided by 8.
    let scaling = RopeScaling::Llama3 { factor: 8.0, low_turns: 1.0, high_turns: 4.0, trained_positions: 64 };
    let y = values(&scaled(scaling).unwrap().apply(&x, 20).unwrap());
    let unscaled = (6.4 / std::f64::consts::TAU - 1.0) / 3.0;
    for (i, f) in
        [1.0, 0.1 * (unscaled + (1.0 - unscaled) / 8.0), 0.01 / 8.0, 0.001 / 8.0].into_iter().enumerate()
    {
        let (a, x) = (20.0 * f, values(&x));
        let want = x[i] * f64::cos(a) - x[i + 4] * f64::sin(a);
        assert!((y[i] - want).abs() < 1e-12, "{i}: {} instead of {want}", y[i]);
    }
    for bad in [
        RopeScaling::Linear { factor: 0.0 },
        RopeScaling::Llama3 { factor: 8.0, low_turns: 4.0, high_turns: 4.0, trained_positions: 64 },
    ] {
        assert!(scaled(bad).unwrap_err().to_string().contains("factor"));
    }
}

#[test]
fn errors_name_the_values() {
    let new = |d, theta| Rotary::new(d, 8, theta, RopeScaling::None, DType::F32, &Device::Cpu);
    assert!(new(7, 1e4).unwrap_err().to_string().contains("head_dim 7"));
    assert!(new(0, 1e4).unwrap_err().to_string().contains("head_dim 0"));
    assert!(new(8, -1.0).unwrap_err().to_string().contains("theta -1"));
    assert!(new(8, f64::NAN).is_err());
    let x = noise(1, &[1, 1, 5, 8], 1.0);
    let e = new(8, 1e4).unwrap().apply(&x.to_dtype(DType::F32).unwrap(), 4).unwrap_err().to_string();
    assert!(e.contains("5 positions") && e.contains("offset 4") && e.contains("the 8 positions"), "{e}");
    let e = new(6, 1e4).unwrap().apply(&x, 0).unwrap_err().to_string();
    assert!(e.contains("dimension 8 instead of 6"), "{e}");
    assert!(new(8, 1e4).unwrap().apply(&x, 0).unwrap_err().to_string().contains("F64"));
}
