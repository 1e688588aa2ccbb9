//! Layers in f32 with keys and values cached in f16 or bf16.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use gd_kernels::Mask;
use gd_layer::mechanisms::{AttentionMechanism, TopK};
use gd_layer::{
    Attention, AttentionConfig, BeaconConfig, GdConfig, LayerCache, MechanismAttention, Pass, RopeScaling,
    Rotary, SoftmaxAttention,
};

use crate::decoding::{bits, cases, frozen};
use crate::layers::{Numbers, attend_in_parts, config, difference, fixture};

/// The dtypes of the cache, with their relative rounding errors.
const HALF: [(DType, f64); 2] = [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)];

/// Layers over tensors without gradients.
fn layers() -> Result<Vec<(String, Box<dyn Attention>)>> {
    let mut all: Vec<(String, Box<dyn Attention>)> = Vec::new();
    for (name, cfg) in cases() {
        let f = fixture(&cfg, true, DType::F32, 21)?;
        all.push((name.into(), Box::new(frozen(&f, &cfg, DType::F32)?)));
    }
    let windowed = AttentionConfig { window: Some(40), ..config(GdConfig::default(), None) };
    let no_prior = BeaconConfig { prior: false, ..BeaconConfig::default() };
    for (name, cfg) in [
        ("softmax", config(GdConfig::default(), None)),
        ("softmax, learned prior", config(GdConfig::default(), Some(BeaconConfig::default()))),
        ("softmax, window", windowed),
    ] {
        let (vb, rotary) = weights(&cfg)?;
        all.push((name.into(), Box::new(SoftmaxAttention::new(&cfg, rotary.clone(), vb.clone())?)));
        all.push((format!("{name}, null"), Box::new(SoftmaxAttention::with_null(&cfg, rotary, vb)?)));
    }
    let cfg = config(GdConfig::default(), Some(no_prior));
    let (vb, rotary) = weights(&cfg)?;
    let top_k = AttentionMechanism::TopK(TopK { k: 4 });
    all.push(("top-k".into(), Box::new(MechanismAttention::new(&cfg, &top_k, 0, rotary, vb)?)));
    Ok(all)
}

/// Random weights of a softmax layer, without gradients.
fn weights(cfg: &AttentionConfig) -> Result<(VarBuilder<'static>, Arc<Rotary>)> {
    let f = fixture(cfg, false, DType::F32, 21)?;
    let mut tensors: HashMap<String, Tensor> =
        f.vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().detach())).collect();
    for (name, value) in [("gd.beta", -1.0f32), ("gd.threshold", 2.0)] {
        tensors.insert(name.into(), Tensor::full(value, 4, &Device::Cpu)?);
    }
    let rotary = Rotary::new(cfg.head_dim, 256, 10_000.0, RopeScaling::None, DType::F32, &Device::Cpu)?;
    Ok((VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), Arc::new(rotary)))
}

/// To the bit, wherever a cache in f32 gives the same bits too: running averages and products of a few rows have orders of
/// summation of their own, and a number that differs in its last bit may be rounded to the next one in 16 bits.
#[test]
fn a_text_in_parts_has_the_outputs_of_the_text_in_one() -> Result<()> {
    let x = Numbers(31).tensor(&[2, 150, 12], 1.0, DType::F32)?;
    let mut exact = 0;
    for (name, layer) in layers()? {
        for parts in [&[70, 80][..], &[9, 128, 13], &[1, 128, 1, 20]] {
            let read = |dtype: DType, parts: &[usize]| {
                let mut cache = LayerCache::new().with_dtype(dtype).with_capacity(20);
                attend_in_parts(layer.as_ref(), &x, parts, &mut cache)
            };
            let same = |dtype| {
                Ok::<_, candle_core::Error>(bits(&read(dtype, parts)?)? == bits(&read(dtype, &[150])?)?)
            };
            let exact_in_f32 = same(DType::F32)?;
            for (dtype, unit) in HALF {
                let off = difference(&read(dtype, parts)?, &read(dtype, &[150])?)?;
                assert!(off < 8.0 * unit, "{name}, {dtype:?}, {parts:?}: {off}");
                assert!(!exact_in_f32 || same(dtype)?, "{name}, {dtype:?}, {parts:?}: {off}");
                exact += usize::from(exact_in_f32);
            }
        }
    }
    assert!(exact >= 20, "{exact}");
    Ok(())
}

