//! The decoder: embedding, blocks of attention and SwiGLU, final norm, output projection.
//!
//! Shapes: ids `[B, N]` (u32), hidden states `[B, N, C]`, logits `[B, N, V]`. The weights have the names of Llama.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use gd_kernels::cross_entropy::{linear_cross_entropy, linear_token_losses};
use gd_kernels::{QuantizedMatrix, feed_forward, swiglu};
use gd_layer::{
    AdapterDropout, Attention, GdAttention, LayerCache, Linear, MechanismAttention, Pass, RmsNorm,
    RopeScaling, Rotary, SoftmaxAttention, linear,
};

use crate::config::{EMBEDDING, Mechanism, ModelConfig};

mod checkpointed;
mod layer_alignment;

/// The feed-forward block (SwiGLU).
struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn new(c: usize, width: usize, bias: bool, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            gate: linear(c, width, bias, false, vb.pp("gate_proj"))?,
            up: linear(c, width, bias, false, vb.pp("up_proj"))?,
            down: linear(width, c, bias, true, vb.pp("down_proj"))?,
        })
    }

    /// x plus the output for x, normalised by `norm`.
    fn added_to(&self, x: &Tensor, norm: &RmsNorm) -> Result<Tensor> {
        let weight =
            |projection: &Linear| projection.plain_weight().filter(|_| projection.bias().is_none()).cloned();
        if let (Some(gate), Some(up), Some(down)) = (weight(&self.gate), weight(&self.up), weight(&self.down))
        {
            return Ok(feed_forward(x, (norm.weight(), norm.eps()), [&gate, &up, &down])?);
        }
        let y = norm.forward(x)?;
        let [gate, up] = Linear::forward_all([&self.gate, &self.up], &y)?;
        x + self.down.forward(&swiglu(&gate, &up)?)?
    }
}

/// A layer: attention and feed-forward block, each with a residual connection.
struct Block {
    index: usize,
    attention: Box<dyn Attention>,
    mlp: Mlp,
    input_norm: RmsNorm,
    post_norm: RmsNorm,
}

impl Block {
    fn forward(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        self.add(x, &self.attend(x, pass, cache)?)
    }

    /// The output of the attention.
    fn attend(&self, x: &Tensor, pass: &Pass, cache: Option<&mut LayerCache>) -> Result<Tensor> {
        let pass = Pass { layer: self.index, ..*pass };
        self.attention.attend(&self.input_norm.forward(x)?, &pass, cache)
    }

    /// The projections by their names in the block.
    fn projections_mut(&mut self) -> Vec<(String, &mut Linear)> {
        let Mlp { gate, up, down } = &mut self.mlp;
        let mlp = [("gate_proj", gate), ("up_proj", up), ("down_proj", down)];
        let mlp = mlp.into_iter().map(|(name, projection)| (format!("mlp.{name}"), projection));
        let attention = self.attention.projections_mut().into_iter();
        attention.map(|(name, projection)| (format!("self_attn.{name}"), projection)).chain(mlp).collect()
    }

    /// The output of the block for an input `x` and the output of the attention.
    fn add(&self, x: &Tensor, attended: &Tensor) -> Result<Tensor> {
        self.mlp.added_to(&(x + attended)?, &self.post_norm)
    }
}

/// The embedding table `[V, C]`.
enum Embedding {
    Tensor(Tensor),
    Quantized(Arc<QuantizedMatrix>),
}

/// A decoder-only language model.
pub struct Transformer {
    embed: Embedding,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
    config: ModelConfig,
    /// The dtype of the hidden states. Embedding and projections may be stored in half precision.
    dtype: DType,
    /// That of the keys and values in new caches.
    cache_dtype: DType,
}

impl Transformer {
    /// A model over the weights of `vb`.
    ///
    /// # Errors
    /// An invalid configuration, or weights that are missing or of another shape.
    pub fn new(config: &ModelConfig, vb: VarBuilder) -> crate::Result<Self> {
        config.validate()?;
        let scaling = config.rope_scaling()?;
        Ok(Self::build(config, scaling, vb)?)
    }

