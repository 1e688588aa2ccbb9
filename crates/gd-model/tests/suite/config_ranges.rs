//! Every number of a configuration with values far outside of what makes sense: it is refused with an error that names it, or
//! the recipe can be used, without a panic and without a large allocation.

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{DType, Device};
use gd_layer::mechanisms::AttentionMechanism;
use gd_model::config::{Mechanism, ModelConfig, Recipe};
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::train::estimate::estimate;
use gd_testing::log_cases;
use serde_json::{Value, json};

/// The values in TOML, which has a NaN.
const VALUES: [&str; 6] = ["0", "-1", "2147483648", "4611686018427387904", "nan", "inf"];

/// A recipe that has every key with a number.
fn full() -> Value {
    let mut recipe: Value = serde_json::from_str(include_str!("../fixtures/small.json")).unwrap();
    recipe["model"]["rms_norm_eps"] = json!(1e-5);
    recipe["model"]["rope_parameters"] = json!({
        "rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    });
    recipe["model"]["rope_theta"] = json!(10000.0);
    recipe["model"]["gd"]["windows"] = json!([16]);
    recipe["model"]["gd"]["beacon"] = json!({
        "conv_width": 4, "averages": 2, "prior": true, "protected": 2,
        "barrier": { "floor": 0.2, "margin": 3.0, "strength": 1.5, "entropy_trigger": 0.4, "slack": 0.5 },
    });
    recipe["model"]["gd"]["select"] = json!({
        "candidates": 8, "temperature": 1.0, "preserve_floor": 0.02, "value_floor": 0.1, "threshold": 0.5, "rounds": 2,
        "gate": { "energy": { "temperature": 0.7 } },
    });
    recipe["train"]["lr"]["shape"] = json!({ "wsd": { "decay": 0.2 } });
    recipe["train"]["muon"] = json!({ "momentum": 0.9, "weight_decay": 0.1 });
    recipe["train"]["ema"] = json!({ "decay": 0.9 });
    recipe["train"]["guard"] = json!({ "window": 16, "least": 4, "sigma": 6.0, "stop_after": 3 });
    recipe["train"]["save_every"] = json!(5);
    recipe["train"]["keep"] = json!(2);
    recipe["train"]["sample_every"] = json!(5);
    recipe["train"]["tokenizer"] = json!({ "bpe": { "vocab": 300 } });
    recipe["train"]["uptrain"] = json!({ "original": "teacher", "align": 0.1, "kl": 0.5 });
    recipe["train"]["select"] = json!({
        "candidates": 4, "hardness": [[0.25, 0.0], [0.7, 1.0]], "preserve_floor": 0.1, "temperature": 1.0, "threshold": 0.5,
    });
    recipe
}

/// The paths of all numbers.
fn numbers(value: &Value, path: String, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(path),
        Value::Object(keys) => {
            keys.iter().for_each(|(key, value)| numbers(value, format!("{path}/{key}"), found))
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, value)| numbers(value, format!("{path}/{i}"), found));
        }
        _ => {}
    }
}

/// Loads a recipe and uses it as the start of a run does. A model is built only if it is small.
fn load(toml: &str, dir: &std::path::Path) -> Result<(), String> {
    let path = dir.join("recipe.toml");
    std::fs::write(&path, toml).unwrap();
    let recipe = Recipe::load(path.to_str().unwrap()).map_err(|e| e.to_string())?;
    recipe.train.validate().map_err(|e| e.to_string())?;
    let parameters = estimate(&recipe).map_err(|e| e.to_string())?.parameters;
    if parameters < 1 << 20 {
        build(&recipe.model)?;
    }
    Ok(())
}

fn build(config: &ModelConfig) -> Result<(), String> {
    let params = Params::new(0, DType::F32, &Device::Cpu);
    Transformer::new(config, params.frozen()).map(drop).map_err(|e| e.to_string())
}

#[test]
fn every_number_of_a_recipe_has_a_range() {
    let (base, dir) = (full(), tempfile::tempdir().unwrap());
    load(&toml::to_string(&base).unwrap(), dir.path()).unwrap();
    let mut paths = Vec::new();
    numbers(&base, String::new(), &mut paths);
    assert!(paths.len() > 50, "{paths:?}");
    let (mut refused, mut cases) = (0, 0);
    for path in &paths {
        for value in VALUES {
            let mut recipe = base.clone();
            *recipe.pointer_mut(path).unwrap() = json!("the value");
            let toml = toml::to_string(&recipe).unwrap().replace("\"the value\"", value);
            let result = catch_unwind(AssertUnwindSafe(|| load(&toml, dir.path())));
            let result = result.unwrap_or_else(|_| panic!("{path} = {value} panics"));
            let is_size = !path.ends_with("_every") && !path.starts_with("/train/guard/stop_after");
            let is_count = base.pointer(path).unwrap().is_u64() && is_size;
            assert!(
                !is_count || value != "4611686018427387904" || result.is_err(),
                "{path} = {value} is accepted"
            );
            if let Err(e) = &result {
                let key = path.rsplit('/').find(|key| key.parse::<usize>().is_err()).unwrap();
                assert!(e.contains(key) || e.contains("rope"), "{path} = {value}: {e}");
                refused += 1;
            }
            cases += 1;
        }
    }
    assert!(refused * 2 > cases, "{refused} of {cases}");
    log_cases("config-ranges", cases);
}

#[test]
fn every_parameter_of_a_mechanism_has_a_range() {
    let (base, dir) = (full(), tempfile::tempdir().unwrap());
    let mut cases = 0;
    for name in Mechanism::names() {
        let Some(mechanism) = AttentionMechanism::named(name) else { continue };
        let mut parameters = serde_json::to_value(mechanism).unwrap();
        // TOML has no null.
        parameters.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        let mut paths = Vec::new();
        numbers(&parameters, String::new(), &mut paths);
        for path in &paths {
            for value in VALUES {
                let mut changed = parameters.clone();
                *changed.pointer_mut(path).unwrap() = json!("the value");
                let mut recipe = base.clone();
                recipe["model"]["gd"] = json!({ "mechanism": [changed] });
                let toml = toml::to_string(&recipe).unwrap().replace("\"the value\"", value);
                let result = catch_unwind(AssertUnwindSafe(|| load(&toml, dir.path())));
                assert!(result.is_ok(), "{name}{path} = {value} panics");
                cases += 1;
            }
        }
    }
    log_cases("config-ranges", cases);
}
