//! What a mechanism reads and what it returns: tensors by name.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};

/// The tensors that a mechanism reads, by the names that its [`Info`](super::Info) lists. Gradients flow to those that
/// are variables. Randomness, such as Gumbel noise, is an input too.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use gd_layer::mechanisms::{AttentionMechanism, Inputs, Sparsemax};
///
/// let q = Tensor::randn(0f32, 1.0, (1, 4, 6, 8), &Device::Cpu)?;
/// // Two key-value heads: each serves two query heads.
/// let k = Tensor::randn(0f32, 1.0, (1, 2, 6, 8), &Device::Cpu)?;
/// let inputs = Inputs::new().with("q", &q).with("k", &k).with("v", &k);
/// let outputs = AttentionMechanism::Sparsemax(Sparsemax {}).attend(&inputs)?;
/// assert_eq!(outputs.get("out")?.dims(), [1, 4, 6, 8]);
/// assert_eq!(outputs.get("weights")?.dims(), [1, 4, 6, 6]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Inputs {
    tensors: BTreeMap<String, Tensor>,
}

impl Inputs {
    /// No tensors.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with one more tensor.
    #[must_use]
    pub fn with(mut self, name: &str, tensor: &Tensor) -> Self {
        self.insert(name, tensor.clone());
        self
    }

    /// Adds a tensor, in place of an earlier one of the same name.
    pub fn insert(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// Names the tensor if it is absent, and those that are present.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        let Some(tensor) = self.optional(name) else {
            let present: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
            candle_core::bail!("the tensor `{name}` is missing; given are {}", present.join(", "));
        };
        Ok(tensor)
    }

    /// The tensor of this name, if there is one.
    pub fn optional(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Names and tensors, in the order of the names.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, t)| (name.as_str(), t))
    }

    /// The same tensors in f32 where they are f16 or bf16, and the narrower dtype if there was one.
    pub(crate) fn widened(&self) -> Result<(Self, Option<DType>)> {
        let narrow = |t: &&Tensor| matches!(t.dtype(), DType::F16 | DType::BF16);
        let dtype = self.tensors.values().find(narrow).map(Tensor::dtype);
        let widen = |t: &Tensor| if narrow(&t) { t.to_dtype(DType::F32) } else { Ok(t.clone()) };
        let tensors = self.tensors.iter().map(|(name, t)| Ok((name.clone(), widen(t)?)));
        Ok((Self { tensors: tensors.collect::<Result<_>>()? }, dtype))
    }
}

/// The tensors that a mechanism returns, by name: `out`, mostly `weights` and `scores`, and what is particular to it.
#[derive(Debug, Clone, Default)]
pub struct Outputs {
    /// The tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// A scalar that belongs to the loss, such as the load-balancing term of a mixture of experts.
    pub extra_loss: Option<Tensor>,
}

impl Outputs {
    /// The tensor of this name.
    ///
    /// # Errors
    /// Names the tensor if the mechanism does not return it.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        match self.tensors.get(name) {
            Some(tensor) => Ok(tensor),
            None => candle_core::bail!("the mechanism returns no tensor `{name}`"),
        }
    }

    /// Adds a tensor.
    pub fn insert(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// The same with every f32 tensor in this dtype, except those of these names.
    pub(super) fn narrowed(mut self, dtype: DType, except: &[&str]) -> Result<Self> {
        for (name, tensor) in &mut self.tensors {
            if tensor.dtype() == DType::F32 && !except.contains(&name.as_str()) {
                *tensor = tensor.to_dtype(dtype)?;
            }
        }
        Ok(self)
    }
}
