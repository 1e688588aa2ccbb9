//! Checkpoint folders: bit-equal round trips, atomic writes, and files that must be refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use gd_model::Error;
use gd_model::io::checkpoint::*;
use gd_model::io::files::write_file;
use gd_model::io::tokenizer::Tokenizer;
use serde_json::json;

/// One tensor of each dtype, with values that a conversion could change: −0, subnormals, NaN, ∞.
fn tensors() -> BTreeMap<String, Tensor> {
    let cpu = &Device::Cpu;
    let odd = [-0.0f32, 1e-42, f32::NAN, f32::INFINITY, 0.1, -3.4e38, 1.0, 65504.0];
    let f32s = Tensor::new(&odd, cpu).unwrap().reshape((2, 4)).unwrap();
    BTreeMap::from([
        ("f32".into(), f32s.clone()),
        ("bf16".into(), f32s.to_dtype(DType::BF16).unwrap()),
        ("f16".into(), f32s.to_dtype(DType::F16).unwrap()),
        ("f64".into(), Tensor::new(&[1e-310f64, 0.1], cpu).unwrap()),
        ("i32".into(), Tensor::new(&[i32::MIN, -1, i32::MAX], cpu).unwrap()),
        ("u32".into(), Tensor::new(u32::MAX, cpu).unwrap()),
        ("strided".into(), f32s.t().unwrap()),
        ("view".into(), f32s.narrow(1, 1, 2).unwrap()),
        ("none".into(), Tensor::zeros((0, 4), DType::F32, cpu).unwrap()),
    ])
}