/// Rounded keys and values change a softmax layer by about the rounding, in a prompt and in the steps after it.
#[test]
fn the_error_is_that_of_rounded_keys_and_values() -> Result<()> {
    let x = Numbers(31).tensor(&[1, 60, 12], 1.0, DType::F32)?;
    let mut compared = 0;
    for (name, layer) in layers()?.into_iter().filter(|(name, _)| name.starts_with("softmax")) {
        let read = |cache: LayerCache| attend_in_parts(layer.as_ref(), &x, &[50, 1, 9], &mut { cache });
        let want = read(LayerCache::new())?;
        for (dtype, unit) in HALF {
            let got = read(LayerCache::new().with_dtype(dtype))?;
            for (first, rows) in [(0, 50), (50, 1), (51, 9)] {
                let part = |t: &Tensor| t.narrow(1, first, rows);
                let off = difference(&part(&got)?, &part(&want)?)?;
                assert!(off > 0.01 * unit && off < 40.0 * unit, "{name}, {dtype:?}, row {first}: {off}");
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 36);
    Ok(())
}

#[test]
fn shortened_caches_continue_as_if_the_rest_had_not_been_read() -> Result<()> {
    let x = Numbers(31).tensor(&[1, 90, 12], 1.0, DType::F32)?;
    let mut shortened = 0;
    for (name, layer) in layers()? {
        for (dtype, _) in HALF {
            let (mut all, mut some) =
                (LayerCache::new().with_dtype(dtype), LayerCache::new().with_dtype(dtype));
            attend_in_parts(layer.as_ref(), &x, &[90], &mut all)?;
            attend_in_parts(layer.as_ref(), &x, &[40], &mut some)?;
            if !all.is_positional() {
                continue;
            }
            let mut cut = all.shortened(40)?;
            let mask = Mask::causal(40);
            let next = x.narrow(1, 40, 1)?;
            let read = |cache: &mut LayerCache| layer.attend(&next, &Pass::new(&mask), Some(cache));
            assert_eq!(bits(&read(&mut cut)?)?, bits(&read(&mut some)?)?, "{name}, {dtype:?}");
            shortened += 1;
        }
    }
    assert!(shortened >= 8, "{shortened}");
    Ok(())
}

#[test]
fn numbers_beyond_the_range_are_refused_and_leave_the_cache_as_it_was() -> Result<()> {
    let cfg = AttentionConfig { attention_bias: false, ..config(GdConfig::default(), None) };
    let (vb, rotary) = weights(&cfg)?;
    let layer = SoftmaxAttention::new(&cfg, rotary, vb)?;
    let x = Numbers(31).tensor(&[1, 20, 12], 1.0, DType::F32)?;
    let attend = |x: &Tensor, cache: &mut LayerCache| {
        let mask = Mask::causal(cache.len() as i64);
        layer.attend(x, &Pass::new(&mask), Some(cache))
    };
    let mut cache = LayerCache::new().with_dtype(DType::F16);
    attend(&x.narrow(1, 0, 10)?, &mut cache)?;
    // The values grow with x; the keys are normalised.
    let large = (x.narrow(1, 10, 1)? * 1e6)?;
    let error = attend(&large, &mut cache).unwrap_err().to_string();
    assert!(error.contains("F16") && error.contains("6.55"), "{error}");
    assert_eq!(cache.lengths(), [10]);
    let mut same = LayerCache::new().with_dtype(DType::F16);
    attend(&x.narrow(1, 0, 10)?, &mut same)?;
    let next = x.narrow(1, 10, 1)?;
    assert_eq!(bits(&attend(&next, &mut cache)?)?, bits(&attend(&next, &mut same)?)?);
    let mut wide = LayerCache::new().with_dtype(DType::BF16);
    attend(&large, &mut wide)?;
    let error = LayerCache::stack(&[&cache, &wide]).unwrap_err().to_string();
    assert!(error.contains("F16 and BF16"), "{error}");
    Ok(())
}
