//! `gd train`: trains a model, saves it, reloads it and generates a sample.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::Context;

/// Train a model and save it
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  gd train\n  gd train --data book.txt notes.txt --config tiny --steps 600 --seed 1 --out runs/book\n  gd train --resume runs/book"
)]
pub struct Args {
    /// UTF-8 text files to train on (default: the shipped sample text)
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "resume")]
    pub data: Vec<PathBuf>,
    /// A preset of models/ or a JSON file with a configuration
    #[arg(long, value_name = "PRESET|FILE", default_value = "tiny", conflicts_with = "resume")]
    pub config: String,
    /// Optimizer steps of the whole run (default: from the configuration)
    #[arg(long, value_name = "N")]
    pub steps: Option<u64>,
    /// Save and stop after this step; `--resume` goes on from there
    #[arg(long, value_name = "N")]
    pub stop_after: Option<u64>,
    /// The folder to write (default: out/ and the configuration's name)
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub out: Option<PathBuf>,
    /// Go on with the run saved in this folder
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that cannot be used.
pub fn run(_args: Args, _ctx: &Context) -> Result<()> {
    bail!("train: waits for the trainer")
}
