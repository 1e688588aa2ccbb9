//! An estimate of the size and the memory of a run before it starts. The number of parameters is exact, the memory
//! approximate.

use gd_kernels::cross_entropy::chunk_rows;
use gd_layer::mechanisms::State;
use serde::Serialize;

use super::optimizer::Group;
use crate::config::{Mechanism, ModelConfig, Recipe};
use crate::error::Result;
use crate::model::adapter::{size, targets};
use crate::model::shapes::shapes;

/// The size and the memory of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunEstimate {
    /// The number of parameters.
    pub parameters: usize,
    /// The number of those that are trained: all of them, or those of an adapter.
    pub trained_parameters: usize,
    /// The number of optimizer steps.
    pub steps: u64,
    /// Training tokens per step.
    pub tokens_per_step: usize,
    /// The cache of a decoded token in bytes, over all layers in f32: keys, values and priors of the heads that read.
    pub cache_bytes_per_token: usize,
    /// The peak memory of the training on the CPU in MiB, without that of the program and the text.
    pub peak_memory_mib: f64,
}

/// The number of parameters of a model, and the number of those that Muon can update.
fn parameters(config: &ModelConfig) -> Result<(usize, usize)> {
    let (mut all, mut matrices) = (0, 0);
    for (name, dims) in shapes(config)? {
        let count: usize = dims.iter().product();
        all += count;
        matrices += if Group::of(&name, dims.len()) == Group::Matrix { count } else { 0 };
    }
    Ok((all, matrices))
}

/// The number of elements that a training step holds besides the parameters. What is stored is a count of the arrays in the
/// graph; what is temporary was fitted to the peak of the allocator in small runs of both mechanisms.
#[derive(Clone, Copy, Default)]
struct Elements {
    /// Activations that the graph of a block stores for its backward pass.
    stored: f64,
    /// Elements that exist during the backward pass of a block alone.
    temporary: f64,
}

/// Matrices of queries by keys that a mechanism other than softmax and selection stores while it is computed, about the mean
/// of all of them.
const STORED_BY_COMPOSITION: f64 = 14.0;
/// Such matrices of one block of queries, stored and temporary ones, about the mean of those that compute in blocks.
const BLOCK_OF_COMPOSITION: f64 = 24.5;
/// Queries that a layer computes at once where they do not depend on each other, and keys of a chunk of linear attention.
const BLOCK_LENGTH: usize = 64;

/// Rows for which the feed-forward block computes the gradients of its parameters at once.
const FEED_FORWARD_ROWS: f64 = 512.0;

/// Block `layer` of a batch of `batch` sequences of `context` tokens, in which `is_adapted` says which projections have an
/// adapter.
fn block(
    config: &ModelConfig,
    layer: usize,
    (batch, context): (usize, usize),
    is_adapted: &dyn Fn(&str) -> bool,
) -> Elements {
    let tokens = (batch * context) as f64;
    let heads = config.num_attention_heads as f64;
    let hidden = tokens * config.hidden_size as f64;
    let feed = tokens * config.intermediate_size as f64;
    let query = tokens * heads * config.head_dim as f64;
    let key = tokens * (config.num_key_value_heads * config.head_dim) as f64;
    let attention = config.attention(layer);
    let reading = attention.reading_heads() as f64;
    // Queries, keys and what is computed from them shrink with the heads that read; values and averages do not.
    let share = (1.0 + reading / heads) / 2.0;
    let averages = config.gd.beacon.as_ref().map_or(0.0, |b| b.averages as f64);
    let convolves = config.gd.beacon.as_ref().is_some_and(|b| b.conv_width > 1);
    let width = config.intermediate_size as f64 / config.hidden_size as f64;
    let mut of = Elements {
        // Of hidden states: the input, the normalised one, the output of the attention, and the sum of both.
        stored: 4.0 * hidden + share * (2.0 * query + key) + key,
        temporary: 7.5 * hidden + 2.0 * query,
    };
    // Beside an adapter a projection is an operator of its own, which stores its result before norms and rotation.
    let projections = [("q_proj", query), ("k_proj", key), ("v_proj", key), ("o_proj", query)];
    let adapted = projections.iter().filter(|(name, _)| is_adapted(&format!("self_attn.{name}")));
    of.stored += 1.4 * adapted.map(|(_, elements)| elements).sum::<f64>();
    let mlp = ["gate_proj", "up_proj", "down_proj"];
    if config.mlp_bias || mlp.iter().any(|name| is_adapted(&format!("mlp.{name}"))) {
        of.stored += hidden + 2.8 * feed;
        of.temporary += 3.7 * feed;
    } else {
        // A copy of gate and up side by side.
        of.stored += 2.0 * (config.intermediate_size * config.hidden_size) as f64;
        let rows = (tokens.min(FEED_FORWARD_ROWS) / tokens) * hidden;
        of.temporary += 0.3 * rows * (1.0 + 3.0 * width);
    }
    of.stored += averages * (query + 10.8 * tokens * heads) + if averages > 0.0 { query } else { 0.0 };
    of.temporary += averages * 3.0 * query;
    of.stored += if convolves { 2.0 * hidden } else { 0.0 };
    of.stored += if config.gd.output_gate { 2.7 * query } else { 0.0 };
    match config.mechanism(layer) {
        Mechanism::Gd => of.stored += 4.0 * tokens * reading * config.gd.select.candidates as f64,
        // Contiguous keys and values, and the logarithms of the sums of each row.
        Mechanism::Softmax => of.stored += 1.5 * key + tokens * reading,
        // The same, and queries and keys with their squares and with one more element each.
        Mechanism::SoftmaxNull => of.stored += 3.5 * key + 3.0 * query + tokens * reading,
        // Compositions of candle operations, each of which stores its result. These figures are counted, not fitted.
        Mechanism::Other(other) => {
            let (info, length) = (other.info(), context.min(BLOCK_LENGTH) as f64);
            if info.independent_queries {
                // Queries, keys, values and the output stay; the rest exists for one block of queries.
                let weights = batch as f64 * length * heads * context as f64;
                of.stored += 2.0 * query + 2.0 * key;
                of.temporary += BLOCK_OF_COMPOSITION * weights;
            } else {
                let is_linear = matches!(info.state, State::Constant(_));
                let weights = tokens * heads * if is_linear { length } else { context as f64 };
                of.stored += STORED_BY_COMPOSITION * weights;
                of.temporary += 3.2 * weights;
            }
        }
    }
    of
}

