//! The guard: a skipped update changes nothing, and training continues after it.

use candle_core::{Device, Tensor};
use gd_model::config::EmaConfig;
use gd_model::config::GuardConfig;
use gd_model::config::MuonConfig;
use gd_model::config::Recipe;
use gd_model::data::{Corpus, Tokens};
use gd_model::train::Trainer;

/// A trainer of a very small model on a simple text.
fn trainer(muon: bool) -> Trainer {
    let mut recipe = Recipe::load("tiny").unwrap();
    let model = &mut recipe.model;
    (model.hidden_size, model.intermediate_size, model.num_hidden_layers) = (16, 24, 2);
    (model.num_attention_heads, model.num_key_value_heads, model.head_dim) = (2, 2, 8);
    let train = &mut recipe.train;
    (train.batch, train.context, train.steps, train.eval_every) = (2, 16, 40, 1000);
    train.lr.warmup = 2;
    train.guard = GuardConfig { window: 16, least: 4, sigma: 6.0, stop_after: 3 };
    train.ema = Some(EmaConfig { decay: 0.9 });
    train.muon = muon.then(MuonConfig::default);
    let tokens: Vec<u32> = (0..400).map(|i| (i * i % 31) as u32).collect();
    let n = tokens.len();
    let tokens = Tokens::from(tokens);
    let corpus = Corpus { train: tokens.clone(), valid: tokens, train_bytes: n, valid_bytes: n };
    Trainer::new(recipe, corpus, 3, &Device::Cpu).unwrap()
}

/// The bits of all weights and moments.
fn bits(trainer: &mut Trainer) -> Vec<(String, Vec<u32>)> {
    let moments = trainer.state().unwrap().tensors;
    let all = trainer.params.tensors().into_iter().chain(moments);
    let bits = |t: &Tensor| -> Vec<u32> {
        let floats = t.to_dtype(candle_core::DType::F32).unwrap().flatten_all().unwrap();
        floats.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    all.map(|(name, t)| (name, bits(&t))).collect()
}

/// Multiplies the weight of the last norm.
fn scale(trainer: &Trainer, by: f64) {
    let (_, var) = trainer.params.vars().into_iter().find(|(name, _)| name == "model.norm.weight").unwrap();
    var.set(&(var.as_detached_tensor() * by).unwrap()).unwrap();
}

#[test]
fn a_skipped_step_changes_no_weights_and_moments() {
    for (muon, by) in [(false, f64::NAN), (false, 64.0), (true, f64::INFINITY), (true, 64.0)] {
        let mut trainer = trainer(muon);
        for _ in 0..8 {
            assert_eq!(trainer.train_step().unwrap().skipped, 0);
        }
        scale(&trainer, by);
        let before = bits(&mut trainer);
        let step = trainer.train_step().unwrap();
        assert_eq!((step.step, step.skipped), (9, 1), "{by}");
        assert!(before == bits(&mut trainer), "{by}");
    }
    let mut trainer = trainer(false);
    trainer.train_step().unwrap();
    let before = bits(&mut trainer);
    assert_eq!(trainer.train_step().unwrap().skipped, 0);
    assert!(before != bits(&mut trainer));
}

#[test]
fn training_continues_after_a_spike_and_stops_after_too_many() {
    let mut trainer = trainer(false);
    for _ in 0..8 {
        trainer.train_step().unwrap();
    }
    scale(&trainer, 64.0);
    assert_eq!(trainer.train_step().unwrap().skipped, 1);
    scale(&trainer, 1.0 / 64.0);
    let before = bits(&mut trainer);
    let step = trainer.train_step().unwrap();
    assert_eq!((step.step, step.skipped), (10, 1));
    assert!(before != bits(&mut trainer));
    scale(&trainer, f64::NAN);
    let result: Result<Vec<_>, _> = (0..3).map(|_| trainer.train_step()).collect();
    let error = result.unwrap_err().to_string();
    assert!(error.starts_with("step 13: 3 updates in a row would be skipped: the loss is NaN"), "{error}");
}
