//! Generation with a cache, in batches, and of chats.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device, Tensor};
use gd_kernels::{Mask, Precision};
use gd_layer::{LayerCache, Pass};
use gd_model::config::{self, ModelConfig};
use gd_model::infer::generate::{generate, generate_batch};
use gd_model::infer::sampler::{Sampler, Sampling};
use gd_model::io::checkpoint::{CHAT_TEMPLATE, TOKENIZER_CONFIG};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::model::pretrained::{self, Loaded};
use gd_testing::log_cases;
use serde_json::{Value, json};

const CPU: Device = Device::Cpu;

/// A model with random parameters, so that each of them affects the result.
fn model(gd: Value) -> Result<(Transformer, Params)> {
    model_of(gd, 48, DType::F32)
}

/// As [`model`] for a number of positions and a dtype.
pub(crate) fn model_of(gd: Value, positions: usize, dtype: DType) -> Result<(Transformer, Params)> {
    let config: ModelConfig = config::parse(json!({
        "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": positions,
        "tie_word_embeddings": false, "gd": gd,
    }))
    .map_err(|problems| anyhow::anyhow!(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))?;
    let params = Params::new(5, dtype, &CPU);
    let model = Transformer::new(&config, params.frozen())?;
    for (at, (_, var)) in params.vars().iter().enumerate() {
        let noise: Vec<f32> =
            (0..var.elem_count()).map(|i| ((i * 37 + at * 101) as f32 * 12.9898).sin() * 0.25).collect();
        var.set(&(var.as_tensor() + Tensor::from_vec(noise, var.shape(), &CPU)?.to_dtype(dtype)?)?)?;
    }
    Ok((model, params))
}

pub(crate) fn models() -> [(&'static str, Value); 5] {
    let beacon = json!({ "conv_width": 4, "averages": 2, "prior": true, "protected": 2 });
    [
        ("softmax", json!({ "mechanism": ["softmax"] })),
        ("softmax with a Beacon", json!({ "mechanism": ["softmax"], "beacon": beacon })),
        ("gd", json!({ "mechanism": ["gd"], "select": { "candidates": 4 } })),
        (
            "gd with a Beacon",
            json!({ "mechanism": ["softmax", "gd", "gd"], "qk_norm": true, "beacon": beacon }),
        ),
        (
            "other mechanisms",
            json!({ "mechanism": ["selective", { "name": "topk", "k": 3 }, "differential"] }),
        ),
    ]
}

fn sampler(temperature: f64) -> Result<Sampler> {
    Ok(Sampler::new(Sampling { temperature, repetition_penalty: 1.3, ..Sampling::default() }, 11)?)
}

const PROMPTS: [&str; 4] = ["It was the best of times, it was", "A", "Call me Ishmael", "!?"];

#[test]
fn greedy_generation_equals_the_full_forward_pass_at_every_step() -> Result<()> {
    let mut steps = 0;
    for (name, gd) in models() {
        let (model, _) = model(gd)?;
        let mut distinct = BTreeSet::new();
        for prompt in PROMPTS {
            let mut all: Vec<u32> = prompt.bytes().map(u32::from).collect();
            let mut greedy = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, 0)?;
            let new = generate(&model, &all, 20, &mut greedy, &CPU, |_| Ok(true))?;
            // One more token can be sampled after the last position.
            ensure!(new.len() == 20.min(49 - all.len()), "{name}: {} tokens", new.len());
            for (step, token) in new.iter().enumerate() {
                let ids = Tensor::new(all.as_slice(), &CPU)?.unsqueeze(0)?;
                let logits = model.forward(&ids, &Pass::new(&Mask::causal(0)), None)?;
                let expected = logits.argmax(D::Minus1)?.flatten_all()?.to_vec1::<u32>()?[all.len() - 1];
                ensure!(*token == expected, "{name}, {prompt:?}, step {step}: {token} instead of {expected}");
                all.push(*token);
                steps += 1;
            }
            distinct.extend(new);
        }
        ensure!(distinct.len() >= 8, "{name}: {} different tokens are too few", distinct.len());
    }
    log_cases("generate-steps", steps);
    Ok(())
}

