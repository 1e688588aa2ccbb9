//! Keys, limits, clients that leave, and the end of the server.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{Served, reply, save};

/// A request that takes long.
fn long() -> Value {
    json!({ "prompt": "It was", "max_tokens": 4000, "temperature": 0, "stream": true })
}

/// Starts a stream and waits for its first event.
fn started(server: &Served, body: &Value) -> Result<TcpStream> {
    let body = body.to_string();
    let mut stream = server.connect()?;
    stream.write_all(server.head("POST", "/v1/completions", "", body.len()).as_bytes())?;
    stream.write_all(body.as_bytes())?;
    let mut text = String::new();
    while !text.contains("data: ") {
        let mut bytes = [0; 512];
        let count = stream.read(&mut bytes)?;
        ensure!(count > 0, "the stream has ended after {text:?}");
        text += &String::from_utf8_lossy(&bytes[..count]);
    }
    Ok(stream)
}

#[test]
fn a_key_and_a_local_name_are_asked_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 64)?;
    fs::write(folder.path().join("key"), "s3cret\n")?;
    let server = Served::start(folder.path(), "--api-key-file key --max-body-bytes 300")?;
    let body = json!({ "prompt": "a", "max_tokens": 1 }).to_string();
    let post = |headers: &str| server.request("POST", "/v1/completions", headers, &body);
    ensure!(post("Authorization: Bearer s3cret\r\n")?.status == 200);
    for headers in ["", "Authorization: Bearer wrong\r\n", "Authorization: Basic s3cret\r\n"] {
        let reply = post(headers)?;
        let error = reply.json()?;
        ensure!(reply.status == 401 && error["error"]["code"] == "invalid_api_key", "{headers}: {error}");
    }
    ensure!(server.get("/v1/models")?.status == 401 && server.get("/health")?.status == 200);
    // The name of another site, which leads to this machine.
    let request = server.head("GET", "/health", "", 0).replace(&server.address, "evil.example:80");
    ensure!(server.send(request.as_bytes())?.error()?.starts_with("403 the host \"evil.example:80\""));
    let large = json!({ "prompt": "a".repeat(400) }).to_string();
    let headers = "Authorization: Bearer s3cret\r\n";
    let error = server.request("POST", "/v1/completions", headers, &large)?.error()?;
    ensure!(error.starts_with("413 the body has more than 300 bytes"), "{error}");
    Ok(())
}

#[test]
fn requests_beyond_the_limits_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 4096)?;
    let server = Served::start(folder.path(), "--max-requests 1 --max-prompt-tokens 8")?;
    let stream = started(&server, &long())?;
    let refused = server.post("/v1/completions", &json!({ "prompt": "a" }))?;
    ensure!(refused.head.contains("retry-after"), "{}", refused.head);
    ensure!(refused.error()?.starts_with("429 too many requests"), "{}", refused.error()?);
    drop(stream);
    server.wait("a free place", |server| {
        Ok(server.post("/v1/completions", &json!({ "prompt": "a", "max_tokens": 1 }))?.status == 200)
    })?;
    let reply = server.post("/v1/completions", &json!({ "prompt": "123456789" }))?;
    ensure!(reply.json()?["error"]["code"] == "context_length_exceeded", "{}", reply.error()?);
    // A stream whose time ends says so.
    let server = Served::start(folder.path(), "--timeout 1")?;
    let events = server.post("/v1/completions", &long())?.events()?;
    let last: Value = serde_json::from_str(events.last().context("an event")?)?;
    ensure!(last["error"]["message"] == "the request took longer than 1 seconds", "{last}");
    let slow = json!({ "prompt": "a", "max_tokens": 4000, "temperature": 0 });
    let error = server.post("/v1/completions", &slow)?.error()?;
    ensure!(error == "504 the request took longer than 1 seconds", "{error}");
    Ok(())
}

#[test]
fn a_client_that_leaves_frees_its_place() -> Result<()> {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 4096)?;
    let server = Served::start(folder.path(), "--batch 1")?;
    for streams in [true, false] {
        let mut body = long();
        body["stream"] = streams.into();
        let stream = match streams {
            true => started(&server, &body)?,
            false => {
                let (mut stream, body) = (server.connect()?, body.to_string());
                stream.write_all(server.head("POST", "/v1/completions", "", body.len()).as_bytes())?;
                stream.write_all(body.as_bytes())?;
                server.wait("a sequence", |server| Ok(server.metric("gd_sequences_running")? == 1.0))?;
                stream
            }
        };
        let before = server.metric("gd_generated_tokens_total")?;
        drop(stream);
        let short = json!({ "prompt": "Call me", "max_tokens": 3 });
        ensure!(server.answer("/v1/completions", &short)?["usage"]["completion_tokens"] == 3);
        let written = server.metric("gd_generated_tokens_total")? - before;
        ensure!(written < 3000.0, "{written} tokens for a client that has left");
        server.wait("an empty batch", |server| Ok(server.metric("gd_sequences_running")? == 0.0))?;
    }
    Ok(())
}

#[test]
fn a_signal_finishes_what_is_under_way_and_refuses_the_rest() -> Result<()> {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 4096)?;
    let mut server = Served::start(folder.path(), "")?;
    let mut body = long();
    body["max_tokens"] = 600.into();
    let mut stream = started(&server, &body)?;
    // A connection that is open, on which the next request comes too late.
    let mut idle = server.connect()?;
    server.signal("-TERM")?;
    let mut rest = String::new();
    stream.read_to_string(&mut rest)?;
    ensure!(rest.ends_with("data: [DONE]\n\n"), "{rest:?}");
    ensure!(server.connect().is_err(), "a new connection");
    // It is closed, or its request is refused.
    if idle.write_all(server.head("GET", "/health", "", 0).as_bytes()).is_ok()
        && let Ok(reply) = reply(idle)
    {
        ensure!(reply.status == 503, "{}", reply.status);
    }
    ensure!(server.ended()?.success());
    // A second signal does not wait.
    let mut server = Served::start(folder.path(), "")?;
    let _stream = started(&server, &long())?;
    server.signal("-INT")?;
    std::thread::sleep(std::time::Duration::from_millis(100));
    server.signal("-INT")?;
    ensure!(server.ended()?.success());
    Ok(())
}
