//! The attention layers: gradients of every parameter, decoding, and use in candle's models.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use gd_kernels::{Estimator, Mask, Score};
use gd_layer::{AttentionConfig, BeaconConfig, GdAttention, GdConfig, LayerCache, Pass, RopeScaling, Rotary};

use crate::layers::{Fixture, Numbers, config, fixture, selecting};

/// `<layer(x), w>` at a fixed random w.
fn loss(f: &Fixture, x: &Tensor, hardness: f64) -> Result<Tensor> {
    let mask = Mask::causal(0);
    let pass = Pass { hardness, ..Pass::new(&mask) };
    let y = f.layer.attend(x, &pass, None)?;
    let w = Numbers(99).tensor(y.dims(), 1.0, y.dtype())?;
    (y * w)?.sum_all()
}

/// Compares gradients with finite differences of `loss`, at about nine elements of each variable.
fn compare(
    name: &str,
    vars: &[(String, Var)],
    grads: &GradStore,
    loss: impl Fn() -> Result<Tensor>,
) -> Result<()> {
    for (var_name, var) in vars {
        let grad = grads.get(var.as_tensor());
        let grad = grad.unwrap_or_else(|| panic!("{name}: {var_name} receives no gradient"));
        let grad = grad.flatten_all()?.to_vec1::<f64>()?;
        let values = var.flatten_all()?.to_vec1::<f64>()?;
        let shape = var.shape().clone();
        let stride = (values.len() / 9).max(1);
        for at in (0..values.len()).step_by(stride) {
            let eps = 1e-6;
            let moved = |by: f64| -> Result<f64> {
                let mut v = values.clone();
                v[at] += by;
                var.set(&Tensor::from_vec(v, shape.clone(), &Device::Cpu)?)?;
                loss()?.to_scalar::<f64>()
            };
            let numeric = (moved(eps)? - moved(-eps)?) / (2.0 * eps);
            let err = (numeric - grad[at]).abs();
            assert!(
                err <= 1e-5 + 1e-3 * numeric.abs(),
                "{name}: {var_name}[{at}]: {} against {numeric}",
                grad[at]
            );
        }
        var.set(&Tensor::from_vec(values, shape, &Device::Cpu)?)?;
    }
    Ok(())
}

/// Compares the gradients of every parameter and of x.
fn gradcheck(name: &str, f: &Fixture, hardness: f64) -> Result<()> {
    let x = Var::from_tensor(&Numbers(7).tensor(&[2, 7, 12], 1.0, DType::F64)?)?;
    let grads = loss(f, x.as_tensor(), hardness)?.backward()?;
    let mut all = f.vars.clone();
    all.push(("x".into(), x.clone()));
    compare(name, &all, &grads, || loss(f, x.as_tensor(), hardness))
}

#[test]
fn gradients_of_exact_estimators_match_finite_differences() -> Result<()> {
    for (name, exact, cfg) in selecting() {
        if exact {
            gradcheck(name, &fixture(&cfg, true, DType::F64, 3)?, 1.0)?;
        }
    }
    Ok(())
}

#[test]
fn gradients_of_softmax_attention_match_finite_differences() -> Result<()> {
    for beacon in [None, Some(BeaconConfig::default())] {
        gradcheck("softmax", &fixture(&config(GdConfig::default(), beacon), false, DType::F64, 5)?, 1.0)?;
    }
    Ok(())
}

#[test]
fn the_soft_half_of_every_estimator_matches_finite_differences() -> Result<()> {
    // At hardness 0 every estimator is the blend.
    for (name, _, cfg) in selecting() {
        let gated = cfg.gd.rounds > 1 || cfg.gd.gate != gd_kernels::Gate::None;
        if !gated {
            gradcheck(name, &fixture(&cfg, true, DType::F64, 11)?, 0.0)?;
        }
    }
    Ok(())
}

