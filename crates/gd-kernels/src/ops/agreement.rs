//! Compares a fused operator with its composition: values and the gradients of all inputs.

use candle_core::{DType, Device, Result, Tensor, Var};

/// Deterministic values in -1.5..1.5.
pub(crate) fn noise(seed: u64, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let values = (0..shape.iter().product::<usize>()).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 24) as f64 * 3.0 - 1.5
    });
    Tensor::from_vec(values.collect::<Vec<f64>>(), shape, &Device::Cpu)?.to_dtype(dtype)
}

/// Fails unless `f` and `g` give the same values and gradients within the rounding of the dtype.
pub(crate) fn agree(
    inputs: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Tensor>,
    g: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let dtype = inputs[0].dtype();
    let bound = match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 2e-6,
        DType::F16 => 8e-3,
        _ => 6e-2,
    };
    let run = |f: &dyn Fn(&[Tensor]) -> Result<Tensor>| -> Result<Vec<Vec<f64>>> {
        let vars = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = f(&tensors)?;
        assert_eq!(y.dtype(), dtype);
        let weights = noise(99, y.dims(), dtype)?;
        let grads = (&y * weights)?.sum_all()?.backward()?;
        let mut all = vec![y];
        for t in &tensors {
            all.push(grads.get(t).cloned().unwrap_or_else(|| panic!("an input got no gradient")));
        }
        all.iter().map(|t| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()).collect()
    };
    for (which, (a, b)) in run(&f)?.into_iter().zip(run(&g)?).enumerate() {
        assert_eq!(a.len(), b.len());
        for (i, (a, b)) in a.iter().zip(&b).enumerate() {
            let scale = bound * (1.0 + b.abs());
            assert!((a - b).abs() <= scale, "{dtype:?}, result {which}, element {i}: {a} against {b}");
        }
    }
    Ok(())
}
