//! `gd chat`: a chat with a model in a terminal.

mod command;
mod session;
mod sources;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use gd_model::data::counted;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use self::command::{Command, HELP};
use self::session::{Session, Settings};
use crate::context::{Context, one_line, usage};
use crate::generation::{CacheArgs, SamplingArgs};

/// Exit code after a signal that does not stop an answer.
const EXIT_INTERRUPTED: i32 = 130;
/// What precedes the user's messages on a terminal.
const PROMPT: &str = "> ";

/// Chat with a model in the terminal
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Each line is a message. Ctrl-C stops an answer, Ctrl-D or /quit ends the program, /help lists the \
                  commands. The keys and values of the chat are stored, so that a turn reads only what is new. Sampling \
                  flags that are not given have the values of the model's generation_config.json. Lines from a pipe are \
                  messages, too; with --json there is one line per answer.\n\n\
                  Example:\n  gd chat out/tiny --system \"Be brief.\""
)]
pub struct Args {
    /// Model: a checkpoint folder, a safetensors file in one, or a GGUF file
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// System message
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Variables of the chat template as a JSON object, such as {"enable_thinking": false}
    #[arg(long, value_name = "JSON")]
    pub chat_template_kwargs: Option<String>,
    /// Maximum number of tokens of an answer (default: up to the model's context)
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Sampling
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Cache
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Stop an answer before this text or special token. Can be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// File that keeps the lines that were typed, for the arrow keys
    #[arg(long, value_name = "FILE")]
    pub history: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Names the flag, file or value that is not valid. Errors of single turns are shown and do not end the chat.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    args.sampling.validate()?;
    if args.stop.iter().any(String::is_empty) {
        return Err(usage("--stop is empty"));
    }
    let loaded = args.cache.load(&args.model, ctx)?;
    let at = || args.model.display().to_string();
    let Some(mut template) = loaded.chat()? else {
        return Err(usage(format!("{} has no chat template", at())));
    };
    if let Some(variables) = &args.chat_template_kwargs {
        template =
            template.with_variables(variables).map_err(|e| usage(format!("--chat-template-kwargs: {e}")))?;
    }
    let settings = Settings {
        sampling: args.sampling.sampling(&loaded.generation).with_context(at)?,
        max_tokens: args.max_tokens.unwrap_or(loaded.model.config().max_position_embeddings),
        seed: ctx.seed(),
    };
    let end_tokens = loaded.end_tokens().with_context(at)?;
    let mut session = Session::new(&loaded, template, &end_tokens, settings, ctx)?;
    session.stop_at(args.stop)?;
    session.system = args.system;
    let signals = Signals::register()?;
    let mut editor = editor(args.history.as_deref())?;
    loop {
        match editor.readline(PROMPT) {
            Ok(line) => {
                // A history that is full or cannot be extended does not matter.
                _ = editor.add_history_entry(&line);
                if !turn(&line, &mut session, &signals, ctx)? {
                    break;
                }
            }
            Err(ReadlineError::Interrupted) => eprintln!("Ctrl-D or /quit ends the chat"),
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error.into()),
        }
    }
    if let Some(path) = &args.history {
        editor.save_history(path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The line editor, with the history of a file if there is one.
fn editor(history: Option<&std::path::Path>) -> Result<Editor<(), FileHistory>> {
    let config = Config::builder().auto_add_history(false).build();
    let mut editor = Editor::with_config(config)?;
    if let Some(path) = history.filter(|path| path.exists()) {
        editor.load_history(path).with_context(|| path.display().to_string())?;
    }
    Ok(editor)
}

/// Answers a line or follows its command. Returns whether the chat goes on.
fn turn(line: &str, session: &mut Session, signals: &Signals, ctx: &Context) -> Result<bool> {
    if line.trim().is_empty() {
        return Ok(true);
    }
    let result = match Command::parse(line) {
        None => answer(line, session, signals, ctx),
        Some(Ok(Command::Quit)) => return Ok(false),
        Some(Ok(Command::Help)) => ctx.print(HELP),
        Some(Ok(command)) => follow(command, session, ctx),
        Some(Err(error)) => Err(error),
    };
    if let Err(error) = result {
        // A chat goes on after a mistake; a script sees it.
        let message = one_line(&error);
        match ctx.json {
            true => ctx.print(json!({ "error": message }))?,
            false => tracing::error!("{message}"),
        }
        if !std::io::stdin().is_terminal() && !ctx.json {
            return Err(error);
        }
    }
    Ok(true)
}

fn answer(text: &str, session: &mut Session, signals: &Signals, ctx: &Context) -> Result<()> {
    signals.stop.store(false, Ordering::Relaxed);
    signals.idle.store(false, Ordering::Relaxed);
    let answer = session.answer(text, &signals.stop, (!ctx.json).then_some(ctx));
    signals.idle.store(true, Ordering::Relaxed);
    let answer = answer?;
    match ctx.json {
        true => ctx.print(serde_json::to_value(&answer)?),
        false => ctx.print(""),
    }
}

/// Follows a command that concerns the chat. With `--json`, what it shows is an object with its name.
fn follow(command: Command, session: &mut Session, ctx: &Context) -> Result<()> {
    let show = |name: &str, text: &str| match ctx.json {
        true => ctx.print(json!({ name: text })),
        false => ctx.write(format!("{text}\n")).map(|_| ()),
    };
    match command {
        Command::System(None) => {
            return show("system", session.system.as_deref().unwrap_or("no system message"));
        }
        Command::System(text) => session.system = text,
        Command::Reset => session.reset(),
        Command::Save(path) => session.save(&path)?,
        Command::Load(path) => {
            let count = session.load(&path)?;
            return show("loaded", &counted(count, "message"));
        }
        Command::Set(None) => return show("settings", &session.settings.to_string()),
        Command::Set(Some((name, value))) => session.settings.set(&name, &value)?,
        Command::Trace => return show("sources", &session.sources()?),
        Command::Help | Command::Quit => {}
    }
    Ok(())
}

/// Flags that follow the signals: whether an answer is to stop, and whether none is written, so that a signal ends the
/// program.
struct Signals {
    stop: Arc<AtomicBool>,
    idle: Arc<AtomicBool>,
}

impl Signals {
    fn register() -> Result<Self> {
        let signals = Self { stop: Arc::default(), idle: Arc::new(AtomicBool::new(true)) };
        for signal in [SIGINT, SIGTERM] {
            flag::register_conditional_shutdown(signal, EXIT_INTERRUPTED, signals.idle.clone())?;
            flag::register(signal, signals.stop.clone())?;
        }
        Ok(signals)
    }
}
