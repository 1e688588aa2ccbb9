//! Layers in which some heads read keys and the others are running averages alone, and their control by softmax.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use gd_kernels::{CandidateGradient, Estimator, Gate, Mask};
use gd_layer::{
    Attention, AttentionConfig, BeaconConfig, GdAttention, GdConfig, LayerCache, Pass, RopeScaling, Rotary,
    SoftmaxAttention,
};

use crate::layers::{Fixture, Numbers, attend_in_parts, config, difference, fixture};

fn heads(n: usize) -> AttentionConfig {
    let gd = GdConfig {
        gate: Gate::Energy { temperature: 0.7 },
        exclude_below: 0.0,
        gradient: CandidateGradient { null: false, ..CandidateGradient::default() },
        threshold: Some(1.2),
        ..GdConfig::default()
    };
    AttentionConfig { selecting_heads: Some(n), ..config(gd, Some(BeaconConfig::default())) }
}

/// Sets the parameters of `to` to those of `from` with the same names and shapes; returns the names of the others.
fn share(from: &Fixture, to: &Fixture) -> Result<Vec<String>> {
    let mut others = Vec::new();
    for (name, var) in &to.vars {
        match from.vars.iter().find(|(n, v)| n == name && v.shape() == var.shape()) {
            Some((_, value)) => var.set(value)?,
            None => others.push(name.clone()),
        }
    }
    Ok(others)
}

#[test]
fn a_layer_without_reading_heads_is_one_whose_reads_are_cut() -> Result<()> {
    let (all, none) = (fixture(&heads(4), true, DType::F64, 5)?, fixture(&heads(0), true, DType::F64, 6)?);
    assert!(share(&all, &none)?.is_empty(), "a subset of the parameters");
    let left = ["q_proj", "k_proj", "q_norm", "k_norm", "gd.", "beacon.prior"];
    assert!(none.vars.iter().all(|(name, _)| !left.iter().any(|part| name.starts_with(part))));
    let x = Numbers(7).tensor(&[2, 9, 12], 1.0, DType::F64)?;
    let mask = Mask::causal(0);
    let pass = |cut_reads| Pass { cut_reads, ..Pass::new(&mask) };
    let cut = all.layer.attend(&x, &pass(true), None)?;
    let without = none.layer.attend(&x, &pass(false), None)?;
    assert!(difference(&cut, &without)? < 1e-12);
    assert!(difference(&all.layer.attend(&x, &pass(false), None)?, &cut)? > 1e-3, "the heads read");
    // Softmax layers have the same parts.
    let softmax = fixture(&heads(0), false, DType::F64, 8)?;
    share(&all, &softmax)?;
    assert!(difference(&softmax.layer.attend(&x, &pass(false), None)?, &without)? < 1e-12);
    Ok(())
}

#[test]
fn the_first_heads_select_as_in_a_layer_of_all() -> Result<()> {
    // o_proj takes the heads beside each other: the output is linear in them.
    let (all, two) = (fixture(&heads(4), true, DType::F64, 5)?, fixture(&heads(2), true, DType::F64, 6)?);
    share(&all, &two)?;
    for (name, var) in &two.vars {
        let (_, of_all) = all.vars.iter().find(|(n, _)| n == name).expect("the same names");
        if of_all.shape() != var.shape() {
            // Rows of q_proj and k_proj, elements of beta and threshold: those of the first heads.
            var.set(&of_all.narrow(0, 0, var.dim(0)?)?.contiguous()?)?;
        }
    }
    let x = Numbers(7).tensor(&[2, 9, 12], 1.0, DType::F64)?;
    let mask = Mask::causal(0);
    let record = std::cell::RefCell::new(Vec::new());
    for layer in [&all, &two] {
        layer.layer.attend(&x, &Pass { stats: Some(&record), ..Pass::new(&mask) }, None)?;
    }
    let picks: Vec<Vec<i32>> = record.borrow().iter().map(|r| r.picks.clone()).collect();
    for b in 0..2 {
        assert_eq!(picks[0][b * 36..b * 36 + 18], picks[1][b * 18..(b + 1) * 18], "sequence {b}");
    }
    Ok(())
}

