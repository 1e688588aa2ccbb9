//! Models that are split into several files.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use gd_model::io::gguf::{self, Gguf};
use gd_model::model::pretrained;
use gd_testing::log_cases;

use super::{CPU, Metadata, metadata, vocabulary, weights, write};

const PARTS: usize = 3;

/// Writes a model in three parts with these names. The first has the metadata.
fn write_parts(
    folder: &Path,
    names: [&str; PARTS],
    change: impl Fn(usize, &mut Metadata),
) -> Result<Vec<PathBuf>> {
    let weights = weights(false, vocabulary().0.len())?;
    let mut paths = Vec::new();
    for (part, name) in names.into_iter().enumerate() {
        let mut keys = if part == 0 { metadata() } else { Metadata::new() };
        keys.insert("split.no".into(), Value::U16(part as u16));
        keys.insert("split.count".into(), Value::U16(PARTS as u16));
        keys.insert("split.tensors.count".into(), Value::I32(weights.len() as i32));
        change(part, &mut keys);
        let of_part = weights.iter().enumerate().filter(|(at, _)| at % PARTS == part);
        let tensors: Vec<_> = of_part.map(|(_, tensor)| tensor.clone()).collect();
        paths.push(folder.join(name));
        write(&paths[part], &keys, &tensors, GgmlDType::Q8_0)?;
    }
    Ok(paths)
}

const NAMES: [&str; PARTS] = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"];
const OTHER_NAMES: [&str; PARTS] = ["z.gguf", "second.gguf", "a.gguf"];

fn same(a: &Gguf, b: &Gguf) -> Result<()> {
    ensure!(a.config == b.config && a.tensors.len() == b.tensors.len());
    for (name, tensor) in &a.tensors {
        ensure!((tensor - &b.tensors[name])?.abs()?.max_all()?.to_scalar::<f32>()? == 0.0, "{name}");
    }
    Ok(())
}

#[test]
fn all_parts_are_read_from_any_of_them() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let whole = folder.path().join("whole.gguf");
    write(&whole, &metadata(), &weights(false, vocabulary().0.len())?, GgmlDType::Q8_0)?;
    let whole = gguf::read(&whole, &CPU)?;
    let mut cases = 0;
    for names in [NAMES, OTHER_NAMES] {
        let folder = tempfile::tempdir()?;
        for path in write_parts(folder.path(), names, |_, _| ())? {
            same(&gguf::read(&path, &CPU)?, &whole)?;
            cases += 1;
        }
        // Other files in the folder do not matter.
        std::fs::write(folder.path().join("broken.gguf"), "GGUF")?;
        same(&gguf::read(&folder.path().join(names[0]), &CPU)?, &whole)?;
        cases += 1;
    }
    // A folder with the parts of one model is that model.
    let folder = tempfile::tempdir()?;
    write_parts(folder.path(), NAMES, |_, _| ())?;
    ensure!(pretrained::read(folder.path(), &CPU)?.tensors.len() == whole.tensors.len());
    log_cases("gguf-split", cases + 1);
    Ok(())
}

#[test]
fn missing_and_contradicting_parts_are_named() -> Result<()> {
    let error = |path: &Path| -> Result<String> {
        let e =
            gguf::read(path, &CPU).err().ok_or_else(|| anyhow::anyhow!("an error was expected"))?.to_string();
        ensure!(!e.contains('\n'), "{e}");
        Ok(e)
    };
    for (names, reason) in [
        (NAMES, "part 2 is missing: there is no m-00002-of-00003.gguf"),
        (OTHER_NAMES, "part 2 is missing: no file beside it has the keys of that part"),
    ] {
        let folder = tempfile::tempdir()?;
        let paths = write_parts(folder.path(), names, |_, _| ())?;
        std::fs::remove_file(&paths[1])?;
        let e = error(&paths[0])?;
        ensure!(
            e.contains(names[0]) && e.contains("part 1 of 3 of a split model") && e.contains(reason),
            "{e}"
        );
        let e = error(&paths[2])?;
        ensure!(e.contains("part 3 of 3") && e.contains(reason), "{e}");
    }
    let folder = tempfile::tempdir()?;
    let paths = write_parts(folder.path(), OTHER_NAMES, |_, _| ())?;
    std::fs::copy(&paths[1], folder.path().join("copy.gguf"))?;
    let e = error(&paths[0])?;
    ensure!(e.contains("copy.gguf and ") && e.contains("second.gguf both have the keys"), "{e}");

    type Change = fn(usize, &mut Metadata);
    let changes: [(Change, &str); 4] = [
        (
            |part, keys| drop((part == 1).then(|| keys.insert("split.no".into(), Value::U16(2)))),
            "not those of part 2 of 3",
        ),
        (|part, keys| drop((part == 1).then(|| keys.remove("split.count"))), "not those of part 2 of 3"),
        (
            |_, keys| drop(keys.insert("split.tensors.count".into(), Value::I32(9))),
            "split.tensors.count is 9",
        ),
        (
            |part, keys| drop((part == 0).then(|| keys.insert("split.no".into(), Value::U16(3)))),
            "split.no is 3",
        ),
    ];
    for (change, expected) in changes {
        let folder = tempfile::tempdir()?;
        let paths = write_parts(folder.path(), NAMES, change)?;
        let e = error(&paths[0])?;
        ensure!(e.contains(expected), "{e}");
    }
    // The same tensor in two parts.
    let folder = tempfile::tempdir()?;
    let paths = write_parts(folder.path(), NAMES, |_, _| ())?;
    let mut keys = Metadata::new();
    keys.insert("split.no".into(), Value::U16(1));
    keys.insert("split.count".into(), Value::U16(3));
    write(&paths[1], &keys, &weights(false, vocabulary().0.len())?[..1], GgmlDType::Q8_0)?;
    let e = error(&paths[0])?;
    ensure!(e.contains("tensor token_embd.weight is in two parts"), "{e}");
    Ok(())
}