#[test]
fn a_batch_gives_the_same_text_as_single_prompts() -> Result<()> {
    for (name, gd) in models() {
        let (model, _) = model(gd)?;
        let prompts: Vec<Vec<u32>> = PROMPTS.iter().map(|p| p.bytes().map(u32::from).collect()).collect();
        for temperature in [0.0, 0.9] {
            // The second text ends early, the first one at the last position of the model.
            let goes_on = |place: usize, count: usize| place != 1 || count < 5;
            let mut counts = vec![0; prompts.len()];
            let mut samplers = vec![sampler(temperature)?; prompts.len()];
            let together = generate_batch(&model, &prompts, 25, &mut samplers, &CPU, |place, _| {
                counts[place] += 1;
                Ok(goes_on(place, counts[place]))
            })?;
            let lengths: Vec<usize> = together.iter().map(Vec::len).collect();
            ensure!(lengths == [17, 5, 25, 25] && counts == lengths, "{name}: {lengths:?}");
            for (place, prompt) in prompts.iter().enumerate() {
                let mut count = 0;
                let alone = generate(&model, prompt, 25, &mut sampler(temperature)?, &CPU, |_| {
                    count += 1;
                    Ok(goes_on(place, count))
                })?;
                ensure!(together[place] == alone, "{name}, {place}: {:?} alone {alone:?}", together[place]);
            }
        }
        let none: [&[u32]; 0] = [];
        ensure!(generate_batch(&model, &none, 5, &mut [], &CPU, |_, _| Ok(true))?.is_empty());
        let long = vec![1; 49];
        let error = generate_batch(&model, &[&long], 5, &mut [sampler(0.0)?], &CPU, |_, _| Ok(true));
        ensure!(
            error.is_err_and(|e| e.to_string() == "the prompt has 49 tokens; the context of 48 allows 1 to 48")
        );
    }
    Ok(())
}