#[test]
fn a_cache_without_keys_counts_positions() -> Result<()> {
    let f = fixture(&heads(0), true, DType::F32, 5)?;
    let x = Numbers(7).tensor(&[3, 9, 12], 1.0, DType::F32)?;
    let full = f.layer.attend(&x, &Pass::new(&Mask::causal(0)), None)?;
    let mut cache = LayerCache::new();
    let out = attend_in_parts(f.layer.as_ref(), &x, &[4, 1, 3], &mut cache)?;
    assert!(difference(&out, &full.narrow(1, 0, 8)?)? < 1e-5);
    // Two of the sequences, in another order.
    let mut some = cache.select(&[2, 0])?;
    let last = x.narrow(1, 8, 1)?.contiguous()?.index_select(&Tensor::new(&[2u32, 0], &Device::Cpu)?, 0)?;
    let y = f.layer.attend(&last, &Pass::new(&Mask::causal(8)), Some(&mut some))?;
    let want =
        full.narrow(1, 8, 1)?.contiguous()?.index_select(&Tensor::new(&[2u32, 0], &Device::Cpu)?, 0)?;
    assert!(difference(&y, &want)? < 1e-5);
    assert_eq!(LayerCache::stack(&[&cache, &some])?.lengths(), [8, 8, 8, 9, 9]);
    let error = f.layer.attend(&last, &Pass::new(&Mask::causal(5)), Some(&mut some)).expect_err("an offset");
    assert!(error.to_string().contains("mask offset 5 does not follow 9"), "{error}");
    Ok(())
}

#[test]
fn heads_that_do_not_divide_into_groups_or_have_no_memory_are_refused() {
    let message = |cfg: AttentionConfig| cfg.validate().expect_err("an error").to_string();
    assert!(message(heads(1)).contains("selecting_heads 1 is not a multiple of 2 up to 4"));
    assert!(message(heads(6)).contains("selecting_heads 6"));
    assert!(message(AttentionConfig { beacon: None, ..heads(2) }).contains("beacon.averages of at least 1"));
    assert!(AttentionConfig { beacon: None, ..heads(4) }.validate().is_ok());
}

#[test]
fn softmax_with_a_null_slot_is_the_blend_of_all_candidates() -> Result<()> {
    let gd =
        GdConfig { estimator: Estimator::Blend, candidates: 16, threshold: Some(1.2), ..GdConfig::default() };
    for (selecting, window, threshold_by_length) in
        [(None, None, false), (Some(2), Some(5), false), (None, Some(5), true)]
    {
        let cfg = AttentionConfig {
            window,
            selecting_heads: selecting,
            ..config(GdConfig { threshold_by_length, ..gd.clone() }, Some(BeaconConfig::default()))
        };
        let f = fixture(&cfg, true, DType::F64, 3)?;
        let map = VarMap::new();
        let vb = VarBuilder::from_varmap(&map, DType::F64, &Device::Cpu);
        let rotary = Rotary::new(6, 64, 10_000.0, RopeScaling::None, DType::F64, &Device::Cpu)?;
        let twin = SoftmaxAttention::with_null(&cfg, Arc::new(rotary), vb)?;
        let vars = map.data().lock().expect("one thread").clone();
        assert_eq!(vars.len(), f.vars.len());
        for (name, var) in &f.vars {
            vars[name].set(var)?;
        }
        let x = Numbers(7).tensor(&[2, 13, 12], 1.0, DType::F64)?;
        let mask = Mask::causal(0);
        let [blend, softmax] = [f.layer.as_ref(), &twin as &dyn Attention]
            .map(|layer| layer.attend(&x, &Pass::new(&mask), None).unwrap());
        assert!(difference(&blend, &softmax)? < 1e-11, "{}", difference(&blend, &softmax)?);
        // And so are the gradients.
        let w = Numbers(9).tensor(blend.dims(), 1.0, DType::F64)?;
        let [a, b] = [blend, softmax].map(|y| (y * &w).unwrap().sum_all().unwrap().backward().unwrap());
        for (name, var) in &f.vars {
            let off = difference(a.get(var).expect(name), b.get(&vars[name]).expect(name))?;
            assert!(off < 1e-10, "{name}: {off}");
        }
    }
    Ok(())
}

#[test]
fn the_public_layer_takes_the_number_of_heads() -> Result<()> {
    let (weights, device) = (VarMap::new(), Device::Cpu);
    let vb = VarBuilder::from_varmap(&weights, DType::F32, &device);
    let rotary = Arc::new(Rotary::new(8, 64, 10_000.0, RopeScaling::None, DType::F32, &device)?);
    let config = AttentionConfig::new(32, 4, 8).with_beacon(BeaconConfig::default()).with_selecting_heads(0);
    let attention = GdAttention::new(&config, rotary, vb)?;
    let x = Numbers(3).tensor(&[1, 6, 32], 1.0, DType::F32)?;
    assert_eq!(attention.forward(&x, None, 0)?.dims(), [1, 6, 32]);
    assert_eq!(attention.forward(&x.narrow(1, 0, 1)?, None, 6)?.dims(), [1, 1, 32]);
    Ok(())
}
