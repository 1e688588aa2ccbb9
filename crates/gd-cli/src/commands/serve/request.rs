//! Requests as clients send them, and their checks.

use gd_model::infer::sampler::Sampling;
use gd_model::io::chat_template::Message;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::error::ApiError;
use super::server::Server;

/// The maximal number of choices of a request: prompts times `n`.
const MAX_CHOICES: usize = 128;
/// The maximal number of stop strings, and the maximal length of all of them together in bytes.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 4096;
/// The maximal number of alternatives to a token.
const MAX_TOP_LOGPROBS: usize = 20;
/// The number of new tokens of a completion that states none, as in OpenAI's interface.
const DEFAULT_COMPLETION_TOKENS: usize = 16;

/// A request that names parameters which would change the answer and are not supported, with the values that change
/// nothing.
const UNSUPPORTED: [(&str, &[&str]); 11] = [
    ("tools", &["[]"]),
    ("functions", &["[]"]),
    ("tool_choice", &["\"none\"", "\"auto\""]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("response_format", &["{\"type\":\"text\"}"]),
    ("logit_bias", &["{}"]),
    ("suffix", &["\"\""]),
    ("audio", &[]),
    ("modalities", &["[\"text\"]"]),
    ("presence_penalty", &["0", "0.0"]),
    ("frequency_penalty", &["0", "0.0"]),
];

/// A prompt of a completion.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// One prompt or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum PromptField {
    One(Prompt),
    Several(Vec<Prompt>),
}

/// One stop string or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum StopField {
    One(String),
    Several(Vec<String>),
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// The parameters that completions and chats share. Those that OpenAI's interface does not have are `top_k`, `min_p`,
/// `repetition_penalty` and `sources`.
#[derive(Debug, Deserialize)]
struct Shared {
    model: Option<String>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<usize>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    max_tokens: Option<usize>,
    n: Option<usize>,
    seed: Option<i64>,
    stop: Option<StopField>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    sources: Option<bool>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Deserialize)]
struct CompletionFields {
    prompt: PromptField,
    logprobs: Option<usize>,
    echo: Option<bool>,
    #[serde(rename = "best_of")]
    candidates: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct ChatFields {
    messages: Vec<ChatMessage>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
    max_completion_tokens: Option<usize>,
    chat_template_kwargs: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct ChatMessage {
    role: String,
    content: Option<Content>,
}

/// A text, or a list of its parts.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part {
    Text { text: String },
}

/// What a request asks for, whatever its endpoint.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) sampling: Sampling,
    pub(super) max_tokens: usize,
    /// The number of choices of each prompt.
    pub(super) n: usize,
    pub(super) seed: u64,
    pub(super) stop: Vec<String>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) sources: bool,
    pub(super) logprobs: Option<usize>,
}

/// A checked request for completions.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) options: Options,
    pub(super) prompts: Vec<Prompt>,
    pub(super) echo: bool,
}

/// A checked request for an answer in a chat.
#[derive(Debug)]
pub(super) struct Chat {
    pub(super) options: Options,
    pub(super) messages: Vec<Message>,
    pub(super) variables: Option<Value>,
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|e| ApiError::invalid(format!("the body is not a valid request: {e}")))
}

impl Completion {
    /// # Errors
    /// Names the parameter that is not valid.
    pub(super) fn parse(body: &[u8], server: &Server) -> Result<Self, ApiError> {
        let (shared, fields): (Shared, CompletionFields) = (parse(body)?, parse(body)?);
        let prompts = match fields.prompt {
            PromptField::One(prompt) => vec![prompt],
            PromptField::Several(prompts) => prompts,
        };
        let mut options = shared.check(server, prompts.len(), DEFAULT_COMPLETION_TOKENS)?;
        options.logprobs = fields.logprobs;
        if fields.candidates.is_some_and(|count| count != options.n) {
            return Err(ApiError::param("best_of", "best_of is not supported with another value than n"));
        }
        check_top_logprobs("logprobs", options.logprobs)?;
        Ok(Self { options, prompts, echo: fields.echo.unwrap_or(false) })
    }
}