/// The bits of a tensor as little-endian bytes.
fn bits(t: &Tensor) -> Vec<u8> {
    let t = t.flatten_all().unwrap();
    match t.dtype() {
        DType::F32 => t.to_vec1::<f32>().unwrap().iter().flat_map(|x| x.to_bits().to_le_bytes()).collect(),
        DType::F64 => t.to_vec1::<f64>().unwrap().iter().flat_map(|x| x.to_bits().to_le_bytes()).collect(),
        DType::I32 => t.to_vec1::<i32>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::U32 => t.to_vec1::<u32>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::BF16 => {
            t.to_vec1::<half::bf16>().unwrap().iter().flat_map(|x| x.to_bits().to_le_bytes()).collect()
        }
        DType::F16 => {
            t.to_vec1::<half::f16>().unwrap().iter().flat_map(|x| x.to_bits().to_le_bytes()).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn assert_same(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) {
    assert!(a.keys().eq(b.keys()), "{:?} {:?}", a.keys(), b.keys());
    for (name, t) in a {
        assert_eq!((t.dtype(), t.dims()), (b[name].dtype(), b[name].dims()), "{name}");
        assert_eq!(bits(t), bits(&b[name]), "{name}");
    }
}

fn save_as(folder: &Path, mark: u32) -> gd_model::Result<()> {
    let extra = BTreeMap::from([("mark.txt".to_string(), mark.to_string().into_bytes())]);
    save_with(folder, &tensors(), &extra)
}

fn save_with(
    folder: &Path,
    tensors: &BTreeMap<String, Tensor>,
    extra: &BTreeMap<String, Vec<u8>>,
) -> gd_model::Result<()> {
    let checkpoint = Checkpoint {
        config: &json!({"vocab_size": 256, "gd": {}}),
        tensors,
        tokenizer: &Tokenizer::bytes().unwrap(),
        generation: &json!({"temperature": 0.8}),
        card: "# card\n",
        extra,
    };
    save(folder, &checkpoint)
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn folder_round_trips_to_the_bit() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("runs/one");
    save_as(&folder, 1).unwrap();
    let names = [CARD, CONFIG, GENERATION, "mark.txt", WEIGHTS, TOKENIZER];
    assert_eq!(entries(&folder), names);
    assert_eq!(entries(folder.parent().unwrap()), ["one"]);
    assert_same(&tensors(), &load_tensors(&folder, &Device::Cpu).unwrap());
    assert_same(&tensors(), &load_tensors(&folder.join(WEIGHTS), &Device::Cpu).unwrap());
    assert_eq!(load_json(&folder.join(CONFIG)).unwrap()["vocab_size"], 256);
    assert_eq!(Tokenizer::load(&folder.join(TOKENIZER)).unwrap().vocab_size(), 256);
    let bytes = fs::read(folder.join(WEIGHTS)).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    // The same content gives the same bytes.
    save_as(&root.path().join("two"), 1).unwrap();
    assert_eq!(bytes, fs::read(root.path().join("two").join(WEIGHTS)).unwrap());
}

#[cfg(unix)]
#[test]
fn permissions_follow_the_umask() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("one");
    save_as(&folder, 1).unwrap();
    let plain = root.path().join("plain");
    fs::create_dir(&plain).unwrap();
    let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode();
    assert_eq!(mode(&folder), mode(&plain));
    write_file(&root.path().join("a"), b"x").unwrap();
    fs::write(root.path().join("b"), b"x").unwrap();
    assert_eq!(mode(&root.path().join("a")), mode(&root.path().join("b")));
}

#[test]
fn a_failed_save_leaves_the_old_folder() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("one");
    save_as(&folder, 1).unwrap();
    save_as(&folder, 2).unwrap();
    assert_eq!(fs::read(folder.join("mark.txt")).unwrap(), b"2");
    let failed = write_folder(&folder, |new| {
        fs::write(new.join("mark.txt"), "3").unwrap();
        // The old folder is in place until the new one is complete.
        assert_eq!(fs::read(folder.join("mark.txt")).unwrap(), b"2");
        Err(Error::Invalid("stopped".into()))
    });
    assert_eq!(failed.unwrap_err().to_string(), "stopped");
    assert_eq!(fs::read(folder.join("mark.txt")).unwrap(), b"2");
    assert_same(&tensors(), &load_tensors(&folder, &Device::Cpu).unwrap());
    assert_eq!(entries(root.path()), ["one"]);
    let fresh = root.path().join("fresh");
    assert!(write_folder(&fresh, |_| Err(Error::Invalid("stopped".into()))).is_err());
    assert_eq!(entries(root.path()), ["one"]);
}

#[test]
fn only_checkpoints_and_empty_folders_are_replaced() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("letters");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("dear.txt"), "x").unwrap();
    let file = root.path().join("file");
    fs::write(&file, "x").unwrap();
    for path in [&folder, &file] {
        let error = save_as(path, 1).unwrap_err();
        assert!(matches!(error, Error::Occupied { .. }), "{error}");
    }
    assert_eq!(entries(&folder), ["dear.txt"]);
    // A folder cannot be created inside a file, not even with all permissions.
    let error = save_as(&file.join("one"), 1).unwrap_err();
    assert!(matches!(error, Error::Unwritable { .. }), "{error}");
    assert_eq!(entries(root.path()), ["file", "letters"]);
    let empty = root.path().join("empty");
    fs::create_dir(&empty).unwrap();
    save_as(&empty, 1).unwrap();
    for name in ["../out", "a/b", "..", "", CONFIG] {
        let extra = BTreeMap::from([(name.to_string(), vec![])]);
        let error = save_with(&root.path().join("two"), &tensors(), &extra).unwrap_err();
        assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
    }
    assert!(!root.path().join("two").exists());
}

#[test]
fn truncated_files_are_named_at_every_length() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("cut.safetensors");
    write_tensors(&path, &tensors()).unwrap();
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        let error = load_tensors(&path, &Device::Cpu).unwrap_err();
        let Error::Truncated { needed, actual, .. } = error else { panic!("{length}: {error}") };
        assert_eq!(actual, length as u64);
        assert!(needed > actual && needed <= whole.len() as u64);
        if length + 1 == whole.len() {
            assert_eq!(needed, whole.len() as u64);
        }
    }
}

#[test]
fn foreign_files_are_named() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("x.safetensors");
    write_tensors(&path, &tensors()).unwrap();
    let mut longer = fs::read(&path).unwrap();
    longer.push(0);
    let header = |json: &str| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"PK\x03\x04 and more than eight bytes".to_vec(), "zip archive"),
        (b"GGUF\x03\x00\x00\x00\x00\x00".to_vec(), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1".to_vec(), "LFS"),
        (b"<!DOCTYPE html><html></html>".to_vec(), "HTML"),
        (b"Call me Ishmael. Some years ago".to_vec(), "header"),
        (vec![0xff; 64], "header"),
        (header("{\"a\": 1}"), "JSON"),
        (header("{not json"), "JSON"),
        ([&2u64.to_le_bytes()[..], b"{\xff"].concat(), "UTF-8"),
        (header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#), "invalid"),
        (longer, "metadata"),
    ];
    for (bytes, expected) in cases {
        fs::write(&path, bytes).unwrap();
        let error = load_tensors(&path, &Device::Cpu).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{expected}: {error}");
        let line = error.to_string();
        assert!(line.contains("x.safetensors") && line.contains(expected), "{expected}: {line}");
        assert!(!line.contains('\n'), "{line}");
    }
    fs::write(&path, header("{}")).unwrap();
    assert!(load_tensors(&path, &Device::Cpu).unwrap().is_empty());
}