    fn build(config: &ModelConfig, scaling: RopeScaling, vb: VarBuilder) -> Result<Self> {
        let (c, v) = (config.hidden_size, config.vocab_size);
        let eps = config.rms_norm_eps;
        let model = vb.pp("model");
        let normal = Init::Randn { mean: 0.0, stdev: 0.02 };
        let embed = model.pp("embed_tokens").get_with_hints((v, c), "weight", normal)?;
        let rotary = Arc::new(Rotary::new(
            config.head_dim,
            config.max_position_embeddings,
            config.theta(),
            scaling,
            vb.dtype(),
            vb.device(),
        )?);
        let block = |i: usize| {
            let vb = model.pp("layers").pp(i);
            let (attention, inner) = (config.attention(i), vb.pp("self_attn"));
            let attention: Box<dyn Attention> = match config.mechanism(i) {
                Mechanism::Softmax => Box::new(SoftmaxAttention::new(&attention, rotary.clone(), inner)?),
                Mechanism::SoftmaxNull => {
                    Box::new(SoftmaxAttention::with_null(&attention, rotary.clone(), inner)?)
                }
                Mechanism::Gd => Box::new(GdAttention::new(&attention, rotary.clone(), inner)?),
                Mechanism::Other(other) => {
                    Box::new(MechanismAttention::new(&attention, other, i, rotary.clone(), inner)?)
                }
            };
            Ok(Block {
                index: i,
                attention,
                mlp: Mlp::new(c, config.intermediate_size, config.mlp_bias, vb.pp("mlp"))?,
                input_norm: RmsNorm::new(c, eps, vb.pp("input_layernorm"))?,
                post_norm: RmsNorm::new(c, eps, vb.pp("post_attention_layernorm"))?,
            })
        };
        let blocks = (0..config.num_hidden_layers).map(block).collect::<Result<_>>()?;
        let norm = RmsNorm::new(c, eps, model.pp("norm"))?;
        let head = match config.tie_word_embeddings {
            true => embed.clone(),
            false => vb.pp("lm_head").get_with_hints((v, c), "weight", normal)?,
        };
        Ok(Self {
            embed: Embedding::Tensor(embed),
            blocks,
            norm,
            head: Linear::new(head, None),
            config: config.clone(),
            dtype: vb.dtype(),
            cache_dtype: vb.dtype(),
        })
    }

    /// Adds an adapter of rank `rank` and factor `scale` to every projection of the blocks whose path `targets` contains,
    /// such as `model.layers.0.self_attn.q_proj`, with weights of `vb` below that path; see [`Linear::adapt`].
    ///
    /// # Errors
    /// Weights that are missing or of another shape.
    pub fn adapt(
        &mut self,
        targets: &BTreeSet<String>,
        rank: usize,
        scale: f64,
        vb: &VarBuilder,
    ) -> Result<()> {
        for (i, block) in self.blocks.iter_mut().enumerate() {
            for (name, projection) in block.projections_mut() {
                let path = format!("model.layers.{i}.{name}");
                if targets.contains(&path) {
                    projection.adapt(rank, scale, vb.pp(path))?;
                }
            }
        }
        Ok(())
    }

    /// Gives all adapters of the model dropout of their inputs, each with a seed of its own, which depends on `seed` and its
    /// path.
    pub fn set_adapter_dropout(&mut self, dropout: &Arc<AdapterDropout>, seed: u64) {
        for (i, block) in self.blocks.iter_mut().enumerate() {
            for (name, projection) in block.projections_mut() {
                let mut hasher = blake3::Hasher::new();
                hasher.update(&seed.to_le_bytes()).update(format!("model.layers.{i}.{name}").as_bytes());
                let mut of_projection = [0; 8];
                hasher.finalize_xof().fill(&mut of_projection);
                projection.set_dropout(dropout, u64::from_le_bytes(of_projection));
            }
        }
    }

    /// Replaces weights by quantised ones, by their names: those of the projections of the blocks, as
    /// `model.layers.0.self_attn.q_proj.weight`, of the embedding and of the output projection. A tied output projection is
    /// replaced together with the embedding. The model computes on the CPU then, and has no gradients.
    ///
    /// # Errors
    /// A name that is none of these, or a matrix of another shape.
    pub fn set_quantized(&mut self, matrices: &BTreeMap<String, Arc<QuantizedMatrix>>) -> Result<()> {
        let mut left: BTreeSet<&str> = matrices.keys().map(String::as_str).collect();
        let mut take = |name: &str| {
            left.remove(name);
            matrices.get(name).cloned()
        };
        for (i, block) in self.blocks.iter_mut().enumerate() {
            for (name, projection) in block.projections_mut() {
                let name = format!("model.layers.{i}.{name}.weight");
                if let Some(matrix) = take(&name) {
                    projection.set_quantized(matrix)?;
                }
            }
        }
        if let Some(matrix) = take(self.config.output_weight()) {
            self.head.set_quantized(matrix)?;
        }
        if let Some(matrix) = take(EMBEDDING) {
            let expected = [self.config.vocab_size, self.config.hidden_size];
            if matrix.dims() != expected {
                candle_core::bail!("{EMBEDDING}: a quantized matrix {:?}, not {expected:?}", matrix.dims());
            }
            self.embed = Embedding::Quantized(matrix);
        }
        match left.first() {
            None => Ok(()),
            Some(name) => candle_core::bail!("{name} is no projection or embedding, which can be quantized"),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Empty caches, one per layer, which store keys and values in the dtype of [`Transformer::set_cache_dtype`].
    pub fn new_cache(&self) -> Vec<LayerCache> {
        vec![LayerCache::new().with_dtype(self.cache_dtype); self.blocks.len()]
    }

    /// Sets the dtype in which new caches store keys and values, initially that of the model. On the CPU, a model that computes
    /// in f32 can store them in f16 or bf16; see [`LayerCache::with_dtype`].
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) for another dtype.
    pub fn set_cache_dtype(&mut self, dtype: DType) -> crate::Result<()> {
        if self.can_cache(dtype) {
            self.cache_dtype = dtype;
            return Ok(());
        }
        let all = [DType::F64, DType::F32, DType::F16, DType::BF16];
        let allowed: Vec<&str> =
            all.into_iter().filter(|dtype| self.can_cache(*dtype)).map(|dtype| dtype.as_str()).collect();
        let device = if self.is_on_cpu() { "the CPU" } else { "a GPU" };
        let allowed = format!("{} for this model on {device}", allowed.join(", "));
        Err(crate::Error::out_of_range("cache_dtype", dtype.as_str(), allowed))
    }

    /// Whether caches can store keys and values in `dtype`.
    pub(crate) fn can_cache(&self, dtype: DType) -> bool {
        let narrow = self.dtype == DType::F32 && [DType::F16, DType::BF16].contains(&dtype);
        dtype == self.dtype || narrow && self.is_on_cpu()
    }

    fn is_on_cpu(&self) -> bool {
        self.norm.weight().device().is_cpu()
    }

    /// The dtype in which the model computes.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// The logits `[B, N, V]` of ids `[B, N]`, u32. With caches, the ids continue the cached positions.
    ///
    /// # Errors
    /// Ids outside the vocabulary, positions beyond the maximal context, or caches of another model.
    pub fn forward(&self, ids: &Tensor, pass: &Pass, cache: Option<&mut [LayerCache]>) -> Result<Tensor> {
        self.head.forward(&self.hidden(ids, pass, cache)?)
    }

    /// The hidden states `[B, N, C]` after the last norm, the input of the output projection.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn hidden(&self, ids: &Tensor, pass: &Pass, cache: Option<&mut [LayerCache]>) -> Result<Tensor> {
        self.hidden_of(self.embedded(ids)?, pass, cache)
    }

