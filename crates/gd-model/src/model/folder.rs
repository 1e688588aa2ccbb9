//! Which model a folder holds, and what to do with a folder that holds something else.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::checkpoint::{CONFIG, INDEX, TOKENIZER, WEIGHTS, load_json};
use crate::io::gguf::SplitName;
use crate::model::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};

/// The start of the names of the weights of an adapter.
const ADAPTER_FILE: &str = "adapter_model.";

/// Extensions of pickles, which may hold weights.
const PICKLES: [&str; 4] = ["bin", "pt", "pth", "ckpt"];
/// Names of pickles that hold no weights start so.
const OTHER_PICKLES: [&str; 4] = ["training_args", "optimizer", "scheduler", "rng_state"];
/// Extensions of weights of other frameworks.
const OTHER_FRAMEWORKS: [&str; 6] = ["h5", "msgpack", "onnx", "npz", "tflite", "nemo"];
/// Tokenizers in other formats than `tokenizer.json`.
const OTHER_TOKENIZERS: [&str; 5] =
    ["tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json"];

/// The number of files that a message lists.
const LISTED: usize = 6;

/// The GGUF file in `folder` if the folder is not a checkpoint: its only one, or the first part of the only split model.
/// `None` for a checkpoint folder.
///
/// # Errors
/// [`Error::NoModel`] with the file that is missing, what the folder holds, and what to do.
pub(super) fn gguf_in(folder: &Path) -> Result<Option<PathBuf>> {
    let names = list(folder)?;
    if names.contains(WEIGHTS) || names.contains(INDEX) {
        return Ok(None);
    }
    let files: Vec<&str> = with_extension(&names, &["gguf"]).collect();
    let parts: Vec<SplitName> = files.iter().filter_map(|name| SplitName::parse(name)).collect();
    let is_split = parts.len() == files.len() && parts.iter().all(|part| part.is_of(&parts[0]));
    match files.as_slice() {
        [] => Err(missing(folder, WEIGHTS, without_weights(folder, &names))),
        [first, ..] if files.len() == 1 || is_split => Ok(Some(folder.join(first))),
        _ => {
            let reason =
                format!("the folder has several GGUF files, give the path of one: {}", files.join(", "));
            Err(missing(folder, WEIGHTS, reason))
        }
    }
}

/// Whether a path is a file, or a folder with weights.
#[cfg(feature = "hub")]
pub(super) fn has_weights(path: &Path) -> bool {
    let is_weights =
        |name: &String| [WEIGHTS, INDEX, ADAPTER_WEIGHTS].contains(&name.as_str()) || name.ends_with(".gguf");
    path.is_file() || list(path).is_ok_and(|names| names.iter().any(is_weights))
}

/// Checks that a checkpoint folder has a configuration and a tokenizer beside the weights.
///
/// # Errors
/// As [`gguf_in`].
pub(super) fn check_companions(folder: &Path) -> Result<()> {
    let names = list(folder)?;
    if names.contains(ADAPTER_CONFIG) {
        tracing::warn!("{}: the adapter beside the model is not applied", folder.display());
    }
    if !names.contains(CONFIG) {
        let reason = match names.contains("params.json") {
            true => {
                "params.json is the format in which the model was first published; convert the model with the \
                     script of transformers for its family"
            }
            false => {
                "the folder has weights without the configuration of their model; copy it from where they come from"
            }
        };
        return Err(missing(folder, CONFIG, reason.into()));
    }
    if names.contains(TOKENIZER) {
        return Ok(());
    }
    let others: Vec<&str> = OTHER_TOKENIZERS.into_iter().filter(|name| names.contains(*name)).collect();
    let reason = if others.is_empty() {
        "the folder has no tokenizer; copy it from where the weights come from".into()
    } else {
        format!(
            "the folder has its tokenizer as {}, which is not read; transformers converts it: \
             AutoTokenizer.from_pretrained(folder).save_pretrained(folder)",
            others.join(" and ")
        )
    };
    Err(missing(folder, TOKENIZER, reason))
}