#[test]
fn missing_files_and_tensors_are_named() {
    let root = tempfile::tempdir().unwrap();
    let error = load_tensors(&root.path().join("none"), &Device::Cpu).unwrap_err();
    assert!(error.to_string().ends_with("none: no such checkpoint"), "{error}");
    let error = load_tensors(root.path(), &Device::Cpu).unwrap_err();
    assert!(error.to_string().ends_with("model.safetensors: no such safetensors file"), "{error}");
    let error = require(Path::new("m"), &tensors(), ["f32", "lm_head.weight"]).unwrap_err();
    assert_eq!(error.to_string(), "m: 1 tensors are missing: lm_head.weight");
    let error = require(Path::new("m"), &tensors(), ["a", "b", "c", "d", "e"]).unwrap_err();
    assert_eq!(error.to_string(), "m: 5 tensors are missing: a, b, c, d, …");
}

#[test]
fn shards_are_joined_and_checked() {
    let root = tempfile::tempdir().unwrap();
    let all = tensors();
    let (first, second): (BTreeMap<_, _>, BTreeMap<_, _>) =
        all.clone().into_iter().partition(|(name, _)| name.as_str() < "g");
    write_tensors(&root.path().join("s1.safetensors"), &first).unwrap();
    write_tensors(&root.path().join("s2.safetensors"), &second).unwrap();
    let mut map: serde_json::Map<_, _> = first.keys().map(|k| (k.clone(), "s1.safetensors".into())).collect();
    map.extend(second.keys().map(|k| (k.clone(), "s2.safetensors".into())));
    let index = root.path().join(INDEX);
    let write = |map: &serde_json::Map<String, serde_json::Value>| {
        fs::write(&index, json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
    };
    write(&map);
    assert_same(&all, &load_tensors(root.path(), &Device::Cpu).unwrap());
    assert_same(&all, &load_tensors(&index, &Device::Cpu).unwrap());

    map.insert("ghost".into(), "s2.safetensors".into());
    write(&map);
    let error = load_tensors(root.path(), &Device::Cpu).unwrap_err().to_string();
    assert!(error.ends_with("s2.safetensors: 1 tensors are missing: ghost"), "{error}");
    map.insert("ghost".into(), "s3.safetensors".into());
    write(&map);
    let error = load_tensors(root.path(), &Device::Cpu).unwrap_err().to_string();
    assert!(error.ends_with("s3.safetensors: no such safetensors file"), "{error}");
    for name in ["../s1.safetensors", "/etc/passwd", "a/b", "a\\b", "..", "", "C:x"] {
        map.insert("ghost".into(), name.into());
        write(&map);
        let error = load_tensors(root.path(), &Device::Cpu).unwrap_err();
        assert!(matches!(&error, Error::ShardName { name: n, .. } if n == name), "{error}");
    }
    for text in ["{}", "[]", "{\"weight_map\": {\"a\": 1}}", "{"] {
        fs::write(&index, text).unwrap();
        assert!(matches!(load_tensors(&index, &Device::Cpu), Err(Error::Foreign { .. })), "{text}");
    }
}

#[test]
fn the_model_card_needs_every_value_and_refuses_others() {
    let keys =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    let values: Vec<(&str, String)> = keys.iter().map(|k| (*k, format!("<{k}>"))).collect();
    let card = model_card(&values).unwrap();
    assert!(card.contains("# <name>\n") && card.contains("| Validation loss | <loss> |"), "{card}");
    assert!(model_card(&values[1..]).unwrap_err().to_string().contains("\"name\""));
    assert!(model_card(&[("colour", String::new())]).unwrap_err().to_string().contains("\"colour\""));
}