/// The cache of a token in bytes, over all layers in f32.
pub fn cache_bytes_per_token(config: &ModelConfig) -> usize {
    let layer = |i: usize| {
        let attention = config.attention(i);
        let prior = usize::from(attention.beacon.as_ref().is_some_and(|beacon| beacon.prior));
        attention.reading_key_value_heads() * (2 * attention.head_dim + prior) * 4
    };
    (0..config.num_hidden_layers).map(layer).sum()
}

/// Estimates the size and the memory of a run of `recipe` in one process. The memory is that of the CPU in f32.
///
/// # Errors
/// A configuration that contradicts itself.
pub fn estimate(recipe: &Recipe) -> Result<RunEstimate> {
    let (model, train) = (&recipe.model, &recipe.train);
    let (parameters, matrices) = parameters(model)?;
    let adapted = train.lora.as_ref().map(|lora| targets(lora, model)).transpose()?;
    let trained = train.lora.as_ref().map_or(Ok(parameters), |lora| size(lora, model))?;
    // Weights, two moments and the gradient; Muon has one moment, and accumulation a second gradient. Weights that are not
    // trained have none of these.
    let frozen = if train.lora.is_some() { parameters } else { 0 };
    let mut elements = 4.0 * trained as f64 + frozen as f64;
    elements -= if train.muon.is_some() { matrices as f64 } else { 0.0 };
    elements += if train.ema.is_some() { trained as f64 } else { 0.0 };
    elements += if train.accumulation > 1 { trained as f64 } else { 0.0 };
    let is_adapted = |layer: usize, name: &str| {
        let path = format!("model.layers.{layer}.{name}");
        adapted.as_ref().is_some_and(|adapted| adapted.contains_key(&path))
    };
    let layers = 0..model.num_hidden_layers;
    let batch = (train.batch, train.context);
    let blocks: Vec<Elements> = layers.map(|i| block(model, i, batch, &|name| is_adapted(i, name))).collect();
    let tokens = train.batch * train.context;
    let max = |of: fn(&Elements) -> f64| blocks.iter().map(of).fold(0.0, f64::max);
    elements += max(|b| b.temporary);
    elements += match train.checkpoint_blocks {
        true => (blocks.len() * tokens * model.hidden_size) as f64 + max(|b| b.stored),
        false => blocks.iter().map(|b| b.stored).sum(),
    };
    // The output loss: logits of a chunk of rows, and the weights' gradient.
    let rows = tokens.min(chunk_rows(model.vocab_size, model.hidden_size));
    elements += 0.5 * (rows * model.vocab_size) as f64;
    elements += if train.lora.is_none() { 1.2 * (model.vocab_size * model.hidden_size) as f64 } else { 0.0 };
    Ok(RunEstimate {
        parameters: frozen + trained,
        trained_parameters: trained,
        steps: train.steps,
        tokens_per_step: tokens * train.accumulation,
        cache_bytes_per_token: cache_bytes_per_token(model),
        peak_memory_mib: elements * 4.0 / f64::from(1 << 20),
    })
}
