//! Layers with every mechanism: decoding with a cache, packed sequences, and what is refused.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use gd_kernels::Mask;
use gd_layer::mechanisms::{AttentionMechanism, Reads, TABLE};
use gd_layer::{
    Attention, AttentionConfig, BeaconConfig, LayerCache, MechanismAttention, Pass, RopeScaling, Rotary,
};
use serde_json::{Value, json};

use super::problem::mechanism;
use crate::layers::Numbers;
use crate::layers::difference;

const WIDTH: usize = 12;

fn attention_config() -> AttentionConfig {
    AttentionConfig::new(WIDTH, 4, 6).with_key_value_heads(2).with_qk_norm(true)
}

fn layer(cfg: &AttentionConfig, mechanism: &AttentionMechanism) -> Result<MechanismAttention> {
    Ok(layer_and_weights(cfg, mechanism)?.0)
}

fn layer_and_weights(
    cfg: &AttentionConfig,
    mechanism: &AttentionMechanism,
) -> Result<(MechanismAttention, VarMap)> {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu);
    let rotary = Arc::new(Rotary::new(6, 192, 10_000.0, RopeScaling::None, DType::F64, &Device::Cpu)?);
    let layer = MechanismAttention::new(cfg, mechanism, 1, rotary, vb)?;
    // In the order of the names, so that all layers have the same values.
    let mut vars: Vec<_> = map.data().lock().expect("one thread").clone().into_iter().collect();
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    let mut numbers = Numbers(31);
    for (_, var) in vars {
        let noise = numbers.tensor(var.dims(), 0.8, DType::F64)?;
        // Candle does not seed the initial values of matrices; those of vectors are constants.
        var.set(&if var.rank() > 1 { noise } else { (var.as_tensor() + noise)? })?;
    }
    Ok((layer, map))
}

/// Every mechanism that a layer can have, with parameters that matter for few positions.
fn in_layers() -> Vec<AttentionMechanism> {
    let particular = |name: &str| match name {
        "topk" | "explicit_sparse" => json!({"name": name, "k": 3}),
        "patterns" => json!({"name": name, "pattern": "fixed", "l": 3, "c": 1}),
        "entmax" => json!({"name": name, "alpha": "learned"}),
        "hopfield" => json!({"name": name, "T": 2}),
        "nsa" => json!({"name": name, "l": 2, "stride": 1, "block": 2, "nsel": 3, "w": 3}),
        "sliding_window" => json!({"name": name, "window": 3}),
        name => json!({ "name": name }),
    };
    let names = TABLE.iter().filter(|(_, info)| info.not_in_models.is_none()).map(|(name, _)| *name);
    let mut all: Vec<_> = names.map(|name| mechanism(particular(name))).collect();
    all.push(mechanism(json!({"name": "patterns", "pattern": "strided", "l": 3})));
    all.push(mechanism(json!({"name": "patterns", "pattern": "longformer", "w": 4, "globals": [1]})));
    all.push(mechanism(json!({"name": "gated", "gate": "headwise"})));
    all
}

/// `attend` with a cache.
fn read(layer: &MechanismAttention, x: &Tensor, offsets: &[usize], cache: &mut LayerCache) -> Result<Tensor> {
    let mask = Mask::causal(0).with_offsets(offsets.iter().map(|&at| at as i64).collect());
    layer.attend(x, &Pass::new(&mask), Some(cache))
}

#[test]
fn decoding_with_a_cache_gives_the_outputs_of_the_whole_sequence() -> Result<()> {
    let x = Numbers(3).tensor(&[2, 9, WIDTH], 1.0, DType::F64)?;
    for mechanism in in_layers() {
        for cfg in [attention_config(), attention_config().with_window(4)] {
            if cfg.window.is_some() && mechanism.info().reads != Reads::Interval {
                continue;
            }
            let layer = layer(&cfg, &mechanism)?;
            let whole = layer.attend(&x, &Pass::new(&Mask::causal(0)), None)?;
            let (mut cache, mut at, mut rows) = (LayerCache::new(), 0, Vec::new());
            for n in [4, 1, 1, 3] {
                rows.push(read(&layer, &x.narrow(1, at, n)?, &[at, at], &mut cache)?);
                at += n;
            }
            let apart = difference(&Tensor::cat(&rows, 1)?, &whole)?;
            assert!(apart < 1e-10, "{mechanism:?}: {apart}");
        }
    }
    Ok(())
}

#[test]
fn sequences_of_different_lengths_are_decoded_together() -> Result<()> {
    let x = Numbers(4).tensor(&[2, 9, WIDTH], 1.0, DType::F64)?;
    let lengths = [6, 3];
    for mechanism in in_layers() {
        let layer = layer(&attention_config(), &mechanism)?;
        let mut caches = [LayerCache::new(), LayerCache::new()];
        for (b, cache) in caches.iter_mut().enumerate() {
            read(&layer, &x.narrow(0, b, 1)?.narrow(1, 0, lengths[b])?, &[0], cache)?;
        }
        let mut together = LayerCache::stack(&[&caches[0], &caches[1]])?;
        let next = |b: usize, step: usize| x.narrow(0, b, 1)?.narrow(1, lengths[b] + step, 1);
        for step in 0..3 {
            let offsets = lengths.map(|length| length + step);
            let both = Tensor::cat(&[next(0, step)?, next(1, step)?], 0)?;
            let y = read(&layer, &both, &offsets, &mut together)?;
            for (b, cache) in caches.iter_mut().enumerate() {
                let own = read(&layer, &next(b, step)?, &[offsets[b]], cache)?;
                let apart = difference(&y.narrow(0, b, 1)?, &own)?;
                assert!(apart < 1e-10, "{mechanism:?}, sequence {b}: {apart}");
            }
        }
        // The second sequence goes on without the first.
        let mut second = together.select(&[1])?;
        let own = read(&layer, &next(1, 3)?, &[6], &mut caches[1])?;
        let apart = difference(&read(&layer, &next(1, 3)?, &[6], &mut second)?, &own)?;
        assert!(apart < 1e-10, "{mechanism:?}: {apart} after a selection");
    }
    Ok(())
}

