//! The parameters of a model: created from a seed or read from a checkpoint, by name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::init::NormalOrUniform;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use gd_kernels::QuantizedMatrix;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal, Uniform};

use super::weights::require_finite;

/// Named parameters, sorted by name. Clones share them.
#[derive(Clone)]
pub struct Params {
    vars: Arc<Mutex<BTreeMap<String, Parameter>>>,
    quantized: Arc<BTreeMap<String, Arc<QuantizedMatrix>>>,
    source: Source,
    dtype: DType,
    device: Device,
}

/// A parameter, and its dtype in the checkpoint.
struct Parameter {
    value: Value,
    stored: DType,
}

/// The value of a parameter.
enum Value {
    /// Of a model that can be trained.
    Trained(Var),
    /// Of a model that is not: the tensor that was read, where a variable would be a copy of it.
    Fixed(Tensor),
}

impl Parameter {
    fn tensor(&self) -> &Tensor {
        match &self.value {
            Value::Trained(var) => var.as_tensor(),
            Value::Fixed(tensor) => tensor,
        }
    }
}

/// The source of the values of new parameters: the tensor of a checkpoint, else initial values that are drawn from the
/// seed and the name of the parameter, so that they do not depend on the order in which a model is built. Without a seed
/// a parameter without a tensor is an error.
#[derive(Clone)]
struct Source {
    /// The tensors that no module has requested yet.
    tensors: Arc<Mutex<BTreeMap<String, Tensor>>>,
    seed: Option<u64>,
    /// Whether the parameters are not trained: matrices in half precision keep their dtype, and tensors are not copied.
    is_fixed: bool,
}

