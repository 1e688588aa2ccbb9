//! Models by name, fetched from a server on this machine that answers as the Hugging Face Hub does.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained::Loaded;
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use sha2::Sha256;

use crate::generate::{model_of, models};
use crate::program::{command, failed, parsed, succeeded};

const WEIGHTS: &str = "model.safetensors";
const COMMIT: &str = "8f3c01d2";
const TOKEN: &str = "hf_secret";
const GENERATE: &str = "--prompt It --max-tokens 4 --temperature 0 --json";

/// What the server does.
#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// How many answers with weights end after half of them.
    breaks: usize,
    /// Whether the content of the weights is another one than the hash says.
    corrupts: bool,
    /// Whether requests need the token.
    is_private: bool,
    /// The requests, as `PATH RANGE`.
    log: Vec<String>,
}

struct Hub {
    state: Arc<Mutex<State>>,
    endpoint: String,
}

impl Hub {
    /// A server for the files of a folder under the name `org/model`. It ends with the process.
    fn start(folder: &Path) -> Result<Self> {
        let mut state = State::default();
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
            state.files.insert(name, fs::read(&path)?);
        }
        state.files.insert("pytorch_model.bin".into(), b"a pickle".to_vec());
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                // A client that goes away is no failure of the test.
                std::thread::spawn(move || answer(stream, &state).ok());
            }
        });
        Ok(Self { state, endpoint })
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).log)
    }

    fn gd(&self, dir: &Path, args: &str, variables: &[(&str, &str)]) -> Result<Output> {
        let mut program = command(dir, args);
        for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN", "HF_HUB_OFFLINE"] {
            program.env_remove(name);
        }
        program.env("HF_HOME", dir.join("hf")).env("HF_ENDPOINT", &self.endpoint).env_remove("HF_HUB_CACHE");
        Ok(program.envs(variables.iter().copied()).output()?)
    }
}

/// The hash by which the Hub names a file: SHA-256 of weights, else that of Git.
fn hash(name: &str, content: &[u8]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    match name == WEIGHTS {
        true => hex(&Sha256::digest(content)),
        false => {
            hex(&Sha1::new_with_prefix(format!("blob {}\0", content.len())).chain_update(content).finalize())
        }
    }
}

fn answer(stream: TcpStream, state: &Mutex<State>) -> Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().context("a request")??;
    let path = request.split(' ').nth(1).context("a path")?.to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        match line?.split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let range = headers.get("range").cloned().unwrap_or_default();
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    state.log.push(format!("{path} {range}"));
    let mut out = stream;
    let mut reply = |status: &str, more: &str, body: &[u8], sent: usize| -> Result<()> {
        write!(
            out,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{more}\r\n",
            body.len()
        )?;
        Ok(out.write_all(&body[..sent])?)
    };
    if state.is_private && headers.get("authorization") != Some(&format!("Bearer {TOKEN}")) {
        return reply("401 Unauthorized", "", b"", 0);
    }
    if path == "/api/models/org/model/revision/main" {
        let siblings: Vec<Value> = state.files.keys().map(|name| json!({ "rfilename": name })).collect();
        let body = json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return reply("200 OK", "Content-Type: application/json\r\n", body.as_bytes(), body.len());
    }
    let file =
        path.strip_prefix("/org/model/resolve/main/").and_then(|name| Some((name, state.files.get(name)?)));
    let Some((name, content)) = file else { return reply("404 Not Found", "", b"", 0) };
    let etag = hash(name, content);
    let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap_or(("0", ""));
    let first: usize = first.parse()?;
    let last = last.parse().map_or(content.len(), |last: usize| last + 1);
    let mut body = content[first..last].to_vec();
    let is_weights = name == WEIGHTS && last == content.len();
    if is_weights && state.corrupts {
        body[0] ^= 1;
    }
    let breaks = is_weights && state.breaks > 0;
    let more = format!(
        "ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {first}-{}/{}\r\n",
        last - 1,
        content.len()
    );
    state.breaks -= usize::from(breaks);
    reply("206 Partial Content", &more, &body, if breaks { body.len() / 2 } else { body.len() })
}

/// Saves a model with random weights in `DIR/model`.
fn save(dir: &Path) -> Result<()> {
    let (model, params) = model_of(models()[3].1.clone(), 64, DType::F32)?;
    let card =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    let loaded = Loaded::new(model, params, Tokenizer::bytes()?);
    Ok(loaded.save(&dir.join("model"), &card.map(|key| (key, "test".to_owned())))?)
}

fn prepare() -> Result<(tempfile::TempDir, PathBuf, Hub, Value)> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path().to_path_buf();
    save(&dir)?;
    let hub = Hub::start(&dir.join("model"))?;
    let expected = parsed(&hub.gd(&dir, &format!("generate model {GENERATE}"), &[])?)?["token_ids"].clone();
    Ok((folder, dir, hub, expected))
}