#[test]
fn the_hard_gradient_is_the_blends_for_scores_and_the_choices_for_values() -> Result<()> {
    // Without a preserve floor `candidates` moves the scores as if the candidates were blended, and
    // the selected value as it is. Every other parameter lies on one side of the choice alone.
    let gd = GdConfig { threshold: Some(1.2), preserve_floor: 0.0, ..GdConfig::default() };
    let beacon = BeaconConfig { conv_width: 1, ..BeaconConfig::default() };
    let f = fixture(&config(gd, Some(beacon)), true, DType::F64, 9)?;
    let x = Numbers(7).tensor(&[2, 7, 12], 1.0, DType::F64)?;
    let scores = ["q_proj.", "k_proj.", "q_norm.", "k_norm.", "gd.", "beacon.prior."];
    let vars = |hardness: f64| -> Vec<_> {
        let of = |n: &str| scores.iter().any(|s| n.starts_with(s)) == (hardness == 0.0);
        f.vars.iter().filter(|(n, _)| of(n)).cloned().collect()
    };
    let grads = loss(&f, &x, 1.0)?.backward()?;
    for hardness in [0.0, 1.0] {
        let chosen = vars(hardness);
        assert!(chosen.len() > 4, "{chosen:?}");
        compare("hard", &chosen, &grads, || loss(&f, &x, hardness))?;
    }
    Ok(())
}

#[test]
fn every_parameter_of_every_estimator_receives_a_gradient() -> Result<()> {
    for (name, _, cfg) in selecting() {
        let f = fixture(&cfg, true, DType::F64, 3)?;
        let x = Numbers(7).tensor(&[2, 7, 12], 1.0, DType::F64)?;
        for hardness in [0.5, 1.0] {
            let grads = loss(&f, &x, hardness)?.backward()?;
            for (var_name, var) in &f.vars {
                let grad =
                    grads.get(var.as_tensor()).map(|g| g.abs()?.max_all()?.to_scalar::<f64>()).transpose()?;
                assert!(grad.is_some_and(|g| g > 0.0 && g.is_finite()), "{name}: {var_name}: {grad:?}");
            }
        }
    }
    Ok(())
}

/// Runs `x` in chunks of these sizes through a cache; returns outputs and selected keys.
fn in_chunks(f: &Fixture, x: &Tensor, sizes: &[usize]) -> Result<(Tensor, Vec<Vec<i32>>)> {
    let (mut cache, mut at, mut out) = (LayerCache::new(), 0, Vec::new());
    let mut picks = vec![Vec::new(); 2 * 4];
    for &n in sizes {
        let (mask, record) = (Mask::causal(at as i64), RefCell::new(Vec::new()));
        let pass = Pass { stats: Some(&record), ..Pass::new(&mask) };
        out.push(f.layer.attend(&x.narrow(1, at, n)?, &pass, Some(&mut cache))?);
        at += n;
        assert_eq!(cache.len(), at);
        for r in record.borrow().iter() {
            if let Some(s) = &r.selected {
                for (head, row) in s.index.flatten_to(1)?.to_vec2::<i32>()?.into_iter().enumerate() {
                    picks[head].extend(row);
                }
            }
        }
    }
    Ok((Tensor::cat(&out, 1)?, picks))
}

#[test]
fn decoding_equals_the_full_forward_pass() -> Result<()> {
    let mut cases = selecting();
    cases.push(("softmax", false, config(GdConfig::default(), Some(BeaconConfig::default()))));
    for (name, _, cfg) in cases {
        let f = fixture(&cfg, name != "softmax", DType::F32, 21)?;
        let x = Numbers(31).tensor(&[2, 13, 12], 1.0, DType::F32)?;
        let (full, full_picks) = in_chunks(&f, &x, &[13])?;
        for sizes in [vec![1; 13], vec![5, 1, 1, 4, 2]] {
            let (y, picks) = in_chunks(&f, &x, &sizes)?;
            assert_eq!(picks, full_picks, "{name} in chunks of {sizes:?}");
            let err = (&y - &full)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(err <= 1e-5, "{name} in chunks of {sizes:?}: off by {err}");
        }
        // The same without a cache.
        let plain = f.layer.attend(&x, &Pass::new(&Mask::causal(0)), None)?;
        assert_eq!(plain.to_vec3::<f32>()?, full.to_vec3::<f32>()?, "{name}");
    }
    Ok(())
}

