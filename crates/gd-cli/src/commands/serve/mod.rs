//! `gd serve`: a model behind the HTTP interface of OpenAI.
//!
//! The HTTP server runs on a thread of its own. It checks requests, turns them into tokens, and sends them as jobs to the
//! worker, which decodes them together on the thread of the command and sends back what is written.

mod access;
mod args;
mod connections;
mod error;
mod handlers;
mod job;
mod metrics;
mod page;
mod prompts;
mod reply;
mod request;
mod server;
mod worker;

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use gd_model::config::Mechanism;
use gd_model::infer::engine::{BatchEngine, EngineLimits};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use tokio::sync::{Semaphore, watch};

pub use args::Args;

use self::access::Access;
use self::metrics::Metrics;
use self::prompts::Prompts;
use self::server::{Limits, Server};
use self::worker::Worker;
use crate::context::{Context, usage};

/// Time between two looks at whether a signal has come.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(20);

/// Runs the command until a signal ends it.
///
/// # Errors
/// Names the flag, file or address that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    args.sampling.validate()?;
    let access = Access::new(&args)?;
    let listener = TcpListener::bind((args.host, args.port))
        .map_err(|e| usage(format!("--host {} --port {}: {e}", args.host, args.port)))?;
    let address = listener.local_addr()?;
    let loaded = args.cache.load(&args.model, ctx)?;
    let at = || args.model.display().to_string();
    let context = loaded.model.config().max_position_embeddings;
    let layers = loaded.model.config().num_hidden_layers;
    let engine_limits = EngineLimits {
        sequences: args.batch,
        tokens_per_step: args.step_tokens,
        stored_tokens: args.stored_tokens,
    };
    let engine = BatchEngine::new(&loaded.model, &ctx.device, engine_limits)?;
    let (jobs, received) = std::sync::mpsc::channel();
    let metrics = Arc::new(Metrics::default());
    let server = Server {
        model: model_name(&args),
        selects: (0..layers).any(|layer| *loaded.model.config().mechanism(layer) == Mechanism::Gd),
        prompts: Prompts::new(&loaded)?,
        sampling: args.sampling.sampling(&loaded.generation).with_context(at)?,
        seed: ctx.seed,
        limits: Limits {
            body_bytes: args.max_body_bytes,
            prompt_tokens: args.max_prompt_tokens.unwrap_or(context).min(context),
            new_tokens: args.max_tokens.unwrap_or(context).min(context),
            time: Duration::from_secs(args.timeout),
        },
        in_flight: Arc::new(Semaphore::new(args.max_requests)),
        access,
        metrics: metrics.clone(),
        jobs,
        draining: Default::default(),
    };
    let end_tokens = loaded.end_tokens().with_context(at)?;
    let worker = Worker::new(engine, &loaded.tokenizer, &end_tokens, received, metrics);
    let signals = count_signals()?;
    let connections = 2 * args.max_requests + connections::SPARE;
    let http = std::thread::Builder::new()
        .name("http".into())
        .spawn(move || connections::serve(listener, Arc::new(server), connections, signals))?;
    let url = format!("http://{address}");
    ctx.print(if ctx.json { json!({ "url": url }).to_string() } else { format!("listening on {url}") })?;
    worker.run();
    http.join().map_err(|_| anyhow!("the HTTP server ended with a panic"))?
}

/// The name of the model in the interface: that of its folder or file.
fn model_name(args: &Args) -> String {
    let path = std::fs::canonicalize(&args.model).unwrap_or_else(|_| args.model.clone());
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    args.name.clone().or(name).unwrap_or_else(|| "model".into())
}

/// The number of signals to end that have arrived.
fn count_signals() -> Result<watch::Receiver<u32>> {
    let (sender, receiver) = watch::channel(0);
    let arrived = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register(signal, arrived.clone())?;
    }
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(SIGNAL_INTERVAL);
            if arrived.swap(false, Ordering::Relaxed) {
                sender.send_modify(|count| *count += 1);
            }
        }
    });
    Ok(receiver)
}
