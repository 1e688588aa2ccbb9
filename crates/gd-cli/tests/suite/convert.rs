//! `gd convert` and the library functions behind it: another attention with the same weights.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use gd_kernels::Score;
use gd_model::config::Mechanism;
use gd_model::io::checkpoint::{CONFIG, load_json, load_tensors};
use gd_model::model::pretrained;
use gd_model::model::swap::{Layers, Swap};
use serde_json::Value;

use crate::program::{error, gd, json};

#[path = "../../../gd-model/examples/swap.rs"]
#[allow(dead_code)]
mod example;

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama").join(family)
}

fn folder() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("text.txt"), TEXT.repeat(3))?;
    Ok(dir)
}

const TEXT: &str = "Whether I shall turn out to be the hero of my own life, or whether that station will be held by \
                    anybody else, these pages must show.\n";

/// The loss of a model on the text, in windows of 64 tokens.
fn loss(dir: &Path, model: impl AsRef<Path>) -> Result<f64> {
    let args = format!("eval {} --data text.txt --context 64 --json", model.as_ref().display());
    Ok(json(dir, &args)?["loss"].as_f64().unwrap_or(f64::NAN))
}

#[test]
fn blending_all_keys_equals_softmax_and_blending_some_does_not() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    for family in ["llama", "mistral", "qwen2", "qwen3"] {
        let model = fixture(family);
        let softmax = loss(dir, &model)?;
        let convert = |flags: &str, out: &str| {
            json(
                dir,
                &format!("convert {} --attention gd {flags} --json --out {family}-{out}", model.display()),
            )
        };
        let converted = convert("--k 64", "dot")?;
        assert_eq!(converted["selecting"], converted["layers"]);
        convert("--k 64 --score energy", "energy")?;
        convert("--k 2", "two")?;
        convert("--k 2 --score energy", "two-energy")?;
        convert("--k 2 --layers last:1", "last")?;
        let of = |out: &str| loss(dir, format!("{family}-{out}"));
        for all in ["dot", "energy"] {
            assert!((of(all)? - softmax).abs() < 1e-5, "{family}: {all} {} softmax {softmax}", of(all)?);
        }
        let (two, last) = (of("two")?, of("last")?);
        assert!((of("two-energy")? - two).abs() < 1e-4, "{family}: {two} {}", of("two-energy")?);
        for (a, b) in [(two, softmax), (last, softmax), (last, two)] {
            assert!(
                (a - b).abs() > 1e-3,
                "{family}: {two} with two keys, {last} in the last layer, softmax {softmax}"
            );
        }
        // The conversion can be reversed because the weights were not trained.
        json(dir, &format!("convert {family}-two --attention softmax --json --out {family}-back"))?;
        assert!((of("back")? - softmax).abs() < 1e-6, "{family}");
        // Layers with different scores in one model are an error.
        let mixed =
            gd(dir, &format!("convert {family}-two --attention gd --layers 0 --k 4 --out {family}-mixed"))?;
        let text = String::from_utf8_lossy(&mixed.stderr).into_owned();
        assert!(mixed.status.code() == Some(1) && text.contains("layer 1 selects already"), "{text}");
    }
    Ok(())
}

#[test]
fn a_layer_becomes_every_mechanism_that_layers_can_have() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let model = fixture("llama");
    let softmax = loss(dir, &model)?;
    let convert = |attention: &str, out: &str| {
        json(dir, &format!("convert {} --attention {attention} --json --out {out}", model.display()))
    };
    let mut new = 0;
    for name in Mechanism::names() {
        let converted = convert(name, name)?;
        assert_eq!(converted["changed"], serde_json::json!([0, 1, 2]), "{name}");
        let learned = converted["new_parameters"].as_u64().context("a number")?;
        new += usize::from(learned > 0);
        // One scale per head.
        assert!(*name != "ssmax" || learned == 3 * 4, "{name}: {learned}");
        let own = loss(dir, name)?;
        // Without updates and with windows beyond the text these are softmax attention.
        let same = ["softmax", "hopfield", "sliding_window"].contains(name);
        assert!(
            own.is_finite() && ((own - softmax).abs() < 1e-5) == same,
            "{name}: {own}, softmax {softmax}"
        );
        let text =
            json(dir, &format!("generate {name} --prompt Whether --temperature 0 --max-tokens 3 --json"))?;
        assert!(text["text"].is_string(), "{name}: {text}");
    }
    assert!(new > 4, "{new} mechanisms with learned parameters");
    for (attention, out) in
        [(r#"{"name":"topk","k":64}"#, "topk64"), (r#"{"name":"explicit_sparse","k":64}"#, "sparse64")]
    {
        convert(attention, out)?;
        assert!((loss(dir, out)? - softmax).abs() < 1e-5, "{attention}");
    }
    // The weights were not trained, and the learned parameters of the mechanism go with it.
    json(dir, "convert differential --attention softmax --json --out back")?;
    assert!((loss(dir, "back")? - softmax).abs() < 1e-6);
    Ok(())
}

#[test]
fn a_mechanism_that_does_not_fit_a_layer_is_named() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let model = fixture("mistral");
    for name in ["linear", "nsa"] {
        let message = error(dir, &format!("convert {} --attention {name} --out new", model.display()), 1)?;
        assert!(message.contains(name) && message.contains("window"), "{message}");
    }
    assert!(!dir.join("new").exists());
    Ok(())
}

