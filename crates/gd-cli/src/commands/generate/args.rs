//! The flags of `gd generate`.

use std::path::PathBuf;

use crate::generation::{CacheArgs, SamplingArgs};

/// Continue a prompt. The prompt and its continuation are written to stdout as they are generated
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Several prompts (repeated --prompt, or --prompts) are decoded as a batch with the same result as one \
                  at a time. With --json there is one line per prompt; a prompt without an answer has a line with its \
                  `error`, and the exit code is 1. With --n there is one line per continuation. Sampling flags that are \
                  not given have the values of the model's generation_config.json. --chat applies the model's chat template to the prompt and prints \
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
    /// Sampling
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Cache
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Number of continuations of each prompt. Their seeds are --seed, --seed + 1, …
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub n: u16,
    /// With --json, the log-probability of every token and of the K most probable ones
    #[arg(long, value_name = "K", requires = "json", value_parser = clap::value_parser!(u16).range(0..=256))]
    pub logprobs: Option<u16>,
    /// Stop before this text or special token. Can be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
}
