//! What holds for the weights of every mechanism, and the limits in which one mechanism is another.

use candle_core::{D, DType, Result, Tensor};
use gd_layer::mechanisms::{AttentionMechanism, TABLE};
use gd_testing::properties;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::problem::{Sizes, Subject, mechanism, subjects};
use crate::layers::Numbers;
use crate::layers::difference;

fn sizes() -> impl Strategy<Value = Sizes> {
    (1usize..3, 1usize..4, 1usize..7, 0usize..5).prop_map(|(key_value_heads, group, queries, more)| Sizes {
        heads: key_value_heads * group,
        key_value_heads,
        queries,
        keys: queries + more,
    })
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Weights are at least 0 and sum to 1 with that of no key, except in a row without keys, where weights and output
/// are 0.
fn check_rows(subject: &Subject, sizes: &Sizes, seed: u64) -> Result<()> {
    let name = subject.name();
    for masked in [false, true] {
        let inputs = subject.problem(sizes, masked, seed, DType::F64)?;
        let outputs = subject.attend(&inputs)?;
        let weights = outputs.get("weights")?;
        let total = weights.sum_keepdim(D::Minus1)?;
        let total = match outputs.tensors.get("null") {
            Some(null) => (total + null)?,
            None => total,
        };
        if name != "differential" {
            assert!(values(weights)?.iter().all(|&w| w >= 0.0), "{name}: a negative weight");
        }
        // A difference of softmax maps sums to 1 - lambda; sigmoids do not sum to anything.
        let expected = match name {
            "differential" => Some(1.0 - values(outputs.get("lambda")?)?[0]),
            "sigmoid" => None,
            _ => Some(1.0),
        };
        // Patterns and causal masks hide more keys than the given mask, whose row 0 hides all.
        let sees = match inputs.optional("mask") {
            Some(mask) if name != "patterns" && name != "selective" => values(&mask.max_keepdim(1)?)?,
            Some(_) => vec![f64::NAN; sizes.queries],
            None => vec![1.0; sizes.queries],
        };
        for (row, total) in values(&total)?.into_iter().enumerate() {
            let sees = sees[row % sizes.queries];
            if sees == 1.0 {
                let sums = expected.is_none_or(|expected| (total - expected).abs() < 1e-9);
                assert!(sums, "{name}: row {row} sums to {total}, not {expected:?}");
            } else if sees == 0.0 {
                let null = if outputs.tensors.contains_key("null") { 1.0 } else { 0.0 };
                assert!(total == null, "{name}: row {row} without keys sums to {total}");
            }
        }
        if masked {
            let out = values(&outputs.get("out")?.narrow(D::Minus2, 0, 1)?)?;
            assert!(out.iter().all(|&x| x == 0.0), "{name}: an output of a query without keys");
        }
    }
    Ok(())
}

/// The keys, values and columns of mask and noise of `inputs` in another order, and the weights in it.
fn check_permutation(subject: &Subject, sizes: &Sizes, seed: u64) -> Result<()> {
    let inputs = subject.problem(sizes, true, seed, DType::F64)?;
    let mut order: Vec<u32> = (0..sizes.keys as u32).collect();
    let mut numbers = Numbers(seed + 1);
    order.sort_by_cached_key(|_| (numbers.next() * 1e6) as i64);
    let order = Tensor::new(order, &candle_core::Device::Cpu)?;
    let mut permuted = inputs.clone();
    for (tensor, dim) in
        [("k", D::Minus2), ("e", D::Minus2), ("v", D::Minus2), ("mask", D::Minus1), ("noise", D::Minus1)]
    {
        if let Some(t) = inputs.optional(tensor) {
            permuted.insert(tensor, t.contiguous()?.index_select(&order, dim)?);
        }
    }
    let (plain, other) = (subject.attend(&inputs)?, subject.attend(&permuted)?);
    let expected = plain.get("weights")?.contiguous()?.index_select(&order, D::Minus1)?;
    let moved = difference(&expected, other.get("weights")?)?;
    assert!(moved < 1e-10, "{}: weights differ by {moved} in another order", subject.name());
    if subject.name() != "pointer" {
        let moved = difference(plain.get("out")?, other.get("out")?)?;
        assert!(moved < 1e-10, "{}: outputs differ by {moved} in another order", subject.name());
    }
    Ok(())
}

/// A vector added to all keys adds the same to all scores of a row.
fn check_shift(subject: &Subject, sizes: &Sizes, seed: u64) -> Result<()> {
    let inputs = subject.problem(sizes, false, seed, DType::F64)?;
    let keys = inputs.get(subject.keys())?;
    let shift = Numbers(seed + 2).tensor(&[keys.dim(D::Minus1)?], 3.0, DType::F64)?;
    let shifted = inputs.clone().with(subject.keys(), &keys.broadcast_add(&shift)?);
    let moved =
        difference(subject.attend(&inputs)?.get("weights")?, subject.attend(&shifted)?.get("weights")?)?;
    assert!(moved < 1e-9, "{}: weights differ by {moved} after a shift", subject.name());
    Ok(())
}

/// Sparsemax by its definition with sorted scores.
fn projection(z: &[f64]) -> Vec<f64> {
    let mut sorted = z.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut threshold) = (0.0, 0.0);
    for (j, x) in sorted.iter().enumerate() {
        sum += x;
        if 1.0 + (j + 1) as f64 * x > sum {
            threshold = (sum - 1.0) / (j + 1) as f64;
        }
    }
    z.iter().map(|x| (x - threshold).max(0.0)).collect()
}

