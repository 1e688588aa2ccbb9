//! The command line: flags in, results on stdout, progress and logs on stderr.
//!
//! Every command is one module with `Args` and `run(args, ctx)`. Exit codes: 0 done, 1 failed,
//! 2 wrong usage. An error is one line on stderr, `error: what: why`.

pub mod beacon_report;
pub mod bench;
pub mod compare;
pub mod convert;
pub mod data;
pub mod doctor;
pub mod eval;
pub mod generate;
pub mod landscape;
pub mod op;
pub mod plot;
pub mod report;
pub mod trace;
pub mod train;
pub mod uptrain;
pub mod verify;

use std::fmt;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use anyhow::Result;
use candle_core::Device;
use clap::error::ErrorKind as ClapKind;
use clap::{Parser, Subcommand};
use gd_model::config::device::DeviceChoice;
use tracing_subscriber::EnvFilter;

/// Trains, runs and checks Preserve-then-Select language models.
#[derive(Debug, Parser)]
#[command(
    name = "gd",
    version,
    after_help = "Results go to stdout, progress and logs to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage.\n\
                  GD_LOG=info (or debug) shows more of what happens; RAYON_NUM_THREADS sets the threads.\n\n\
                  Example: train on the shipped text, save, reload and generate:\n  gd train"
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

/// The flags that every command takes.
#[derive(Debug, clap::Args)]
struct Common {
    /// Where to compute: auto, cpu, cuda:N or metal
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// The seed of everything random: same seed, same result (default 0)
    #[arg(long, global = true, value_name = "S")]
    seed: Option<u64>,
    /// Print the result as JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Train(train::Args),
    Data(data::Args),
    Eval(eval::Args),
    Generate(generate::Args),
    Convert(convert::Args),
    Op(op::Args),
    Trace(trace::Args),
    Verify(verify::Args),
    Compare(compare::Args),
    Plot(plot::Args),
    Report(report::Args),
    BeaconReport(beacon_report::Args),
    Landscape(landscape::Args),
    Bench(bench::Args),
    Doctor(doctor::Args),
}

/// What a command gets besides its own flags.
#[derive(Debug, Clone)]
pub struct Context {
    /// The open device.
    pub device: Device,
    /// The value of `--seed`, if it was given.
    pub seed: Option<u64>,
    /// Whether stdout is to be JSON.
    pub json: bool,
}

impl Context {
    /// Writes `text` to stdout at once; returns whether somebody still reads there. A reader that
    /// has closed the pipe has seen enough, so that is no error.
    ///
    /// # Errors
    /// When stdout cannot be written for another reason.
    pub fn write(&self, text: impl fmt::Display) -> Result<bool> {
        let mut out = std::io::stdout().lock();
        match write!(out, "{text}").and_then(|()| out.flush()) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(e) => Err(anyhow::Error::new(e).context("cannot write to stdout")),
        }
    }

    /// Writes `text` and a line end to stdout.
    ///
    /// # Errors
    /// As [`Context::write`].
    pub fn print(&self, text: impl fmt::Display) -> Result<()> {
        self.write(format_args!("{text}\n")).map(|_| ())
    }
}

/// A mistake in how the program was called, found after the flags were parsed: exit code 2.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// An error that ends the program with exit code 2; `message` names the flag and its value.
pub fn usage(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Usage(message.into()))
}

/// Runs the program on the process's arguments.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) if matches!(e.kind(), ClapKind::DisplayHelp | ClapKind::DisplayVersion) => {
            // A closed pipe on `gd --help | head` is no failure.
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
        Err(e) => return fail(&usage(usage_line(&e))),
    };
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e),
    }
}

fn start(cli: Cli) -> Result<()> {
    let filter = match std::env::var("GD_LOG") {
        Ok(text) => EnvFilter::try_new(&text).map_err(|e| usage(format!("GD_LOG={text}: {e}")))?,
        Err(_) => EnvFilter::new("warn"),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
    let Common { device, seed, json } = cli.common;
    let ctx = Context { device: device.open()?, seed, json };
    match cli.command {
        Command::Train(args) => train::run(args, &ctx),
        Command::Data(args) => data::run(args, &ctx),
        Command::Eval(args) => eval::run(args, &ctx),
        Command::Generate(args) => generate::run(args, &ctx),
        Command::Convert(args) => convert::run(args, &ctx),
        Command::Op(args) => op::run(args, &ctx),
        Command::Trace(args) => trace::run(args, &ctx),
        Command::Verify(args) => verify::run(args, &ctx),
        Command::Compare(args) => compare::run(args, &ctx),
        Command::Plot(args) => plot::run(args, &ctx),
        Command::Report(args) => report::run(args, &ctx),
        Command::BeaconReport(args) => beacon_report::run(args, &ctx),
        Command::Landscape(args) => landscape::run(args, &ctx),
        Command::Bench(args) => bench::run(args, &ctx),
        Command::Doctor(args) => doctor::run(args, &ctx),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // Nothing is left to report to when stderr itself is gone.
    let _ = writeln!(std::io::stderr(), "error: {}", one_line(error));
    ExitCode::from(exit_code(error))
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if error.chain().any(|e| e.is::<Usage>()) { 2 } else { 1 }
}

/// The causes of an error, outermost first, on one line.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // candle appends a backtrace when the environment asks for one; it is no part of the cause.
        let text = text.split("\n   0: ").next().unwrap_or_default();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        // Transparent wrappers repeat their source word for word.
        if !line.ends_with(&text) {
            if !line.is_empty() {
                line.push_str(": ");
            }
            line.push_str(&text);
        }
    }
    line
}

/// What clap found wrong, without its usage block.
fn usage_line(error: &clap::Error) -> String {
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
    fn the_flags_are_consistent_and_every_command_has_an_example() {
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
    fn errors_fit_on_one_line_and_name_every_cause_once() {
        let e = anyhow::anyhow!("in\nner   cause\n   0: frame\n   1: frame").context("outer");
        assert_eq!(one_line(&e), "outer: in ner cause");
        let e = gd_kernels::Error::from(candle_core::Error::Msg("k is short".into()));
        assert_eq!(one_line(&anyhow::Error::new(e)), "k is short");
    }

    #[test]
    fn clap_errors_lose_their_usage_block() {
        let e = Cli::try_parse_from(["gd", "op", "scan", "--in", "x"]).unwrap_err();
        let line = one_line(&usage(usage_line(&e)));
        assert!(line.contains("--out") && !line.contains("Usage") && !line.contains('\n'), "{line}");
    }
}
