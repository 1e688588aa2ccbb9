//! `gd bench step`: the time of the parts of a training step.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use gd_model::config::Setting;
use gd_model::train::Trainer;
use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Subscriber, subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context as LayerContext, Layer, SubscriberExt};
use tracing_subscriber::registry::{LookupSpan, Registry};

use super::shape::median;
use crate::context::Context;
use crate::render::table::{TERMINAL, plain_table};
use crate::training::{DEFAULT_CONFIG, load_recipe, placeholder_corpus};

/// The target of the spans that operators enter.
const OPERATORS: &str = "gd_kernels::operator";
/// Steps before the measured ones.
const WARM_UP_STEPS: u64 = 2;

/// The flags of `gd bench step`.
#[derive(Debug, clap::Args)]
pub struct StepArgs {
    /// Preset of models/, or a TOML or JSON configuration file. Can be repeated
    #[arg(long, value_name = "PRESET|FILE", default_value = DEFAULT_CONFIG)]
    pub config: Vec<String>,
    /// Override a value of the configuration by its dotted path. Can be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
    /// Number of measured steps, over which the medians are taken
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
}

/// The output of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    parameters: usize,
    tokens: usize,
    precision: &'static str,
    threads: usize,
    /// The median time of a step in ms.
    step_ms: f64,
    tokens_per_second: f64,
    parts: Vec<Part>,
}

/// The median times of an operator in a step.
#[derive(Debug, Serialize)]
struct Part {
    name: String,
    forward_ms: f64,
    backward_ms: f64,
    /// The share of both in the time of a step.
    share: f64,
}

/// Trains a few steps on tokens without meaning and prints the time of every operator.
pub(super) fn run(args: &StepArgs, ctx: &Context) -> Result<()> {
    let mut recipe = load_recipe(&args.config, &args.set, None)?;
    let train = &mut recipe.train;
    // No evaluation is due: no measured step is the last one, or a multiple of `eval_every`.
    (train.steps, train.eval_every) = (train.steps.max(WARM_UP_STEPS + args.steps + 1), u64::MAX);
    let tokens = train.batch * train.context * train.accumulation;
    let precision = train.precision(&ctx.device).name();
    let corpus = placeholder_corpus(recipe.model.vocab_size, 4 * (train.context + 1));
    let mut trainer = Trainer::new(recipe, corpus, ctx.seed(), &ctx.device)?;
    let times = Times::default();
    let (mut seconds, mut steps) = (Vec::new(), Vec::new());
    let layer = times.clone().with_filter(Targets::new().with_target(OPERATORS, tracing::Level::TRACE));
    subscriber::with_default(Registry::default().with(layer), || {
        for step in 0..WARM_UP_STEPS + args.steps {
            let started = Instant::now();
            trainer.train_step()?;
            let (elapsed, operators) = (started.elapsed(), times.take());
            if step >= WARM_UP_STEPS {
                seconds.push(elapsed.as_secs_f64());
                steps.push(operators);
            }
        }
        anyhow::Ok(())
    })?;
    let report = Report {
        parameters: trainer.params.count(),
        tokens,
        precision,
        threads: rayon::current_num_threads(),
        step_ms: 1e3 * median(&seconds),
        tokens_per_second: tokens as f64 / median(&seconds),
        parts: parts(&seconds, &steps),
    };
    match ctx.json {
        true => ctx.print(serde_json::to_string(&report)?),
        false => ctx.print(report),
    }
}

/// The operators, those that take the most time first, and what remains of a step.
fn parts(seconds: &[f64], steps: &[BTreeMap<Operator, Duration>]) -> Vec<Part> {
    let step_ms = 1e3 * median(seconds);
    let part = |name: &str, [forward_ms, backward_ms]: [f64; 2]| {
        let share = (forward_ms + backward_ms) / step_ms;
        Part { name: name.to_owned(), forward_ms, backward_ms, share }
    };
    let names: BTreeSet<&str> = steps.iter().flatten().map(|(operator, _)| operator.name.as_str()).collect();
    let time = |name: &str, backward: bool| {
        let operator = Operator { name: name.to_owned(), backward };
        let of =
            |step: &BTreeMap<Operator, Duration>| step.get(&operator).map_or(0.0, |d| 1e3 * d.as_secs_f64());
        median(&steps.iter().map(of).collect::<Vec<_>>())
    };
    let mut parts: Vec<Part> =
        names.iter().map(|name| part(name, [false, true].map(|backward| time(name, backward)))).collect();
    parts.sort_by(|a, b| b.share.total_cmp(&a.share));
    let rest = step_ms - parts.iter().map(|p| p.forward_ms + p.backward_ms).sum::<f64>();
    parts.push(part("everything else", [rest, 0.0]));
    parts
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { parameters, tokens, precision, threads, step_ms, tokens_per_second, parts } = self;
        writeln!(
            f,
            "{parameters} parameters, {tokens} tokens in {precision} on {threads} threads: {step_ms:.1} ms a step, \
             {tokens_per_second:.0} tokens/s"
        )?;
        let mut table = plain_table(TERMINAL, &["operator", "forward ms", "backward ms", "share"]);
        for Part { name, forward_ms, backward_ms, share } in parts {
            let cells = [forward_ms, backward_ms].map(|ms| format!("{ms:.2}"));
            table.add_row([
                name.clone(),
                cells[0].clone(),
                cells[1].clone(),
                format!("{:.1} %", 100.0 * share),
            ]);
        }
        write!(f, "{table}")
    }
}

/// A pass of an operator.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Operator {
    name: String,
    backward: bool,
}

impl Visit for Operator {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "op" {
            value.clone_into(&mut self.name);
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.backward = field.name() == "backward" && value;
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}

/// The time in each operator, without that of operators that it calls.
#[derive(Debug, Clone, Default)]
struct Times(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    total: BTreeMap<Operator, Duration>,
    /// When the operators that run now were entered, and the time of those that they called.
    running: Vec<(Instant, Duration)>,
}

impl Times {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The times since the last call.
    fn take(&self) -> BTreeMap<Operator, Duration> {
        std::mem::take(&mut self.lock().total)
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Times {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, ctx: LayerContext<'_, S>) {
        let mut operator = Operator::default();
        attributes.record(&mut operator);
        if let Some(span) = ctx.span(id) {
            span.extensions_mut().insert(operator);
        }
    }

    fn on_enter(&self, _: &Id, _: LayerContext<'_, S>) {
        self.lock().running.push((Instant::now(), Duration::ZERO));
    }

    fn on_exit(&self, id: &Id, ctx: LayerContext<'_, S>) {
        let mut state = self.lock();
        let Some((entered, called)) = state.running.pop() else { return };
        let elapsed = entered.elapsed();
        if let Some((_, called)) = state.running.last_mut() {
            *called += elapsed;
        }
        let operator = ctx.span(id).and_then(|span| span.extensions().get::<Operator>().cloned());
        *state.total.entry(operator.unwrap_or_default()).or_default() += elapsed.saturating_sub(called);
    }
}
