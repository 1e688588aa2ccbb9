//! Traces: the records contain the selections of the model, every change of a file is detected, and a replay agrees
//! only with the recorded model and text.

mod blends;
mod certificate;
mod effects;
mod forgeries;
mod proofs;
mod replays;
mod runners_up;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use gd_model::config::{self, ModelConfig};
use gd_model::infer::sampler::{Sampler, Sampling};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::model::pretrained::Loaded;
use gd_model::trace::{self, Ending, Generation, Header, Intervention, Record, Trace, Writer};
use serde_json::{Value, json};

const CPU: Device = Device::Cpu;
const PROMPT: &str = "Call me Ishmael. Some years ago, never";

/// Configurations that together set every field of a record, with their names.
fn models() -> [(&'static str, Value); 6] {
    let beacon = json!({ "conv_width": 4, "averages": 2, "prior": true });
    let barrier = json!({
        "conv_width": 4, "averages": 0, "prior": true, "protected": 2,
        "barrier": { "floor": 0.2, "margin": 3.0, "strength": 1.5, "entropy_trigger": 0.4, "slack": 0.5 },
    });
    [
        (
            "plain",
            json!({ "mechanism": ["gd"], "qk_norm": true, "beacon": beacon, "select": { "candidates": 4 } }),
        ),
        (
            "abstaining, protecting and gated",
            json!({ "mechanism": ["gd"], "qk_norm": true, "beacon": barrier, "select": {
                "candidates": 2, "threshold": 0.6, "gate": { "energy": { "temperature": 0.7 } } } }),
        ),
        (
            "refining and coherent, ties to the last",
            json!({ "mechanism": ["softmax", "gd", "gd"], "output_gate": true, "beacon": beacon, "select": {
                "candidates": 4, "rounds": 2, "gate": "coherence", "tie": "last", "score": "dot" } }),
        ),
        ("of one candidate", json!({ "mechanism": ["gd"], "qk_norm": true, "select": { "candidates": 1 } })),
        (
            "thresholds by length, gated, a window",
            json!({ "mechanism": ["gd"], "qk_norm": true, "windows": [null, null, 7], "select": {
                "candidates": 4, "threshold": 0.6, "threshold_by_length": true, "exclude_below": 0.3, "picks": 2,
                "gate": { "energy": { "temperature": 0.7 } } } }),
        ),
        (
            "gated by the margin",
            json!({ "mechanism": ["gd"], "qk_norm": true, "beacon": beacon, "select": {
                "candidates": 4, "threshold": 0.02, "exclude_below": 0.4, "picks": 2,
                "gate": { "margin": { "temperature": 0.7 } } } }),
        ),
    ]
}

/// A model with random parameters, so that each of them affects the result.
fn model(gd: &Value, seed: u64) -> Result<Loaded> {
    let config: ModelConfig = config::parse(json!({
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "tie_word_embeddings": false, "gd": gd,
    }))
    .map_err(|problems| {
        anyhow::anyhow!(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
    })?;
    let params = Params::new(seed, DType::F32, &CPU);
    let model = Transformer::new(&config, params.frozen())?;
    for (at, (name, var)) in params.vars().iter().enumerate() {
        let size = if name.contains(".gd.") { 0.1 } else { 0.25 };
        let noise: Vec<f32> =
            (0..var.elem_count()).map(|i| ((i * 37 + at * 101) as f32 * 12.9898).sin() * size).collect();
        var.set(&(var.as_tensor() + Tensor::from_vec(noise, var.shape(), &CPU)?)?)?;
    }
    Ok(Loaded::new(model, params, Tokenizer::bytes()?))
}

/// A recorded text.
struct Recorded {
    loaded: Loaded,
    header: Header,
    records: Vec<Record>,
    new: Vec<u32>,
    ending: Ending,
}

const SAMPLING: Sampling =
    Sampling { temperature: 0.9, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0 };

fn record(gd: &Value, prompt: &str, max_tokens: usize, interventions: &[&str]) -> Result<Recorded> {
    let loaded = model(gd, 5)?;
    let prompt = loaded.tokenizer.encode(prompt)?;
    let interventions = interventions.iter().map(|text| text.parse::<Intervention>());
    let interventions = interventions.collect::<Result<Vec<_>, _>>().map_err(anyhow::Error::msg)?;
    let interventions: Vec<_> = interventions.into_iter().map(|i| i.with_position(prompt.len())).collect();
    let generation = match max_tokens {
        0 => None,
        n => {
            Some(Generation { sampling: SAMPLING, seed: 7, max_tokens: n, end_tokens: loaded.end_tokens()? })
        }
    };
    let header = Header::new(&loaded, "model", &prompt, generation.as_ref(), &interventions, &CPU)?;
    let mut records = Vec::new();
    let (new, ending) = trace::record(&loaded, &header, &prompt, &CPU, |record| {
        records.push(record);
        Ok(())
    })?;
    Ok(Recorded { loaded, header, records, new, ending })
}

/// A time of signatures, in seconds since the start of 1970.
const SECONDS: u64 = 1_800_000_000;

/// The bytes of a trace with these records, which ends as its header says or, with tokens that it does not describe, by its
/// maximum.
fn written(header: &Header, records: &[Record], key: Option<&ed25519_dalek::SigningKey>) -> Result<Vec<u8>> {
    let ending = if header.sampling.is_some() { Ending::MaxTokens } else { Ending::Read };
    written_to(header, records, ending, key)
}

/// The bytes of a trace with these records that ends so.
fn written_to(
    header: &Header,
    records: &[Record],
    ending: Ending,
    key: Option<&ed25519_dalek::SigningKey>,
) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(Path::new("trace"), &mut bytes, header)?;
    for record in records {
        writer.push(record)?;
    }
    match key {
        Some(key) => writer.finish_signed(ending, key, SECONDS)?,
        None => writer.finish(ending)?,
    };
    Ok(bytes)
}

/// Reads and verifies a trace, and returns its records.
fn verified(bytes: &[u8]) -> gd_model::Result<Vec<Record>> {
    let trace = Trace::from_bytes(Path::new("trace"), bytes)?;
    trace::verify(&trace, None, None)?;
    trace.decoded()
}

#[test]
fn a_record_contains_the_selections_of_the_model() -> Result<()> {
    let (mut abstained, mut lifted, mut later, mut rejected) = (0, 0, 0, 0);
    for (name, gd) in models() {
        let Recorded { loaded, header, records, new, ending } = record(&gd, PROMPT, 20, &[])?;
        ensure!(ending == Ending::MaxTokens, "{name}: {ending}");
        let prompt = loaded.tokenizer.encode(PROMPT)?;
        ensure!(new.len() == 20 && records.len() == prompt.len() + 20, "{name}: {} records", records.len());
        // The result is the same as without recording.
        let mut sampler = Sampler::new(SAMPLING, 7)?;
        let plain =
            gd_model::infer::generate::generate(&loaded.model, &prompt, 20, &mut sampler, &CPU, |_| {
                Ok(true)
            })?;
        ensure!(plain == new, "{name}: the trace changed the text");
        let text: String = records.iter().map(|r| r.text.as_str()).collect();
        let all: Vec<u32> = records.iter().map(|r| r.token).collect();
        ensure!(
            loaded.tokenizer.decode(&all)?.starts_with(&text) && text.starts_with(PROMPT),
            "{name}: {text}"
        );
        // The selections of a single pass over the whole text.
        let layers = std::cell::RefCell::new(Vec::new());
        let mask = gd_kernels::Mask::causal(0);
        let pass = gd_layer::Pass { stats: Some(&layers), ..gd_layer::Pass::new(&mask) };
        loaded.model.hidden(&Tensor::new(all.as_slice(), &CPU)?.unsqueeze(0)?, &pass, None)?;
        let layers = layers.take();
        let mut place = 0;
        for layer in header.selecting() {
            for h in 0..layer.heads {
                for (i, record) in records.iter().enumerate() {
                    let row = &record.rows[place + h];
                    let pick = layers[layer.layer].picks[h * records.len() + i];
                    ensure!(
                        row.selected == pick,
                        "{name}: {i}, {}.{h}: {}, {pick}",
                        layer.layer,
                        row.selected
                    );
                    abstained += usize::from(row.selected < 0);
                    later += row.later.iter().filter(|&&key| key >= 0).count();
                    lifted += row.slots.iter().filter(|slot| slot.lifted.is_some()).count();
                    rejected += row.slots.iter().filter(|slot| slot.rejected).count();
                    let consistent = layer.memory == (row.memory > 0.0) || row.selected < 0;
                    ensure!(consistent, "{name}: a share of {} of the running averages", row.memory);
                    ensure!(
                        (row.share + row.memory > 0.999) == (layer.rounds == 1 || row.later == [-1])
                            || row.share + row.memory == 0.0,
                        "{name}: {row:?}"
                    );
                }
            }
            place += layer.heads;
        }
        let bytes = written(&header, &records, None)?;
        let verified = verified(&bytes).with_context(|| name)?;
        ensure!(format!("{verified:?}") == format!("{records:?}"), "{name}: changed by the file");
    }
    for (name, count) in
        [("abstained", abstained), ("lifted", lifted), ("later rounds", later), ("rejected", rejected)]
    {
        ensure!(count > 20, "{name}: only {count} cases");
    }
    Ok(())
}

#[test]
fn a_model_without_a_selecting_layer_is_an_error() -> Result<()> {
    for (gd, word) in [
        (json!({ "mechanism": ["softmax"] }), "all layers are softmax attention"),
        (
            json!({ "mechanism": ["gd", "softmax", "gd"], "select": { "estimator": "blend", "candidates": 4 } }),
            "its 2 gd layers blend more than one candidate",
        ),
    ] {
        let e = record(&gd, PROMPT, 0, &[]).err().context("a trace of a blend")?.to_string();
        ensure!(e.contains(word) && e.contains("no layer that selects"), "{e}");
    }
    // A blend of one candidate is a selection.
    record(
        &json!({ "mechanism": ["gd"], "select": { "estimator": "blend", "candidates": 1 } }),
        PROMPT,
        0,
        &[],
    )?;
    Ok(())
}