    /// The hidden states `[B, N, C]` after the last norm, from embeddings `[B, N, C]` in the place of those of tokens.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn hidden_of(&self, x: Tensor, pass: &Pass, cache: Option<&mut [LayerCache]>) -> Result<Tensor> {
        let mut x = x;
        let mut caches = match cache {
            Some(caches) if caches.len() != self.blocks.len() => {
                candle_core::bail!("{} caches for {} layers", caches.len(), self.blocks.len())
            }
            Some(caches) => caches.iter_mut().map(Some).collect::<Vec<_>>(),
            None => self.blocks.iter().map(|_| None).collect(),
        };
        for (block, cache) in self.blocks.iter().zip(&mut caches) {
            x = block.forward(&x, pass, cache.as_deref_mut())?;
        }
        self.norm.forward(&x)
    }

    /// The mean cross entropy of `targets` `[B, N]` for ids `[B, N]`, both u32, in nats per target that is not
    /// [`IGNORE`](gd_kernels::cross_entropy::IGNORE).
    ///
    /// # Errors
    /// As [`Transformer::forward`], or a target outside the vocabulary.
    pub fn loss(&self, ids: &Tensor, targets: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.head_loss(&self.hidden(ids, pass, None)?, targets)
    }

    /// The cross entropy of every target in nats, 0 for ignored targets, in the order of `targets`; without gradient.
    ///
    /// # Errors
    /// As [`Transformer::loss`].
    pub fn token_losses(&self, ids: &Tensor, targets: &Tensor, pass: &Pass) -> Result<Vec<f32>> {
        let hidden = self.hidden(ids, pass, None)?.flatten_to(1)?;
        Ok(linear_token_losses(&hidden, &self.head_weight()?, &targets.flatten_all()?)?)
    }

    /// The logits `[.., V]` of hidden states `[.., C]`: the output projection.
    ///
    /// # Errors
    /// Hidden states of another width.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head.forward(hidden)
    }

    /// The embeddings `[B, N, C]` of ids `[B, N]`.
    fn embedded(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, n) = ids.dims2()?;
        let ids = ids.flatten_all()?;
        let rows = match &self.embed {
            Embedding::Tensor(table) => gd_kernels::embedding(table, &ids)?,
            Embedding::Quantized(matrix) => matrix.embedding(&ids)?,
        };
        rows.to_dtype(self.dtype)?.reshape((b, n, self.config.hidden_size))
    }

    /// The mean cross entropy of `targets` `[B, N]` from the hidden states `[B, N, C]` after the last norm, in nats.
    ///
    /// # Errors
    /// A target outside the vocabulary.
    pub fn head_loss(&self, hidden: &Tensor, targets: &Tensor) -> Result<Tensor> {
        Ok(linear_cross_entropy(&hidden.flatten_to(1)?, &self.head_weight()?, &targets.flatten_all()?)?)
    }

    /// The weights `[V, C]` of the output projection in the dtype of the hidden states.
    ///
    /// # Errors
    /// An error of the device.
    pub fn head_weight(&self) -> Result<Tensor> {
        self.head.weight()?.to_dtype(self.dtype)
    }
}