/// The bits of the logits `[B, N, V]` of ids that continue cached sequences.
fn logits(model: &Transformer, ids: &Tensor, mask: &Mask, cache: &mut [LayerCache]) -> Result<Vec<u32>> {
    let logits = model.forward(ids, &Pass::new(mask), Some(cache))?.to_dtype(DType::F32)?;
    Ok(logits.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

#[test]
fn decoding_with_cached_key_data_equals_native_decoding() -> Result<()> {
    const LENGTHS: [usize; 3] = [150, 5, 97];
    let beacon = json!({ "conv_width": 2, "averages": 1, "prior": true, "protected": 2 });
    for (gd, dtype) in [
        (json!({ "mechanism": ["gd"], "select": { "candidates": 4, "norm_prior": true } }), DType::F32),
        (json!({ "mechanism": ["gd"], "select": { "candidates": 1 }, "qk_norm": true }), DType::BF16),
        (json!({ "mechanism": ["gd"], "select": { "norm_prior": true }, "beacon": beacon }), DType::BF16),
        (json!({ "mechanism": ["softmax", "gd", "gd"], "beacon": beacon }), DType::F16),
        (json!({ "mechanism": ["gd"], "select": { "score": "dot" } }), DType::F32),
    ] {
        let name = format!("{gd} {dtype:?}");
        let (model, params) = model_of(gd, 200, dtype)?;
        // If the key norms are not cached, their prior is computed in every step.
        let uncached = Transformer::new(model.config(), params.builder())?;
        let ids = |b: usize, at: usize| ((at * 29 + b * 71 + at * at * 3) % 256) as u32;
        let prompts = |b: usize| Tensor::new((0..LENGTHS[b]).map(|at| ids(b, at)).collect::<Vec<_>>(), &CPU);
        let native = || vec![LayerCache::new().with_precision(Precision::Native); 3];
        let (mut cached, mut plain) = (Vec::new(), Vec::new());
        for b in 0..3 {
            let (mut one, mut other, prompt) = (model.new_cache(), native(), prompts(b)?.unsqueeze(0)?);
            let want = logits(&uncached, &prompt, &Mask::causal(0), &mut other)?;
            ensure!(logits(&model, &prompt, &Mask::causal(0), &mut one)? == want, "{name}: prompt {b}");
            cached.push(one);
            plain.push(other);
        }
        let stack = |all: &[Vec<LayerCache>]| -> Result<Vec<LayerCache>> {
            let layer = |i: usize| LayerCache::stack(&all.iter().map(|cache| &cache[i]).collect::<Vec<_>>());
            Ok((0..3).map(layer).collect::<candle_core::Result<_>>()?)
        };
        let (mut cached, mut plain) = (stack(&cached)?, stack(&plain)?);
        let (mut rows, mut different) = (vec![0, 1, 2], BTreeSet::new());
        for step in 0..12 {
            if step == 7 {
                // The longest sequence ends, and the order of the others changes.
                for cache in cached.iter_mut().chain(&mut plain) {
                    *cache = cache.select(&[2, 1])?;
                }
                rows = vec![2, 1];
            }
            let next: Vec<u32> = rows.iter().map(|b| ids(*b, LENGTHS[*b] + step)).collect();
            let next = Tensor::new(next, &CPU)?.unsqueeze(1)?;
            let mask =
                Mask::causal(0).with_offsets(rows.iter().map(|b| (LENGTHS[*b] + step) as i64).collect());
            let want = logits(&uncached, &next, &mask, &mut plain)?;
            ensure!(logits(&model, &next, &mask, &mut cached)? == want, "{name}: step {step}");
            different.extend(want);
        }
        ensure!(different.len() > 1000, "{name}: {} different logits are too few", different.len());
    }
    Ok(())
}

/// Runs the program. Returns its exit code, stdout and stderr.
fn gd(folder: &Path, args: &[&str]) -> Result<(i32, String, String)> {
    let output = Command::new(env!("CARGO_BIN_EXE_gd")).args(args).current_dir(folder).output()?;
    let code = output.status.code().context("an exit code")?;
    Ok((code, String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?))
}

/// Runs `gd generate` greedily. Returns each line of stdout as JSON.
fn generated(folder: &Path, args: &[&str]) -> Result<Vec<Value>> {
    let args = [&["generate", "model", "--temperature", "0", "--max-tokens", "12", "--json"], args].concat();
    let (code, out, err) = gd(folder, &args)?;
    ensure!(code == 0, "{args:?}: {err}");
    out.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// Saves a model with its optional files.
fn save(folder: &Path, files: &[(&str, &str)], generation: Option<Value>) -> Result<()> {
    let (model, params) = model(models()[3].1.clone())?;
    let mut loaded = Loaded::new(model, params, Tokenizer::bytes()?);
    loaded.files = files.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect();
    loaded.generation = generation.unwrap_or(loaded.generation);
    let card =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    Ok(loaded.save(folder, &card.map(|key| (key, "test".to_owned())))?)
}

#[test]
fn the_program_continues_many_prompts_and_answers_chats() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    let template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:";
    let settings = json!({ "chat_template": template, "model_max_length": 48 }).to_string();
    let files = [(TOKENIZER_CONFIG, settings.as_str())];
    save(&dir.join("model"), &files, None)?;

    let texts = |values: &[Value]| values.iter().map(|v| v["text"].to_string()).collect::<Vec<_>>();
    let [a, b] = ["It was", "Ishmael, then"].map(|p| generated(dir, &["--prompt", p]));
    let alone = [texts(&a?), texts(&b?)].concat();
    ensure!(alone[0] != alone[1], "{alone:?}");
    let both = generated(dir, &["--prompt", "It was", "--prompt", "Ishmael, then"])?;
    ensure!(texts(&both) == alone && both[1]["prompt"] == "Ishmael, then", "{both:?} {alone:?}");
    fs::write(dir.join("p.txt"), "It was\n\nIshmael, then\n")?;
    fs::write(dir.join("p.jsonl"), "{\"prompt\": \"It was\"}\n{\"prompt\": \"Ishmael, then\", \"id\": 2}\n")?;
    for file in ["p.txt", "p.jsonl"] {
        ensure!(texts(&generated(dir, &["--prompts", file])?) == alone, "{file}");
    }
    let args = ["generate", "model", "--temperature", "0", "--max-tokens", "12"];
    let (_, plain, _) = gd(dir, &[&args[..], &["--prompts", "p.txt"]].concat())?;
    let text = |at: usize| both[at]["text"].as_str().unwrap_or_default();
    ensure!(plain == format!("It was{}\n\nIshmael, then{}\n", text(0), text(1)), "{plain:?}");

    // A chat continues the text of its template and prints only the answer.
    let written = generated(dir, &["--prompt", "s:Be brief\nu:Hi\na:"])?;
    let chat = ["--chat", "--system", "Be brief", "--prompt", "Hi"];
    ensure!(texts(&generated(dir, &chat)?) == texts(&written));
    let (_, shown, _) = gd(dir, &[&args[..], &chat].concat())?;
    ensure!(shown == format!("{}\n", written[0]["text"].as_str().unwrap_or_default()), "{shown:?}");

    // An end token ends the text and is not part of it.
    let loaded = pretrained::load(&dir.join("model"), &CPU)?;
    let prompt = loaded.tokenizer.encode("It was")?;
    let mut greedy = Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, 0)?;
    let ids = generate(&loaded.model, &prompt, 12, &mut greedy, &CPU, |_| Ok(true))?;
    let at = (2..ids.len()).find(|&i| !ids[..i].contains(&ids[i])).context("a new token")?;
    save(&dir.join("model"), &files, Some(json!({ "eos_token_id": [300, ids[at]] })))?;
    let ended = generated(dir, &["--prompt", "It was"])?;
    ensure!(
        ended[0]["text"] == loaded.tokenizer.decode(&ids[..at])? && ended[0]["tokens"] == at + 1,
        "{ended:?} {at}"
    );

    let loaded = pretrained::load(&dir.join("model"), &CPU)?;
    ensure!(loaded.end_tokens()? == [300, ids[at]], "{}", loaded.generation);
    Ok(())
}

#[test]
fn continuations_have_seeds_tokens_and_log_probabilities() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    let defaults = json!({ "do_sample": true, "temperature": 0.7, "top_k": 3 });
    save(&dir.join("model"), &[], Some(defaults))?;
    let lines = |args: &str| -> Result<Vec<Value>> {
        let args: Vec<&str> = args.split(' ').collect();
        let (code, out, err) =
            gd(dir, &[&["generate", "model", "--json", "--max-tokens", "8"], &args[..]].concat())?;
        ensure!(code == 0, "{args:?}: {err}");
        out.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    };
    // The sampling of generation_config.json; flags go first.
    let default = lines("--prompt It_was --seed 5")?;
    ensure!(
        default[0]["token_ids"]
            == lines("--prompt It_was --seed 5 --temperature 0.7 --top-k 3")?[0]["token_ids"]
    );
    let greedy = lines("--prompt It_was --temperature 0 --logprobs 2")?;
    ensure!(
        greedy[0]["token_ids"]
            != lines("--prompt It_was --seed 5 --temperature 5 --top-k 200")?[0]["token_ids"]
    );
    // Each continuation is that of its seed.
    let several = lines("--prompt It_was --prompt Call --seed 5 --n 3")?;
    ensure!(several.len() == 6 && several[0]["token_ids"] == default[0]["token_ids"], "{several:?}");
    for (at, line) in several.iter().enumerate() {
        let prompt = ["It_was", "Call"][at / 3];
        let alone = lines(&format!("--prompt {prompt} --seed {}", 5 + at % 3))?;
        ensure!(line["token_ids"] == alone[0]["token_ids"] && line["choice"] == at % 3, "{at}: {line}");
    }
    // The greedy token is the most probable one, and the log-probabilities are those of the model.
    let loaded = pretrained::load(&dir.join("model"), &CPU)?;
    let prompt = loaded.tokenizer.encode("It_was")?;
    let ids = Tensor::new(prompt.as_slice(), &CPU)?.unsqueeze(0)?;
    let logits = loaded.model.forward(&ids, &Pass::new(&Mask::causal(0)), None)?.to_dtype(DType::F64)?;
    let last =
        candle_nn::ops::log_softmax(&logits, D::Minus1)?.get(0)?.get(prompt.len() - 1)?.to_vec1::<f64>()?;
    let first = &greedy[0]["logprobs"][0];
    let (token, logprob) =
        (first["token"].as_u64().context("a token")?, first["logprob"].as_f64().context("a number")?);
    ensure!(greedy[0]["token_ids"][0] == token && first["top"][0]["token"] == token, "{first}");
    ensure!((last[token as usize] - logprob).abs() <= 1e-4, "{first} {}", last[token as usize]);
    ensure!(first["top"].as_array().is_some_and(|top| top.len() == 2), "{first}");
    let (code, _, err) = gd(dir, &["generate", "model", "--prompt", "a", "--logprobs", "2"])?;
    ensure!(code == 2 && err.contains("--json"), "{code} {err}");
    Ok(())
}

