//! The greatest weights of softmax heads, interventions on every head in turn, and traces for other programs.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::Tensor;
use gd_model::model::pretrained::Loaded;
use gd_model::trace::{self, Ending, Header, Record, SweepAct, Trace, export};
use serde_json::{Value, json};

use super::effects::saved;
use super::{CPU, PROMPT, model, models, written_to};
use crate::program::{error, gd, json as json_of};

/// One softmax layer, two selecting ones.
fn hybrid() -> Value {
    json!({ "mechanism": ["softmax", "gd", "gd"], "qk_norm": true, "select": { "candidates": 4 } })
}

fn recorded(gd: &Value) -> Result<(Loaded, Header, Vec<Record>)> {
    let loaded = model(gd, 5)?;
    let (header, records) = record(&loaded)?;
    Ok((loaded, header, records))
}

fn record(loaded: &Loaded) -> Result<(Header, Vec<Record>)> {
    let prompt = loaded.tokenizer.encode(PROMPT)?;
    let header = Header::with_blends(loaded, "m", &prompt, None, &[], &CPU)?;
    let mut records = Vec::new();
    trace::record(loaded, &header, &prompt, &CPU, |record| {
        records.push(record);
        Ok(())
    })?;
    Ok((header, records))
}

#[test]
fn softmax_heads_record_their_greatest_weights() -> Result<()> {
    for gd in
        [hybrid(), json!({ "mechanism": ["softmax"] }), json!({ "mechanism": ["softmax-null", "gd", "gd"] })]
    {
        let (loaded, header, records) = recorded(&gd)?;
        let layers = header.blending().count();
        for record in &records {
            ensure!(record.blends.len() == 4 * layers, "{} heads", record.blends.len());
            for blend in &record.blends {
                let (keys, sum) = (record.position as usize + 1, blend.iter().map(|b| b.1).sum::<f32>());
                // Weights can be 0 in f32.
                ensure!(blend.len() <= keys.min(8) && sum <= 1.0001, "{blend:?}");
                // All keys together have all weight, except that of a null slot.
                let whole = (sum - 1.0).abs() < 1e-4 || gd["mechanism"][0] == "softmax-null";
                ensure!(keys > 8 || whole, "{blend:?}");
            }
        }
        let bytes = written_to(&header, &records, Ending::Read, None)?;
        let trace = Trace::from_bytes(Path::new("trace"), &bytes)?;
        trace::verify(&trace, None, None)?;
        let replay = |records: &[Record]| trace::replay(&header, records, trace.ending, &loaded, 1e-3, &CPU);
        let outcome = replay(&trace.decoded()?)?;
        ensure!(outcome.contradictions == 0 && outcome.unchecked.is_empty(), "{outcome:?}");
        let several = |r: &Record| (10..30).contains(&r.position) && r.blends[0].len() > 1;
        let at = records.iter().position(several).context("no head has several weights")?;
        let mut forged = records.clone();
        forged[at].blends[0][1].1 *= 0.999;
        ensure!(replay(&forged)?.contradictions == 1, "another weight is not noticed");
        for (change, words) in [
            ((|r: &mut Record| r.blends[0].swap(0, 1)) as fn(&mut Record), "out of order"),
            (|r: &mut Record| r.blends[0][0].0 = 30, "no position up to its own"),
            (|r: &mut Record| r.blends[0][0].1 = 1.5, "weights"),
            (|r: &mut Record| r.blends[0] = vec![(0, 0.01); 9], "at most 8"),
        ] {
            let mut forged = records.clone();
            change(&mut forged[at]);
            let bytes = written_to(&header, &forged, Ending::Read, None)?;
            let trace = Trace::from_bytes(Path::new("trace"), &bytes)?;
            let error = trace::verify(&trace, None, None).err().context("accepted")?.to_string();
            ensure!(error.contains(words), "{words}: {error}");
        }
    }
    Ok(())
}

#[test]
fn the_weights_are_those_of_softmax_attention() -> Result<()> {
    // With queries of zeros, all keys have the same weight; ties go to the first keys.
    let (loaded, ..) = recorded(&hybrid())?;
    let vars = loaded.params.vars();
    let (_, q) =
        vars.iter().find(|(name, _)| name.ends_with("layers.0.self_attn.q_proj.weight")).context("q")?;
    q.set(&q.zeros_like()?)?;
    let (_, records) = record(&loaded)?;
    let blend = &records[19].blends[2];
    let keys: Vec<i32> = blend.iter().map(|b| b.0).collect();
    ensure!(keys == (0..8).collect::<Vec<_>>(), "{keys:?}");
    ensure!(blend.iter().all(|b| (b.1 - 0.05).abs() < 1e-6), "{blend:?}");
    Ok(())
}

#[test]
fn a_sweep_has_the_effect_of_each_intervention() -> Result<()> {
    for (name, gd) in models() {
        let loaded = model(&gd, 5)?;
        let prompt = loaded.tokenizer.encode(PROMPT)?;
        let header = Header::new(&loaded, "m", &prompt, None, &[], &CPU)?;
        for act in [SweepAct::Ban, SweepAct::Ablate] {
            let sweep = trace::sweep(&loaded, &header, &prompt, act, &CPU)?;
            ensure!(sweep.heads.len() == header.rows() && sweep.query == prompt.len() - 1);
            for head in sweep.heads.iter().step_by(3) {
                let (layer, h) = (head.layer, head.head);
                let text = match act {
                    SweepAct::Ban => format!("ban {layer}.{h}:{}", head.before),
                    SweepAct::Ablate => format!("ablate {layer}.{h}"),
                };
                if head.before < 0 {
                    ensure!(head.kl == 0.0 && head.after == -1, "{head:?}");
                    continue;
                }
                let intervention: trace::Intervention = text.parse().map_err(anyhow::Error::msg)?;
                let interventions = vec![intervention.with_position(prompt.len())];
                let changed = Header { interventions, ..header.clone() };
                let effect = trace::effect(&loaded, &changed, &prompt, &CPU)?;
                ensure!(
                    (effect.kl - head.kl).abs() < 1e-5 * (1.0 + effect.kl),
                    "{name}: {effect:?}, {head:?}"
                );
                ensure!((effect.total_variation - head.total_variation).abs() < 1e-4, "{name}: {head:?}");
                let pick = effect.picks[0];
                ensure!((pick.before, pick.after) == (head.before, head.after), "{name}: {pick:?}, {head:?}");
            }
            ensure!(sweep.heads.iter().any(|head| head.kl > 1e-6), "{name}: no head has an effect");
        }
    }
    Ok(())
}