/// The greatest difference between the weights of two mechanisms on the problem of the first.
fn between(first: Value, second: Value, sizes: &Sizes, seed: u64) -> Result<f64> {
    let subject = Subject { mechanism: mechanism(first), equivariant: false, shift_invariant: false };
    let inputs = subject.problem(sizes, true, seed, DType::F64)?;
    let [first, second] = [&subject.mechanism, &mechanism(second)].map(|m| m.attend(&inputs));
    difference(first?.get("weights")?, second?.get("weights")?)
}

proptest! {
    #![proptest_config(properties(24))]

    #[test]
    fn weights_are_a_distribution_or_zero(sizes in sizes(), seed in any::<u64>()) {
        for subject in subjects() {
            check_rows(&subject, &subject.fit(sizes), seed).unwrap();
        }
    }

    #[test]
    fn the_order_of_the_keys_does_not_matter(sizes in sizes(), seed in any::<u64>()) {
        for subject in subjects().into_iter().filter(|subject| subject.equivariant) {
            check_permutation(&subject, &subject.fit(sizes), seed).unwrap();
        }
    }

    #[test]
    fn a_shift_of_all_scores_does_not_matter(sizes in sizes(), seed in any::<u64>()) {
        for subject in subjects().into_iter().filter(|subject| subject.shift_invariant) {
            check_shift(&subject, &subject.fit(sizes), seed).unwrap();
        }
    }

    #[test]
    fn limits_of_mechanisms_are_other_mechanisms(sizes in sizes(), seed in any::<u64>()) {
        let softmax = json!({"name": "softmax"});
        let pairs = [
            (json!({"name": "entmax", "alpha": 2.0}), json!({"name": "sparsemax"})),
            (json!({"name": "topk", "k": sizes.keys}), softmax.clone()),
            (json!({"name": "explicit_sparse", "k": 2 * sizes.keys}), softmax.clone()),
            (json!({"name": "hopfield", "T": 0}), softmax.clone()),
            (json!({"name": "topk", "k": 1}), json!({"name": "hard"})),
            (json!({"name": "patterns", "pattern": "longformer", "w": 2 * sizes.keys}), softmax),
        ];
        for (first, second) in pairs {
            let what = format!("{first} and {second}");
            let apart = between(first, second, &sizes, seed).unwrap();
            prop_assert!(apart < 1e-10, "{what} differ by {apart}");
        }
        // Entmax approaches softmax as alpha approaches 1.
        let near = between(json!({"name": "entmax", "alpha": 1.0001}), json!({"name": "softmax"}), &sizes, seed).unwrap();
        prop_assert!(near < 0.01, "entmax with alpha 1.0001 and softmax differ by {near}");
    }

    #[test]
    fn sparsemax_is_the_projection_onto_the_simplex(sizes in sizes(), seed in any::<u64>()) {
        let subject = Subject {
            mechanism: mechanism(json!({"name": "sparsemax"})), equivariant: true, shift_invariant: true,
        };
        let outputs = subject.attend(&subject.problem(&sizes, false, seed, DType::F64).unwrap()).unwrap();
        let [scores, weights] =
            ["scores", "weights"].map(|name| values(outputs.get(name).unwrap()).unwrap());
        for (z, w) in scores.chunks(sizes.keys).zip(weights.chunks(sizes.keys)) {
            let expected = projection(z);
            prop_assert!(w.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-12), "{w:?}, not {expected:?}");
        }
    }

    #[test]
    fn differential_attention_with_lambda_0_is_its_first_map(sizes in sizes(), seed in any::<u64>()) {
        let subject = Subject {
            mechanism: mechanism(json!({"name": "differential", "lambda_init": 0.0})),
            equivariant: false,
            shift_invariant: false,
        };
        let mut inputs = subject.problem(&sizes, true, seed, DType::F64).unwrap();
        for name in ["lq1", "lq2"] {
            inputs.insert(name, inputs.get(name).unwrap().zeros_like().unwrap());
        }
        let first = |name: &str| -> Result<Tensor> {
            let (b, h, n, d) = inputs.get(name)?.dims4()?;
            inputs.get(name)?.reshape((b, h / 2, 2, n, d))?.narrow(2, 0, 1)?.squeeze(2)
        };
        let plain = inputs.clone().with("q", &first("q").unwrap()).with("k", &first("k").unwrap());
        let softmax = mechanism(json!({"name": "softmax"})).attend(&plain).unwrap();
        let differential = subject.attend(&inputs).unwrap();
        let apart = difference(softmax.get("weights").unwrap(), differential.get("weights").unwrap()).unwrap();
        prop_assert!(apart < 1e-12, "they differ by {apart}");
    }

    #[test]
    fn updates_of_a_hopfield_network_do_not_increase_its_energy(sizes in sizes(), seed in any::<u64>(), beta in 0.1f64..8.0) {
        let subject = Subject {
            mechanism: mechanism(json!({"name": "hopfield", "T": 4, "beta": beta})),
            equivariant: false,
            shift_invariant: false,
        };
        let outputs = subject.attend(&subject.problem(&sizes, false, seed, DType::F64).unwrap()).unwrap();
        for t in 0..4 {
            let energy = |t: usize| values(outputs.get(&format!("E.{t}")).unwrap()).unwrap();
            for (before, after) in energy(t).iter().zip(energy(t + 1)) {
                prop_assert!(after <= before + 1e-12 && after >= -1e-12, "update {t}: {before} to {after}");
            }
        }
    }

    #[test]
    fn all_keys_that_tie_are_treated_as_the_mechanism_says(keys in 2usize..9, k in 1usize..4) {
        // All scores are 0: every key ties with every other.
        let sizes = Sizes { heads: 1, key_value_heads: 1, queries: 1, keys };
        let weights = |config: Value| -> Result<Vec<f64>> {
            let subject = Subject { mechanism: mechanism(config), equivariant: false, shift_invariant: false };
            let inputs = subject.problem(&sizes, false, 7, DType::F64)?;
            let zeros = inputs.get("q")?.zeros_like()?;
            let no_noise = Tensor::zeros((2, 1, 1, keys), DType::F64, zeros.device())?;
            let outputs = subject.attend(&inputs.with("q", &zeros).with("noise", &no_noise))?;
            Ok(values(outputs.get("weights")?)?[..keys].to_vec())
        };
        let k = k.min(keys);
        let share = |from: usize, to: usize| -> Vec<f64> {
            (0..keys).map(|j| if (from..to).contains(&j) { 1.0 / (to - from) as f64 } else { 0.0 }).collect()
        };
        for (config, expected) in [
            (json!({"name": "topk", "k": k}), share(0, k)),
            (json!({"name": "explicit_sparse", "k": k}), share(0, keys)),
            (json!({"name": "hard", "ties": "first"}), share(0, 1)),
            (json!({"name": "hard", "ties": "last"}), share(keys - 1, keys)),
            (json!({"name": "hard", "ties": "average"}), share(0, keys)),
            (json!({"name": "sparsemax"}), share(0, keys)),
        ] {
            let what = config.to_string();
            let all = weights(config).unwrap();
            prop_assert!(all.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-15), "{what}: {all:?}");
        }
    }
}

