//! `gd config`: shows a resolved configuration, its keys, or its schema.

use anyhow::Result;
use clap::Subcommand;
use gd_model::config::{KeyInfo, Setting, keys, schema};
use serde_json::Value;

use crate::context::Context;
use crate::training::{DEFAULT_CONFIG, load_recipe};

/// Show configurations: the resolved one, every key, or the JSON schema
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  gd config show --config tiny --config mine.toml --set train.steps=100\n  gd config keys\n  gd config schema"
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Show(ShowArgs),
    Keys(KeysArgs),
    Schema(SchemaArgs),
}

/// Print the configuration that gd train would use, as JSON
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  gd config show --config small --set train.lr.peak=1e-3")]
pub struct ShowArgs {
    /// Preset of models/, or a TOML or JSON configuration file (default: tiny). Can be repeated: later ones replace
    /// values of earlier ones
    #[arg(long, value_name = "PRESET|FILE", default_value = DEFAULT_CONFIG)]
    pub config: Vec<String>,
    /// Override a value of the configuration by its dotted path. Can be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
}

/// Print every key with its type, default and meaning
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  gd config keys --json")]
pub struct KeysArgs {
    /// Print the tables of the documentation
    #[arg(long)]
    pub markdown: bool,
}

/// Print the JSON schema of configuration files
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  gd config schema > gd.schema.json")]
pub struct SchemaArgs {}

/// Runs the command.
///
/// # Errors
/// Names the file, key or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    match args.command {
        Command::Show(args) => {
            let recipe = load_recipe(&args.config, &args.set, None)?;
            ctx.print(format_args!("{:#}", serde_json::to_value(&recipe)?))
        }
        Command::Keys(_) if ctx.json => ctx.print(serde_json::to_string(&keys())?),
        Command::Keys(args) if args.markdown => ctx.write(markdown(&keys())).map(|_| ()),
        Command::Keys(_) => ctx.write(keys().iter().map(paragraph).collect::<String>()).map(|_| ()),
        Command::Schema(_) => ctx.print(format_args!("{:#}", schema())),
    }
}

/// The value of an absent key.
fn default_of(key: &KeyInfo) -> String {
    match &key.default {
        _ if key.required => "required".into(),
        Some(Value::Object(_)) => "that of its keys".into(),
        Some(value) if !value.is_null() => value.to_string(),
        _ => "none".into(),
    }
}

/// A key in the terminal.
fn paragraph(key: &KeyInfo) -> String {
    let default = if key.required { "required".into() } else { format!("default: {}", default_of(key)) };
    format!("{}: {} ({default})\n    {}\n", key.key, key.kind.replace('`', ""), key.meaning)
}

/// The tables of the documentation: one for the keys of the model and one for those of the training.
pub fn markdown(keys: &[KeyInfo]) -> String {
    let mut text = String::new();
    for block in ["model", "train"] {
        text.push_str(&format!("### `{block}`\n\n| key | type | default | meaning |\n|---|---|---|---|\n"));
        for key in keys.iter().filter(|key| key.key.starts_with(&format!("{block}."))) {
            let default = match (key.required, default_of(key)) {
                (false, value) if key.default.as_ref().is_some_and(|d| !d.is_object()) && value != "none" => {
                    format!("`{value}`")
                }
                (_, word) => word,
            };
            let meaning = key.meaning.replace('|', "\\|");
            text.push_str(&format!("| `{}` | {} | {default} | {meaning} |\n", key.key, key.kind));
        }
        text.push('\n');
    }
    text
}
