//! `GdAttention` in place of the multi-head attention of a candle model.
//!
//! The block below is that of a Llama-like model: norm, attention, norm, feed-forward. To use selection attention,
//! the type of one field changes; the call `forward(x, mask, offset)` stays.
//!
//! `cargo run --release -p gd-examples --bin drop_in_layer`

use std::sync::Arc;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Linear, RmsNorm, VarBuilder, VarMap, linear_no_bias, rms_norm};
use gd_layer::{AttentionConfig, BeaconConfig, GdAttention, RopeScaling, Rotary};

const WIDTH: usize = 64;
const HEADS: usize = 4;
const HEAD_DIM: usize = 16;
const MAX_POSITIONS: usize = 128;

/// A block of a decoder.
struct Block {
    norm1: RmsNorm,
    attention: GdAttention, // was: CausalSelfAttention
    norm2: RmsNorm,
    up: Linear,
    down: Linear,
}

impl Block {
    fn new(rotary: Arc<Rotary>, vb: VarBuilder) -> Result<Self> {
        let config = AttentionConfig::new(WIDTH, HEADS, HEAD_DIM)
            .with_qk_norm(true)
            .with_beacon(BeaconConfig::default());
        Ok(Self {
            norm1: rms_norm(WIDTH, 1e-5, vb.pp("input_layernorm"))?,
            attention: GdAttention::new(&config, rotary, vb.pp("self_attn"))?,
            norm2: rms_norm(WIDTH, 1e-5, vb.pp("post_attention_layernorm"))?,
            up: linear_no_bias(WIDTH, 4 * WIDTH, vb.pp("up_proj"))?,
            down: linear_no_bias(4 * WIDTH, WIDTH, vb.pp("down_proj"))?,
        })
    }

    /// x `[B, N, C]`, whose first position is `offset` -> `[B, N, C]`.
    fn forward(&self, x: &Tensor, offset: usize) -> Result<Tensor> {
        let x = (x + self.attention.forward(&self.norm1.forward(x)?, None, offset)?)?;
        let hidden = self.up.forward(&self.norm2.forward(&x)?)?.silu()?;
        &x + self.down.forward(&hidden)?
    }
}

fn main() -> anyhow::Result<()> {
    let device = Device::Cpu;
    let weights = VarMap::new();
    let vb = VarBuilder::from_varmap(&weights, DType::F32, &device);
    let rotary =
        Arc::new(Rotary::new(HEAD_DIM, MAX_POSITIONS, 10_000.0, RopeScaling::None, DType::F32, &device)?);
    let block = Block::new(rotary, vb.pp("model.layers.0"))?;

    // A prompt of 8 positions, then one position at a time with the internal cache of the layer.
    let x = Tensor::randn(0f32, 1.0, (1, 12, WIDTH), &device)?;
    let mut outputs = vec![block.forward(&x.narrow(1, 0, 8)?, 0)?];
    for position in 8..12 {
        outputs.push(block.forward(&x.narrow(1, position, 1)?, position)?);
    }
    let stepwise = Tensor::cat(&outputs, 1)?;

    // All positions in one pass. Offset 0 starts a new sequence.
    let whole = block.forward(&x, 0)?;
    let difference = (&stepwise - &whole)?.abs()?.max_all()?.to_scalar::<f32>()?;
    println!("output {:?}, stepwise and whole differ by at most {difference:.1e}", whole.dims());
    anyhow::ensure!(difference < 1e-4, "decoding with the cache changes the output by {difference}");
    Ok(())
}