#[test]
fn a_trace_is_exported_as_arrays_and_as_lines() -> Result<()> {
    let (_, header, records) = recorded(&hybrid())?;
    let bytes = written_to(&header, &records, Ending::Read, None)?;
    let trace = Trace::from_bytes(Path::new("trace"), &bytes)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("t.npz");
    std::fs::write(&file, export::npz(&trace)?)?;
    let arrays: std::collections::HashMap<String, Tensor> = Tensor::read_npz(&file)?.into_iter().collect();
    let (n, rows) = (records.len(), header.rows());
    for (name, shape) in [
        ("token", vec![n]),
        ("selected", vec![n, rows]),
        ("margin", vec![n, rows]),
        ("layer", vec![rows]),
        ("blend_layer", vec![4]),
        ("blend_key", vec![n, 4, 8]),
        ("blend_weight", vec![n, 4, 8]),
    ] {
        let array = arrays.get(name).context(name)?;
        ensure!(array.dims() == shape, "{name}: {:?}", array.dims());
    }
    let selected = arrays["selected"].get(30)?.to_vec1::<i64>()?;
    let expected: Vec<i64> = records[30].rows.iter().map(|row| i64::from(row.selected)).collect();
    ensure!(selected == expected);
    let key = arrays["blend_key"].get(3)?.get(2)?.to_vec1::<i64>()?;
    ensure!(key[4..] == [-1; 4] && key[0] == i64::from(records[3].blends[2][0].0), "{key:?}");
    let mut lines = Vec::new();
    export::json_lines(&trace, &mut lines)?;
    let lines: Vec<Value> =
        String::from_utf8(lines)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(lines.len() == n + 1 && lines[0]["layers"][0]["weights"] == 8, "{}", lines[0]);
    ensure!(lines[31]["rows"][2]["selected"] == records[30].rows[2].selected, "{}", lines[31]);
    ensure!(lines[1]["rows"][0]["margin"].is_null(), "{}", lines[1]);
    Ok(())
}

#[test]
fn the_program_blends_sweeps_and_exports() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    saved(&hybrid(), 5, &dir.join("m"))?;
    saved(&json!({ "mechanism": ["softmax"] }), 5, &dir.join("dense"))?;
    let refused = error(dir, "trace dense --prompt abc --out t", 1)?;
    let remedies = ["gd trace dense --blend", "gd convert dense --attention gd --k 1"];
    ensure!(remedies.iter().all(|words| refused.contains(words)), "{refused}");
    json_of(dir, "trace dense --prompt Call_me --blend --out d.trace --html d.html --json")?;
    let verified = json_of(dir, "verify d.trace --model dense --json")?;
    ensure!(verified["replay"]["contradictions"] == 0 && verified["selections"] == 0, "{verified}");
    json_of(dir, "trace m --prompt Call_me --blend --export a.npz --html m.html --out m.trace --json")?;
    json_of(dir, "trace --from m.trace --export b.npz --json")?;
    ensure!(Tensor::read_npz(dir.join("a.npz"))?.len() == Tensor::read_npz(dir.join("b.npz"))?.len());
    json_of(dir, "trace --from m.trace --export m.jsonl --json")?;
    ensure!(std::fs::read_to_string(dir.join("m.jsonl"))?.lines().count() == 8);
    ensure!(error(dir, "trace --from m.trace --export m.txt", 2)?.contains(".npz or .jsonl"));
    ensure!(error(dir, "trace --from m.trace", 2)?.contains("--html or --export"));
    ensure!(error(dir, "trace --from m.trace --from m.trace --export x.npz", 2)?.contains("takes one trace"));

    let swept = json_of(dir, "trace m --prompt Call_me --sweep ban --plot s.svg --json")?;
    ensure!(swept["sweep"]["heads"].as_array().map(Vec::len) == Some(8), "{swept}");
    let svg = std::fs::read_to_string(dir.join("s.svg"))?;
    ensure!(svg.contains("KL in nats") && svg.contains("head") && svg.contains("layer"), "{svg}");
    let text = String::from_utf8(gd(dir, "trace m --prompt Call_me --sweep ablate")?.stdout)?;
    ensure!(text.contains("each head abstains at position 6") && text.contains("nothing"), "{text}");
    ensure!(error(dir, "trace m --prompt a --plot s.svg --out t", 2)?.contains("--sweep"));

    // A key that is not read.
    let last = json_of(dir, "trace m --prompt Call_me --sweep ablate --json")?;
    let reads = last["sweep"]["heads"][0]["before"].as_i64().context("a read")?;
    let args = format!("trace m --prompt Call_me --ban 1.0:{}", (reads + 1) % 7);
    let text = String::from_utf8(gd(dir, &args)?.stdout)?;
    ensure!(text.contains(&format!("reads {reads} as before")) && text.contains("nothing changed"), "{text}");
    ensure!(json_of(dir, &format!("{args} --json"))?["changed"] == false);
    Ok(())
}