/// Softmax attention over the `top_k` greatest scores of each query and no others, in f64, one row at a time.
fn top_k_softmax(f: &Fixture, cfg: &AttentionConfig, x: &Tensor, top_k: usize) -> Result<Tensor> {
    let var =
        |name: &str| f.vars.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_tensor().clone()).unwrap();
    let linear = |x: &Tensor, name: &str| {
        x.broadcast_matmul(&var(&format!("{name}.weight")).t()?)?.broadcast_add(&var(&format!("{name}.bias")))
    };
    let (b, n, _) = x.dims3()?;
    let d = cfg.head_dim;
    let rotary = Rotary::new(d, 64, 10_000.0, RopeScaling::None, DType::F64, &Device::Cpu)?;
    let heads = |name: &str| linear(x, name)?.reshape((b, n, (), d))?.transpose(1, 2);
    let rows = |t: Tensor| t.flatten_to(1)?.to_vec3::<f64>();
    let q = rows(rotary.apply(&heads("q_proj")?, 0)?)?;
    let (k, v) = (rows(rotary.apply(&heads("k_proj")?, 0)?)?, rows(heads("v_proj")?)?);
    let mut y = vec![0f64; q.len() * n * d];
    for (at, row) in y.chunks_mut(d).enumerate() {
        // The query heads of all sequences come in order, and so do the key heads: group by group.
        let (head, i) = (at / n, at % n);
        let (kv, first) = (head / cfg.group(), cfg.window.map_or(0, |w| (i + 1).saturating_sub(w)));
        let score =
            |j: usize| q[head][i].iter().zip(&k[kv][j]).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt();
        let mut scores: Vec<(f64, usize)> = (first..=i).map(|j| (score(j), j)).collect();
        scores.sort_by(|a, b| b.0.total_cmp(&a.0));
        scores.truncate(top_k);
        let total: f64 = scores.iter().map(|(s, _)| s.exp()).sum();
        for (s, j) in scores {
            row.iter_mut().zip(&v[kv][j]).for_each(|(y, v)| *y += s.exp() / total * v);
        }
    }
    let y = Tensor::from_vec(y, (b, (), n, d), &Device::Cpu)?;
    linear(&y.transpose(1, 2)?.reshape((b, n, ()))?, "o_proj")
}

#[test]
fn a_blend_is_softmax_attention_over_the_candidates() -> Result<()> {
    let plain = |gd| AttentionConfig { qk_norm: false, output_gate: false, ..config(gd, None) };
    let x = Numbers(7).tensor(&[2, 13, 12], 1.0, DType::F64)?;
    for (score, norm_prior) in [(Score::Dot, false), (Score::Energy, true)] {
        for (candidates, window) in [(2, None), (16, None), (4, Some(6)), (16, Some(6))] {
            let gd = GdConfig {
                score,
                norm_prior,
                candidates,
                estimator: Estimator::Blend,
                ..GdConfig::default()
            };
            let cfg = AttentionConfig { window, ..plain(gd) };
            let f = fixture(&cfg, true, DType::F64, 3)?;
            // The fixture changes beta, which softmax attention does not have.
            let (_, beta) = f.vars.iter().find(|(name, _)| name == "gd.beta").unwrap();
            let scale = if score == Score::Dot { 1.0 } else { 0.5 };
            beta.set(&(beta.ones_like()? * (scale / 6f64.sqrt()).ln())?)?;
            let y = f.layer.attend(&x, &Pass::new(&Mask::causal(0)), None)?;
            let difference = |other: &Tensor| (&y - other)?.abs()?.max_all()?.to_scalar::<f64>();
            let off = difference(&top_k_softmax(&f, &cfg, &x, candidates)?)?;
            assert!(off < 1e-12, "{score:?}, top {candidates} in {window:?}: off by {off}");
            if candidates == 16 {
                let softmax = fixture(&cfg, false, DType::F64, 3)?;
                for (name, var) in &softmax.vars {
                    var.set(&f.vars.iter().find(|(n, _)| n == name).unwrap().1)?;
                }
                let off = difference(&softmax.layer.attend(&x, &Pass::new(&Mask::causal(0)), None)?)?;
                assert!(off < 1e-12, "{score:?}, all keys in {window:?}: off by {off}");
            }
        }
    }
    Ok(())
}

/// A forward pass that continues `cache`; returns outputs `[B, N, C]` and the selected keys of each sequence.
fn step(f: &Fixture, x: &Tensor, mask: &Mask, cache: &mut LayerCache) -> Result<(Tensor, Vec<Vec<i32>>)> {
    let record = RefCell::new(Vec::new());
    let y = f.layer.attend(x, &Pass { stats: Some(&record), ..Pass::new(mask) }, Some(cache))?;
    let picks = record.borrow()[0].picks.clone();
    Ok((y, picks.chunks(picks.len() / x.dim(0)?).map(<[_]>::to_vec).collect()))
}

