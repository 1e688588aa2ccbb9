//! A file with one JSON object per line, which is appended to and can be truncated to a step.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The file, open for appending.
#[derive(Debug)]
pub struct Jsonl {
    file: File,
    path: PathBuf,
}

impl Jsonl {
    /// Opens or creates `path` and truncates it before the first line that is incomplete or of a later step than `step`.
    /// Step 0 removes every line.
    ///
    /// # Errors
    /// Names the file that cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::read(path, "log", e)),
        };
        let length: usize = match step {
            0 => 0,
            _ => lines(&text).take_while(|(_, line)| step_of(line) <= step).map(|(bytes, _)| bytes).sum(),
        };
        let error = |e| Error::write(path, e);
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(error)?;
        file.set_len(length as u64).map_err(error)?;
        Ok(Self { file, path: path.into() })
    }

    /// Appends a line in a single write, so that a reader sees all of it, or its beginning at the end of the file.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn append(&mut self, line: &Map<String, Value>) -> Result<()> {
        let mut text = Value::Object(line.clone()).to_string();
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(|e| Error::write(&self.path, e))
    }

    /// Waits until the file is on the disk.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::write(&self.path, e))
    }
}

/// The complete lines of a log. An incomplete line at the end, which may still be being written, is ignored.
///
/// # Errors
/// Names a file that cannot be read, or a line in it that is not a JSON object.
pub fn read(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let text = fs::read(path).map_err(|e| Error::read(path, "log", e))?;
    let complete: Vec<_> = lines(&text).collect();
    let bytes: usize = complete.iter().map(|(bytes, _)| bytes).sum();
    if text[bytes..].contains(&b'\n') {
        let reason = format!("line {} is not a JSON object", complete.len() + 1);
        return Err(Error::Foreign { path: path.into(), kind: "log", reason });
    }
    Ok(complete.into_iter().map(|(_, line)| line).collect())
}

/// The lines before the first incomplete one, with their lengths in bytes.
fn lines(text: &[u8]) -> impl Iterator<Item = (usize, Map<String, Value>)> {
    text.split_inclusive(|b| *b == b'\n')
        .map_while(|line| Some((line.len(), serde_json::from_slice(line.strip_suffix(b"\n")?).ok()?)))
}

fn step_of(line: &Map<String, Value>) -> u64 {
    line.get("step").and_then(Value::as_u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(step: u64) -> Map<String, Value> {
        json!({ "step": step, "text": "ä\n" }).as_object().cloned().unwrap()
    }

    fn steps(path: &Path) -> Vec<u64> {
        read(path).unwrap().iter().map(step_of).collect()
    }

    #[test]
    fn lines_are_appended_and_truncated_to_a_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Jsonl::open(&path, 0).unwrap();
        for step in [1, 2, 2, 3] {
            log.append(&line(step)).unwrap();
        }
        assert_eq!(read(&path).unwrap()[3], line(3));
        let mut log = Jsonl::open(&path, 2).unwrap();
        assert_eq!(steps(&path), [1, 2, 2]);
        log.append(&line(3)).unwrap();
        assert_eq!(steps(&path), [1, 2, 2, 3]);
        Jsonl::open(&path, 9).unwrap();
        assert_eq!(steps(&path), [1, 2, 2, 3]);
        Jsonl::open(&path, 0).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    #[test]
    fn an_incomplete_last_line_is_ignored_and_then_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, b"{\"step\":1}\n{\"step\":2,\"te\xffxt").unwrap();
        let mut log = Jsonl::open(&path, 5).unwrap();
        log.append(&line(2)).unwrap();
        assert_eq!(steps(&path), [1, 2]);
        fs::write(&path, "{\"step\":1}\n{\"step\":2").unwrap();
        assert_eq!(steps(&path), [1]);
        // Before the last line it is damage.
        fs::write(&path, "{\"step\":1}\n{\"step\n{\"step\":3}\n").unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("log") && error.contains("line 2"), "{error}");
    }
}
