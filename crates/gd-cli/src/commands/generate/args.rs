//! The flags of `gd generate`.

use std::path::PathBuf;

use gd_model::infer::sampler::Sampling;

/// Continue a prompt. The prompt and its continuation are written to stdout as they are generated
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Several prompts (repeated --prompt, or --prompts) are decoded as a batch with the same result as one \
                  at a time. With --json there is one line per prompt; a prompt without an answer has a line with its \
                  `error`, and the exit code is 1. --chat applies the model's chat template to the prompt and prints \
                  only the answer. Generation ends at an end token of the model.\n\n\
                  Example:\n  gd generate out/tiny --prompt \"Once upon a time\" --max-tokens 100 --temperature 0.8 --top-p 0.95 --seed 7"
)]
pub struct Args {
    /// Model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Text to continue; `-` reads it from stdin. Can be repeated
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts", allow_hyphen_values = true)]
    pub prompt: Vec<String>,
    /// File with prompts: the lines of a text file, or the field `prompt` of each line of a .jsonl file; `-` for stdin
    #[arg(long, value_name = "FILE", allow_hyphen_values = true)]
    pub prompts: Option<PathBuf>,
    /// Use each prompt as the user message of a chat
    #[arg(long)]
    pub chat: bool,
    /// System message of the chat
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Variables of the chat template as a JSON object, such as {"enable_thinking": false}
    #[arg(long, value_name = "JSON", requires = "chat")]
    pub chat_template_kwargs: Option<String>,
    /// Maximum number of new tokens
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,
    /// Sampling temperature. 0 always takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Sample from the K most probable tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Sample from the smallest set of most probable tokens with this total probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Sample from the tokens with at least this share of the highest probability
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub min_p: Option<f64>,
    /// Divisor of the logits of tokens that already occur (1: no penalty)
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repetition_penalty: f64,
    /// Stop before this text or special token. Can be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
}

impl Args {
    /// The sampling settings.
    pub(super) fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }
}
