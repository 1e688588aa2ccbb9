//! `gd serve`: a process of the program, and requests over TCP as clients write them.

mod answers;
mod limits;
mod malformed;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use candle_core::DType;
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained::Loaded;
use serde_json::{Value, json};

use crate::generate::{model_of, models};
use crate::program::{command, json};

/// The longest wait for something that happens soon.
const PATIENCE: Duration = Duration::from_secs(60);

/// The chat template of the model.
const TEMPLATE: &str = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:";

/// Saves a model with random weights, byte tokens and a chat template, which selects in two of three layers.
fn save(dir: &Path, positions: usize) -> Result<()> {
    let (model, params) = model_of(models()[3].1.clone(), positions, DType::F32)?;
    let mut loaded = Loaded::new(model, params, Tokenizer::bytes()?);
    loaded.files.insert("chat_template.jinja".into(), TEMPLATE.into());
    let card =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    Ok(loaded.save(&dir.join("model"), &card.map(|key| (key, "test".to_owned())))?)
}

/// A server in a process of its own, which ends with this value.
pub(crate) struct Served {
    process: Child,
    address: String,
}

/// An answer.
struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Result<Value> {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_slice(&self.body).with_context(|| format!("{}: {text}", self.status))
    }

    /// The message of an error in the form of OpenAI's interface.
    fn error(&self) -> Result<String> {
        let body = self.json()?;
        let error = &body["error"];
        let complete = ["message", "type"].into_iter().all(|key| error[key].is_string());
        ensure!(complete && error.get("param").is_some() && error.get("code").is_some(), "{body}");
        Ok(format!("{} {}", self.status, error["message"].as_str().unwrap_or_default()))
    }

    /// The data of the events of a stream.
    fn events(&self) -> Result<Vec<String>> {
        ensure!(self.head.contains("text/event-stream"), "{}", self.head);
        let text = String::from_utf8(self.body.clone())?;
        Ok(text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect())
    }
}

impl Served {
    /// Starts a server for the folder `model` in `dir`.
    fn start(dir: &Path, args: &str) -> Result<Self> {
        Self::of(dir, "model", args)
    }

