//! From the texts and chats of requests to tokens.

use gd_model::Error;
use gd_model::infer::stop::StopStrings;
use gd_model::io::chat_template::{ChatTemplate, Message};
use gd_model::io::tokenizer::Tokenizer;
use gd_model::model::pretrained::Loaded;
use serde_json::{Value, json};

use super::error::ApiError;
use super::request::Prompt;
use super::server::Limits;
use crate::context::one_line;
use crate::generation::token_text;

/// Makes prompts for the model.
pub(super) struct Prompts {
    pub(super) tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    begin: Option<u32>,
    vocab_size: usize,
}

/// The error of a text that cannot be a prompt.
fn refused(param: &'static str, error: Error) -> ApiError {
    ApiError::param(param, one_line(&error.into()))
}

impl Prompts {
    /// # Errors
    /// A chat template that cannot be parsed.
    pub(super) fn new(loaded: &Loaded) -> gd_model::Result<Self> {
        Ok(Self {
            tokenizer: loaded.tokenizer.clone(),
            template: loaded.chat()?,
            begin: loaded.begin_token(),
            vocab_size: loaded.model.config().vocab_size,
        })
    }

    /// The tokens of a prompt.
    pub(super) fn encode(&self, prompt: &Prompt, limits: &Limits) -> Result<Vec<u32>, ApiError> {
        let ids = match prompt {
            Prompt::Ids(ids) => ids.clone(),
            Prompt::Text(text) => self.tokenizer.encode(text).map_err(|e| refused("prompt", e))?,
        };
        let ids = if ids.is_empty() { self.begin.into_iter().collect() } else { ids };
        self.checked(ids, "prompt", limits)
    }

    /// The tokens of a chat up to the model's answer. `variables` are those of the template, a JSON object.
    pub(super) fn encode_chat(
        &self,
        chat: &[Message],
        variables: Option<&Value>,
        limits: &Limits,
    ) -> Result<Vec<u32>, ApiError> {
        let refused = |error| refused("messages", error);
        let Some(template) = &self.template else {
            return Err(ApiError::invalid("the model has no chat template; use /v1/completions"));
        };
        let text = match variables {
            Some(variables) => {
                let template = template.clone().with_variables(&variables.to_string());
                template.and_then(|template| template.render_chat(chat))
            }
            None => template.render_chat(chat),
        };
        let ids = self.tokenizer.encode_written(&text.map_err(refused)?).map_err(refused)?;
        self.checked(ids, "messages", limits)
    }

    fn checked(&self, ids: Vec<u32>, param: &'static str, limits: &Limits) -> Result<Vec<u32>, ApiError> {
        if ids.is_empty() {
            return Err(ApiError::param(param, "the prompt is empty, and the model has no begin token"));
        }
        if ids.len() > limits.prompt_tokens {
            let (tokens, limit) = (ids.len(), limits.prompt_tokens);
            return Err(ApiError::too_long(
                param,
                format!("the prompt has {tokens} tokens; the limit is {limit}"),
            ));
        }
        match ids.iter().find(|id| **id as usize >= self.vocab_size) {
            Some(id) => {
                let size = self.vocab_size;
                Err(ApiError::param(param, format!("the prompt has the token {id}; the model has {size}")))
            }
            None => Ok(ids),
        }
    }

    /// Stop strings, which may name special tokens.
    pub(super) fn stop(&self, stops: Vec<String>) -> Result<StopStrings, ApiError> {
        let stop = StopStrings::new(stops).map_err(|e| refused("stop", e))?;
        Ok(stop.with_special_tokens(&self.tokenizer.special_tokens()))
    }

    /// A token as JSON: `id` and `text`.
    pub(super) fn token_json(&self, id: u32) -> Value {
        json!({ "id": id, "text": token_text(&self.tokenizer, id) })
    }

    /// The text of tokens, for `echo`.
    pub(super) fn text(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids).unwrap_or_default()
    }
}
