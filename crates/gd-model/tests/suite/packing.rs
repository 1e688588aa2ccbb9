//! Order and packing of training windows: permutations, ranks, documents in windows, and the outputs of models for packed
//! documents.

use candle_core::{DType, Device, Tensor};
use gd_kernels::cross_entropy::{IGNORE, count_targets};
use gd_layer::Pass;
use gd_model::analysis::variants::variants;
use gd_model::config::{ModelConfig, PRESETS, Recipe};
use gd_model::data::{Batch, Batches, Permutation, Tokens, places};
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_testing::properties;
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn permutation(len: u64, seed: u64) -> Permutation {
    Permutation::new(len, &mut ChaCha8Rng::seed_from_u64(seed))
}

#[test]
fn every_short_length_is_permuted() {
    for len in 1..300 {
        let order = permutation(len, len);
        let mut all: Vec<u64> = (0..len).map(|i| order.at(i)).collect();
        all.sort_unstable();
        assert!(all.iter().copied().eq(0..len), "{len}: {all:?}");
    }
}

#[test]
fn the_largest_lengths_are_permuted() {
    for len in [1 << 32, (1 << 32) + 1, 1 << 63, u64::MAX] {
        let order = permutation(len, 1);
        let values: Vec<u64> = (0..1000).map(|i| order.at(i * (len / 1000))).collect();
        assert!(values.iter().all(|&x| x < len));
        let mut distinct = values.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 1000, "{len}");
    }
}

/// Over many seeds, the first value and its distance to the second one are uniformly distributed (chi-squared test).
#[test]
fn permutations_are_uniform() {
    const LEN: usize = 10;
    const SEEDS: u64 = 20_000;
    let (mut first, mut steps) = ([0f64; LEN], [0f64; LEN]);
    for seed in 0..SEEDS {
        let order = permutation(LEN as u64, seed);
        let (a, b) = (order.at(0) as usize, order.at(1) as usize);
        first[a] += 1.0;
        steps[(b + LEN - a) % LEN] += 1.0;
    }
    let chi2 = |counts: &[f64]| -> f64 {
        let want = counts.iter().sum::<f64>() / counts.len() as f64;
        counts.iter().map(|n| (n - want).powi(2) / want).sum()
    };
    // The 99.9 % quantiles for 9 and 8 degrees of freedom are 27.9 and 26.1.
    assert!(chi2(&first) < 27.9, "{first:?}");
    assert_eq!(steps[0], 0.0);
    assert!(chi2(&steps[1..]) < 26.1, "{steps:?}");
}

fn rows(t: &candle_core::Tensor) -> Vec<Vec<u32>> {
    t.to_vec2().unwrap()
}

proptest! {
    #![proptest_config(properties(64))]

    #[test]
    fn any_length_is_permuted(len in 1u64..5000, seed: u64) {
        let order = permutation(len, seed);
        let mut visited = vec![false; len as usize];
        for i in 0..len {
            prop_assert!(!std::mem::replace(&mut visited[order.at(i) as usize], true));
        }
    }

    #[test]
    fn ranks_share_the_batch_of_one_process(
        micro in 0u64..1000, batch in 1usize..20, world in 1usize..9, seed: u64,
    ) {
        let tokens = Tokens::documents((0..90u32).map(|d| (0..d % 13 + 1).map(|i| 1000 * d + i).collect()));
        let batches = Batches::new(tokens, seed);
        let whole = batches.batch(places(micro, batch, 0, 1), 8, &Device::Cpu).unwrap();
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for share in (0..world).map(|rank| places(micro, batch, rank, world)).filter(|s| !s.is_empty()) {
            let part = batches.batch(share, 8, &Device::Cpu).unwrap();
            inputs.extend(rows(&part.inputs));
            targets.extend(rows(&part.targets));
        }
        prop_assert_eq!(inputs, rows(&whole.inputs));
        prop_assert_eq!(targets, rows(&whole.targets));
    }

    /// Token `1000 d + i` is the i-th of document d, so that a token identifies its document and position.
    #[test]
    fn rows_predict_inside_documents_and_the_mask_cuts_between_them(
        lengths in prop::collection::vec(1usize..40, 1..30), context in 1usize..50, rows_of in 1usize..4,
    ) {
        let text = |(d, &n): (usize, &usize)| (0..n).map(|i| (1000 * d + i) as u32).collect::<Vec<_>>();
        let all: Vec<u32> = lengths.iter().enumerate().flat_map(text).collect();
        let tokens = Tokens::documents(lengths.iter().enumerate().map(text));
        prop_assert_eq!(tokens.len(), all.len());
        let windows: Vec<_> = tokens.windows(context).collect();
        let mut predicted = 0;
        for group in windows.chunk_by(|a, b| a.len() == b.len()).flat_map(|g| g.chunks(rows_of)) {
            let batch = Batch::new(&tokens, group, &Device::Cpu).unwrap();
            let n = group[0].len();
            batch.mask.validate(group.len(), n).unwrap();
            for (row, window) in group.iter().enumerate() {
                let (x, y) = (&rows(&batch.inputs)[row], &rows(&batch.targets)[row]);
                prop_assert_eq!(&x[..], &all[window.clone()]);
                for t in 0..n {
                    let same = all[window.start + t] / 1000 == all[window.start + t + 1] / 1000;
                    prop_assert_eq!(y[t], if same { all[window.start + t + 1] } else { IGNORE });
                    predicted += usize::from(same);
                    let first = (0..=t).find(|&s| x[s] / 1000 == x[t] / 1000).unwrap();
                    prop_assert_eq!(batch.mask.visible(row, t, n), first..t + 1);
                }
            }
        }
        prop_assert_eq!(predicted, all.len() - lengths.len());
    }
}

