//! The parameters of a model: created from a seed or read from a checkpoint, by name.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Normal, Uniform};

/// Named parameters in the order of their names. Clones share them.
#[derive(Clone)]
pub struct Params {
    vars: Arc<Mutex<BTreeMap<String, Parameter>>>,
    source: Source,
    dtype: DType,
    device: Device,
}

/// A parameter, and the dtype in which it is stored.
struct Parameter {
    var: Var,
    stored: DType,
}

/// Where a parameter that is asked for comes from: the tensors of a checkpoint that no module has asked for
/// yet, else its initial values, drawn from a seed and its name, so that they do not depend on the order in
/// which a model is built. Without a seed a parameter that no tensor holds is an error.
#[derive(Clone)]
struct Source {
    tensors: Arc<Mutex<BTreeMap<String, Tensor>>>,
    seed: Option<u64>,
    /// Whether matrices in half precision stay as they are.
    halves: bool,
}

impl Params {
    /// New parameters.
    pub fn new(seed: u64, dtype: DType, device: &Device) -> Self {
        Self::stored(BTreeMap::new(), Some(seed), dtype, device)
    }

    /// The parameters of a checkpoint, cast to `dtype`. Those that it lacks are new ones where there is a
    /// `seed`, else errors.
    pub fn stored(
        tensors: BTreeMap<String, Tensor>,
        seed: Option<u64>,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let source = Source { tensors: Arc::new(Mutex::new(tensors)), seed, halves: false };
        Self { vars: Arc::default(), source, dtype, device: device.clone() }
    }

    /// The same for a model that is not trained: the embedding and the projections stay in half precision where
    /// they are stored so. The model computes in `dtype` and gives the same results from half the memory.
    pub fn for_inference(
        tensors: BTreeMap<String, Tensor>,
        seed: Option<u64>,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let mut params = Self::stored(tensors, seed, dtype, device);
        params.source.halves = true;
        params
    }

    /// What modules are built from.
    pub fn builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), self.dtype, self.device.clone())
    }

    /// The same, without gradients: a module built from it follows every change of the parameters, and what
    /// it computes builds no graph.
    pub fn frozen(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(Frozen(self.clone())), self.dtype, self.device.clone())
    }

    /// The parameters that a model has asked for, by name.
    pub fn vars(&self) -> Vec<(String, Var)> {
        self.lock().iter().map(|(name, p)| (name.clone(), p.var.clone())).collect()
    }

    /// Their tensors, without gradients.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.lock().iter().map(|(name, p)| (name.clone(), p.var.as_detached_tensor())).collect()
    }

    /// The same, each in the dtype in which it was stored: bit for bit what was read, unless it has changed.
    ///
    /// # Errors
    /// What the device reports.
    pub fn stored_tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let stored = |(name, p): (&String, &Parameter)| {
            Ok((name.clone(), p.var.as_detached_tensor().to_dtype(p.stored)?))
        };
        self.lock().iter().map(stored).collect()
    }

    /// Takes the values of `tensors`, one for each parameter; others are passed over.
    ///
    /// # Errors
    /// Names a tensor that is missing, or of another shape or dtype; nothing has changed then.
    pub fn set(&self, tensors: &BTreeMap<String, Tensor>) -> crate::Result<()> {
        let vars = self.lock();
        for (name, Parameter { var, .. }) in vars.iter() {
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
        for (name, Parameter { var, .. }) in vars.iter() {
            var.set(&tensors[name].to_device(&self.device)?)?;
        }
        Ok(())
    }

    /// Elements in all parameters.
    pub fn count(&self) -> usize {
        self.lock().values().map(|p| p.var.elem_count()).sum()
    }

    /// A hash of names, shapes and values.
    ///
    /// # Errors
    /// Parameters that cannot be read from their device.
    pub fn hash(&self) -> Result<blake3::Hash> {
        let tensors = self.tensors();
        let bytes = safetensors::serialize(&tensors, None).map_err(candle_core::Error::wrap)?;
        Ok(blake3::hash(&bytes))
    }

    /// Stored tensors that no module has asked for.
    pub fn unused(&self) -> Vec<String> {
        self.tensors_left().keys().cloned().collect()
    }

    fn tensors_left(&self) -> MutexGuard<'_, BTreeMap<String, Tensor>> {
        self.source.tensors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Parameter>> {
        self.vars.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SimpleBackend for Params {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut vars = self.lock();
        if let Some(Parameter { var, .. }) = vars.get(name) {
            if var.shape() != &shape {
                candle_core::bail!("parameter {name} is {:?} here and {:?} there", var.shape(), shape);
            }
            return Ok(var.as_tensor().clone());
        }
        // Taken out, so that a tensor that is cast is not held twice.
        let (value, stored) = match (self.tensors_left().remove(name), self.source.seed) {
            (Some(tensor), _) if tensor.shape() != &shape => {
                candle_core::bail!("tensor {name:?} is {:?}, not {:?}", tensor.dims(), shape.dims())
            }
            (Some(tensor), _) => {
                let half = matches!(tensor.dtype(), DType::BF16 | DType::F16);
                let stays = self.source.halves && half && read_in_half(name);
                (if stays { tensor.clone() } else { tensor.to_dtype(dtype)? }, tensor.dtype())
            }
            (None, Some(seed)) => (initial(seed, name, &shape, init)?.to_dtype(dtype)?, dtype),
            (None, None) => {
                candle_core::bail!("the checkpoint has no tensor {name:?} ({:?} expected)", shape.dims())
            }
        };
        let var = Var::from_tensor(&value.to_device(device)?)?;
        let tensor = var.as_tensor().clone();
        vars.insert(name.to_owned(), Parameter { var, stored });
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("parameter {name} was asked for without a shape")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.source.seed.is_some() || self.lock().contains_key(name) || self.tensors_left().contains_key(name)
    }
}

/// Whether a module widens this parameter itself: [`gd_layer::Linear`] and the embedding do.
fn read_in_half(name: &str) -> bool {
    ["_proj.weight", "embed_tokens.weight", "lm_head.weight"].iter().any(|end| name.ends_with(end))
}

/// Hands the parameters out detached; they share their storage.
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

/// Initial values from a generator of their own: keyed by seed and name.
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
        Init::Kaiming { .. } => return Err(wrong(&"a Kaiming rule; state the deviation")),
    };
    Tensor::from_vec(values, shape.clone(), &Device::Cpu)
}