#[test]
fn sequences_of_different_lengths_decode_together_as_alone() -> Result<()> {
    const PROMPTS: [usize; 3] = [5, 1, 9];
    let mut cases = selecting();
    cases.push(("softmax", false, config(GdConfig::default(), Some(BeaconConfig::default()))));
    for (name, _, cfg) in cases {
        let f = fixture(&cfg, name != "softmax", DType::F32, 21)?;
        let x = Numbers(31).tensor(&[3, 13, 12], 1.0, DType::F32)?;
        let part = |b: usize, at: usize, n: usize| x.narrow(0, b, 1)?.narrow(1, at, n);
        let mut alone = Vec::new();
        for (b, n) in PROMPTS.into_iter().enumerate() {
            let mut cache = LayerCache::new();
            step(&f, &part(b, 0, n)?, &Mask::causal(0), &mut cache)?;
            alone.push(cache);
        }
        let mut together = LayerCache::stack(&alone.iter().collect::<Vec<_>>())?;
        // Two steps of all, then two of the last and the first.
        let mut rows = vec![0, 1, 2];
        for i in 0..4 {
            if i == 2 {
                together = together.select(&[2, 0])?;
                rows = vec![2, 0];
            }
            let lengths: Vec<usize> = rows.iter().map(|&b| PROMPTS[b] + i).collect();
            assert_eq!(together.lengths(), lengths, "{name}");
            let next =
                rows.iter().zip(&lengths).map(|(&b, &at)| part(b, at, 1)).collect::<Result<Vec<_>>>()?;
            let mask = Mask::causal(0).with_offsets(lengths.iter().map(|&at| at as i64).collect());
            let (y, picks) = step(&f, &Tensor::cat(&next, 0)?, &mask, &mut together)?;
            for (row, &b) in rows.iter().enumerate() {
                let mask = Mask::causal(lengths[row] as i64);
                let (want, want_picks) = step(&f, &next[row], &mask, &mut alone[b])?;
                let err = (y.narrow(0, row, 1)? - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(err <= 1e-5, "{name}: sequence {b}, step {i}: off by {err}");
                assert_eq!(picks[row], want_picks[0], "{name}: sequence {b}, step {i}");
            }
        }
        let message = |r: Result<(Tensor, Vec<Vec<i32>>)>| r.expect_err("an error").to_string();
        let two = x.narrow(0, 0, 2)?.narrow(1, 0, 1)?;
        assert!(
            message(step(&f, &two, &Mask::causal(13), &mut together))
                .contains("mask offset 13 does not follow 9")
        );
        assert!(message(step(&f, &two, &Mask::none(), &mut together)).contains("need a causal mask"));
        assert!(together.select(&[2]).is_err());
    }
    Ok(())
}

fn attention(cfg: &AttentionConfig) -> Result<(GdAttention, VarMap)> {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let rotary =
        Arc::new(Rotary::new(cfg.head_dim, 64, 10_000.0, RopeScaling::None, DType::F32, &Device::Cpu)?);
    let layer = GdAttention::new(cfg, rotary, vb)?;
    let mut numbers = Numbers(1);
    let mut vars: Vec<_> = map.data().lock().expect("one thread").clone().into_iter().collect();
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, var) in vars.iter().filter(|(n, _)| !n.starts_with("gd.")) {
        assert!(!name.is_empty());
        var.set(&numbers.tensor(var.dims(), 0.5, DType::F32)?)?;
    }
    Ok((layer, map))
}

#[test]
fn stands_in_for_the_attention_of_a_candle_model() -> Result<()> {
    let (layer, _map) = attention(&config(GdConfig::default(), None))?;
    let x = Numbers(2).tensor(&[1, 6, 12], 1.0, DType::F32)?;
    let want = Module::forward(&layer, &x)?.to_vec3::<f32>()?;
    let inf = f32::NEG_INFINITY;
    let rows: Vec<f32> = (0..6).flat_map(|i| (0..6).map(move |j| if j <= i { 0.0 } else { inf })).collect();
    let mask = Tensor::from_vec(rows, (1, 1, 6, 6), &Device::Cpu)?;
    assert_eq!(layer.forward(&x, Some(&mask), 0)?.to_vec3::<f32>()?, want);
    layer.clear_kv_cache();
    // Prefill of four positions, then steps of one.
    let first = layer.forward(&x.narrow(1, 0, 4)?, Some(&mask.narrow(2, 0, 4)?.narrow(3, 0, 4)?), 0)?;
    let next = layer.forward(&x.narrow(1, 4, 1)?, None, 4)?;
    let last = layer.forward(&x.narrow(1, 5, 1)?, None, 5)?;
    let got = Tensor::cat(&[first, next, last], 1)?;
    let want = Tensor::new(want, &Device::Cpu)?;
    let err = (&got - &want)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(err <= 1e-5, "off by {err}");
    Ok(())
}