impl Params {
    /// New parameters in `dtype`, initialized from `seed`.
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        Self::stored(BTreeMap::new(), Some(seed), dtype, device)
    }

    /// The parameters of a checkpoint, cast to `dtype`. Parameters that it lacks are initialized from `seed`; without a
    /// seed they are errors.
    pub fn stored(
        tensors: BTreeMap<String, Tensor>,
        seed: Option<u64>,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let source = Source { tensors: Arc::new(Mutex::new(tensors)), seed, is_fixed: false };
        Self { vars: Arc::default(), quantized: Arc::default(), source, dtype, device: device.clone() }
    }

    /// As [`Params::stored`], for a model that is not trained: the embedding and the projections stay in half precision
    /// if they are stored so. The model computes in `dtype` with the same results and half the memory, and there are no
    /// variables: [`Params::vars`] is empty.
    pub fn for_inference(
        tensors: BTreeMap<String, Tensor>,
        seed: Option<u64>,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let mut params = Self::stored(tensors, seed, dtype, device);
        params.source.is_fixed = true;
        params
    }

    /// With quantised matrices in the place of tensors of their names. A module that requests one gets zeros without memory
    /// of their own; [`Transformer::set_quantized`](super::Transformer::set_quantized) replaces them.
    pub fn with_quantized(mut self, matrices: BTreeMap<String, Arc<QuantizedMatrix>>) -> Self {
        self.quantized = Arc::new(matrices);
        self
    }

    /// The quantised matrices by name.
    pub fn quantized(&self) -> &BTreeMap<String, Arc<QuantizedMatrix>> {
        &self.quantized
    }

    /// Whether matrices are quantised or stored in 16 bits.
    pub(crate) fn has_narrow_matrices(&self) -> bool {
        let half = |p: &Parameter| [DType::F16, DType::BF16].contains(&p.tensor().dtype());
        !self.quantized.is_empty() || self.lock().values().any(half)
    }

    /// The builder of modules over these parameters.
    pub fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), self.dtype, self.device.clone())
    }

    /// As [`Params::builder`], without gradients: the modules share the storage of the parameters, follow their updates,
    /// and record no graph.
    pub fn frozen(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Frozen(self.clone())), self.dtype, self.device.clone())
    }

    /// The variables that modules have requested, sorted by name.
    pub fn vars(&self) -> Vec<(String, Var)> {
        let parameters = self.lock();
        let var = |(name, p): (&String, &Parameter)| match &p.value {
            Value::Trained(var) => Some((name.clone(), var.clone())),
            Value::Fixed(_) => None,
        };
        parameters.iter().filter_map(var).collect()
    }

    /// The tensors of the parameters, detached; without those of quantised matrices.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.lock().iter().map(|(name, p)| (name.clone(), p.tensor().detach())).collect()
    }

    /// The tensors of the parameters in the dtypes of the checkpoint. Values that were not changed have the bits that were
    /// read, and quantised matrices are dequantised.
    ///
    /// # Errors
    /// An error of the device.
    pub fn stored_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let stored =
            |(name, p): (&String, &Parameter)| Ok((name.clone(), p.tensor().detach().to_dtype(p.stored)?));
        let mut tensors: BTreeMap<_, _> = self.lock().iter().map(stored).collect::<Result<_>>()?;
        self.add_dequantized(&mut tensors)?;
        Ok(tensors)
    }

    /// Adds the quantised matrices as tensors in f32.
    fn add_dequantized(&self, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, matrix) in &*self.quantized {
            tensors.insert(name.clone(), matrix.dequantize()?);
        }
        Ok(())
    }

    /// Replaces the values of all variables by the tensors of the same names. Other tensors are ignored.
    ///
    /// # Errors
    /// Names a tensor that is missing, or of another shape or dtype, or a parameter that is no variable. The variables are
    /// unchanged then.
    pub fn set(&self, tensors: &BTreeMap<String, Tensor>) -> crate::Result<()> {
        let vars = self.vars();
        let fixed =
            |(name, p): (&String, &Parameter)| matches!(p.value, Value::Fixed(_)).then(|| name.clone());
        if let Some(name) = self.lock().iter().find_map(fixed) {
            let what = format!("the parameter {name:?} of a model for inference cannot be set");
            return Err(crate::Error::Invalid(what));
        }
        for (name, var) in &vars {
            let Some(stored) = tensors.get(name) else {
                return Err(crate::Error::Invalid(format!("the checkpoint has no tensor {name:?}")));
            };
            if (stored.dims(), stored.dtype()) != (var.dims(), var.dtype()) {
                return Err(crate::Error::TensorMismatch {
                    name: name.clone(),
                    expected: format!("{:?} {:?}", var.dtype(), var.dims()),
                    actual: format!("{:?} {:?}", stored.dtype(), stored.dims()),
                });
            }
        }
        for (name, var) in &vars {
            var.set(&tensors[name].to_device(&self.device)?)?;
        }
        Ok(())
    }

    /// The number of elements of all parameters.
    pub fn count(&self) -> usize {
        let quantized = self.quantized.values().map(|matrix| matrix.dims().iter().product::<usize>());
        self.lock().values().map(|p| p.tensor().elem_count()).chain(quantized).sum()
    }

    /// The blake3 hash of the names, shapes and values; for quantised matrices, of the dequantised values.
    ///
    /// # Errors
    /// Parameters that cannot be read from their device.
    pub fn hash(&self) -> Result<blake3::Hash> {
        let mut tensors = self.tensors();
        self.add_dequantized(&mut tensors)?;
        let bytes = safetensors::serialize(&tensors, None).map_err(candle_core::Error::wrap)?;
        Ok(blake3::hash(&bytes))
    }

    /// The names of the tensors that no module has requested.
    pub fn unused(&self) -> Vec<String> {
        self.unrequested().keys().cloned().collect()
    }

    fn unrequested(&self) -> MutexGuard<'_, BTreeMap<String, Tensor>> {
        self.source.tensors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Parameter>> {
        self.vars.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SimpleBackend for Params {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut vars = self.lock();
        if let Some(parameter) = vars.get(name) {
            let tensor = parameter.tensor();
            if tensor.shape() != &shape {
                candle_core::bail!(
                    "parameter {name} has the shape {:?}, and {:?} is requested",
                    tensor.shape(),
                    shape
                );
            }
            return Ok(tensor.clone());
        }
        if let Some(matrix) = self.quantized.get(name) {
            if shape.dims() != matrix.dims() {
                candle_core::bail!("tensor {name:?} is {:?}, not {:?}", matrix.dims(), shape.dims());
            }
            return Tensor::zeros((), dtype, device)?.broadcast_as(shape);
        }
        // Removed, so that a tensor that is cast is not stored twice.
        let (value, stored) = match (self.unrequested().remove(name), self.source.seed) {
            (Some(tensor), _) if tensor.shape() != &shape => {
                candle_core::bail!("tensor {name:?} is {:?}, not {:?}", tensor.dims(), shape.dims())
            }
            (Some(tensor), _) => {
                require_finite(name, &tensor)?;
                let half = matches!(tensor.dtype(), DType::BF16 | DType::F16);
                let keeps_half = self.source.is_fixed && half && is_widened_by_module(name);
                (if keeps_half { tensor.clone() } else { tensor.to_dtype(dtype)? }, tensor.dtype())
            }
            (None, Some(seed)) => (initial(seed, name, &shape, init)?.to_dtype(dtype)?, dtype),
            (None, None) => {
                candle_core::bail!("the checkpoint has no tensor {name:?} ({:?} expected)", shape.dims())
            }
        };
        let value = value.to_device(device)?;
        let value = match self.source.is_fixed {
            true => Value::Fixed(value.contiguous()?),
            false => Value::Trained(Var::from_tensor(&value)?),
        };
        let parameter = Parameter { value, stored };
        let tensor = parameter.tensor().clone();
        vars.insert(name.to_owned(), parameter);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("parameter {name} was requested without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.source.seed.is_some()
            || self.quantized.contains_key(name)
            || self.lock().contains_key(name)
            || self.unrequested().contains_key(name)
    }
}

/// Whether the module of a parameter accepts half precision: [`gd_layer::Linear`] and the embedding do.
fn is_widened_by_module(name: &str) -> bool {
    ["_proj.weight", "embed_tokens.weight", "lm_head.weight"].iter().any(|end| name.ends_with(end))
}

/// A backend that returns the parameters detached, with shared storage.
struct Frozen(Params);

impl SimpleBackend for Frozen {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        Ok(self.0.get(shape, name, init, dtype, device)?.detach())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.0.get_unchecked(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_tensor(name)
    }
}

/// Initial values from a random generator seeded by the hash of seed and name.
fn initial(seed: u64, name: &str, shape: &Shape, init: Init) -> Result<Tensor> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    let mut rng = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
    let n = shape.elem_count();
    let wrong = |e: &dyn std::fmt::Display| candle_core::Error::Msg(format!("initial values of {name}: {e}"));
    let values: Vec<f32> = match init {
        Init::Const(x) => vec![x as f32; n],
        Init::Randn { mean, stdev } => {
            let normal = Normal::new(mean as f32, stdev as f32).map_err(|e| wrong(&e))?;
            (0..n).map(|_| normal.sample(&mut rng)).collect()
        }
        Init::Uniform { lo, up } => {
            let uniform = Uniform::new(lo as f32, up as f32).map_err(|e| wrong(&e))?;
            (0..n).map(|_| uniform.sample(&mut rng)).collect()
        }
        Init::Kaiming { dist, fan, non_linearity } => {
            let stdev = non_linearity.gain() / (fan.for_shape(shape) as f64).sqrt();
            let init = match dist {
                NormalOrUniform::Normal => Init::Randn { mean: 0.0, stdev },
                // The standard deviation of a uniform distribution is its bound divided by √3.
                NormalOrUniform::Uniform => {
                    let bound = 3f64.sqrt() * stdev;
                    Init::Uniform { lo: -bound, up: bound }
                }
            };
            return initial(seed, name, shape, init);
        }
    };
    Tensor::from_vec(values, shape.clone(), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of a model that is trained are variables with copies of their own.
    #[test]
    fn parameters_for_inference_are_the_tensors_that_were_read() -> Result<()> {
        let tensor = Tensor::arange(0f32, 6.0, &Device::Cpu)?.reshape((2, 3))?;
        let of_file = || BTreeMap::from([("q_proj.weight".to_owned(), tensor.clone())]);
        for (params, is_fixed) in [
            (Params::for_inference(of_file(), None, DType::F32, &Device::Cpu), true),
            (Params::stored(of_file(), None, DType::F32, &Device::Cpu), false),
        ] {
            let parameter = params.builder().get((2, 3), "q_proj.weight")?;
            {
                let ((a, _), (b, _)) = (parameter.storage_and_layout(), tensor.storage_and_layout());
                assert_eq!(std::ptr::eq(&*a, &*b), is_fixed);
            }
            assert_eq!((parameter.is_variable(), params.vars().is_empty()), (!is_fixed, is_fixed));
            assert_eq!((params.count(), params.set(&of_file()).is_err()), (6, is_fixed));
        }
        Ok(())
    }
}
