//! The names and shapes of the parameters of a model, without allocating them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::Transformer;

/// The shapes of the parameters of a model by name.
///
/// # Errors
/// An invalid configuration.
pub fn shapes(config: &ModelConfig) -> Result<BTreeMap<String, Vec<usize>>> {
    let shapes = Shapes::default();
    let builder = VarBuilder::from_backend(Box::new(shapes.clone()), DType::F32, Device::Cpu);
    Transformer::new(config, builder)?;
    let shapes = shapes.0.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(shapes.clone())
}

/// The number of parameters of a model.
///
/// # Errors
/// An invalid configuration.
pub fn count(config: &ModelConfig) -> Result<usize> {
    Ok(shapes(config)?.values().map(|shape| shape.iter().product::<usize>()).sum())
}

/// A backend that returns a broadcast zero for every parameter and records the shape.
#[derive(Clone, Default)]
struct Shapes(Arc<Mutex<BTreeMap<String, Vec<usize>>>>);

impl SimpleBackend for Shapes {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut shapes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shapes.insert(name.to_owned(), shape.dims().to_vec());
        Tensor::zeros((), dtype, device)?.broadcast_as(shape)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("parameter {name} was requested without a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}