#[test]
fn keys_and_values_have_the_dtype_of_the_flag_or_that_of_the_weights() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(&dir.join("model"), &[], None)?;
    let (code, _, err) = gd(dir, &["convert", "model", "--dtype", "bf16", "--out", "half"])?;
    ensure!(code == 0, "{err}");
    let read = |model: &str, dtype: &[&str]| -> Result<Value> {
        let args = ["generate", model, "--prompt", "It was", "--temperature", "0", "--max-tokens", "3"];
        let (code, out, err) = gd(dir, &[&args[..], &["--logprobs", "1", "--json"], dtype].concat())?;
        ensure!(code == 0, "{dtype:?}: {err}");
        Ok(serde_json::from_str::<Value>(&out)?["logprobs"].clone())
    };
    for (model, default) in [("model", "f32"), ("half", "f16")] {
        let all = ["f32", "f16", "bf16"].map(|dtype| read(model, &["--cache-dtype", dtype]));
        let [f32, f16, bf16] = all;
        let (f32, f16, bf16) = (f32?, f16?, bf16?);
        ensure!(f32 != f16 && f16 != bf16 && f32 != bf16, "{model}: {f32} {f16} {bf16}");
        ensure!(read(model, &[])? == if default == "f32" { f32 } else { f16 }, "{model}");
    }
    let (code, _, err) = gd(dir, &["generate", "model", "--prompt", "a", "--cache-dtype", "q8"])?;
    ensure!(code == 2 && err.contains("q8") && err.contains("f32, f16, bf16"), "{code} {err}");
    Ok(())
}