#[test]
fn a_single_document_has_a_causal_mask() {
    let batches = Batches::new((0..100).collect::<Vec<u32>>().into(), 1);
    let batch = batches.batch(0..3, 8, &Device::Cpu).unwrap();
    assert_eq!(batch.mask, gd_kernels::Mask::causal(0));
}

/// A model in f64 with random parameters, none of which is a matrix of zeros.
fn random_model(config: &ModelConfig) -> (Transformer, Params) {
    let params = Params::new(3, DType::F64, &Device::Cpu);
    let model = Transformer::new(config, params.builder()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    for (_, var) in params.vars() {
        let noise: Vec<f64> = (0..var.elem_count()).map(|_| rng.random_range(-0.15..0.15)).collect();
        let noise = Tensor::from_vec(noise, var.shape(), &Device::Cpu).unwrap();
        var.set(&(var.as_tensor() + noise).unwrap()).unwrap();
    }
    (model, params)
}

/// The rows of logits, and the summed loss of the predicted tokens, of one window over all `tokens`.
fn read(model: &Transformer, tokens: &Tokens, hardness: f64) -> (Vec<Vec<f64>>, Tensor) {
    let all: Vec<_> = tokens.windows(usize::MAX >> 1).collect();
    let Batch { inputs, targets, mask, .. } = Batch::new(tokens, &all, &Device::Cpu).unwrap();
    let pass = Pass { hardness, ..Pass::new(&mask) };
    let logits = model.forward(&inputs, &pass, None).unwrap().flatten_to(1).unwrap();
    let mean = model.loss(&inputs, &targets, &pass).unwrap();
    let sum = (mean * count_targets(&targets.flatten_all().unwrap()).unwrap() as f64).unwrap();
    (logits.to_vec2().unwrap(), sum)
}

/// Every mechanism of every preset that has options of its own, also with shared key-value heads.
fn configurations() -> Vec<(String, ModelConfig)> {
    let (mut all, mut seen) = (Vec::new(), Vec::new());
    for (preset, _) in PRESETS {
        let mut base = Recipe::load(preset).unwrap().model;
        // The result does not depend on width and depth.
        (base.num_hidden_layers, base.vocab_size) = (2, 40);
        (base.hidden_size, base.intermediate_size, base.head_dim) = (32, 48, 8);
        (base.num_attention_heads, base.num_key_value_heads) = (4, 4);
        base.gd.mechanism.truncate(1);
        base.gd.selecting_heads = vec![2];
        if seen.contains(&base.gd) {
            continue;
        }
        seen.push(base.gd.clone());
        // Native sparse attention refuses packed rows: it divides a row into blocks from its start.
        for variant in variants().iter().filter(|v| v.applies(&base) && v.name != "nsa") {
            for kv in [4, 2] {
                let config = ModelConfig { num_key_value_heads: kv, ..variant.config(&base).unwrap() };
                all.push((format!("{preset}, {}, {kv} key-value heads", variant.name), config));
            }
        }
    }
    all
}

#[test]
fn a_packed_row_gives_the_outputs_of_each_document_alone() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let lengths = [2usize, 9, 1, 14, 3, 11];
    let documents = lengths.map(|n| (0..n).map(|_| rng.random_range(0..40)).collect::<Vec<u32>>());
    let packed = Tokens::documents(documents.clone());
    let configurations = configurations();
    assert!(configurations.len() >= 8);
    for (name, config) in configurations {
        let (model, params) = random_model(&config);
        for hardness in [0.0, 1.0] {
            let (logits, loss) = read(&model, &packed, hardness);
            let grads = loss.backward().unwrap();
            let (mut at, mut alone_loss) = (0, None::<Tensor>);
            for document in &documents {
                if document.len() > 1 {
                    let (alone, loss) = read(&model, &document.clone().into(), hardness);
                    for (a, b) in logits[at..].iter().flatten().zip(alone.iter().flatten()) {
                        assert!((a - b).abs() <= 1e-9 * (1.0 + b.abs()), "{name}: logit {a} against {b}");
                    }
                    alone_loss = Some(match alone_loss {
                        None => loss,
                        Some(sum) => (loss + sum).unwrap(),
                    });
                }
                at += document.len();
            }
            let alone = alone_loss.unwrap().backward().unwrap();
            for (parameter, var) in params.vars() {
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f64>().unwrap();
                let (a, b) = (grads.get(&var).map(flat), alone.get(&var).map(flat));
                assert_eq!(a.is_some(), b.is_some(), "{name}: {parameter}");
                for (a, b) in a.iter().flatten().zip(b.iter().flatten()) {
                    let bound = 1e-8 * (1.0 + b.abs());
                    assert!((a - b).abs() <= bound, "{name}: gradient of {parameter}: {a} against {b}");
                }
            }
        }
    }
}
