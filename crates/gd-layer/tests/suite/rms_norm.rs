//! rms_norm against its formula, finite differences and itself in other dtypes and thread counts.

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{VarBuilder, VarMap};
use gd_kernels::rms_norm;
use gd_layer::RmsNorm;

use gd_testing::tensors::*;

#[test]
fn follows_the_formula() {
    let x = Tensor::new(&[[3.0f64, 4.0]], &Device::Cpu).unwrap();
    let w = Tensor::new(&[1.0f64, 2.0], &Device::Cpu).unwrap();
    let y = values(&rms_norm(&x, &w, 0.5).unwrap());
    let rms = 13f64.sqrt();
    assert!((y[0] - 3.0 / rms).abs() < 1e-15 && (y[1] - 8.0 / rms).abs() < 1e-15);
}

#[test]
fn gradients_match_finite_differences() {
    for shape in [vec![1, 1], vec![7, 33], vec![2, 3, 64], vec![300, 5]] {
        let w = noise(2, &shape[shape.len() - 1..], 2.0);
        check_gradients(&[noise(1, &shape, 2.0), w], |t| Ok(rms_norm(&t[0], &t[1], 1e-5)?));
    }
}

#[test]
fn gradients_reach_transposed_and_narrowed_inputs() {
    let inputs = [noise(1, &[4, 6, 10], 2.0), noise(2, &[12], 2.0)];
    check_gradients(&inputs, |t| Ok(rms_norm(&t[0].transpose(0, 2)?, &t[1].narrow(0, 3, 4)?, 1e-5)?));
    check_gradients(&inputs, |t| Ok(rms_norm(&t[0].transpose(0, 1)?, &t[1].narrow(0, 1, 10)?, 1e-5)?));
    check_gradients(&inputs, |t| Ok(rms_norm(&t[0].narrow(2, 3, 7)?, &t[1].narrow(0, 1, 7)?, 1e-5)?));
}

#[test]
fn low_precision_stays_near_f64() {
    check_dtypes(&[noise(1, &[9, 65], 2.0), noise(2, &[65], 2.0)], |t| Ok(rms_norm(&t[0], &t[1], 1e-5)?));
}

#[test]
fn bits_do_not_depend_on_the_thread_count() {
    let x = noise(1, &[517, 96], 2.0).to_dtype(DType::F32).unwrap();
    let w = noise(2, &[96], 2.0).to_dtype(DType::F32).unwrap();
    same_bits(|| with_gradients(&[x.clone(), w.clone()], |t| Ok(rms_norm(&t[0], &t[1], 1e-5)?)));
}

#[test]
fn module_trains_its_weight_and_starts_at_one() {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let norm = RmsNorm::new(8, 1e-6, vb.pp("norm")).unwrap();
    assert_eq!(values(norm.weight()), vec![1.0; 8]);
    let x = noise(1, &[3, 8], 2.0).to_dtype(DType::F32).unwrap();
    let grads = norm.forward(&x).unwrap().sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&map.data().lock().unwrap()["norm.weight"]).is_some());
}

#[test]
fn errors_name_the_shapes() {
    let x = noise(1, &[3, 8], 1.0);
    let e = rms_norm(&x, &noise(2, &[7], 1.0), 1e-5).unwrap_err().to_string();
    assert!(e.contains("[7]") && e.contains("[3, 8]"), "{e}");
    let e = rms_norm(&x, &noise(2, &[8], 1.0).to_dtype(DType::F32).unwrap(), 1e-5).unwrap_err().to_string();
    assert!(e.contains("F32") && e.contains("F64"), "{e}");
    let ids = Tensor::zeros((3, 8), DType::U32, &Device::Cpu).unwrap();
    let e = rms_norm(&ids, &ids.get(0).unwrap(), 1e-5).unwrap_err().to_string();
    assert!(e.contains("U32"), "{e}");
}