#[test]
fn without_a_new_attention_the_model_is_saved_unchanged() -> Result<()> {
    let folder = folder()?;
    let model = fixture("qwen2");
    let converted = json(folder.path(), &format!("convert {} --json --out same", model.display()))?;
    assert_eq!((&converted["selecting"], &converted["changed"]), (&0.into(), &Value::Array(vec![])));
    assert_eq!(load_json(&model.join(CONFIG))?, load_json(&folder.path().join("same").join(CONFIG))?);
    assert_eq!(loss(folder.path(), &model)?, loss(folder.path(), "same")?);
    Ok(())
}

#[test]
fn invalid_flags_are_errors() -> Result<()> {
    let folder = folder()?;
    let model = fixture("llama");
    let (model, dir) = (model.display(), folder.path());
    fs::create_dir(dir.join("there"))?;
    for (args, code, words) in [
        (format!("convert {model}"), 2, ["--out", ""]),
        (format!("convert {model} --out there"), 2, ["there", "exists already"]),
        (format!("convert {model} --out new --k 4"), 2, ["--attention", ""]),
        (format!("convert {model} --out new --attention gd --k 3"), 2, ["--k 3", "64"]),
        (format!("convert {model} --out new --attention linar"), 2, ["linar", "linear"]),
        (format!("convert {model} --out new --attention reformer"), 2, ["reformer", "one tensor"]),
        (format!("convert {model} --out new --attention {{\"name\":\"topk\",\"q\":3}}"), 2, ["`q`", "`k`"]),
        (format!("convert {model} --out new --attention topk --k 4"), 2, ["--k", "--attention gd"]),
        (format!("convert {model} --out new --attention gd --layers some"), 2, ["some", "--layers"]),
        (format!("convert {model} --out new --attention gd --layers 1,3"), 1, ["layer 3", "0 to 2"]),
        (format!("convert {model} --out new --attention gd --layers last:4"), 1, ["last 4", "3 layers"]),
        ("convert nowhere --out new".to_owned(), 1, ["nowhere", "no such"]),
        (format!("convert {model} --out text.txt/new"), 1, ["text.txt", ""]),
    ] {
        let out = gd(dir, &args)?;
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{args}: {text}");
        assert!(words.iter().all(|w| text.contains(w)) && text.lines().count() == 1, "{args}: {text}");
    }
    assert!(!dir.join("new").exists());
    Ok(())
}

#[test]
fn a_swap_does_not_create_missing_tensors() -> Result<()> {
    let mut parts = pretrained::read(&fixture("qwen3"), &Device::Cpu)?;
    let name = "model.layers.1.self_attn.k_norm.weight";
    ensure!(parts.tensors.remove(name).is_some());
    let swap = Swap { layers: Layers::All, mechanism: Mechanism::Gd, candidates: 4, score: Score::Dot };
    let e = swap.apply(&mut parts).unwrap_err().to_string();
    assert!(e.contains("1 tensors are missing") && e.contains(name) && e.contains("qwen3"), "{e}");
    Ok(())
}

#[test]
fn the_example_for_users_of_the_library_runs() -> Result<()> {
    let [softmax, all] = example::swapped(&fixture("mistral"), TEXT, 64)?;
    // The sliding window of the model is shorter than 64.
    assert!((softmax / all - 1.0).abs() < 1e-5, "{softmax} {all}");
    let [same, two] = example::swapped(&fixture("mistral"), TEXT, 2)?;
    assert!(same == softmax && (two / softmax - 1.0).abs() > 1e-3, "{softmax} {two}");
    Ok(())
}

