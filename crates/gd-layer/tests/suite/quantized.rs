//! Projections with quantised weights.

use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use gd_kernels::QuantizedMatrix;
use gd_layer::Linear;
use gd_testing::tensors::*;

fn matrix(rows: usize, columns: usize) -> Result<Arc<QuantizedMatrix>> {
    let weight = noise(1, &[rows, columns], 1.0).to_dtype(DType::F32)?;
    let stored = QTensor::quantize(&weight, GgmlDType::Q5_1)?;
    Ok(Arc::new(QuantizedMatrix::new(GgmlDType::Q5_1, [rows, columns], &stored.data()?)?))
}

fn zeros(rows: usize, columns: usize) -> Result<Tensor> {
    Tensor::zeros((rows, columns), DType::F32, &Device::Cpu)
}

#[test]
fn it_is_the_projection_by_the_dequantised_weight() -> Result<()> {
    let bias = noise(2, &[20], 1.0).to_dtype(DType::F32)?;
    let mut projection = Linear::new(zeros(20, 64)?, Some(bias.clone()));
    assert!(projection.plain_weight().is_some());
    projection.set_quantized(matrix(20, 64)?)?;
    assert!(projection.plain_weight().is_none());
    assert_eq!(projection.dims()?, (20, 64));
    let weight = projection.weight()?;
    let x = noise(3, &[2, 3, 64], 1.0).to_dtype(DType::F32)?;
    let expected = Linear::new(weight, Some(bias)).forward(&x)?;
    assert_close("y", &projection.forward(&x)?, &expected, 3e-4);
    Ok(())
}

#[test]
fn shapes_and_adapters_that_do_not_fit_are_errors() -> Result<()> {
    let mut projection = Linear::new(zeros(20, 64)?, None);
    let error = projection.set_quantized(matrix(20, 96)?).unwrap_err().to_string();
    assert!(error.contains("[20, 96]") && error.contains("[20, 64]"), "{error}");
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let mut adapted = projection.clone();
    adapted.adapt(4, 1.0, vb.pp("a"))?;
    assert!(adapted.set_quantized(matrix(20, 64)?).unwrap_err().to_string().contains("adapter"));
    projection.set_quantized(matrix(20, 64)?)?;
    assert!(projection.adapt(4, 1.0, vb.pp("b")).unwrap_err().to_string().contains("quantized"));
    Ok(())
}
