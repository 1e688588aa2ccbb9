//! Requests that are not valid have an answer that says why, and the server goes on.

use anyhow::{Result, ensure};
use gd_testing::log_cases;
use serde_json::{Value, json};

use super::{Served, save};

/// Fields with values that a completion refuses.
fn values() -> Vec<(&'static str, Value)> {
    let mut all = Vec::new();
    for wrong in [json!("a"), json!([1]), json!({ "a": 1 }), json!(true)] {
        for field in
            ["max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "logprobs", "best_of"]
        {
            all.push((field, wrong.clone()));
        }
    }
    for wrong in [json!("a"), json!([1]), json!({ "a": 1 }), json!(1), json!(0.5)] {
        for field in ["stream", "echo", "sources"] {
            all.push((field, wrong.clone()));
        }
        all.push(("logit_bias", wrong.clone()));
        all.push(("suffix", if wrong == json!("a") { json!("b") } else { wrong }));
    }
    for (field, wrong) in [
        ("temperature", json!(-1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(0)),
        ("top_k", json!(-3)),
        ("min_p", json!(-0.1)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(1000)),
        ("n", json!(u64::MAX)),
        ("max_tokens", json!(65)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1.5)),
        ("max_tokens", json!(u64::MAX)),
        ("logprobs", json!(21)),
        ("seed", json!(1.5)),
        ("seed", json!(u64::MAX)),
        ("stop", json!("")),
        ("stop", json!(3)),
        ("stop", json!(["a", ""])),
        ("stop", json!(["a", 1])),
        ("stop", json!(vec!["a"; 17])),
        ("stop", json!("a".repeat(5000))),
        ("best_of", json!(2)),
        ("presence_penalty", json!(0.5)),
        ("frequency_penalty", json!(-1)),
        ("tools", json!([{ "type": "function" }])),
        ("response_format", json!({ "type": "json_object" })),
        ("model", json!("gpt")),
        ("model", json!(7)),
        ("stream_options", json!({ "include_usage": 3 })),
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!([[]])),
        ("prompt", json!([""])),
        ("prompt", json!([256])),
        ("prompt", json!([-1])),
        ("prompt", json!([1.5])),
        ("prompt", json!([u64::MAX])),
        ("prompt", json!([1, "a"])),
        ("prompt", json!([[[1]]])),
        ("prompt", json!(null)),
        ("prompt", json!({ "text": "a" })),
        ("prompt", json!("a".repeat(65))),
        ("prompt", json!(vec![97; 65])),
        ("prompt", json!(vec!["a"; 129])),
    ] {
        all.push((field, wrong));
    }
    all
}

/// Bodies of chats that are refused.
fn chats() -> Vec<Value> {
    let user = json!({ "role": "user", "content": "Hi" });
    let with = |key: &str, value: Value| json!({ "messages": [user.clone()], key: value });
    vec![
        json!({}),
        json!({ "messages": null }),
        json!({ "messages": [] }),
        json!({ "messages": "Hi" }),
        json!({ "messages": ["Hi"] }),
        json!({ "messages": [{}] }),
        json!({ "messages": [{ "role": 3, "content": "Hi" }] }),
        json!({ "messages": [{ "role": "user", "content": 3 }] }),
        json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": "x" }] }] }),
        json!({ "messages": [{ "role": "user", "content": [{ "type": "text" }] }] }),
        json!({ "messages": [{ "role": "user", "content": "a".repeat(70) }] }),
        json!({ "messages": [{ "content": "Hi" }] }),
        with("top_logprobs", json!(3)),
        with("logprobs", json!(3)),
        with("max_completion_tokens", json!(100)),
        with("max_completion_tokens", json!("a")),
        with("chat_template_kwargs", json!([1])),
        with("chat_template_kwargs", json!({ "messages": [] })),
        with("chat_template_kwargs", json!("a")),
        with("tools", json!([1])),
        with("tool_choice", json!("required")),
        with("functions", json!([1])),
        with("n", json!(129)),
        with("modalities", json!(["audio"])),
    ]
}

