//! Records the system calls of a command by strace, and parses them to operations on the files below a folder.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// An operation that succeeded. Paths are relative to the folder.
#[derive(Debug, Clone)]
pub(super) enum Operation {
    /// A new file.
    Create(PathBuf),
    /// A file is cut to this length.
    Truncate(PathBuf, usize),
    /// Bytes are appended to a file.
    Append(PathBuf, Vec<u8>),
    CreateFolder(PathBuf),
    /// A file or an empty folder is removed.
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
    /// Two entries change places.
    Exchange(PathBuf, PathBuf),
    /// The content of a file, or the entries of a folder, are on the disk.
    Sync(PathBuf),
}

const CALLS: &str = "trace=openat,open,creat,write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,\
                     unlink,unlinkat,rmdir,ftruncate,close,link,linkat";

/// Runs the program in `folder`, which must succeed, and returns its operations on files there.
pub(super) fn record(folder: &Path, args: &str) -> Result<Vec<Operation>> {
    let log = folder.with_extension("strace");
    let output = Command::new("strace")
        .args(["-f", "--seccomp-bpf", "-qq", "-xx", "-s", "100000000", "-e", CALLS, "-o"])
        .arg(&log)
        .arg(env!("CARGO_BIN_EXE_gd"))
        .args(args.split_whitespace())
        .current_dir(folder)
        .env("RAYON_NUM_THREADS", "1")
        .output()?;
    ensure!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    let text = std::fs::read_to_string(&log)?;
    let mut parser = Parser { folder: folder.to_path_buf(), open: BTreeMap::new(), operations: Vec::new() };
    let mut unfinished: BTreeMap<&str, String> = BTreeMap::new();
    for line in text.lines() {
        let (thread, call) = line.split_once(' ').context("a line without a thread")?;
        let call = call.trim_start();
        if let Some(start) = call.strip_suffix(" <unfinished ...>") {
            unfinished.insert(thread, start.to_owned());
        } else if let Some((_, end)) =
            call.strip_prefix("<... ").and_then(|rest| rest.split_once(" resumed>"))
        {
            let start = unfinished.remove(thread).unwrap_or_default();
            parser.call(&(start + end)).with_context(|| shown(line))?;
        } else {
            parser.call(call).with_context(|| shown(line))?;
        }
    }
    Ok(parser.operations)
}

/// The start of a line of the log, for messages.
fn shown(line: &str) -> String {
    line.chars().take(200).collect()
}

struct Parser {
    folder: PathBuf,
    /// The paths of the open files and folders below the folder.
    open: BTreeMap<i64, PathBuf>,
    operations: Vec<Operation>,
}

