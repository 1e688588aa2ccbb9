//! Floating-point operations of training, and the rate of the device. Their ratio is the model FLOPs utilization (MFU).
//!
//! Per token, with H heads of dimension D of which Hq read keys, K candidates, and n the mean number of keys that a query of
//! a context of N tokens sees ((N + 1) / 2 without a window):
//!
//! | part | forward | backward |
//! |---|---|---|
//! | a matrix of W weights | 2 W | 4 W |
//! | softmax attention, and other mechanisms except selection | 4 Hq D n | 8 Hq D n |
//! | scan | 2 Hq D n | none, because it has no gradient |
//! | select, each round | 2 Hq D K | 8 Hq D K |
//! | each running average | 6 H D | 12 H D |
//!
//! With the estimator `dense` K is n; with `winner` one candidate has a gradient. Embeddings, norms, activations, rotary
//! embeddings and recomputation are not counted. A matrix that is not trained has 2 W in the backward pass.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use gd_kernels::Estimator;

use crate::config::{Mechanism, ModelConfig};
use crate::error::Result;

/// The floating-point operations of the forward and backward pass per training token in windows of `context` tokens.
pub fn per_token(config: &ModelConfig, context: usize) -> f64 {
    let (weights, other) = parts(config, context);
    6.0 * weights + other
}

/// As [`per_token`], where an adapter of `adapter` parameters is trained in the place of the weights.
pub fn per_token_of_adapter(config: &ModelConfig, context: usize, adapter: usize) -> f64 {
    let (weights, other) = parts(config, context);
    4.0 * weights + 6.0 * adapter as f64 + other
}

/// The weights of all matrices that a token is multiplied with, and the operations of the rest.
fn parts(config: &ModelConfig, context: usize) -> (f64, f64) {
    let (c, d) = (config.hidden_size as f64, config.head_dim as f64);
    let (heads, value_heads) = (config.num_attention_heads as f64, config.num_key_value_heads as f64);
    let layer = |i| {
        let attention = config.attention(i);
        let (hq, hk) = (attention.reading_heads() as f64, attention.reading_key_value_heads() as f64);
        let keys = keys(context, config.window(i));
        let gate = f64::from(config.gd.output_gate);
        let mut weights = c * d * (hq + hk + heads + value_heads + gate * heads)
            + 3.0 * c * config.intermediate_size as f64;
        let mut other = 0.0;
        if let Some(beacon) = &config.gd.beacon {
            let averages = beacon.averages as f64;
            let conv = if beacon.conv_width > 1 { beacon.conv_width as f64 } else { 0.0 };
            weights += c * (conv + 3.0 * averages * heads + f64::from(beacon.prior) * hk);
            other += 18.0 * averages * heads * d;
        }
        other += match config.mechanism(i) {
            Mechanism::Softmax | Mechanism::SoftmaxNull | Mechanism::Other(_) => 12.0 * hq * d * keys,
            Mechanism::Gd => {
                let select = &config.gd.select;
                let candidates = (select.candidates as f64).min(keys);
                let (forward, backward) = match select.estimator {
                    Estimator::Dense => (keys, keys),
                    Estimator::Winner => (candidates, 1.0),
                    _ => (candidates, candidates),
                };
                hq * d * (2.0 * keys + select.rounds as f64 * (2.0 * forward + 8.0 * backward))
            }
        };
        (weights, other)
    };
    let head = (c * config.vocab_size as f64, 0.0);
    (0..config.num_hidden_layers).map(layer).fold(head, |sum, part| (sum.0 + part.0, sum.1 + part.1))
}

/// The mean number of keys that the queries of a context of `context` tokens see.
fn keys(context: usize, window: Option<usize>) -> f64 {
    let (n, w) = (context as f64, window.map_or(context, |w| w.min(context)) as f64);
    // The first w queries see 1, 2, .. w keys, the others w.
    (w * (w + 1.0) / 2.0 + (n - w) * w) / n
}

/// The rate of a large matrix product in `dtype` on the device in FLOP/s: the highest of products of growing matrices, and
/// of three of the first size that takes at least 4 ms. It is the denominator of the utilization, because there is no table
/// of the peak rates of all devices.
///
/// # Errors
/// An error of the device.
pub fn peak(dtype: DType, device: &Device) -> Result<f64> {
    let mut highest = 0f64;
    let mut size = 256;
    let mut repeats = 3;
    while repeats > 0 {
        let x = Tensor::ones((size, size), dtype, device)?;
        let started = Instant::now();
        gd_kernels::linear(&x, &x, None)?;
        device.synchronize()?;
        let seconds = started.elapsed().as_secs_f64();
        highest = highest.max(2.0 * (size as f64).powi(3) / seconds);
        if seconds < 4e-3 && size < 8192 {
            size *= 2;
        } else {
            repeats -= 1;
        }
    }
    Ok(highest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recipe;

    #[test]
    fn operations_per_token_equal_a_count_by_hand() {
        let mut config = Recipe::load("tiny").unwrap().model;
        // 4 layers of (2 projections of the 2 heads that select, 2 of all 8, SwiGLU, convolution, memory, prior), and the
        // output.
        let weights =
            4 * (2 * 128 * 32 + 2 * 128 * 128 + 3 * 128 * 448 + 128 * (4 + 3 * 2 * 8 + 2)) + 128 * 256;
        let averages = 4 * 18 * 2 * 128;
        let scan = 4 * 32 * 257;
        let select = 4 * 32 * 10 * 8;
        assert_eq!(per_token(&config, 256), f64::from(6 * weights + averages + scan + select));
        config.gd.mechanism = vec![Mechanism::Softmax];
        (config.gd.beacon, config.gd.selecting_heads) = (None, Vec::new());
        let weights = 4 * (4 * 128 * 128 + 3 * 128 * 448) + 128 * 256;
        assert_eq!(per_token(&config, 256), f64::from(6 * weights + 4 * 6 * 128 * 257));
        let adapted = f64::from(4 * weights + 4 * 6 * 128 * 257 + 6 * 1000);
        assert_eq!(per_token_of_adapter(&config, 256, 1000), adapted);
    }

    #[test]
    fn a_window_limits_the_mean_number_of_keys() {
        assert_eq!(keys(4, None), 2.5);
        assert_eq!(keys(4, Some(9)), 2.5);
        assert_eq!(keys(4, Some(2)), (1.0 + 2.0 + 2.0 + 2.0) / 4.0);
    }

    #[test]
    fn selection_costs_a_sixth_of_softmax_per_key() {
        let mut config = Recipe::load("tiny").unwrap().model;
        let slope = |config: &ModelConfig| per_token(config, 4097) - per_token(config, 4095);
        let selecting = slope(&config);
        config.gd.mechanism = vec![Mechanism::Softmax];
        assert!((slope(&config) / selecting - 6.0).abs() < 1e-9);
    }
}