impl Chat {
    /// # Errors
    /// Names the parameter that is not valid.
    pub(super) fn parse(body: &[u8], server: &Server) -> Result<Self, ApiError> {
        let (mut shared, fields): (Shared, ChatFields) = (parse(body)?, parse(body)?);
        shared.max_tokens = fields.max_completion_tokens.or(shared.max_tokens);
        let mut options = shared.check(server, 1, server.limits.new_tokens)?;
        options.logprobs = match (fields.logprobs.unwrap_or(false), fields.top_logprobs) {
            (true, count) => Some(count.unwrap_or(0)),
            (false, None | Some(0)) => None,
            (false, Some(_)) => return Err(ApiError::param("top_logprobs", "top_logprobs needs logprobs")),
        };
        check_top_logprobs("top_logprobs", options.logprobs)?;
        if fields.messages.is_empty() {
            return Err(ApiError::param("messages", "there are no messages"));
        }
        if fields.chat_template_kwargs.as_ref().is_some_and(|variables| !variables.is_object()) {
            return Err(ApiError::param("chat_template_kwargs", "the variables are a JSON object"));
        }
        let messages = fields.messages.into_iter().map(|message| {
            let content = match message.content {
                None => String::new(),
                Some(Content::Text(text)) => text,
                Some(Content::Parts(parts)) => parts.into_iter().map(|Part::Text { text }| text).collect(),
            };
            Message { role: message.role, content }
        });
        Ok(Self { options, messages: messages.collect(), variables: fields.chat_template_kwargs })
    }
}

fn check_top_logprobs(param: &'static str, count: Option<usize>) -> Result<(), ApiError> {
    match count {
        Some(count) if count > MAX_TOP_LOGPROBS => {
            Err(ApiError::param(param, format!("{param} is {count}; the maximum is {MAX_TOP_LOGPROBS}")))
        }
        _ => Ok(()),
    }
}

impl Shared {
    fn check(self, server: &Server, prompts: usize, default_tokens: usize) -> Result<Options, ApiError> {
        if let Some(model) = self.model.as_ref().filter(|model| **model != server.model) {
            return Err(ApiError::no_such_model(model, &server.model));
        }
        for (name, neutral) in UNSUPPORTED {
            let value = self.rest.get(name).filter(|value| !value.is_null());
            if let Some(value) = value.filter(|value| !neutral.contains(&value.to_string().as_str())) {
                return Err(ApiError::param(name, format!("{name} = {value} is not supported")));
            }
        }
        let n = self.n.unwrap_or(1);
        if n == 0 || prompts == 0 || n.saturating_mul(prompts) > MAX_CHOICES {
            let message = format!("{prompts} prompts with n = {n}; 1 to {MAX_CHOICES} choices are allowed");
            return Err(ApiError::param("n", message));
        }
        let limit = server.limits.new_tokens;
        if let Some(tokens) = self.max_tokens.filter(|tokens| *tokens > limit) {
            return Err(ApiError::param(
                "max_tokens",
                format!("max_tokens is {tokens}; the limit is {limit}"),
            ));
        }
        let defaults = server.sampling;
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.or(defaults.top_k),
            top_p: self.top_p.or(defaults.top_p),
            min_p: self.min_p.or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
        };
        sampling.validate().map_err(|e| ApiError::invalid(e.to_string()))?;
        let sources = self.sources.unwrap_or(false);
        if sources && !server.selects {
            return Err(ApiError::param(
                "sources",
                "no layer of the model selects, so that tokens have no sources",
            ));
        }
        Ok(Options {
            sampling,
            max_tokens: self.max_tokens.unwrap_or(default_tokens.min(limit)),
            n,
            seed: self.seed.map(i64::cast_unsigned).or(server.seed).unwrap_or_else(rand::random),
            stop: stops(self.stop)?,
            stream: self.stream.unwrap_or(false),
            include_usage: self.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
            sources,
            logprobs: None,
        })
    }
}

fn stops(field: Option<StopField>) -> Result<Vec<String>, ApiError> {
    let stops = match field {
        None => Vec::new(),
        Some(StopField::One(stop)) => vec![stop],
        Some(StopField::Several(stops)) => stops,
    };
    if stops.len() > MAX_STOPS || stops.iter().map(String::len).sum::<usize>() > MAX_STOP_BYTES {
        let message =
            format!("at most {MAX_STOPS} stop strings of {MAX_STOP_BYTES} bytes together are allowed");
        return Err(ApiError::param("stop", message));
    }
    Ok(stops)
}
