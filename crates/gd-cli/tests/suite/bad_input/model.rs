//! The commands that need a model or a text: train, eval, generate, compare, doctor.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use gd_model::config::Recipe;
use gd_model::io::checkpoint::{CONFIG, INDEX, TOKENIZER, WEIGHTS, write_tensors};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::model::pretrained::Loaded;
use serde_json::{Value, json};

use super::{Case, case};
use crate::program::SMALL;

/// `gd train` on the valid text with the small configuration. Additional flags take precedence.
fn train(flags: &str, code: i32, names: &'static [&'static str]) -> Case {
    let mut args = "train".to_owned();
    for (flag, value) in
        [("--config", "{dir}/small.json"), ("--data", "{dir}/good.txt"), ("--out", "{dir}/new")]
    {
        if !flags.contains(flag) {
            args += &format!(" {flag} {value}");
        }
    }
    case(format!("{args} {flags}"), code, names)
}

/// `gd eval` of a model on the valid text.
fn eval(model: &str, code: i32, names: &'static [&'static str]) -> Case {
    case(format!("eval {{dir}}/{model} --data {{dir}}/good.txt"), code, names)
}

/// `gd eval` of the valid model with these flags.
fn eval_on(flags: &str, code: i32, names: &'static [&'static str]) -> Case {
    case(format!("eval {{dir}}/model {flags}"), code, names)
}

/// `gd generate` with the valid model.
fn generate(flags: &str, code: i32, names: &'static [&'static str]) -> Case {
    case(format!("generate {{dir}}/model {flags}"), code, names)
}

/// `gd compare` on the valid text.
fn compare(flags: &str, code: i32, names: &'static [&'static str]) -> Case {
    case(format!("compare --data {{dir}}/good.txt {flags}"), code, names)
}

pub(super) fn train_cases() -> Vec<Case> {
    vec![
        train("--data {dir}/nowhere.txt", 1, &["nowhere.txt", "no such"]),
        train("--data {dir}/nothing.txt", 1, &["nothing.txt", "empty"]),
        train("--data {dir}/latin.txt", 1, &["latin.txt", "byte 3"]),
        train("--data {dir}/hollow", 1, &["hollow", ".txt"]),
        train("--data {dir}/short.txt", 1, &["18 tokens", "33"]),
        train("--config tinny", 1, &["\"tinny\"", "tiny"]),
        train("--config {dir}/nowhere.json", 1, &["nowhere.json"]),
        train("--config {dir}/text.txt", 1, &["text.txt"]),
        train("--config {dir}/unknown_key.json", 1, &["unknown_key.json", "hidden_sizes"]),
        train("--config {dir}/unknown_gd_key.json", 1, &["unknown_gd_key.json", "temperatur"]),
        train("--config {dir}/mechanism.json", 1, &["mechanism.json", "linear"]),
        train("--config {dir}/heads.json", 1, &["heads.json", "3", "2"]),
        train("--config {dir}/odd.json", 1, &["odd.json", "head_dim must be even"]),
        train("--config {dir}/layers.json", 1, &["3 mechanisms", "2 layers"]),
        train("--config {dir}/long.json", 1, &["train.context", "64", "not 65"]),
        train("--config {dir}/rate.json", 1, &["rate.json", "-1"]),
        train("--out {dir}/text.txt/new", 1, &["text.txt"]),
        train("--out {dir}/text.txt", 1, &["text.txt"]),
        train("--out {dir}/occupied", 1, &["occupied", "left alone"]),
        train("--steps 0", 2, &["0", "--steps"]),
        train("--steps -5", 2, &["-5"]),
        train("--steps ten", 2, &["ten", "--steps"]),
        train("--stop-after 0", 2, &["0", "--stop-after"]),
        train("--save-every 0", 2, &["0", "--save-every"]),
        case("train --resume {dir}/nowhere", 1, &["nowhere", "no such"]),
        case("train --resume {dir}/model", 1, &["model", "no checkpoint"]),
        train("--resume {dir}/model", 2, &["--resume"]),
        train("--device cuda:9", 1, &["cuda:9"]),
    ]
}

