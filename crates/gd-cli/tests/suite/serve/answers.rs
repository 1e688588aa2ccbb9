//! Answers: those of one request, and of many at once.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use gd_testing::log_cases;
use serde_json::{Value, json};

use super::{Served, generated, save};

fn text(choice: &Value) -> &str {
    choice["text"].as_str().unwrap_or_default()
}

/// The strings at a path of every event, joined.
fn joined(events: &[Value], at: impl Fn(&Value) -> &Value) -> String {
    events.iter().filter_map(|event| at(event).as_str()).collect()
}

#[test]
fn completions_are_those_of_the_command_line() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(dir, 64)?;
    let server = Served::start(dir, "--temperature 0")?;
    let expected = generated(dir, "--prompt It_was --max-tokens 12 --logprobs 2")?;
    let body = json!({ "model": "model", "prompt": "It_was", "max_tokens": 12, "logprobs": 2 });
    let answer = server.answer("/v1/completions", &body)?;
    let choice = &answer["choices"][0];
    ensure!(answer["object"] == "text_completion" && text(choice) == expected["text"], "{answer} {expected}");
    ensure!(choice["finish_reason"] == "length" && choice["index"] == 0, "{answer}");
    let usage = json!({ "prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18 });
    ensure!(answer["usage"] == usage, "{answer}");
    let logprobs = &choice["logprobs"];
    for (at, token) in expected["logprobs"].as_array().context("logprobs")?.iter().enumerate() {
        ensure!(logprobs["token_logprobs"][at] == token["logprob"], "{at}: {logprobs} {token}");
        ensure!(logprobs["tokens"][at] == token["text"], "{at}: {logprobs} {token}");
        ensure!(logprobs["top_logprobs"][at].is_object(), "{at}: {logprobs}");
    }
    // The same as ids, as a stream, and as the default of 16 tokens.
    let ids: Vec<u32> = "It_was".bytes().map(u32::from).collect();
    let of_ids = server.answer("/v1/completions", &json!({ "prompt": ids, "max_tokens": 12 }))?;
    ensure!(text(&of_ids["choices"][0]) == expected["text"] && of_ids["choices"][0]["logprobs"].is_null());
    let options = json!({ "include_usage": true });
    let body = json!({ "prompt": "It_was", "max_tokens": 12, "stream": true, "stream_options": options });
    let events = server.stream("/v1/completions", &body)?;
    ensure!(joined(&events, |event| &event["choices"][0]["text"]) == expected["text"], "{events:?}");
    let last = events.last().context("an event")?;
    ensure!(last["usage"] == usage && last["choices"] == json!([]), "{last}");
    ensure!(events[events.len() - 2]["choices"][0]["finish_reason"] == "length", "{events:?}");
    let default = server.answer("/v1/completions", &json!({ "prompt": "It_was" }))?;
    ensure!(default["usage"]["completion_tokens"] == 16, "{default}");
    // Several prompts, and a stop string inside the text.
    let body = json!({ "prompt": ["It_was", "Call"], "max_tokens": 12, "n": 2 });
    let several = server.answer("/v1/completions", &body)?;
    let texts: Vec<_> = several["choices"].as_array().context("choices")?.iter().map(text).collect();
    ensure!(texts.len() == 4 && texts[0] == expected["text"] && texts[0] == texts[1], "{several}");
    ensure!(texts[2] == texts[3] && texts[2] != texts[0], "{several}");
    ensure!(several["usage"]["prompt_tokens"] == 10 && several["usage"]["completion_tokens"] == 48);
    let whole: Vec<char> = text(choice).chars().collect();
    let stop: String = whole[4..6].iter().collect();
    let stopped =
        server.answer("/v1/completions", &json!({ "prompt": "It_was", "max_tokens": 12, "stop": stop }))?;
    let before = text(choice).find(&stop).context("the stop string")?;
    ensure!(text(&stopped["choices"][0]) == &text(choice)[..before], "{stopped} {stop:?}");
    ensure!(stopped["choices"][0]["finish_reason"] == "stop", "{stopped}");
    Ok(())
}

#[test]
fn sampling_is_that_of_the_model_unless_a_flag_or_the_request_states_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(dir, 64)?;
    std::fs::write(dir.join("model/generation_config.json"), r#"{ "do_sample": false }"#)?;
    let greedy = generated(dir, "--prompt It_was --max-tokens 12")?;
    let mut body = json!({ "prompt": "It_was", "max_tokens": 12, "seed": 1 });
    let answer = Served::start(dir, "")?.answer("/v1/completions", &body)?;
    ensure!(text(&answer["choices"][0]) == greedy["text"], "{answer} {greedy}");
    let server = Served::start(dir, "--temperature 2")?;
    let sampled = server.answer("/v1/completions", &body)?;
    ensure!(text(&sampled["choices"][0]) != greedy["text"], "{sampled}");
    body["temperature"] = 0.into();
    let answer = server.answer("/v1/completions", &body)?;
    ensure!(text(&answer["choices"][0]) == greedy["text"], "{answer} {greedy}");
    Ok(())
}

#[test]
fn echo_gives_the_log_probabilities_of_the_prompt() -> Result<()> {
    let folder = tempfile::tempdir()?;
    save(folder.path(), 64)?;
    let server = Served::start(folder.path(), "--step-tokens 4")?;
    let body = json!({ "prompt": "abcdef", "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0 });
    let answer = server.answer("/v1/completions", &body)?;
    let (choice, logprobs) = (&answer["choices"][0], &answer["choices"][0]["logprobs"]);
    ensure!(text(choice).starts_with("abcdef"), "{answer}");
    ensure!(logprobs["tokens"].as_array().is_some_and(|tokens| tokens.len() == 7), "{answer}");
    let values = logprobs["token_logprobs"].as_array().context("values")?;
    ensure!(values[0].is_null() && values[1..].iter().all(|value| value.as_f64().is_some_and(|x| x < 0.0)));
    ensure!(logprobs["text_offset"] == json!([0, 1, 2, 3, 4, 5, 6]), "{answer}");
    // Without new tokens, the answer is the prompt; the same values.
    let body = json!({ "prompt": "abcdef", "max_tokens": 0, "echo": true, "logprobs": 0, "temperature": 0 });
    let of_prompt = server.answer("/v1/completions", &body)?;
    ensure!(text(&of_prompt["choices"][0]) == "abcdef", "{of_prompt}");
    let again = of_prompt["choices"][0]["logprobs"]["token_logprobs"].as_array().context("values")?;
    ensure!(again[..] == values[..6], "{again:?} {values:?}");
    Ok(())
}

#[test]
fn chats_continue_with_what_is_cached_and_name_sources() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(dir, 256)?;
    let server = Served::start(dir, "")?;
    let path = "/v1/chat/completions";
    let mut messages =
        json!([{ "role": "system", "content": "Be brief" }, { "role": "user", "content": "Hi" }]);
    let body = |messages: &Value| json!({ "messages": messages, "max_tokens": 10, "temperature": 0 });
    let answer = server.answer(path, &body(&messages))?;
    let message = &answer["choices"][0]["message"];
    let expected = crate::program::command(dir, "generate model --temperature 0 --json --max-tokens 10")
        .args(["--chat", "--system", "Be brief", "--prompt", "Hi"])
        .output()?;
    let expected = crate::program::parsed(&expected)?;
    ensure!(message["content"] == expected["text"] && message["role"] == "assistant", "{answer} {expected}");
    ensure!(
        answer["object"] == "chat.completion"
            && answer["usage"]["prompt_tokens"] == expected["prompt_tokens"]
    );
    // The next turn, as a stream, with parts of a text and with log-probabilities.
    messages.as_array_mut().context("a list")?.extend([
        message.clone(),
        json!({ "role": "user", "content": [{ "type": "text", "text": "And" }, { "type": "text", "text": "?" }] }),
    ]);
    let mut request = body(&messages);
    let whole = server.answer(path, &request)?;
    ensure!(server.metric("gd_reused_tokens_total")? >= 10.0);
    for (key, value) in [("stream", json!(true)), ("logprobs", json!(true)), ("top_logprobs", json!(3))] {
        request[key] = value;
    }
    request["sources"] = json!(true);
    let events = server.stream(path, &request)?;
    let delta = joined(&events, |event| &event["choices"][0]["delta"]["content"]);
    ensure!(delta == whole["choices"][0]["message"]["content"], "{delta:?} {whole}");
    ensure!(events[0]["choices"][0]["delta"]["role"] == "assistant", "{events:?}");
    let part = |at: &'static str| events.iter().map(move |event| &event["choices"][0][at]);
    let content: Vec<_> = part("logprobs").filter_map(|part| part["content"].as_array()).flatten().collect();
    ensure!(content.len() == 10 && content[0]["top_logprobs"].as_array().is_some_and(|top| top.len() == 3));
    // Every token has the four heads of the last two layers, which read positions before it.
    let prompt = events[0]["choices"][0]["gd"]["prompt"].as_array().context("the prompt")?;
    let tokens: Vec<_> = part("gd").filter_map(|gd| gd["tokens"].as_array()).flatten().collect();
    ensure!(
        tokens.len() == 10 && prompt.len() as u64 == whole["usage"]["prompt_tokens"].as_u64().unwrap_or(0)
    );
    for (at, token) in tokens.iter().enumerate() {
        let sources = token["sources"].as_array().context("sources")?;
        ensure!(sources.len() == 8, "{token}");
        for source in sources {
            let position = source["position"].as_u64();
            ensure!(
                position.is_none_or(|position| (position as usize) < prompt.len() + at),
                "{at}: {source}"
            );
            ensure!(source["layer"].as_u64().is_some_and(|layer| layer == 1 || layer == 2), "{source}");
        }
    }
    Ok(())
}

#[test]
fn a_seed_repeats_an_answer_and_choices_differ() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(dir, 64)?;
    let server = Served::start(dir, "")?;
    let texts = |seed: i64| -> Result<Vec<String>> {
        let body = json!({ "prompt": "It was", "max_tokens": 12, "n": 3, "seed": seed, "temperature": 1.0 });
        let answer = server.answer("/v1/completions", &body)?;
        let choices = answer["choices"].as_array().context("choices")?;
        Ok(choices.iter().map(|choice| text(choice).to_owned()).collect())
    };
    let first = texts(-7)?;
    ensure!(first == texts(-7)? && first != texts(8)?);
    ensure!(first.iter().collect::<BTreeSet<_>>().len() == 3, "{first:?}");
    Ok(())
}

#[test]
fn many_clients_get_the_answers_that_each_gets_alone() -> Result<()> {
    const CLIENTS: usize = 64;
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    save(dir, 96)?;
    let server = Served::start(dir, "--batch 8 --step-tokens 16")?;
    let body = |client: usize| {
        let prompt: String =
            (0..3 + client % 23).map(|at| char::from(b'a' + ((client * 7 + at * 3) % 26) as u8)).collect();
        let tokens = 4 + client * 5 % 29;
        json!({ "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": client.is_multiple_of(2) })
    };
    let ask = |client: usize| -> Result<String> {
        let body = body(client);
        match client % 2 {
            0 => Ok(joined(&server.stream("/v1/completions", &body)?, |event| &event["choices"][0]["text"])),
            _ => Ok(text(&server.answer("/v1/completions", &body)?["choices"][0]).to_owned()),
        }
    };
    let ask = &ask;
    let together: Vec<String> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|client| scope.spawn(move || ask(client))).collect();
        clients.into_iter().map(|client| client.join().expect("a client")).collect::<Result<_>>()
    })?;
    for (client, text) in together.iter().enumerate() {
        let alone = ask(client)?;
        ensure!(*text == alone, "client {client}: {text:?} alone {alone:?}");
    }
    ensure!(together.iter().collect::<BTreeSet<_>>().len() > 40);
    log_cases("serve-clients", CLIENTS);
    Ok(())
}