/// Bytes that are no valid request at all.
fn bytes(server: &Served) -> Vec<Vec<u8>> {
    let completions = |body: &[u8]| {
        let head = server.head("POST", "/v1/completions", "", body.len());
        [head.as_bytes(), body].concat()
    };
    let deep = "[".repeat(100_000);
    let mut all: Vec<Vec<u8>> = [
        &b""[..],
        b"{",
        b"[]",
        b"null",
        b"3",
        b"\"a\"",
        b"{\"prompt\":}",
        b"{\"prompt\": \"a\"",
        b"\xff\xfe",
        b"{\"prompt\": \"\xff\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"{\"prompt\": \"a\"} b",
        b"{'prompt': 'a'}",
        b"{\"prompt\": \"a\", \"prompt\": \"b\"}",
        b"{\"prompt\": NaN}",
        b"{\"prompt\": \"a\", \"n\": 1e999}",
        b"\0\0\0\0",
        b"prompt=a",
        deep.as_bytes(),
    ]
    .into_iter()
    .map(completions)
    .collect();
    let good = completions(b"{\"prompt\": \"a\"}");
    let text = String::from_utf8_lossy(&good).into_owned();
    for (from, to) in [
        ("application/json", "text/plain"),
        ("Content-Type: application/json\r\n", ""),
        ("POST", "GET"),
        ("POST", "DELETE"),
        ("POST", "PO ST"),
        ("/v1/completions", "/v1/completion"),
        ("/v1/completions", "/v1/%ff%fe"),
        ("/v1/completions", "v1"),
        ("/v1/completions", "/v1/embeddings"),
        ("HTTP/1.0", "HTTP/9.9"),
        ("HTTP/1.0", ""),
        ("Content-Length: 15", "Content-Length: -1"),
        ("Content-Length: 15", "Content-Length: a"),
        ("Content-Length: 15", "Content-Length: 99999999999999999999999"),
        ("Content-Length: 15", "Content-Length: 15\r\nContent-Length: 16"),
        ("Content-Length: 15", "Content-Length: 15\r\nBad Header: 1"),
        ("Content-Length: 15", "Content-Length: 15\r\n: 1"),
    ] {
        assert!(text.contains(from), "{from}");
        all.push(text.replacen(from, to, 1).into_bytes());
    }
    all
}

#[test]
fn every_malformed_request_is_refused_and_the_server_goes_on() -> Result<()> {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 64)?;
    let server = Served::start(folder.path(), "--timeout 30")?;
    let mut cases = 0;
    let mut refused = |name: &str, reply: Result<super::Reply>| -> Result<()> {
        cases += 1;
        let reply = reply.map_err(|e| e.context(name.to_owned()))?;
        ensure!((400..500).contains(&reply.status), "{name}: {} {:?}", reply.status, reply.json());
        Ok(())
    };
    let user = json!([{ "role": "user", "content": "Hi" }]);
    let mut bodies: Vec<_> = chats().into_iter().map(|body| ("/v1/chat/completions", body)).collect();
    for (field, value) in values() {
        let mut body = json!({ "prompt": "a", "max_tokens": 2 });
        body[field] = value.clone();
        bodies.push(("/v1/completions", body));
        if !["prompt", "logprobs", "best_of", "echo", "suffix"].contains(&field) {
            bodies.push(("/v1/chat/completions", json!({ "messages": user, "max_tokens": 2, field: value })));
        }
    }
    for (path, body) in bodies {
        let reply = server.post(path, &body);
        let is_error = reply.as_ref().is_ok_and(|reply| reply.error().is_ok());
        ensure!(
            is_error,
            "{path} {body}: not an error of the interface: {:?}",
            reply.map(|reply| reply.status)
        );
        refused(&body.to_string(), reply)?;
    }
    for bytes in bytes(&server) {
        let name = String::from_utf8_lossy(&bytes[..bytes.len().min(300)]).into_owned();
        // The HTTP library ends some connections without an answer.
        match server.send(&bytes) {
            Err(error) if error.to_string().starts_with("no answer") => cases_without_answer(&error)?,
            reply => refused(&name, reply)?,
        }
    }
    let answer = server.answer("/v1/completions", &json!({ "prompt": "a", "max_tokens": 2 }))?;
    ensure!(answer["usage"]["completion_tokens"] == 2, "{answer}");
    ensure!(server.metric("gd_sequences_running")? == 0.0);
    log_cases("serve-malformed", cases);
    Ok(())
}

/// A connection that was closed has no bytes of an answer.
fn cases_without_answer(error: &anyhow::Error) -> Result<()> {
    ensure!(error.to_string() == "no answer but \"\"", "{error}");
    Ok(())
}
