//! The command line of `gd`: one module per command with its flags (`Args`) and a function `run(args, ctx)`.
//!
//! Results go to stdout, progress and logs to stderr. Exit codes: 0 success, 1 failure, 2 usage error, 3 an
//! incomplete check (`gd verify`). An error is one line on stderr that starts with `error: `.

pub mod beacon_report;
pub mod bench;
pub mod chat;
pub mod compare;
pub mod completions;
pub mod config;
pub mod convert;
pub mod data;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod landscape;
pub mod man;
pub mod map;
pub mod op;
pub mod plot;
pub mod report;
pub mod serve;
pub mod task;
pub mod trace;
pub mod train;
pub mod verify;

use std::process::ExitCode;

use anyhow::Result;
use clap::error::ErrorKind as ClapKind;
use clap::{ColorChoice, CommandFactory, FromArgMatches, Parser, Subcommand};
use gd_model::config::device::DeviceChoice;
use tracing_subscriber::EnvFilter;

use crate::color;
use crate::context::{Context, exit_code, one_line, usage};
use crate::terminal::{Stderr, note};

/// Trains, runs and checks Preserve-then-Select language models.
#[derive(Debug, Parser)]
#[command(
    name = "gd",
    version,
    after_help = "Results go to stdout, progress and logs to stderr. Exit codes: 0 success, 1 failure, 2 usage error, 3 not\n\
                  everything was checked (verify).\n\
                  GD_LOG=info (or debug) shows more log messages. RAYON_NUM_THREADS sets the number of threads.\n\n\
                  Example: train on the sample text, save, reload and generate:\n  gd train"
)]
struct Cli {
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    command: Command,
}

/// The flags that all commands share.
#[derive(Debug, clap::Args)]
struct CommonArgs {
    /// Device: auto, cpu, cuda:N or metal
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Random seed. Equal seeds give equal results (default: 0)
    #[arg(long, global = true, value_name = "S")]
    seed: Option<u64>,
    /// Print the result as JSON
    #[arg(long, global = true)]
    json: bool,
    /// When to color messages: auto is on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    color: ColorChoice,
}

#[derive(Debug, Subcommand)]
enum Command {
    Train(train::Args),
    Config(config::Args),
    Data(data::Args),
    Eval(eval::Args),
    Generate(generate::Args),
    Chat(chat::Args),
    Serve(serve::Args),
    Convert(convert::Args),
    Op(op::Args),
    Trace(trace::Args),
    Verify(verify::Args),
    Compare(compare::Args),
    Task(task::Args),
    Plot(plot::Args),
    Report(report::Args),
    BeaconReport(beacon_report::Args),
    Landscape(landscape::Args),
    Map(map::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
    Completions(completions::Args),
    Man(man::Args),
}

/// The definition of all commands and their flags, against which tests check the commands in the documentation.
pub fn definition() -> clap::Command {
    Cli::command()
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    let command = Cli::command().color(color::requested(std::env::args_os()));
    let cli = match command.try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(e) if matches!(e.kind(), ClapKind::DisplayHelp | ClapKind::DisplayVersion) => {
            // A closed pipe, as in `gd --help | head`, is not an error.
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
        Err(e) => return fail(&usage(usage_message(&e))),
    };
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn run(cli: Cli) -> Result<()> {
    let CommonArgs { device, seed, json, color } = cli.common;
    start_log(color)?;
    let ctx = Context { device: device.open()?, seed, json };
    match cli.command {
        Command::Train(args) => train::run(args, &ctx),
        Command::Config(args) => config::run(args, &ctx),
        Command::Data(args) => data::run(args, &ctx),
        Command::Eval(args) => eval::run(args, &ctx),
        Command::Generate(args) => generate::run(args, &ctx),
        Command::Chat(args) => chat::run(args, &ctx),
        Command::Serve(args) => serve::run(args, &ctx),
        Command::Convert(args) => convert::run(args, &ctx),
        Command::Op(args) => op::run(args, &ctx),
        Command::Trace(args) => trace::run(args, &ctx),
        Command::Verify(args) => verify::run(args, &ctx),
        Command::Compare(args) => compare::run(args, &ctx),
        Command::Task(args) => task::run(args, &ctx),
        Command::Plot(args) => plot::run(args, &ctx),
        Command::Report(args) => report::run(args, &ctx),
        Command::BeaconReport(args) => beacon_report::run(args, &ctx),
        Command::Landscape(args) => landscape::run(args, &ctx),
        Command::Map(args) => map::run(args, &ctx),
        Command::Bench(args) => bench::run(args, &ctx),
        Command::Doctor(args) => doctor::run(args, &ctx),
        Command::Completions(args) => completions::run(&args, &ctx),
        Command::Man(args) => man::run(&args, &ctx),
    }
}

/// Writes log messages to stderr, filtered by the environment variable `GD_LOG`.
fn start_log(choice: ColorChoice) -> Result<()> {
    let filter = match std::env::var("GD_LOG") {
        Ok(text) => EnvFilter::try_new(&text).map_err(|e| usage(format!("GD_LOG={text}: {e}")))?,
        Err(_) => EnvFilter::new("warn"),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Stderr)
        // Without it, an error of stderr would be a panic.
        .log_internal_errors(false)
        .with_ansi(color::on_stderr(choice))
        .without_time()
        .with_target(false)
        .init();
    Ok(())
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // If stderr is closed, the message is lost, but the exit code remains.
    note(format_args!("error: {}", one_line(error)));
    ExitCode::from(exit_code(error))
}

/// The message of a clap error without its usage block.
fn usage_message(error: &clap::Error) -> String {
    if error.kind() == ClapKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "a command is missing (`gd --help` lists them)".into();
    }
    let text = error.to_string();
    let body = text.split("\nUsage:").next().unwrap_or_default();
    let body = body.split("\nFor more information").next().unwrap_or_default();
    body.trim().trim_start_matches("error:").trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn flags_are_consistent_and_every_help_text_has_an_example() {
        let mut cli = Cli::command();
        cli.build();
        fn visit(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            if command.get_name() != "help" && !path.contains(" help ") {
                let help = command.clone().render_long_help().to_string();
                assert!(help.contains("Example"), "no example in `{path} --help`");
                command.get_subcommands().for_each(|c| visit(c, &path));
            }
        }
        visit(&cli, "");
        cli.debug_assert();
    }

    #[test]
    fn clap_errors_lose_their_usage_block() {
        let e = Cli::try_parse_from(["gd", "op", "scan", "--in", "x"]).unwrap_err();
        let line = one_line(&usage(usage_message(&e)));
        assert!(line.contains("--out") && !line.contains("Usage") && !line.contains('\n'), "{line}");
    }
}