#[test]
fn weights_are_stored_in_the_requested_dtype() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let model = fixture("llama");
    let plain = loss(dir, &model)?;
    for (flag, dtype, name) in
        [("f32", DType::F32, "float32"), ("f16", DType::F16, "float16"), ("bf16", DType::BF16, "bfloat16")]
    {
        json(dir, &format!("convert {} --dtype {flag} --json --out {flag}", model.display()))?;
        let out = dir.join(flag);
        let config = load_json(&out.join(CONFIG))?;
        let stored = config.get("torch_dtype").or_else(|| config.get("dtype"));
        assert_eq!(stored, Some(&Value::from(name)));
        assert!(load_tensors(&out, &Device::Cpu)?.values().all(|t| t.dtype() == dtype));
        // Weights that are stored in half precision give the results of the same values in f32.
        json(dir, &format!("convert {flag} --dtype f32 --json --out {flag}-wide"))?;
        let (half, wide) = (loss(dir, flag)?, loss(dir, format!("{flag}-wide"))?);
        assert!((half - wide).abs() < 1e-5 && (half - plain).abs() < 1e-2, "{flag}: {half} {wide} {plain}");
        let written = json(
            dir,
            &format!("generate {flag} --prompt {} --temperature 0 --max-tokens 20 --json", "Whether"),
        )?;
        let same = json(
            dir,
            &format!("generate {flag}-wide --prompt {} --temperature 0 --max-tokens 20 --json", "Whether"),
        )?;
        assert_eq!(written["text"], same["text"]);
        assert!(
            written["prompt_tokens"].as_u64() > Some(0) && written["tokens_per_second"].as_f64() > Some(0.0)
        );
    }
    let mut parts = pretrained::read(&model, &Device::Cpu)?;
    let name = "model.layers.1.mlp.up_proj.weight";
    let scaled = (parts.tensors[name].to_dtype(DType::F32)? * 1e7)?;
    parts.tensors.insert(name.into(), scaled);
    let error = parts.cast(DType::F16).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("float16"), "{error}");
    Ok(())
}

#[test]
fn quantised_files_are_written_and_continued() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let corpus = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/gguf").join(name);
    let convert = |model: &Path, flags: &str| format!("convert {} {flags}", model.display());
    let model = corpus("q4_0.gguf");
    let written = json(dir, &convert(&model, "--quantize q4_1 --out q.gguf --json"))?;
    ensure!(written["architecture"] == "llama" && written["type"] == "q4_1", "{written}");
    ensure!(written["bytes"] == fs::metadata(dir.join("q.gguf"))?.len(), "{written}");
    ensure!(written["tensors"]["Q4_1"].as_u64() == Some(7), "{written}");
    let selecting = json(dir, &convert(&model, "--attention gd --k 2 --quantize q8_0 --out gd.gguf --json"))?;
    ensure!(selecting["architecture"] == "gd", "{selecting}");
    let text = |model: &str| -> Result<Value> {
        Ok(json(dir, &format!("generate {model} --prompt ab --temperature 0 --max-tokens 8 --json"))?["token_ids"].clone())
    };
    for quantised in ["q.gguf", "gd.gguf"] {
        // The same weights, dequantised.
        gd(dir, &convert(Path::new(quantised), &format!("--out {quantised}-f32")))?;
        assert_eq!(text(quantised)?, text(&format!("{quantised}-f32"))?, "{quantised}");
    }
    let plain = gd(dir, &convert(&model, "--attention gd --k 2 --quantize q8_0 --out other.gguf"))?;
    let plain = String::from_utf8(plain.stdout)?;
    ensure!(plain.contains("which llama.cpp does not read"), "{plain}");

    let refused = |flags: &str, code| error(dir, &convert(&model, flags), code);
    let message = refused("--quantize q4_1 --out q.gguf", 2)?;
    ensure!(message.contains("q.gguf: exists already"), "{message}");
    let message = refused("--quantize q4_1 --dtype f16 --out new.gguf", 2)?;
    ensure!(message.contains("--dtype"), "{message}");
    let message = error(dir, &convert(&fixture("qwen2"), "--quantize q4_0 --out new.gguf"), 1)?;
    ensure!(message.contains("new.gguf: "), "{message}");
    ensure!(!dir.join("new.gguf").exists());
    Ok(())
}
