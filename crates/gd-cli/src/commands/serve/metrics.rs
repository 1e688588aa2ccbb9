//! Counts and times in the format of Prometheus.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use gd_model::infer::engine::{BatchEngine, EngineCounts};
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// The format of [`Metrics::text`].
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The labels of a finished request.
type Labels = [(&'static str, String); 2];

/// What the server has done and does.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<Labels, Counter>,
    running: Gauge,
    waiting: Gauge,
    prompt_tokens: Counter,
    reused_tokens: Counter,
    generated_tokens: Counter,
    steps: Counter,
    /// Seconds of one step of the engine.
    step_seconds: Histogram,
    /// Seconds from the start of a request to its first token.
    first_token_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let times = |first: f64| Histogram::new(exponential_buckets(first, 2.0, 14));
        let mut metrics = Self {
            registry: Registry::with_prefix("gd"),
            requests: Family::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            prompt_tokens: Counter::default(),
            reused_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            steps: Counter::default(),
            step_seconds: times(0.001),
            first_token_seconds: times(0.01),
        };
        let registry = &mut metrics.registry;
        registry.register("requests", "Answered requests", metrics.requests.clone());
        registry.register("sequences_running", "Sequences in the batch", metrics.running.clone());
        registry.register("sequences_waiting", "Sequences with unread prompts", metrics.waiting.clone());
        registry.register("prompt_tokens", "Tokens of prompts that were read", metrics.prompt_tokens.clone());
        let reused = "Tokens of prompts whose keys and values were stored";
        registry.register("reused_tokens", reused, metrics.reused_tokens.clone());
        registry.register("generated_tokens", "New tokens", metrics.generated_tokens.clone());
        registry.register("steps", "Steps of the engine", metrics.steps.clone());
        registry.register("step_seconds", "Time of a step", metrics.step_seconds.clone());
        let first = "Time from a request to its first token";
        registry.register("first_token_seconds", first, metrics.first_token_seconds.clone());
        metrics
    }
}

impl Metrics {
    /// Counts an answered request.
    pub(super) fn answered(&self, endpoint: &'static str, status: u16) {
        let labels = [("endpoint", endpoint.to_owned()), ("status", status.to_string())];
        self.requests.get_or_create(&labels).inc();
    }

    /// Records the time to the first token of a request.
    pub(super) fn first_token(&self, time: Duration) {
        self.first_token_seconds.observe(time.as_secs_f64());
    }

    /// Records a step of the engine.
    pub(super) fn step(&self, engine: &BatchEngine, time: Duration) {
        self.step_seconds.observe(time.as_secs_f64());
        self.engine(engine);
    }

    /// Records the state of the engine.
    pub(super) fn engine(&self, engine: &BatchEngine) {
        self.running.set(engine.running() as i64);
        self.waiting.set(engine.waiting() as i64);
        let EngineCounts { prompt_tokens, reused_tokens, generated_tokens, steps } = engine.counts();
        // Only the worker writes, so that the counters do not change in between.
        let raise = |counter: &Counter<u64, AtomicU64>, to: u64| {
            counter.inc_by(to.saturating_sub(counter.get()));
        };
        raise(&self.prompt_tokens, prompt_tokens);
        raise(&self.reused_tokens, reused_tokens);
        raise(&self.generated_tokens, generated_tokens);
        raise(&self.steps, steps);
    }

    /// All metrics as text.
    pub(super) fn text(self: &Arc<Self>) -> String {
        let mut text = String::new();
        match text::encode(&mut text, &self.registry) {
            Ok(()) => text,
            // Writing to a string does not fail.
            Err(_) => String::new(),
        }
    }
}