#[test]
fn the_losses_of_all_tokens_are_written() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(&dir.join("model"), &[], None)?;
    fs::write(
        dir.join("d.jsonl"),
        "{\"text\": \"It was the best\"}\n{\"text\": \"a\"}\n{\"text\": \"Call me\"}\n",
    )?;
    let args =
        ["eval", "model", "--data", "d.jsonl", "--context", "6", "--per-token", "out/t.jsonl", "--json"];
    let (code, out, err) = gd(dir, &args)?;
    ensure!(code == 0, "{err}");
    let result: Value = serde_json::from_str(&out)?;
    let text = fs::read_to_string(dir.join("out/t.jsonl"))?;
    let lines = text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect::<Result<Vec<Value>>>()?;
    ensure!(result["tokens"] == lines.len() && lines.len() == 20, "{} {result}", lines.len());
    let sum: f64 = lines.iter().filter_map(|line| line["loss"].as_f64()).sum();
    let loss = result["loss"].as_f64().context("a loss")?;
    ensure!((sum / 20.0 - loss).abs() <= 1e-6, "{} {loss}", sum / 20.0);
    let words: String = lines.iter().filter_map(|line| line["text"].as_str()).collect();
    ensure!(words == "t was the bestall me", "{words}");
    ensure!(
        lines[14]["document"] == 2 && lines[14]["position"] == 1 && lines[0]["position"] == 1,
        "{lines:?}"
    );
    Ok(())
}

#[test]
fn invalid_prompts_and_models_are_errors() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(&dir.join("model"), &[], None)?;
    save(&dir.join("broken"), &[(CHAT_TEMPLATE, "{% if %}")], None)?;
    save(&dir.join("strict"), &[(CHAT_TEMPLATE, "{{ raise_exception('only two') }}")], None)?;
    save(&dir.join("ends"), &[], Some(json!({ "eos_token_id": 1.5 })))?;
    fs::write(dir.join("empty.txt"), "\n")?;
    fs::write(dir.join("bad.jsonl"), "{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n")?;
    let cases: [(&[&str], i32, &str); 9] = [
        (&["ends", "--prompt", "a"], 1, "ends: eos_token_id 1.5 is not a token id"),
        (&["model", "--prompt", ""], 1, "the prompt is empty, and the model has no begin token"),
        (&["model", "--prompt", "a", "--system", "b"], 2, "--chat"),
        (&["model", "--prompt", "a", "--chat"], 2, "--chat: model has no chat template"),
        (&["broken", "--prompt", "a", "--chat"], 1, "chat template: syntax error"),
        (&["strict", "--prompt", "a", "--chat"], 1, "only two"),
        (&["model", "--prompts", "none.txt"], 1, "none.txt"),
        (&["model", "--prompts", "empty.txt"], 1, "empty.txt: the file has no prompts"),
        (&["model", "--prompts", "bad.jsonl"], 1, "bad.jsonl:2"),
    ];
    for (args, expected, names) in cases {
        let (code, out, err) = gd(dir, &[&["generate"], args].concat())?;
        let last = err.trim_end().lines().last().unwrap_or_default();
        ensure!(
            code == expected && last.starts_with("error: ") && last.contains(names),
            "{args:?}: {code} {err}"
        );
        ensure!(out.is_empty(), "{args:?}: {out}");
    }
    Ok(())
}
