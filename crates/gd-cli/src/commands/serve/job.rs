//! What the HTTP server and the worker send each other.

use std::time::Instant;

use gd_model::infer::engine::Source;
use gd_model::infer::logprobs::TokenLogprobs;
use gd_model::infer::sampler::Sampling;
use gd_model::infer::stop::StopStrings;
use gd_model::infer::text::FinishReason;
use tokio::sync::mpsc::UnboundedSender;

use super::error::ApiError;

/// A request as the worker gets it. Its number of updates is bounded by its number of tokens.
#[derive(Debug)]
pub(super) struct Job {
    /// The prompt and the seed of each choice.
    pub(super) choices: Vec<(Vec<u32>, u64)>,
    pub(super) sampling: Sampling,
    pub(super) max_tokens: usize,
    pub(super) stop: StopStrings,
    /// How many of the most probable tokens are reported with each token.
    pub(super) logprobs: Option<usize>,
    /// Whether log-probabilities of the prompts are reported.
    pub(super) prompt_logprobs: bool,
    /// Whether the sources of each token are reported.
    pub(super) sources: bool,
    pub(super) start: Instant,
    pub(super) deadline: Instant,
    /// Closed if the client is gone.
    pub(super) updates: UnboundedSender<Update>,
}

/// What the worker reports about a choice of a job.
#[derive(Debug)]
pub(super) enum Update {
    /// The prompt is read.
    Prompt {
        choice: usize,
        /// The log-probabilities of its tokens but the first.
        logprobs: Vec<TokenLogprobs>,
    },
    /// A new token, with the text that is certain after it.
    Token(Box<NewToken>),
    /// The end of a choice, with the text that was held back.
    End { choice: usize, text: String, reason: FinishReason },
    /// The end of the job, because of an error.
    Failed(ApiError),
}

/// A new token of a choice.
#[derive(Debug)]
pub(super) struct NewToken {
    pub(super) choice: usize,
    pub(super) id: u32,
    pub(super) text: String,
    pub(super) logprobs: Option<TokenLogprobs>,
    pub(super) sources: Vec<Source>,
}