#[test]
fn a_packed_row_gives_the_outputs_of_each_sequence() -> Result<()> {
    let x = Numbers(6).tensor(&[1, 9, WIDTH], 1.0, DType::F64)?;
    for mechanism in in_layers() {
        let layer = layer(&attention_config(), &mechanism)?;
        let packed = Mask::causal(0).packed(vec![vec![0, 4, 9]]);
        if mechanism.info().reads == Reads::Row {
            let error = layer.attend(&x, &Pass::new(&packed), None).unwrap_err().to_string();
            assert!(error.contains(mechanism.name()) && error.contains("several sequences"), "{error}");
            continue;
        }
        let whole = layer.attend(&x, &Pass::new(&packed), None)?;
        for (start, n) in [(0, 4), (4, 5)] {
            let alone = layer.attend(&x.narrow(1, start, n)?, &Pass::new(&Mask::causal(0)), None)?;
            let apart = difference(&whole.narrow(1, start, n)?, &alone)?;
            assert!(apart < 1e-10, "{mechanism:?} from {start}: {apart}");
        }
    }
    Ok(())
}

/// The outputs and the gradients of x and of all weights.
fn with_gradients(layer: &MechanismAttention, map: &VarMap, x: &Tensor, pass: &Pass) -> Result<Vec<Tensor>> {
    let x = Var::from_tensor(x)?;
    let y = layer.attend(&x, pass, None)?;
    let grads = (&y * Numbers(77).tensor(y.dims(), 1.0, DType::F64)?)?.sum_all()?.backward()?;
    let mut vars: Vec<_> = map.data().lock().expect("one thread").clone().into_iter().collect();
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    let all = vars.iter().map(|(_, var)| var).chain([&x]);
    let of = |var: &Var| grads.get(var).cloned().map_or_else(|| var.zeros_like(), Ok);
    [Ok(y.detach())].into_iter().chain(all.map(of)).collect()
}

#[test]
fn blocks_of_queries_give_the_outputs_and_gradients_of_all_queries_at_once() -> Result<()> {
    // More queries than a block has, and two sequences in a row. A pass with statistics computes all queries at once.
    let x = Numbers(8).tensor(&[2, 150, WIDTH], 1.0, DType::F64)?;
    let mut compared = 0;
    for mechanism in in_layers().into_iter().filter(|mechanism| mechanism.info().independent_queries) {
        let (layer, map) = layer_and_weights(&attention_config(), &mechanism)?;
        let packed = Mask::causal(0).packed(vec![vec![0, 70, 150], vec![0, 150]]);
        let mask = if mechanism.info().reads == Reads::Row { Mask::causal(0) } else { packed };
        let blocks = with_gradients(&layer, &map, &x, &Pass::new(&mask))?;
        let stats = RefCell::new(Vec::new());
        let whole = with_gradients(&layer, &map, &x, &Pass { stats: Some(&stats), ..Pass::new(&mask) })?;
        for (a, b) in blocks.iter().zip(&whole) {
            let apart = difference(a, b)?;
            assert!(apart < 1e-10, "{mechanism:?}: {apart}");
            compared += 1;
        }
        assert!(blocks.iter().all(|t| t.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap() > 0.0));
    }
    assert!(compared > 100, "{compared} tensors");
    Ok(())
}

#[test]
fn what_a_layer_cannot_have_is_an_error() -> Result<()> {
    let refused = |cfg: &AttentionConfig, config: Value| {
        layer(cfg, &mechanism(config)).map(|_| ()).unwrap_err().to_string()
    };
    let cfg = attention_config();
    for (name, info) in TABLE {
        if let Some(reason) = info.not_in_models {
            let error = refused(&cfg, json!({ "name": name }));
            assert!(error.contains(name) && error.contains(reason), "{name}: {error}");
        }
    }
    assert!(refused(&cfg, json!({"name": "patterns", "pattern": "bigbird"})).contains("random blocks"));
    assert!(refused(&cfg, json!({"name": "topk", "k": 0})).contains("k is 0"));
    assert!(refused(&cfg, json!({"name": "linear", "causal": false})).contains("causal"));
    for name in ["linear", "nsa"] {
        assert!(
            refused(&attention_config().with_window(4), json!({ "name": name })).contains("a window of 4")
        );
    }
    let odd = AttentionConfig::new(WIDTH, 3, 6);
    assert!(refused(&odd, json!({"name": "differential"})).contains("3 heads"));
    let prior = attention_config().with_beacon(BeaconConfig::default());
    assert!(refused(&prior, json!({"name": "sparsemax"})).contains("beacon.prior"));
    let without = BeaconConfig { prior: false, ..BeaconConfig::default() };
    layer(&attention_config().with_beacon(without), &mechanism(json!({"name": "sparsemax"})))?;
    Ok(())
}