pub(super) fn model_cases() -> Vec<Case> {
    vec![
        eval("nowhere", 1, &["nowhere", "no such"]),
        eval("hollow", 1, &["hollow/model.safetensors"]),
        eval("cut", 1, &["cut/model.safetensors", "truncated"]),
        eval("alien", 1, &["alien/model.safetensors", "zip"]),
        eval("gap", 1, &["gap", "model.layers.1.mlp.up_proj.weight"]),
        eval("other_shape", 1, &["other_shape", "[64, 32]", "[60, 32]"]),
        eval("other_heads", 1, &["other_heads", "3", "2"]),
        eval("other_key", 1, &["other_key/config.json", "colour"]),
        eval("no_config", 1, &["no_config/config.json"]),
        eval("no_tokenizer", 1, &["no_tokenizer/tokenizer.json"]),
        eval("bad_tokenizer", 1, &["bad_tokenizer/tokenizer.json"]),
        eval("small_vocabulary", 1, &["small_vocabulary", "256", "200"]),
        eval("not_finite", 1, &["not_finite/model.safetensors", "model.norm.weight", "1 are NaN"]),
        case(
            "generate {dir}/not_finite --prompt It",
            1,
            &["not_finite/model.safetensors", "model.norm.weight", "1 are NaN"],
        ),
        eval("pickle", 1, &["pickle/model.safetensors", "pytorch_model.bin is a pickle", "safetensors"]),
        eval("escape", 1, &["escape/model.safetensors.index.json", "../model.safetensors"]),
        eval_on("", 2, &["--data"]),
        eval_on("--data {dir}/nowhere.txt", 1, &["nowhere.txt"]),
        eval_on("--data {dir}/nothing.txt", 1, &["nothing.txt", "empty"]),
        eval_on("--data {dir}/latin.txt", 1, &["latin.txt", "byte 3"]),
        eval_on("--data {dir}/one.txt", 1, &["one.txt", "1 token"]),
        eval_on("--data {dir}/good.txt --context 0", 2, &["--context 0"]),
        eval_on("--data {dir}/good.txt --context 65", 2, &["--context 65", "max_position_embeddings 64"]),
        eval_on("--data {dir}/good.txt --context many", 2, &["many", "--context"]),
        case("generate {dir}/nowhere --prompt It", 1, &["nowhere"]),
        case("generate {dir}/cut --prompt It", 1, &["cut/model.safetensors", "truncated"]),
        generate("--prompt ''", 1, &["the prompt is empty", "begin token"]),
        generate("--prompt It --stop ''", 2, &["--stop"]),
        generate("--prompt It --temperature -1", 2, &["--temperature", "-1"]),
        generate("--prompt It --temperature nan", 2, &["--temperature", "NaN"]),
        generate("--prompt It --temperature hot", 2, &["--temperature", "hot"]),
        generate("--prompt It --top-k 0", 2, &["--top-k", "0"]),
        generate("--prompt It --top-p 0", 2, &["--top-p", "0"]),
        generate("--prompt It --top-p 1.5", 2, &["--top-p", "1.5"]),
        generate("--prompt It --min-p -0.1", 2, &["--min-p", "-0.1"]),
        generate("--prompt It --repetition-penalty 0", 2, &["--repetition-penalty", "0"]),
        generate("--prompt It --max-tokens -1", 2, &["-1"]),
        generate(
            "--prompt a-prompt-of-more-bytes-than-the-sixty-four-positions-that-the-model-has",
            1,
            &["71 tokens", "context of 64"],
        ),
    ]
}

pub(super) fn other_cases() -> Vec<Case> {
    vec![
        compare(
            "--mechanisms softmax,blending",
            2,
            &["--mechanisms", "blending", "softmax+beacon", "gd-bare"],
        ),
        compare("--mechanisms gd,gd", 2, &["--mechanisms", "gd twice"]),
        compare(
            "--mechanisms softmax+beacon --config {dir}/no_beacon.json",
            1,
            &["softmax+beacon", "Beacon"],
        ),
        compare("--config {dir}/unknown_key.json", 1, &["unknown_key.json", "hidden_sizes"]),
        compare("--config {dir}/small.json --out {dir}/text.txt/c", 1, &["text.txt"]),
        compare("--steps 0", 2, &["--steps", "0"]),
        compare("--memory 16", 2, &["--memory", "--data"]),
        case("compare --data {dir}/nowhere.txt", 1, &["nowhere.txt"]),
        case("compare --data {dir}/short.txt --config {dir}/small.json", 1, &["18 tokens"]),
        case("compare --memory 0", 2, &["--memory", "0"]),
        case("compare --memory 16 --mechanisms blending", 2, &["blending"]),
        case(
            "compare --memory 16,32 --mechanisms softmax+beacon --config {dir}/no_beacon.json",
            1,
            &["softmax+beacon"],
        ),
        case("bench", 2, &["command"]),
        case("bench attention --shapes 1x8x0x64", 2, &["1x8x0x64", "N is `0`"]),
        case("bench attention --shapes 1x2x16x16,8x64", 2, &["'8x64'", "BxHxNxD"]),
        case("bench attention --shapes 1x8xlongx64", 2, &["1x8xlongx64", "N is `long`"]),
        case("bench attention --shapes 1x1x99999999999x64", 2, &["1x1x99999999999x64", "elements"]),
        case("bench attention --pass fwd,sideways", 2, &["sideways", "fwdbwd"]),
        case("bench attention --repeats 0", 2, &["0", "--repeats"]),
        case("bench attention --only flash", 2, &["`flash`", "candle flash"]),
        case("bench step --steps 0", 2, &["0", "--steps"]),
        case("bench step --set train.batch=0", 1, &["train.batch must be at least 1, not 0"]),
        case("bench attention {dir}/report.json", 2, &["report.json", "--json"]),
        case("bench attention --json {dir}/text.txt/report.json", 1, &["text.txt"]),
        case("bench attention --json {dir}/hollow", 1, &["hollow"]),
        case("doctor --config {dir}/unknown_key.json", 1, &["unknown_key.json", "hidden_sizes"]),
        case("doctor --config {dir}/nowhere.json", 1, &["nowhere.json"]),
    ]
}