impl Parser {
    fn call(&mut self, text: &str) -> Result<()> {
        let Some((name, rest)) = text.split_once('(') else { return Ok(()) };
        let Some((arguments, result)) = rest.rsplit_once(") = ").or_else(|| rest.rsplit_once(')')) else {
            return Ok(());
        };
        let result = result.trim_start_matches([' ', '=']);
        let result: i64 = result.split([' ', '<']).next().unwrap_or_default().parse().unwrap_or(-1);
        if result < 0 {
            return Ok(());
        }
        let arguments: Vec<&str> = arguments.split(", ").collect();
        let descriptor =
            |at: usize| arguments.get(at).and_then(|text| text.parse::<i64>().ok()).unwrap_or(-1);
        match name {
            "openat" => self.opened(arguments[0], arguments[1], arguments[2], result)?,
            "open" => self.opened("AT_FDCWD", arguments[0], arguments[1], result)?,
            "close" => drop(self.open.remove(&descriptor(0))),
            "write" => {
                if let Some(path) = self.open.get(&descriptor(0)) {
                    let mut bytes = bytes(arguments[1])?;
                    bytes.truncate(result as usize);
                    self.operations.push(Operation::Append(path.clone(), bytes));
                }
            }
            "ftruncate" => {
                if let Some(path) = self.open.get(&descriptor(0)) {
                    self.operations.push(Operation::Truncate(path.clone(), descriptor(1) as usize));
                }
            }
            "fsync" | "fdatasync" => {
                self.operations
                    .extend(self.open.get(&descriptor(0)).map(|path| Operation::Sync(path.clone())));
            }
            "mkdir" => {
                self.operations.extend(self.path("AT_FDCWD", arguments[0])?.map(Operation::CreateFolder))
            }
            "mkdirat" => {
                self.operations.extend(self.path(arguments[0], arguments[1])?.map(Operation::CreateFolder))
            }
            "unlink" | "rmdir" => {
                self.operations.extend(self.path("AT_FDCWD", arguments[0])?.map(Operation::Remove))
            }
            "unlinkat" => {
                self.operations.extend(self.path(arguments[0], arguments[1])?.map(Operation::Remove))
            }
            "rename" => self.renamed(["AT_FDCWD", arguments[0]], ["AT_FDCWD", arguments[1]], false)?,
            "renameat" | "renameat2" => {
                let exchanges = arguments.get(4).is_some_and(|flags| flags.contains("EXCHANGE"));
                self.renamed([arguments[0], arguments[1]], [arguments[2], arguments[3]], exchanges)?;
            }
            other => {
                // Writes elsewhere, such as to a pipe, do not matter.
                ensure!(!self.open.contains_key(&descriptor(0)), "the call {other} is not known");
            }
        }
        Ok(())
    }

    fn opened(&mut self, at: &str, name: &str, flags: &str, descriptor: i64) -> Result<()> {
        let Some(path) = self.path(at, name)? else {
            self.open.remove(&descriptor);
            return Ok(());
        };
        if flags.contains("O_CREAT") {
            // The model of the disk ignores the creation of a file that is there.
            self.operations.push(Operation::Create(path.clone()));
        }
        if flags.contains("O_TRUNC") {
            self.operations.push(Operation::Truncate(path.clone(), 0));
        }
        self.open.insert(descriptor, path);
        Ok(())
    }

    fn renamed(&mut self, from: [&str; 2], to: [&str; 2], exchanges: bool) -> Result<()> {
        let (from, to) = (self.path(from[0], from[1])?, self.path(to[0], to[1])?);
        let Some((from, to)) = from.zip(to) else { return Ok(()) };
        // Descriptors of a file follow it.
        for path in self.open.values_mut() {
            if let Ok(rest) = path.strip_prefix(&from) {
                *path = if rest == Path::new("") { to.clone() } else { to.join(rest) };
            }
        }
        self.operations.push(if exchanges {
            Operation::Exchange(from, to)
        } else {
            Operation::Rename(from, to)
        });
        Ok(())
    }

    /// A path below the folder; `None` for one elsewhere.
    fn path(&self, at: &str, name: &str) -> Result<Option<PathBuf>> {
        let name = PathBuf::from(String::from_utf8(bytes(name)?)?);
        if name.is_absolute() {
            return Ok(name.strip_prefix(&self.folder).ok().map(Path::to_path_buf));
        }
        let base = match at.parse::<i64>() {
            Ok(descriptor) => match self.open.get(&descriptor) {
                Some(base) => base.clone(),
                None => return Ok(None),
            },
            Err(_) => PathBuf::new(),
        };
        // Without `.`, as in `./run`.
        Ok(Some(base.join(name).components().filter(|c| c.as_os_str() != ".").collect()))
    }
}

/// The bytes of a string of strace, such as `"\x61"`.
fn bytes(text: &str) -> Result<Vec<u8>> {
    let inner = text.trim_start_matches('"').split('"').next().unwrap_or_default();
    let digits = inner.split("\\x").skip(1);
    digits.map(|digits| Ok(u8::from_str_radix(digits, 16)?)).collect()
}