#[test]
fn scores_of_any_size_have_finite_weights() -> Result<()> {
    let sizes = Sizes { heads: 2, key_value_heads: 1, queries: 3, keys: 5 };
    for subject in subjects() {
        let sizes = subject.fit(sizes);
        for dtype in [DType::F64, DType::F32] {
            let inputs = subject.problem(&sizes, true, 3, dtype)?;
            let query = if subject.name() == "pointer" { "dec" } else { "q" };
            let inputs = inputs.clone().with(query, &(inputs.get(query)? * 1e4)?);
            let outputs = subject.attend(&inputs)?;
            let finite = values(outputs.get("weights")?)?
                .iter()
                .chain(&values(outputs.get("out")?)?)
                .all(|w| w.is_finite());
            assert!(finite, "{} in {dtype:?}", subject.name());
        }
    }
    Ok(())
}

#[test]
fn half_precision_is_computed_in_f32() -> Result<()> {
    let sizes = Sizes { heads: 4, key_value_heads: 2, queries: 5, keys: 5 };
    for subject in subjects() {
        for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let inputs = subject.problem(&sizes, true, 11, dtype)?;
            let mut wide = inputs.clone();
            for &(name, _) in subject.mechanism.info().inputs.iter().chain(subject.mechanism.info().learned) {
                if let Some(t) = inputs.optional(name) {
                    wide.insert(name, t.to_dtype(DType::F32)?);
                }
            }
            if let Some(noise) = inputs.optional("noise") {
                wide.insert("noise", noise.to_dtype(DType::F32)?);
            }
            let (half, wide) = (subject.attend(&inputs)?, subject.attend(&wide)?);
            assert_eq!(half.get("out")?.dtype(), dtype, "{}", subject.name());
            let apart = difference(half.get("weights")?, wide.get("weights")?)?;
            assert!(apart < tolerance, "{} in {dtype:?}: {apart}", subject.name());
        }
    }
    Ok(())
}

