//! `gd compare`: trains several mechanisms on equal terms and prints one table.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::Context;

/// Train several mechanisms at equal parameters, data and steps, and compare them
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Prints one table (validation loss and its spread, bits per byte, tokens/s, peak memory, abstain rate, \
                  first-token share, top-1 margin) and writes the loss curves as SVG.\n\n\
                  Example:\n  gd compare --mechanisms softmax,gd --seeds 3 --out out/compare"
)]
pub struct Args {
    /// The mechanisms, separated by commas
    #[arg(long, value_name = "A,B,..", value_delimiter = ',', default_value = "softmax,gd")]
    pub mechanisms: Vec<String>,
    /// Runs per mechanism
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub seeds: u64,
    /// UTF-8 text files to train on (default: the shipped sample text)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub data: Vec<PathBuf>,
    /// A preset of models/ or a JSON file with a configuration
    #[arg(long, value_name = "PRESET|FILE", default_value = "tiny")]
    pub config: String,
    /// Optimizer steps of each run (default: from the configuration)
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// The folder for the table and the curves
    #[arg(long, value_name = "DIR", default_value = "out/compare")]
    pub out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(_args: Args, _ctx: &Context) -> Result<()> {
    bail!("compare: waits for the trainer")
}
