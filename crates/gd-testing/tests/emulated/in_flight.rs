//! A trainer that launches a step before it has read the result of the previous one ends with the same bits as one that
//! waits for every step, also when updates are skipped.

use candle_core::{DType, Device, Tensor, Var};
use gd_model::config::{self, Recipe};
use gd_model::data::{Corpus, Tokens};
use gd_model::train::{Step, Trainer};
use serde_json::{Value, json};

use crate::targets;

/// A trainer of a very small model on a short text.
fn trainer(settings: Value) -> Trainer {
    let mut recipe: Value =
        serde_json::from_str(include_str!("../../../../crates/gd-model/tests/fixtures/small.json")).unwrap();
    let train = recipe["train"].as_object_mut().unwrap();
    let short = json!({
        "steps": 40, "batch": 2, "context": 17, "eval_every": 39, "save_every": 39,
        "guard": { "window": 16, "least": 4, "sigma": 6.0, "stop_after": 3 },
    });
    train.extend(short.as_object().unwrap().clone());
    train.extend(settings.as_object().unwrap().clone());
    let mut recipe: Recipe = config::parse(recipe).unwrap_or_else(|problems| panic!("{problems:?}"));
    recipe.model.vocab_size = 31;
    let tokens: Vec<u32> = (0..400).map(|i| (i * i % 31) as u32).collect();
    let n = tokens.len();
    let tokens = Tokens::from(tokens);
    let corpus = Corpus { train: tokens.clone(), valid: tokens, train_bytes: n, valid_bytes: n };
    Trainer::new(recipe, corpus, 3, &Device::Cpu).unwrap()
}

/// The weight of the last norm: a NaN in it makes every gradient NaN.
fn last_norm(trainer: &Trainer) -> (String, Var) {
    trainer.params.vars().into_iter().find(|(name, _)| name == "model.norm.weight").unwrap()
}

/// The bits of every tensor of a run, by name.
type Bits = Vec<(String, Vec<u32>)>;

/// The bits of weights, moments and counts of updates.
fn bits(trainer: &mut Trainer) -> Bits {
    let state = trainer.state().unwrap().tensors;
    let all = trainer.params.tensors().into_iter().chain(state);
    let bits = |t: &Tensor| -> Vec<u32> {
        let floats = t.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        floats.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    all.map(|(name, t)| (name, bits(&t))).collect()
}

/// Runs six steps, of which the third and the fourth have NaN gradients, and waits for every one (`at_once`) or as late
/// as the trainer allows. Returns the number of steps that each call reported, the steps, and all bits at the end.
fn steps(settings: &Value, at_once: bool) -> (Vec<usize>, Vec<Step>, Bits) {
    let mut trainer = trainer(settings.clone());
    let (_, norm) = last_norm(&trainer);
    let (mut reported, mut all, mut good) = (Vec::new(), Vec::new(), None);
    for step in 1..=6 {
        if step == 3 {
            good = Some(norm.as_detached_tensor().copy().unwrap());
            norm.set(&(norm.as_detached_tensor() * f64::NAN).unwrap()).unwrap();
        } else if step == 5 {
            norm.set(&good.take().unwrap()).unwrap();
        }
        let steps = if at_once { vec![trainer.train_step().unwrap()] } else { trainer.next_steps().unwrap() };
        reported.push(steps.len());
        all.extend(steps);
    }
    if !at_once && trainer.is_asynchronous() {
        let error = trainer.state().expect_err("a state without the last step's outcome").to_string();
        assert!(error.contains("step 6"), "{error}");
    }
    let rest = trainer.drain(0).unwrap();
    reported.push(rest.len());
    all.extend(rest);
    let bits = bits(&mut trainer);
    (reported, all, bits)
}

#[test]
fn steps_in_flight_give_the_same_bits_as_waiting() {
    for settings in [json!({}), json!({ "precision": "bf16", "accumulation": 2 })] {
        let (_, on_cpu, _) = steps(&settings, true);
        for target in targets() {
            let (waits, want, at_once) = target.run(|| steps(&settings, true));
            let (reported, got, late) = target.run(|| steps(&settings, false));
            assert_eq!((waits, reported), (vec![1, 1, 1, 1, 1, 1, 0], vec![0, 1, 1, 1, 1, 1, 1]));
            for (step, ((a, b), cpu)) in want.iter().zip(&got).zip(&on_cpu).enumerate() {
                assert_eq!((a.step, b.step), (step as u64 + 1, step as u64 + 1));
                assert_eq!(a.loss.to_bits(), b.loss.to_bits(), "loss of step {}", a.step);
                assert_eq!(a.grad_norm.to_bits(), b.grad_norm.to_bits(), "norm of step {}", a.step);
                assert_eq!((&a.skip, a.skipped), (&b.skip, b.skipped));
                assert_eq!((a.skip.is_some(), a.skipped), (cpu.skip.is_some(), cpu.skipped));
                let near = (a.loss - cpu.loss).abs() <= 3e-2 * cpu.loss.abs();
                assert!(near || (a.loss.is_nan() && cpu.loss.is_nan()), "{} not {}", a.loss, cpu.loss);
            }
            assert!(
                want[2].skip.as_ref().is_some_and(|reason| reason.contains("the loss is NaN (first in "))
            );
            assert_eq!(want[5].skipped, 2);
            for ((name, a), (_, b)) in at_once.iter().zip(&late) {
                assert!(a == b, "{name} differs");
                // Two of six updates did not take place.
                if name.ends_with(".step") {
                    assert_eq!(a, &[4f32.to_bits()], "{name}");
                }
            }
            target.count();
        }
    }
}

#[test]
fn a_gpu_stops_a_run_whose_updates_are_all_skipped() {
    let [target, ..] = targets();
    let error = target.run(|| {
        let mut trainer = trainer(json!({}));
        let (_, norm) = last_norm(&trainer);
        norm.set(&(norm.as_detached_tensor() * f64::NAN).unwrap()).unwrap();
        (0..5).find_map(|_| trainer.next_steps().err()).expect("an end").to_string()
    });
    assert!(error.starts_with("step 3: 3 updates in a row would be skipped: the loss is NaN"), "{error}");
    target.count();
}

#[test]
fn muon_and_ema_wait_for_every_step() {
    let [target, ..] = targets();
    target.run(|| {
        assert!(trainer(json!({})).is_asynchronous());
        for settings in [json!({ "muon": {} }), json!({ "ema": { "decay": 0.9 } })] {
            let mut trainer = trainer(settings.clone());
            assert!(!trainer.is_asynchronous(), "{settings}");
            assert_eq!(trainer.next_steps().unwrap().len(), 1, "{settings}");
        }
        // Before an evaluation of the validation text, the trainer also waits for the previous step.
        let mut trainer = trainer(json!({ "eval_every": 2 }));
        assert!(trainer.next_steps().unwrap().is_empty());
        let steps = trainer.next_steps().unwrap();
        assert_eq!(steps.iter().map(|s| s.valid_loss.is_some()).collect::<Vec<_>>(), [false, true]);
    });
    assert!(!trainer(json!({})).is_asynchronous(), "on the CPU");
    target.count();
}
