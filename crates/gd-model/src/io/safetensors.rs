//! One safetensors file: read whole, written whole or not at all.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{Device, Tensor};

/// Tensors by name, in a fixed order.
pub type Tensors = BTreeMap<String, Tensor>;

/// Reads every tensor of the file at `path`.
///
/// # Errors
/// Names the file and what is wrong with it: missing, empty, truncated or foreign.
pub fn read(path: &Path, device: &Device) -> Result<Tensors> {
    let at = || path.display().to_string();
    let bytes = std::fs::read(path).with_context(at)?;
    if bytes.is_empty() {
        bail!("{}: the file is empty", at());
    }
    candle_core::safetensors::load_buffer(&bytes, device)
        .map(|tensors| tensors.into_iter().collect())
        .with_context(|| format!("{}: not a whole safetensors file ({} bytes)", at(), bytes.len()))
}

/// Writes `tensors` to `path`. The bytes go to a temporary file in the same folder, which takes
/// the name only once it is complete and on disk: on failure `path` stays as it was.
///
/// # Errors
/// Names the file when its folder is missing or cannot be written.
pub fn write(path: &Path, tensors: &Tensors) -> Result<()> {
    let at = || format!("cannot write {}", path.display());
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".gd-").suffix(".tmp");
    #[cfg(unix)]
    {
        // The usual mode of a new file; the process's mask still applies.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let file = builder.tempfile_in(folder).with_context(at)?;
    let views = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    safetensors::serialize_to_file(views, None, file.path()).with_context(at)?;
    file.as_file().sync_all().with_context(at)?;
    file.persist(path).map_err(|e| e.error).with_context(at)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_back_and_a_failed_write_leaves_nothing() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("x.safetensors");
        let x = Tensor::new(&[[1i32, -2], [3, 4]], &Device::Cpu)?;
        write(&path, &Tensors::from([("x".into(), x.clone())]))?;
        let back = read(&path, &Device::Cpu)?;
        assert_eq!(back["x"].to_vec2::<i32>()?, x.to_vec2::<i32>()?);

        let below_a_file = path.join("y.safetensors");
        assert!(write(&below_a_file, &back).is_err());
        assert_eq!(std::fs::read_dir(dir.path())?.count(), 1);
        Ok(())
    }

    #[test]
    fn damaged_files_are_named() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("x.safetensors");
        write(
            &path,
            &Tensors::from([("x".into(), Tensor::zeros(64, candle_core::DType::F32, &Device::Cpu)?)]),
        )?;
        let whole = std::fs::read(&path)?;
        for len in [0, 4, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..len])?;
            let e = format!("{:#}", read(&path, &Device::Cpu).unwrap_err());
            assert!(e.contains("x.safetensors"), "{len}: {e}");
        }
        Ok(())
    }
}