    /// Starts a server for a model in `dir`.
    pub(crate) fn of(dir: &Path, model: &str, args: &str) -> Result<Self> {
        let mut program = command(dir, &format!("serve {model} --port 0 --json {args}"));
        let mut process = program.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().context("stdout")?).read_line(&mut line)?;
        let url: Value =
            serde_json::from_str(&line).with_context(|| format!("the first line is {line:?}"))?;
        let address = url["url"].as_str().and_then(|url| url.strip_prefix("http://")).context("a URL")?;
        Ok(Self { address: address.to_owned(), process })
    }

    fn connect(&self) -> Result<TcpStream> {
        let stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Sends bytes and reads the answer up to the end of the connection.
    fn send(&self, bytes: &[u8]) -> Result<Reply> {
        let mut stream = self.connect()?;
        stream.write_all(bytes)?;
        reply(stream)
    }

    /// Sends a request with a JSON body. HTTP/1.0 has neither chunks nor further requests.
    fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> Result<Reply> {
        self.send(format!("{}{body}", self.head(method, path, headers, body.len())).as_bytes())
    }

    fn head(&self, method: &str, path: &str, headers: &str, length: usize) -> String {
        let host = &self.address;
        format!(
            "{method} {path} HTTP/1.0\r\nHost: {host}\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n{headers}\r\n"
        )
    }

    fn get(&self, path: &str) -> Result<Reply> {
        self.request("GET", path, "", "")
    }

    fn post(&self, path: &str, body: &Value) -> Result<Reply> {
        self.request("POST", path, "", &body.to_string())
    }

    /// The answer to a valid request.
    pub(crate) fn answer(&self, path: &str, body: &Value) -> Result<Value> {
        let reply = self.post(path, body)?;
        ensure!(reply.status == 200, "{body}: {}", reply.error()?);
        reply.json()
    }

    /// The events of a valid request, without the last one.
    fn stream(&self, path: &str, body: &Value) -> Result<Vec<Value>> {
        let mut events = self.post(path, body)?.events()?;
        ensure!(events.pop().as_deref() == Some("[DONE]"), "{body}: {events:?}");
        events.iter().map(|event| Ok(serde_json::from_str(event)?)).collect()
    }

    /// The value of a metric.
    fn metric(&self, name: &str) -> Result<f64> {
        let text = String::from_utf8(self.get("/metrics")?.body)?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.with_context(|| format!("no {name} in {text}"))?.parse().context("a number")
    }

    /// Waits until a condition holds.
    fn wait(&self, what: &str, condition: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !condition(self)? {
            ensure!(start.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Sends a signal to the process.
    fn signal(&self, name: &str) -> Result<()> {
        let id = self.process.id().to_string();
        let status = std::process::Command::new("kill").args([name, &id]).status()?;
        ensure!(status.success(), "kill {name}: {status}");
        Ok(())
    }

    /// Waits for the end of the process.
    fn ended(&mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > PATIENCE {
                bail!("the server has not ended");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It may have ended by itself.
        _ = self.process.kill();
        _ = self.process.wait();
    }
}

/// Reads an answer up to the end of the connection.
fn reply(mut stream: TcpStream) -> Result<Reply> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.with_context(|| format!("no answer but {:?}", String::from_utf8_lossy(&bytes)))?;
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok(Reply { status: status.with_context(|| head.clone())?, head, body: bytes.split_off(end + 4) })
}

/// What `gd generate` writes for these arguments, greedily.
fn generated(dir: &Path, args: &str) -> Result<Value> {
    json(dir, &format!("generate model --temperature 0 --json {args}"))
}

#[test]
fn the_server_names_its_model_and_shows_its_page() -> Result<()> {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 64)?;
    let server = Served::start(folder.path(), "--name small")?;
    ensure!(server.address.starts_with("127.0.0.1:"), "{}", server.address);
    let models = server.get("/v1/models")?.json()?;
    ensure!(models["object"] == "list" && models["data"][0]["id"] == "small", "{models}");
    ensure!(server.get("/v1/models/small")?.json()?["object"] == "model");
    ensure!(server.get("/v1/models/other/name")?.error()?.starts_with("404 "));
    ensure!(server.get("/health")?.json()? == json!({ "status": "ok" }));
    let page = server.get("/")?;
    let text = String::from_utf8_lossy(&page.body).into_owned();
    ensure!(page.status == 200 && text.contains("<form id=\"form\">"), "{text}");
    ensure!(page.head.contains("content-security-policy: default-src 'none'"), "{}", page.head);
    let metrics = server.get("/metrics")?;
    ensure!(metrics.head.contains("openmetrics-text"), "{}", metrics.head);
    ensure!(server.metric("gd_requests_total{endpoint=\"/health\",status=\"200\"}")? == 1.0);
    ensure!(server.get("/none")?.error()?.starts_with("404 "));
    ensure!(server.get("/v1/completions")?.error()?.starts_with("405 "));
    Ok(())
}

#[test]
fn a_server_that_cannot_start_says_why() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(dir, 64)?;
    fs::write(dir.join("key"), "\n")?;
    let server = Served::start(dir, "")?;
    let port = server.address.rsplit(':').next().unwrap_or_default();
    for (args, code, names) in [
        (format!("serve model --port {port}"), 2, port),
        ("serve none --port 0".into(), 1, "none"),
        ("serve model --port 0 --api-key-file key".into(), 1, "the key is empty"),
        ("serve model --port 0 --temperature -1".into(), 2, "--temperature"),
        ("serve model --port 0 --batch 0".into(), 2, "--batch"),
    ] {
        let error = crate::program::error(dir, &args, code)?;
        ensure!(error.contains(names), "{args}: {error}");
    }
    Ok(())
}
