//! The flags of `gd serve`.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use crate::generation::{CacheArgs, SamplingArgs};

/// Serve a model over HTTP, in the interface of OpenAI, with a chat page at `/`
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Serves /v1/models, /v1/completions and /v1/chat/completions, with streaming; /health; /metrics in the \
                  format of Prometheus. Requests are decoded together as they come and go. SIGTERM and Ctrl-C refuse new \
                  requests and finish those under way; a second signal ends at once. The key of --api-key-file, or of the \
                  environment variable GD_API_KEY, is asked for under /v1.\n\n\
                  Example:\n  gd serve out/tiny --port 8080"
)]
pub struct Args {
    /// Model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Address to listen on. Other machines reach it only if it is not 127.0.0.1
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub host: IpAddr,
    /// Port to listen on; 0 for a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// Name of the model in the interface (default: that of its folder or file)
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// File with the key that requests must send (`Authorization: Bearer KEY`)
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Sampling where a request states none
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Cache
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Maximum number of sequences that are decoded together
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = positive)]
    pub batch: usize,
    /// Maximum number of tokens of prompts that are read between two tokens of the sequences under way
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    pub step_tokens: usize,
    /// Number of tokens whose keys and values are stored for prompts that begin with the same text
    #[arg(long, value_name = "N", default_value_t = 8192)]
    pub stored_tokens: usize,
    /// Maximum number of requests in flight; others are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = positive)]
    pub max_requests: usize,
    /// Maximum number of tokens of a prompt (default: the model's context)
    #[arg(long, value_name = "N")]
    pub max_prompt_tokens: Option<usize>,
    /// Maximum number of new tokens of a request (default: the model's context)
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Maximum size of the body of a request
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 20)]
    pub max_body_bytes: usize,
    /// Maximum time of a request in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
}

/// Parses a number of at least 1. The maximum is that of a semaphore's permits, far above any use.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=0xffff_ffff) => Ok(number),
        _ => Err("a number of at least 1".into()),
    }
}
