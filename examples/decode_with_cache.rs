//! Decoding with a cache: one query against the cached keys of each layer, alone and in a batch.
//!
//! A `LayerCache` belongs to one layer. Besides keys and values it stores what makes decoding quick: on the CPU the
//! keys as 8-bit integers, from which the layer finds the same key as from the keys themselves.
//!
//! `cargo run --release -p gd-examples --bin decode_with_cache`

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use gd_kernels::Mask;
use gd_layer::{
    Attention, AttentionConfig, BeaconConfig, GdAttention, LayerCache, Pass, RopeScaling, Rotary,
};

const WIDTH: usize = 64;

/// Reads x `[B, N, C]` behind the positions that the cache holds, each sequence at its own position.
fn read(layer: &GdAttention, x: &Tensor, cache: &mut LayerCache) -> Result<Tensor> {
    let mask = match cache.lengths() {
        [] => Mask::causal(0),
        lengths => Mask::causal(0).with_offsets(lengths.iter().map(|&length| length as i64).collect()),
    };
    layer.attend(x, &Pass::new(&mask), Some(cache))
}

fn main() -> anyhow::Result<()> {
    let device = Device::Cpu;
    let weights = VarMap::new();
    let rotary = Arc::new(Rotary::new(16, 512, 10_000.0, RopeScaling::None, DType::F32, &device)?);
    let vb = VarBuilder::from_varmap(&weights, DType::F32, &device);
    let layer = GdAttention::new(
        &AttentionConfig::new(WIDTH, 4, 16).with_qk_norm(true).with_beacon(BeaconConfig::default()),
        rotary,
        vb,
    )?;

    // Two prompts of different lengths, each read into a cache of its own.
    let prompts = [
        Tensor::randn(0f32, 1.0, (1, 100, WIDTH), &device)?,
        Tensor::randn(0f32, 1.0, (1, 40, WIDTH), &device)?,
    ];
    let mut caches = [LayerCache::new(), LayerCache::new()];
    for (prompt, cache) in prompts.iter().zip(&mut caches) {
        read(&layer, prompt, cache)?;
    }

    // From here on they are one batch.
    let mut batch = LayerCache::stack(&[&caches[0], &caches[1]])?;
    println!("cached positions: {:?}", batch.lengths());
    for _ in 0..8 {
        let x = Tensor::randn(0f32, 1.0, (2, 1, WIDTH), &device)?;
        let together = read(&layer, &x, &mut batch)?;
        // Each sequence gets in the batch what it gets alone.
        for (i, cache) in caches.iter_mut().enumerate() {
            let alone = read(&layer, &x.narrow(0, i, 1)?, cache)?;
            let difference = (together.narrow(0, i, 1)? - alone)?.abs()?.max_all()?.to_scalar::<f32>()?;
            anyhow::ensure!(difference < 1e-5, "sequence {i} differs by {difference} in the batch");
        }
    }

    // The first sequence has ended: the second goes on alone.
    let rest = batch.select(&[1])?;
    println!("after 8 steps: {:?}, of the second sequence alone: {:?}", batch.lengths(), rest.lengths());
    Ok(())
}
