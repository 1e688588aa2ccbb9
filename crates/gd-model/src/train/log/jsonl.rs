//! A file with one JSON object per line, which is appended to and can be truncated to a step.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::io::files::{read_file, write_file};

/// The maximal size of the lines that wait for a file that cannot be written; later lines are dropped.
const MAX_WAITING_BYTES: usize = 16 << 20;

/// The file, open for appending.
#[derive(Debug)]
pub struct Jsonl {
    file: File,
    path: PathBuf,
    /// The length of the complete lines in the file.
    length: u64,
    /// The lines that could not be written, which are written before the next one.
    waiting: Vec<u8>,
}

impl Jsonl {
    /// Opens or creates `path` and removes the lines of later steps than `step`, an incomplete line at the end, and damaged
    /// lines. A file with damaged lines is retained as `NAME.damaged`, with a warning. Step 0 removes every line.
    ///
    /// # Errors
    /// Names the file that cannot be read or written.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let text = match read_file(path, "log") {
            Ok(text) => text,
            Err(Error::Missing { .. }) => Vec::new(),
            Err(e) => return Err(e),
        };
        let (retained, damaged) = match step {
            0 => (Vec::new(), 0),
            _ => lines_up_to(&text, step),
        };
        if damaged > 0 {
            let mut copy = path.as_os_str().to_os_string();
            copy.push(".damaged");
            write_file(Path::new(&copy), &text)?;
            tracing::warn!(
                "{}: {damaged} damaged lines were removed; the file as it was is now {}",
                path.display(),
                Path::new(&copy).display()
            );
            write_file(path, &retained)?;
        }
        let error = |e| Error::write(path, e);
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(error)?;
        // Without damage the retained lines are the start of the file.
        file.set_len(retained.len() as u64).map_err(error)?;
        Ok(Self { file, path: path.into(), length: retained.len() as u64, waiting: Vec::new() })
    }

    /// Appends a line in a single write, so that a reader sees all of it, or its beginning at the end of the file. After an
    /// error the line waits and is written before the next one.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn append(&mut self, line: &Map<String, Value>) -> Result<()> {
        let text = Value::Object(line.clone()).to_string();
        if self.waiting.len() + text.len() < MAX_WAITING_BYTES {
            self.waiting.extend(text.as_bytes());
            self.waiting.push(b'\n');
        }
        self.write_waiting().map_err(|e| Error::write(&self.path, e))
    }

    fn write_waiting(&mut self) -> std::io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        match self.file.write_all(&self.waiting) {
            Ok(()) => {
                self.length += self.waiting.len() as u64;
                self.waiting.clear();
                Ok(())
            }
            Err(e) => {
                // A part of a line may have been written. If it cannot be removed, the next attempt fails as well.
                self.file.set_len(self.length)?;
                Err(e)
            }
        }
    }

    /// Waits until the file is on the disk.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn sync(&mut self) -> Result<()> {
        self.write_waiting().and_then(|()| self.file.sync_data()).map_err(|e| Error::write(&self.path, e))
    }
}

/// The lines of steps up to `step`, up to the first line of a later one, without damaged lines, and the number of these. The
/// incomplete line at the end is not damage.
fn lines_up_to(text: &[u8], step: u64) -> (Vec<u8>, usize) {
    let (mut retained, mut damaged) = (Vec::new(), 0);
    for line in text.split_inclusive(|b| *b == b'\n') {
        match serde_json::from_slice::<Map<String, Value>>(line) {
            Ok(parsed) if line.ends_with(b"\n") => {
                if step_of(&parsed) > step {
                    break;
                }
                retained.extend_from_slice(line);
            }
            _ if line.ends_with(b"\n") => damaged += 1,
            _ => {}
        }
    }
    (retained, damaged)
}

/// The complete lines of a log. An incomplete line at the end, which may still be being written, is ignored.
///
/// # Errors
/// Names a file that cannot be read, or a line in it that is not a JSON object.
pub fn read(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let text = read_file(path, "log")?;
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
    use std::fs;

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
    #[test]
    fn damaged_lines_are_removed_alone_and_the_file_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let text = b"{\"step\":1}\n{\"st\xff\n{\"step\":2}\nnull\n{\"step\":3}\n{\"step\":4}\n{\"step";
        fs::write(&path, text).unwrap();
        let mut log = Jsonl::open(&path, 3).unwrap();
        log.append(&line(4)).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4]);
        assert_eq!(fs::read(dir.path().join("log.damaged")).unwrap(), text);
        // Damage after the step that is resumed from is removed as well as the rest.
        fs::write(&path, "{\"step\":1}\n{\"step\":9}\nx\n").unwrap();
        Jsonl::open(&path, 3).unwrap();
        assert_eq!(steps(&path), [1]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_line_that_cannot_be_written_waits() {
        let full = || OpenOptions::new().append(true).open("/dev/full").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Jsonl::open(&path, 0).unwrap();
        log.append(&line(1)).unwrap();
        let file = std::mem::replace(&mut log.file, full());
        for step in 2..=3 {
            let error = log.append(&line(step)).unwrap_err().to_string();
            assert!(error.contains("log: cannot write"), "{error}");
        }
        assert!(log.sync().is_err());
        log.file = file;
        log.append(&line(4)).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4]);
    }
}
