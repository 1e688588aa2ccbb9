//! The flags of `gd trace`.

use std::path::PathBuf;

use anyhow::Result;
use gd_model::trace::Intervention;

use crate::context::usage;

/// Record which position every selecting head reads, show it, and measure the effect of a selection
#[derive(Debug, clap::Args)]
#[command(
    after_help = "The trace contains, for every token, selecting layer and head: the position that is read (or none), \
                  its energy, the margin to the runner-up, the coherence point, the gate, the candidates (protected, \
                  raised by the barrier, rejected), and which shares of the head's output come from the selected value \
                  and from the Beacon's running average. Only the selected value has a single source. The records form \
                  a hash chain. The printed head of the chain identifies the whole trace, and `gd verify` checks it. \
                  `openssl genpkey -algorithm ed25519` creates a key to sign the head.\n\n\
                  A selection shows what a head read, not that it mattered. --force, --ban and --ablate change a \
                  selection and report how the distribution of the next token changes. Their argument is \
                  LAYER.HEAD@QUERY:POSITION, where QUERY is a position or `all` (default: the last token of the \
                  prompt).\n\n\
                  Examples:\n  \
                  gd trace out/tiny --prompt \"Call me\" --max-tokens 100 --out call.trace --html call.html\n  \
                  gd trace out/tiny --prompt \"Call me Ishmael\" --ban 1.3:2 --ablate 0.5\n  \
                  gd trace --from call.trace --from other.trace --html both.html"
)]
pub struct Args {
    /// Model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL", required_unless_present = "from")]
    pub model: Option<PathBuf>,
    /// Text to read
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["file", "from"], allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// File with the text to read
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    pub file: Option<PathBuf>,
    /// Show this recorded trace instead of recording one. Two traces are shown side by side
    #[arg(long, value_name = "T", conflicts_with_all = ["model", "out"], requires = "html", num_args = 1)]
    pub from: Vec<PathBuf>,
    /// Trace to write
    #[arg(long, value_name = "T")]
    pub out: Option<PathBuf>,
    /// HTML page to write: one self-contained file
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Maximum number of tokens to generate after the text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_tokens: usize,
    /// Sampling temperature. 0 always takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.8, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Force the head to read this position
    #[arg(long, value_name = "PLACE")]
    pub force: Vec<String>,
    /// Exclude this position from the keys of the head
    #[arg(long, value_name = "PLACE")]
    pub ban: Vec<String>,
    /// Force the head to abstain
    #[arg(long, value_name = "PLACE")]
    pub ablate: Vec<String>,
    /// Ed25519 key (PKCS#8 PEM) that signs the trace
    #[arg(long, value_name = "FILE", requires = "out")]
    pub key: Option<PathBuf>,
}

impl Args {
    /// The interventions that the flags describe.
    pub(super) fn interventions(&self) -> Result<Vec<Intervention>> {
        let mut all = Vec::new();
        for (name, places) in [("force", &self.force), ("ban", &self.ban), ("ablate", &self.ablate)] {
            for place in places {
                all.push(Intervention::parse(name, place).map_err(|e| usage(format!("--{name}: {e}")))?);
            }
        }
        Ok(all)
    }
}