/// What a folder without weights in a format that is read holds, and what to do.
fn without_weights(folder: &Path, names: &BTreeSet<String>) -> String {
    let safetensors: Vec<&str> =
        with_extension(names, &["safetensors"]).filter(|name| !name.starts_with(ADAPTER_FILE)).collect();
    let pickles = with_extension(names, &PICKLES).find(|name| {
        !name.starts_with(ADAPTER_FILE) && !OTHER_PICKLES.iter().any(|other| name.starts_with(other))
    });
    let is_adapter =
        names.contains(ADAPTER_CONFIG) || names.iter().any(|name| name.starts_with(ADAPTER_FILE));
    match safetensors.as_slice() {
        [one] if is_shard(one) => {
            return format!(
                "{one} is a shard, and {INDEX}, which lists the tensors of the shards, is missing; copy it from where the \
                 shard comes from, or give the path of the shard if it is the only one"
            );
        }
        [first, ..] if is_shard(first) => {
            return format!(
                "the folder has {} shards, but not {INDEX}, which lists their tensors; copy it from where they come from: {}",
                safetensors.len(),
                shorten(&safetensors)
            );
        }
        [one] => return format!("the weights are in {one}; give the path of that file"),
        [_, ..] => {
            return format!(
                "several files may hold the weights, give the path of one: {}",
                shorten(&safetensors)
            );
        }
        [] => {}
    }
    if let Some(pickle) = pickles {
        return format!(
            "{pickle} is a pickle, which is not read because it can run code; save the model as safetensors \
             (transformers: save_pretrained(folder, safe_serialization=True))"
        );
    }
    if is_adapter {
        return adapter(folder);
    }
    if let Some(other) = with_extension(names, &OTHER_FRAMEWORKS).next() {
        return format!("{other} is a format that is not read; save the model as safetensors");
    }
    if names.contains("snapshots") {
        return "this is a folder of the Hugging Face cache; the model is in a folder below snapshots".into();
    }
    if names.is_empty() {
        return "the folder is empty".into();
    }
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    format!("the folder has no weights, only {}", shorten(&all))
}

/// The message for a folder with an adapter that cannot be read, or with a part of one.
fn adapter(folder: &Path) -> String {
    let settings = load_json(&folder.join(ADAPTER_CONFIG)).unwrap_or_default();
    let base = settings.get("base_model_name_or_path").and_then(|value| value.as_str());
    let base = base.map_or("its base model".into(), |text| format!("{text:?}"));
    format!(
        "the folder has an adapter, but not both of {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, which are read; save it again \
         as safetensors, or merge it into {base} (peft: merge_and_unload) and save the result"
    )
}

/// The names of the files and folders in a folder.
fn list(folder: &Path) -> Result<BTreeSet<String>> {
    let folder = if folder == Path::new("") { Path::new(".") } else { folder };
    let unreadable = |e| Error::read(folder, "folder", e);
    let entries = fs::read_dir(folder).map_err(unreadable)?;
    entries.map(|entry| Ok(entry.map_err(unreadable)?.file_name().to_string_lossy().into_owned())).collect()
}

fn with_extension<'a>(names: &'a BTreeSet<String>, extensions: &'a [&str]) -> impl Iterator<Item = &'a str> {
    names.iter().map(String::as_str).filter(|name| {
        let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
        extensions.iter().any(|candidate| extension.eq_ignore_ascii_case(candidate))
    })
}

/// Whether a file has the name of a shard, such as `model-00001-of-00002.safetensors`.
fn is_shard(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    name.strip_suffix(".safetensors")
        .and_then(|stem| stem.rsplit_once("-of-"))
        .and_then(|(rest, count)| Some((rest.rsplit_once('-')?.1, count)))
        .is_some_and(|(at, count)| number(at) && number(count))
}

fn shorten(names: &[&str]) -> String {
    let more = if names.len() > LISTED { ", …" } else { "" };
    format!("{}{more}", names[..names.len().min(LISTED)].join(", "))
}

fn missing(folder: &Path, name: &str, reason: String) -> Error {
    Error::NoModel { path: folder.join(name), reason }
}