#[test]
fn a_model_is_fetched_by_its_name_over_a_connection_that_breaks() -> Result<()> {
    let (_folder, dir, hub, expected) = prepare()?;
    ensure!(hub.log().is_empty(), "a path is no name");
    hub.set(|state| state.breaks = 1);
    let args = format!("generate org/model {GENERATE}");
    let found = parsed(&hub.gd(&dir, &args, &[])?)?;
    ensure!(found["token_ids"] == expected, "{found} {expected}");
    let log = hub.log();
    let half = fs::metadata(dir.join("model").join(WEIGHTS))?.len() / 2;
    ensure!(log.contains(&format!("/org/model/resolve/main/{WEIGHTS} bytes={half}-")), "{log:?}");
    ensure!(!log.iter().any(|line| line.contains("pytorch_model.bin")), "{log:?}");
    // As huggingface_hub lays it out, and without what was needed meanwhile.
    let model = dir.join("hf/hub/models--org--model");
    ensure!(fs::read_to_string(model.join("refs/main"))? == COMMIT);
    let (link, weights) =
        (model.join("snapshots").join(COMMIT).join(WEIGHTS), fs::read(dir.join("model").join(WEIGHTS))?);
    let blob = model.join("blobs").join(hash(WEIGHTS, &weights));
    ensure!(link.is_symlink() && fs::canonicalize(&link)? == fs::canonicalize(&blob)?, "{}", link.display());
    ensure!(fs::read(&link)? == weights && !dir.join("hf/hub/.gd-downloads").exists());
    // From then on it is in the cache.
    let found = parsed(&hub.gd(&dir, &args, &[("HF_HUB_OFFLINE", "1")])?)?;
    ensure!(found["token_ids"] == expected && hub.log().is_empty(), "{found}");
    succeeded(&hub.gd(&dir, "convert org/model:model.safetensors --out copy", &[])?)?;
    Ok(())
}

#[test]
fn a_download_of_an_earlier_process_is_continued_and_its_hash_checked() -> Result<()> {
    let (_folder, dir, hub, expected) = prepare()?;
    let weights = fs::read(dir.join("model").join(WEIGHTS))?;
    let blobs = dir.join("hf/hub/.gd-downloads/models--org--model/blobs");
    fs::create_dir_all(&blobs)?;
    let part = blobs.join(format!("{}.part", hash(WEIGHTS, &weights)));
    fs::write(&part, &weights[..1000])?;
    let args = format!("generate org/model {GENERATE}");
    hub.set(|state| state.corrupts = true);
    let message = failed(&hub.gd(&dir, &args, &[])?, 1)?;
    ensure!(message.contains(WEIGHTS) && message.contains(&hash(WEIGHTS, &weights)), "{message}");
    ensure!(hub.log().contains(&format!("/org/model/resolve/main/{WEIGHTS} bytes=1000-")), "not continued");
    ensure!(!dir.join("hf/hub/models--org--model/refs").exists(), "a damaged model is in the cache");
    hub.set(|state| state.corrupts = false);
    let found = parsed(&hub.gd(&dir, &args, &[])?)?;
    ensure!(found["token_ids"] == expected, "{found} {expected}");
    let log = hub.log();
    ensure!(log.contains(&format!("/org/model/resolve/main/{WEIGHTS} bytes=0-")), "{log:?}");
    ensure!(!log.iter().any(|line| line.starts_with("/org/model/resolve/main/tokenizer.json")), "{log:?}");
    Ok(())
}

#[test]
fn what_cannot_be_fetched_is_named() -> Result<()> {
    let (_folder, dir, hub, expected) = prepare()?;
    let args = format!("generate org/model {GENERATE}");
    let fails = |args: &str, variables: &[(&str, &str)]| failed(&hub.gd(&dir, args, variables)?, 1);
    let message = fails(&args, &[("HF_HUB_OFFLINE", "1")])?;
    ensure!(message.contains("HF_HUB_OFFLINE") && message.contains("hf"), "{message}");
    ensure!(hub.log().is_empty());
    hub.set(|state| state.is_private = true);
    let message = fails(&args, &[])?;
    ensure!(message.contains("401") && message.contains("which HF_TOKEN can hold"), "{message}");
    let message = fails(&args, &[("HF_TOKEN", "hf_wrong_token")])?;
    ensure!(message.contains("401") && message.contains("the token (HF_TOKEN)"), "{message}");
    ensure!(!message.contains("hf_wrong_token"), "{message}");
    let found = parsed(&hub.gd(&dir, &args, &[("HF_TOKEN", TOKEN)])?)?;
    ensure!(found["token_ids"] == expected, "{found} {expected}");
    hub.set(|state| state.is_private = false);
    let message = fails("generate org/model:none.gguf --prompt It", &[])?;
    ensure!(message.contains("no file \"none.gguf\""), "{message}");
    let message = fails("generate org/other --prompt It", &[])?;
    ensure!(message.contains("has no such model"), "{message}");
    let message = fails("generate org/other --prompt It", &[("HF_ENDPOINT", "http://127.0.0.1:9")])?;
    ensure!(message.contains("http://127.0.0.1:9 cannot be reached"), "{message}");
    // A mistake in a path is not sent anywhere.
    hub.log();
    let message = fails("generate model/none --prompt It", &[])?;
    ensure!(message.contains("model/none") && hub.log().is_empty(), "{message}");
    // Models without weights that are read.
    hub.set(|state| state.files.retain(|name, _| name != WEIGHTS));
    let message = fails(&args, &[("HF_HOME", "elsewhere")])?;
    ensure!(message.contains("no weights as safetensors or GGUF"), "{message}");
    hub.set(|state| state.files.extend(["a.gguf", "b.gguf"].map(|name| (name.to_owned(), Vec::new()))));
    let message = fails(&args, &[("HF_HOME", "elsewhere")])?;
    ensure!(message.contains("several GGUF files") && message.contains("a.gguf, b.gguf"), "{message}");
    Ok(())
}
