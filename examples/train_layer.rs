//! Trains the layer as a part of a candle model, with candle's optimizer.
//!
//! The task is associative recall: a sequence of pairs (key, value) is followed by one of the keys, and the model
//! answers with the value that belongs to it. A head that selects one position can solve it exactly.
//!
//! `cargo run --release -p gd-examples --bin train_layer`

use std::sync::Arc;

use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{
    AdamW, Embedding, Linear, Optimizer, ParamsAdamW, VarBuilder, VarMap, embedding, linear_no_bias, loss,
};
use gd_kernels::Mask;
use gd_layer::{Attention, AttentionConfig, BeaconConfig, GdAttention, Pass, RopeScaling, Rotary};

const WIDTH: usize = 32;
const HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const KEYS: usize = 8;
const VALUES: usize = 8;
const PAIRS: usize = 4;
const LENGTH: usize = 2 * PAIRS + 1;

/// Embedding, two attention layers, output projection.
struct Model {
    embed: Embedding,
    layers: Vec<GdAttention>,
    head: Linear,
}

impl Model {
    fn new(vb: VarBuilder) -> Result<Self> {
        let config = AttentionConfig::new(WIDTH, HEADS, HEAD_DIM)
            .with_qk_norm(true)
            .with_beacon(BeaconConfig::default());
        let rotary =
            Arc::new(Rotary::new(HEAD_DIM, LENGTH, 10_000.0, RopeScaling::None, vb.dtype(), vb.device())?);
        let layer = |i: usize| GdAttention::new(&config, rotary.clone(), vb.pp(format!("layers.{i}")));
        Ok(Self {
            embed: embedding(KEYS + VALUES, WIDTH, vb.pp("embed"))?,
            layers: (0..2).map(layer).collect::<Result<_>>()?,
            head: linear_no_bias(WIDTH, VALUES, vb.pp("head"))?,
        })
    }

    /// Logits `[B, VALUES]` of the answer to ids `[B, LENGTH]`.
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let mask = Mask::causal(0);
        let pass = Pass::new(&mask);
        let mut x = self.embed.forward(ids)?;
        for layer in &self.layers {
            // `attend` is differentiable. The configured estimator defines the gradient of the discrete selection.
            x = (&x + layer.attend(&x, &pass, None)?)?;
        }
        self.head.forward(&x.narrow(1, LENGTH - 1, 1)?.squeeze(1)?)
    }
}

/// A xorshift generator, so that the example needs no crate for random numbers.
struct Random(u64);

impl Random {
    /// A number in `0..n`.
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

/// Sequences `[B, LENGTH]` and answers `[B]`.
fn batch(size: usize, random: &mut Random, device: &Device) -> Result<(Tensor, Tensor)> {
    let (mut ids, mut answers) = (Vec::new(), Vec::new());
    for _ in 0..size {
        let mut keys: Vec<u32> = (0..KEYS as u32).collect();
        for i in 0..PAIRS {
            let j = i + random.below(KEYS - i);
            keys.swap(i, j);
        }
        let values: Vec<u32> = (0..PAIRS).map(|_| random.below(VALUES) as u32).collect();
        for (key, value) in keys.iter().zip(&values) {
            ids.extend([*key, KEYS as u32 + value]);
        }
        let query = random.below(PAIRS);
        ids.push(keys[query]);
        answers.push(values[query]);
    }
    Ok((Tensor::from_vec(ids, (size, LENGTH), device)?, Tensor::from_vec(answers, size, device)?))
}

fn main() -> anyhow::Result<()> {
    let device = Device::Cpu;
    let weights = VarMap::new();
    let model = Model::new(VarBuilder::from_varmap(&weights, DType::F32, &device))?;
    let mut optimizer = AdamW::new(weights.all_vars(), ParamsAdamW { lr: 3e-3, ..ParamsAdamW::default() })?;
    let mut random = Random(42);
    let (mut first, mut last) = (None, 0.0);
    for step in 1..=200 {
        let (ids, answers) = batch(64, &mut random, &device)?;
        let loss = loss::cross_entropy(&model.forward(&ids)?, &answers)?;
        optimizer.backward_step(&loss)?;
        last = loss.to_scalar::<f32>()?;
        first.get_or_insert(last);
        if step % 50 == 0 {
            println!("step {step}: loss {last:.3}");
        }
    }
    let (ids, answers) = batch(256, &mut random, &device)?;
    let accuracy = model.forward(&ids)?.argmax(D::Minus1)?.eq(&answers)?.to_dtype(DType::F32)?.mean_all()?;
    println!("accuracy: {:.0} %", 100.0 * accuracy.to_scalar::<f32>()?);
    let first = first.unwrap_or(0.0);
    anyhow::ensure!(last < first, "the loss did not decrease: {first} at step 1, {last} at the end");
    Ok(())
}
