//! The manifest of a folder: the sizes and hashes of its files. It is written last, so a folder that matches its manifest is
//! complete.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::disk::{Disk, Output};
use super::tensors::is_plain_name;
use crate::error::{Error, Result};
use crate::io::files::open_regular;
use crate::io::safetensors::stream;

/// The file name of the manifest.
pub const MANIFEST: &str = "manifest.json";

/// The size and hash of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Digest {
    /// The BLAKE3 hash of the content, hexadecimal.
    blake3: String,
    /// The size in bytes.
    size: u64,
}

/// The files of a folder and their digests, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    files: BTreeMap<String, Digest>,
}

impl Manifest {
    /// The content of the manifest file. It includes a hash of the list of files, so that damage to the manifest itself is
    /// detected. Keys are sorted, so the text does not depend on the features of serde_json.
    fn to_text(&self) -> String {
        let files = serde_json::to_value(&self.files).unwrap_or_default();
        let hash = blake3::hash(files.to_string().as_bytes()).to_hex();
        format!("{:#}\n", serde_json::json!({ "blake3": hash.as_str(), "files": files }))
    }
}

/// Checks all files of `folder` that its manifest lists.
///
/// # Errors
/// [`Error::Missing`] or [`Error::Unreadable`] for the manifest or a file; [`Error::Damaged`] with the file that differs.
pub fn verify(disk: &dyn Disk, folder: &Path) -> Result<()> {
    let path = folder.join(MANIFEST);
    let mut text = Vec::new();
    let read = disk.open(&path).and_then(|mut file| file.read_to_end(&mut text));
    read.map_err(|e| Error::read(&path, "manifest", e))?;
    let damaged = |path: &Path, reason: String| Error::Damaged { path: path.into(), reason };
    let manifest: Manifest =
        serde_json::from_slice(&text).map_err(|e| damaged(&path, format!("not a manifest: {e}")))?;
    // Comparing the whole text detects every changed byte, including white space.
    if manifest.to_text().as_bytes() != text {
        return Err(damaged(&path, "its own hash does not match".into()));
    }
    for (name, expected) in &manifest.files {
        let path = folder.join(name);
        if !is_plain_name(name) {
            return Err(damaged(&path, "not a plain file name".into()));
        }
        let actual = digest(disk, &path)?;
        if actual.size != expected.size {
            let reason = format!("{} bytes, where the manifest says {}", actual.size, expected.size);
            return Err(damaged(&path, reason));
        }
        if actual.blake3 != expected.blake3 {
            let reason = format!("blake3 {}, where the manifest says {}", actual.blake3, expected.blake3);
            return Err(damaged(&path, reason));
        }
    }
    Ok(())
}

/// The hash of a file according to the manifest of its folder; `None` if either is missing or cannot be read.
pub(super) fn digest_of(folder: &Path, name: &str) -> Option<String> {
    let text = open_regular(&folder.join(MANIFEST)).and_then(io::read_to_string).ok()?;
    let manifest: Manifest = serde_json::from_str(&text).ok()?;
    manifest.files.get(name).map(|digest| digest.blake3.clone())
}

fn digest(disk: &dyn Disk, path: &Path) -> Result<Digest> {
    let (mut hasher, mut size) = (blake3::Hasher::new(), 0);
    let mut buffer = vec![0; 1 << 16];
    let mut read = || -> io::Result<()> {
        let mut file = disk.open(path)?;
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    hasher.update(&buffer[..n]);
                    size += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    };
    read().map_err(|e| Error::read(path, "file that the manifest lists", e))?;
    Ok(Digest { size, blake3: hasher.finalize().to_hex().to_string() })
}

/// Writes the files of a folder. Every file is synced, and its digest goes into the manifest.
pub struct FolderWriter<'a> {
    disk: &'a dyn Disk,
    folder: PathBuf,
    manifest: Manifest,
}

impl<'a> FolderWriter<'a> {
    /// Writes into an existing folder.
    pub(super) fn new(disk: &'a dyn Disk, folder: &Path) -> Self {
        Self { disk, folder: folder.into(), manifest: Manifest::default() }
    }

    /// Writes a file.
    ///
    /// # Errors
    /// [`Error::Unwritable`] with the file and the system's reason.
    pub fn file(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.write(name, |path, out| out.write_all(content).map_err(|e| Error::write(path, e)))
    }

    /// Writes a JSON file.
    ///
    /// # Errors
    /// As [`FolderWriter::file`].
    pub fn json(&mut self, name: &str, content: &impl Serialize) -> Result<()> {
        let content = serde_json::to_value(content)
            .map_err(|e| Error::Invalid(format!("{name}: the content cannot be written as JSON: {e}")))?;
        self.file(name, format!("{content:#}\n").as_bytes())
    }

    /// Writes a safetensors file.
    ///
    /// # Errors
    /// As [`FolderWriter::file`].
    pub fn tensors(&mut self, name: &str, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        self.write(name, |path, out| {
            let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
            stream(path, out, tensors, Some(format))
        })
    }

    /// Writes the manifest of all files written so far, and syncs the folder.
    pub(super) fn finish(mut self) -> Result<()> {
        let text = self.manifest.to_text();
        self.file(MANIFEST, text.as_bytes())?;
        self.sync()
    }

    /// Syncs the entries of the folder to the disk.
    pub(super) fn sync(&self) -> Result<()> {
        self.disk.sync_dir(&self.folder).map_err(|e| Error::write(&self.folder, e))
    }

    fn write(&mut self, name: &str, fill: impl FnOnce(&Path, &mut dyn Write) -> Result<()>) -> Result<()> {
        let path = self.folder.join(name);
        let unwritable = |e| Error::write(&path, e);
        let file = self.disk.create(&path).map_err(unwritable)?;
        let mut out =
            BufWriter::with_capacity(1 << 16, HashingWriter { file, hasher: blake3::Hasher::new(), size: 0 });
        fill(&path, &mut out)?;
        let mut out = out.into_inner().map_err(|e| unwritable(e.into_error()))?;
        out.file.sync().map_err(unwritable)?;
        let digest = Digest { size: out.size, blake3: out.hasher.finalize().to_hex().to_string() };
        self.manifest.files.insert(name.into(), digest);
        Ok(())
    }
}

/// Hashes the bytes that are written to a file. The hash is that of the bytes in memory, so that reading the file back
/// detects errors of the disk.
struct HashingWriter {
    file: Box<dyn Output>,
    hasher: blake3::Hasher,
    size: u64,
}

impl Write for HashingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
