//! The flags of `gd trace`.

use std::path::PathBuf;

use anyhow::Result;
use gd_model::trace::{Intervention, SweepAct};

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
                  A softmax head has no single source. --blend records its 8 greatest weights, which show a blend and \
                  no selection.\n\n\
                  A selection shows what a head read, not that it mattered. --force, --ban and --ablate change a \
                  selection and report how the distribution of the next token changes. Their argument is \
                  LAYER.HEAD@QUERY:POSITION, where QUERY is a position or `all` (default: the last token of the \
                  prompt). --sweep does so with every head in turn, for the last token of the prompt.\n\n\
                  Examples:\n  \
                  gd trace out/tiny --prompt \"Call me\" --max-tokens 100 --out call.trace --html call.html\n  \
                  gd trace out/tiny --prompt \"Call me Ishmael\" --ban 1.3:2 --ablate 0.5\n  \
                  gd trace out/tiny --prompt \"Call me Ishmael\" --sweep ban --plot effects.svg\n  \
                  gd trace --from call.trace --export call.npz\n  \
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
    #[arg(long, value_name = "T", conflicts_with_all = ["model", "out"], num_args = 1)]
    pub from: Vec<PathBuf>,
    /// Trace to write
    #[arg(long, value_name = "T")]
    pub out: Option<PathBuf>,
    /// HTML page to write: one self-contained file
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// File to write with the trace for other programs: arrays for NumPy if the name ends in .npz, else lines of JSON (.jsonl)
    #[arg(long, value_name = "FILE", value_parser = export_file)]
    pub export: Option<PathBuf>,
    /// Record the 8 greatest weights of softmax heads, too
    #[arg(long, conflicts_with = "from")]
    pub blend: bool,
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
    /// Ban what each head reads, or let it abstain, one head at a time, and report the effect on the next token
    #[arg(long, value_enum, value_name = "ACT", conflicts_with_all = ["force", "ban", "ablate", "from"])]
    pub sweep: Option<Sweep>,
    /// Heat map of the effects of --sweep to write: PNG if the name ends in .png, a page if it ends in .html, else SVG
    #[arg(long, value_name = "FILE", requires = "sweep")]
    pub plot: Option<PathBuf>,
    /// Ed25519 key (PKCS#8 PEM) that signs the trace
    #[arg(long, value_name = "FILE", requires = "out")]
    pub key: Option<PathBuf>,
}

/// What --sweep does to every head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Sweep {
    /// Exclude the position that the head reads from its keys
    Ban,
    /// Force the head to abstain
    Ablate,
}

impl From<Sweep> for SweepAct {
    fn from(sweep: Sweep) -> Self {
        match sweep {
            Sweep::Ban => Self::Ban,
            Sweep::Ablate => Self::Ablate,
        }
    }
}

/// A file of --export, whose name says the format.
fn export_file(name: &str) -> std::result::Result<PathBuf, String> {
    let path = PathBuf::from(name);
    match path.extension().and_then(|e| e.to_str()) {
        Some("npz" | "jsonl") => Ok(path),
        _ => Err("its name must end in .npz or .jsonl".into()),
    }
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