#[test]
fn a_configuration_has_the_parameters_of_the_table_and_no_others() -> Result<()> {
    for &(name, info) in TABLE {
        let default = mechanism(json!({ "name": name }));
        assert_eq!(Some(&default), AttentionMechanism::named(name).as_ref(), "{name}");
        assert_eq!(default.name(), name);
        let written = serde_json::to_value(&default).expect("JSON");
        let mut keys: Vec<&str> = written.as_object().expect("keys").keys().map(String::as_str).collect();
        keys.retain(|key| *key != "name");
        let mut parameters: Vec<&str> = info.parameters.iter().map(|(parameter, _)| *parameter).collect();
        keys.sort_unstable();
        parameters.sort_unstable();
        assert_eq!(keys, parameters, "{name}");
        let error =
            serde_json::from_value::<AttentionMechanism>(json!({ "name": name, "colour": 1 })).unwrap_err();
        assert!(error.to_string().contains("colour"), "{name}: {error}");
    }
    let error =
        serde_json::from_value::<AttentionMechanism>(json!({"name": "softmaxx"})).unwrap_err().to_string();
    assert!(error.contains("softmaxx") && error.contains("sparsemax"), "{error}");
    Ok(())
}

#[test]
fn bad_parameters_and_tensors_are_errors_that_name_them() -> Result<()> {
    let sizes = Sizes { heads: 2, key_value_heads: 1, queries: 3, keys: 3 };
    let subject =
        |config: Value| Subject { mechanism: mechanism(config), equivariant: false, shift_invariant: false };
    let softmax = subject(json!({"name": "softmax"}));
    let inputs = softmax.problem(&sizes, false, 5, DType::F64)?;
    for (config, part) in [
        (json!({"name": "topk", "k": 0}), "k is 0"),
        (json!({"name": "explicit_sparse", "k": 0}), "k is 0"),
        (json!({"name": "entmax", "alpha": 1.0}), "alpha 1"),
        (json!({"name": "hard", "gumbel_tau": 0.0}), "gumbel_tau 0"),
        (json!({"name": "patterns", "l": 0}), "l is 0"),
        (json!({"name": "patterns", "pattern": "fixed", "l": 2, "c": 3}), "c 3"),
        (json!({"name": "patterns", "pattern": "bigbird", "block": 0}), "block is 0"),
        (json!({"name": "differential", "eps": 0.0}), "eps 0"),
        (json!({"name": "sigmoid", "keys": 0}), "keys is 0"),
        (json!({"name": "hopfield", "beta": -1.0}), "beta -1"),
        (json!({"name": "sink"}), "`t` is missing"),
        (json!({"name": "patterns", "pattern": "bigbird"}), "`rand_blocks` is missing"),
        (json!({"name": "gated"}), "`Wg` is missing"),
    ] {
        let error = subject(config.clone()).attend(&inputs).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(part), "{config}: {error}");
    }
    let long = Tensor::ones((4, 3), DType::U8, &candle_core::Device::Cpu)?;
    let wide = inputs.get("k")?.repeat((1, 3, 1, 1))?;
    for (inputs, part) in [
        (inputs.clone().with("mask", &long), "mask [4, 3]"),
        (inputs.clone().with("mask", inputs.get("q")?), "u8 [N, M]"),
        (inputs.clone().with("k", &wide), "2 query heads"),
        (inputs.clone().with("k", &inputs.get("k")?.narrow(3, 0, 2)?), "last dimension"),
    ] {
        let error = softmax.attend(&inputs).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}, not {part}");
    }
    Ok(())
}
