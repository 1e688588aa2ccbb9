//! Training of models on an emulated GPU: losses, gradients of all parameters and whole runs, against the CPU path.

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::config::{self, ModelConfig, Recipe};
use gd_model::data::{Corpus, Texts};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::train::Trainer;
use serde_json::{Value, json};

use crate::graph::relative_difference;
use crate::targets;

/// A tiny model with the block `gd` of its config.
pub(crate) fn config(gd: &Value) -> ModelConfig {
    config::parse(json!({
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 48,
        "tie_word_embeddings": false, "gd": gd,
    }))
    .unwrap_or_else(|problems| panic!("{problems:?}"))
}

/// Models that together have every part of a selecting layer, and one with softmax attention.
pub(crate) fn models() -> [(&'static str, Value); 5] {
    let beacon = json!({ "conv_width": 4, "averages": 2, "prior": true });
    let with_protected = json!({
        "conv_width": 3, "averages": 1, "prior": true, "protected": 2,
        "barrier": { "floor": 0.1, "margin": 2.0, "strength": 0.5, "entropy_trigger": 0.5, "slack": 0.5 },
    });
    [
        ("softmax", json!({ "mechanism": ["softmax"] })),
        ("softmax with a Beacon", json!({ "mechanism": ["softmax"], "beacon": beacon })),
        ("gd with a Beacon", json!({ "mechanism": ["gd"], "qk_norm": true, "beacon": beacon })),
        (
            "gd with protected keys",
            json!({ "mechanism": ["gd"], "beacon": with_protected, "select": {
                "candidates": 4, "gate": { "energy": { "temperature": 1.0 } }, "threshold": 1.2,
            } }),
        ),
        (
            "gd in rounds",
            json!({ "mechanism": ["gd", "softmax"], "select": {
                "candidates": 8, "gate": "coherence", "rounds": 2, "value_floor": 0.1, "estimator": "reinmax",
            } }),
        ),
    ]
}

/// A model whose parameters are all perturbed, so that every part of it affects the result.
pub(crate) fn perturbed(config: &ModelConfig, dtype: DType) -> Result<(Transformer, Params)> {
    let params = Params::new(5, dtype, &Device::Cpu);
    let model = Transformer::new(config, params.builder()).unwrap();
    for (at, (_, var)) in params.vars().iter().enumerate() {
        let noise: Vec<f32> =
            (0..var.elem_count()).map(|i| ((i * 37 + at * 101) as f32 * 12.9898).sin() * 0.1).collect();
        let noise = Tensor::from_vec(noise, var.shape(), &Device::Cpu)?.to_dtype(dtype)?;
        var.set(&(var.as_detached_tensor() + noise)?)?;
    }
    Ok((model, params))
}

/// The loss and the gradient of every parameter, by name.
fn loss_and_gradients(gd: &Value, mask: &Mask, hardness: f64) -> Result<Vec<(String, Tensor)>> {
    let (model, params) = perturbed(&config(gd), DType::F32)?;
    let (rows, n) = (2, 21);
    let ids: Vec<u32> = (0..rows * n).map(|i| (i * 37 % 251) as u32).collect();
    let next: Vec<u32> = ids.iter().map(|i| i * 5 % 256).collect();
    let tensor = |ids| Tensor::from_vec(ids, (rows, n), &Device::Cpu);
    let pass = Pass { hardness, ..Pass::new(mask) };
    let loss = model.loss(&tensor(ids)?, &tensor(next)?, &pass)?;
    let grads = loss.backward()?;
    let mut all = vec![("the loss".to_owned(), loss.detach())];
    for (name, var) in params.vars() {
        let grad = grads.get(&var).unwrap_or_else(|| panic!("{name} got no gradient"));
        all.push((name, grad.clone()));
    }
    Ok(all)
}

#[test]
fn a_step_has_the_same_loss_and_gradients_as_on_the_cpu() -> Result<()> {
    let packed = || Mask::causal(0).packed(vec![vec![0, 4, 21], vec![0, 21]]);
    for (at, (name, gd)) in models().into_iter().enumerate() {
        for (mask, hardness) in [(Mask::causal(0), 1.0), (packed(), 0.3)] {
            let want = loss_and_gradients(&gd, &mask, hardness)?;
            for (which, target) in targets().into_iter().enumerate() {
                // Softmax attention has no kernels; the others go through all of them with one mask or the other.
                if (at == 0 && which > 0) || (hardness < 1.0 && (at + which) % 3 != 0) {
                    continue;
                }
                let got = target.run(|| loss_and_gradients(&gd, &mask, hardness))?;
                assert_eq!(want.len(), got.len());
                for ((part, a), (_, b)) in want.iter().zip(&got) {
                    let off = relative_difference(b, a);
                    assert!(
                        off <= 1e-3,
                        "{name} on {}, {hardness}, {part}: a relative difference of {off}",
                        target.name()
                    );
                    let largest = a.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
                    assert!(largest > 0.0, "{name}, {hardness}: {part} is 0");
                }
                target.count();
            }
        }
    }
    Ok(())
}

#[test]
fn every_parameter_learns() {
    for (name, gd) in models() {
        for target in targets() {
            let (count, faults) = target
                .run(|| gd_model::analysis::gradient_check::check(&config(&gd), 7, &Device::Cpu))
                .unwrap();
            assert!(count > 20 && faults.is_empty(), "{name} on {}: {faults:?}", target.name());
            target.count();
        }
    }
}

/// Runs three steps. Returns loss and gradient norm of each, the validation loss, and the tensors of the state.
fn run(settings: Value) -> (Vec<[f64; 2]>, f64, Vec<Tensor>) {
    let mut recipe: Value =
        serde_json::from_str(include_str!("../../../../crates/gd-model/tests/fixtures/small.json")).unwrap();
    let train = recipe["train"].as_object_mut().unwrap();
    train.extend(
        json!({ "steps": 3, "batch": 2, "context": 19, "eval_every": 3 }).as_object().unwrap().clone(),
    );
    train.extend(settings.as_object().unwrap().clone());
    let recipe: Recipe = config::parse(recipe).unwrap_or_else(|problems| panic!("{problems:?}"));
    let text: String = (0..600).map(|i| ["the ", "key ", "of ", "a ", "query "][i * i % 7 % 5]).collect();
    let texts = Texts::split(&[text], 0.1).unwrap();
    let corpus = Corpus::encode(&texts, &Tokenizer::bytes().unwrap()).unwrap();
    let mut trainer = Trainer::new(recipe, corpus, 3, &Device::Cpu).unwrap();
    let (mut steps, mut valid) = (Vec::new(), f64::NAN);
    trainer
        .run(|step| {
            steps.push([step.loss, step.grad_norm]);
            valid = step.valid_loss.unwrap_or(valid);
            Ok(())
        })
        .unwrap();
    let state = trainer.state().unwrap();
    (steps, valid, state.tensors.into_values().collect())
}

#[test]
fn runs_take_the_same_steps() {
    let runs = [
        (json!({}), 1e-3),
        (json!({ "checkpoint_blocks": true, "accumulation": 2, "muon": {}, "ema": { "decay": 0.9 } }), 5e-3),
        (json!({ "precision": "bf16" }), 3e-2),
    ];
    for (settings, bound) in runs {
        let (want, valid, state) = run(settings.clone());
        assert!(valid.is_finite() && want.len() == 3);
        for target in targets() {
            let (got, got_valid, got_state) = target.run(|| run(settings.clone()));
            let off = |a: f64, b: f64| ((a - b) / a).abs();
            for (step, ([loss, norm], [got_loss, got_norm])) in want.iter().zip(&got).enumerate() {
                let close = off(*loss, *got_loss) <= bound && off(*norm, *got_norm) <= 10.0 * bound;
                let name = target.name();
                assert!(
                    close,
                    "{settings} on {name}, step {step}: loss {got_loss}, norm {got_norm}; expected {loss}, {norm}"
                );
            }
            assert!(
                off(valid, got_valid) <= bound,
                "{settings}: validation loss {got_valid} instead of {valid}"
            );
            assert_eq!(state.len(), got_state.len());
            target.count();
        }
    }
}