/// The gradients that a loss of `y` gives to all parameters, by name.
fn parameter_gradients(y: &Tensor, map: &VarMap) -> Result<BTreeMap<String, Vec<f32>>> {
    let w = Numbers(99).tensor(y.dims(), 1.0, y.dtype())?;
    let grads = (y * w)?.sum_all()?.backward()?;
    let vars = map.data().lock().expect("one thread");
    let of = |(name, var): (&String, &Var)| {
        let grad = grads.get(var.as_tensor()).unwrap_or_else(|| panic!("{name} receives no gradient"));
        Ok((name.clone(), grad.flatten_all()?.to_vec1()?))
    };
    vars.iter().map(of).collect()
}

#[test]
fn gradients_flow_through_forward_to_every_parameter() -> Result<()> {
    for (name, _, cfg) in selecting() {
        let (layer, map) = attention(&cfg)?;
        let mut numbers = Numbers(5);
        for (_, var) in map.data().lock().expect("one thread").iter().filter(|(n, _)| n.starts_with("gd.")) {
            let noise = numbers.tensor(var.dims(), 0.3, DType::F32)?;
            var.set(&(var.as_tensor() + noise)?)?;
        }
        let x = Numbers(2).tensor(&[1, 9, 12], 1.0, DType::F32)?;
        // Without cached positions, the gradients are those of a pass without a cache.
        let (first, plain) = (layer.forward(&x, None, 0)?, Module::forward(&layer, &x)?);
        assert_eq!(first.to_vec3::<f32>()?, plain.to_vec3::<f32>()?, "{name}");
        let grads = parameter_gradients(&first, &map)?;
        assert_eq!(grads, parameter_gradients(&plain, &map)?, "{name}");
        // After cached positions, every parameter still has a gradient.
        layer.forward(&x.narrow(1, 0, 3)?, None, 0)?;
        let later = parameter_gradients(&layer.forward(&x.narrow(1, 3, 6)?, None, 3)?, &map)?;
        for (parameter, grad) in grads.iter().chain(&later) {
            let largest = grad.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert!(largest > 0.0 && grad.iter().all(|x| x.is_finite()), "{name}: {parameter}: {largest}");
        }
    }
    Ok(())
}

#[test]
fn refuses_what_does_not_follow() -> Result<()> {
    let (layer, _map) = attention(&config(GdConfig::default(), None))?;
    let x = Numbers(2).tensor(&[1, 3, 12], 1.0, DType::F32)?;
    let message = |r: Result<Tensor>| r.expect_err("an error").to_string();
    assert!(message(layer.forward(&x, None, 5)).contains("offset 5 does not follow 0"));
    let bias = Tensor::new(&[[0f32, -0.5, -1.0], [0.0, 0.0, -0.5], [0.0, 0.0, 0.0]], &Device::Cpu)?;
    assert!(message(layer.forward(&x, Some(&bias), 0)).contains("-0.5"));
    let inf = f32::NEG_INFINITY;
    let holes = Tensor::new(&[[0f32, inf, 0.0], [0.0, inf, 0.0], [0.0, inf, 0.0]], &Device::Cpu)?;
    assert!(message(layer.forward(&x, Some(&holes), 0)).contains("neither full, causal nor"));
    let wide = Numbers(2).tensor(&[1, 3, 10], 1.0, DType::F32)?;
    assert!(message(Module::forward(&layer, &wide)).contains("hidden_size 12"));
    let odd = AttentionConfig { num_key_value_heads: 3, ..config(GdConfig::default(), None) };
    assert!(attention(&odd).map(|_| ()).expect_err("an error").to_string().contains("4 attention heads"));
    Ok(())
}