/// The small configuration with one changed value. The key is a JSON pointer.
fn changed(pointer: &str, value: Value) -> Result<Value> {
    let mut recipe: Value = serde_json::from_str(SMALL)?;
    let (parent, key) = pointer.rsplit_once('/').context("a pointer")?;
    recipe.pointer_mut(parent).context("no such place")?[key] = value;
    Ok(recipe)
}

/// Writes the texts, configurations and models of the cases into `dir`.
pub(super) fn write_files(dir: &Path) -> Result<()> {
    let text = "All work is made of words, and words of letters.\n".repeat(40);
    fs::write(dir.join("good.txt"), text)?;
    fs::write(dir.join("nothing.txt"), "")?;
    fs::write(dir.join("latin.txt"), b"caf\xe9 au lait")?;
    fs::write(dir.join("short.txt"), "twenty bytes of text")?;
    fs::write(dir.join("one.txt"), "x")?;
    fs::create_dir(dir.join("hollow"))?;
    fs::create_dir(dir.join("occupied"))?;
    fs::write(dir.join("occupied/letter.doc"), "mine")?;

    fs::write(dir.join("small.json"), SMALL)?;
    let configs = [
        ("unknown_key", "/model/hidden_sizes", json!(32)),
        ("unknown_gd_key", "/model/gd/select/temperatur", json!(1.0)),
        ("mechanism", "/model/gd/mechanism", json!(["linear"])),
        ("heads", "/model/num_attention_heads", json!(3)),
        ("odd", "/model/head_dim", json!(15)),
        ("layers", "/model/gd/mechanism", json!(["gd", "gd", "gd"])),
        ("long", "/train/context", json!(65)),
        ("rate", "/train/lr/peak", json!(-1)),
        ("no_beacon", "/model/gd/beacon", Value::Null),
    ];
    for (name, pointer, value) in configs {
        fs::write(dir.join(format!("{name}.json")), changed(pointer, value)?.to_string())?;
    }

    let recipe: Recipe = serde_json::from_str(SMALL)?;
    let params = Params::new(0, DType::F32, &Device::Cpu);
    let model = Transformer::new(&recipe.model, params.builder())?;
    let card =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    let card = card.map(|key| (key, "test".to_owned()));
    let good = dir.join("model");
    let model = Loaded::new(model, params, Tokenizer::bytes()?);
    model.save(&good, &card)?;

    let copy = |name: &str, leave_out: &[&str]| -> Result<std::path::PathBuf> {
        let folder = dir.join(name);
        fs::create_dir(&folder)?;
        for file in [CONFIG, WEIGHTS, TOKENIZER].iter().filter(|f| !leave_out.contains(f)) {
            fs::copy(good.join(file), folder.join(file))?;
        }
        Ok(folder)
    };
    let weights = fs::read(good.join(WEIGHTS))?;
    fs::write(copy("cut", &[])?.join(WEIGHTS), &weights[..weights.len() - 7])?;
    fs::write(copy("alien", &[])?.join(WEIGHTS), b"PK\x03\x04 archive")?;
    let mut tensors = model.params.tensors();
    tensors.remove("model.layers.1.mlp.up_proj.weight").context("the tensor to leave out")?;
    write_tensors(&copy("gap", &[])?.join(WEIGHTS), &tensors)?;
    let mut tensors = model.params.tensors();
    let mut norm = tensors["model.norm.weight"].to_vec1::<f32>()?;
    norm[3] = f32::NAN;
    tensors.insert("model.norm.weight".into(), Tensor::new(norm, &Device::Cpu)?);
    write_tensors(&copy("not_finite", &[])?.join(WEIGHTS), &tensors)?;
    fs::write(copy("pickle", &[WEIGHTS])?.join("pytorch_model.bin"), b"PK\x03\x04")?;
    let config: Value = serde_json::from_slice(&fs::read(good.join(CONFIG))?)?;
    for (name, key, value) in [
        ("other_shape", "intermediate_size", 60),
        ("other_heads", "num_attention_heads", 3),
        ("other_key", "colour", 1),
        ("small_vocabulary", "vocab_size", 200),
    ] {
        let mut config = config.clone();
        config[key] = json!(value);
        fs::write(copy(name, &[])?.join(CONFIG), config.to_string())?;
    }
    copy("no_config", &[CONFIG])?;
    copy("no_tokenizer", &[TOKENIZER])?;
    fs::write(copy("bad_tokenizer", &[])?.join(TOKENIZER), "{}")?;
    let index = json!({ "weight_map": { "model.norm.weight": "../model.safetensors" } });
    fs::write(copy("escape", &[WEIGHTS])?.join(INDEX), index.to_string())?;
    Ok(())
}
