//! Decodes the jobs of the HTTP server together.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use gd_model::Error;
use gd_model::infer::engine::{BatchEngine, Event, Request};
use gd_model::infer::sampler::Sampler;
use gd_model::infer::text::TextStream;
use gd_model::io::tokenizer::Tokenizer;

use super::error::ApiError;
use super::job::{Job, NewToken, Update};
use super::metrics::Metrics;
use crate::context::one_line;

/// A choice of a job.
struct Active<'a> {
    job: Rc<Job>,
    choice: usize,
    text: TextStream<'a>,
    has_token: bool,
}

impl Active<'_> {
    /// Takes what the engine reports, and sends it to the client. Returns whether the sequence goes on.
    fn take(&mut self, event: Event, metrics: &Metrics) -> bool {
        let result = match event {
            Event::Prompt(prompt) => {
                let (choice, logprobs) = (self.choice, prompt.logprobs);
                let sent = self.send(Update::Prompt { choice, logprobs });
                if prompt.last { self.end().map(|()| false) } else { Ok(sent) }
            }
            Event::Token(token) => {
                if !std::mem::replace(&mut self.has_token, true) {
                    metrics.first_token(self.job.start.elapsed());
                }
                let last = token.last;
                self.push(token).and_then(|goes_on| match goes_on && !last {
                    true => Ok(!self.job.updates.is_closed()),
                    false => self.end().map(|()| false),
                })
            }
            Event::Failed(error) => Err(error),
        };
        result.unwrap_or_else(|error| {
            self.send(Update::Failed(internal(error)));
            false
        })
    }

    fn push(&mut self, token: gd_model::infer::engine::Generated) -> gd_model::Result<bool> {
        let (text, goes_on) = self.text.push(token.token)?;
        let (choice, id) = (self.choice, token.token);
        let (logprobs, sources) = (token.logprobs, token.sources);
        self.send(Update::Token(Box::new(NewToken { choice, id, text, logprobs, sources })));
        Ok(goes_on)
    }

    fn end(&mut self) -> gd_model::Result<()> {
        let (text, reason) = self.text.finish()?;
        self.send(Update::End { choice: self.choice, text, reason });
        Ok(())
    }

    /// Returns false if the client is gone.
    fn send(&self, update: Update) -> bool {
        self.job.updates.send(update).is_ok()
    }
}

fn internal(error: Error) -> ApiError {
    ApiError::internal(one_line(&error.into()))
}

/// Runs the engine on the jobs that arrive.
pub(super) struct Worker<'a> {
    engine: BatchEngine<'a>,
    tokenizer: &'a Tokenizer,
    end_tokens: &'a [u32],
    jobs: Receiver<Job>,
    active: BTreeMap<u64, Active<'a>>,
    metrics: Arc<Metrics>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        engine: BatchEngine<'a>,
        tokenizer: &'a Tokenizer,
        end_tokens: &'a [u32],
        jobs: Receiver<Job>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { engine, tokenizer, end_tokens, jobs, active: BTreeMap::new(), metrics }
    }

    /// Works until the server is gone.
    pub(super) fn run(mut self) {
        loop {
            if self.engine.is_idle() {
                match self.jobs.recv() {
                    Ok(job) => self.admit(job),
                    Err(_) => return,
                }
            }
            while let Ok(job) = self.jobs.try_recv() {
                self.admit(job);
            }
            self.end_overdue();
            self.step();
        }
    }

    /// Gives the choices of a job to the engine.
    fn admit(&mut self, job: Job) {
        let job = Rc::new(job);
        for (choice, (prompt, seed)) in job.choices.iter().enumerate() {
            if let Err(error) = self.submit(&job, choice, prompt, *seed) {
                // The other choices find the channel closed by the client, who gets one error.
                _ = job.updates.send(Update::Failed(internal(error)));
                return;
            }
        }
    }

    fn submit(&mut self, job: &Rc<Job>, choice: usize, prompt: &[u32], seed: u64) -> gd_model::Result<()> {
        let decoder = self.tokenizer.stream_after(prompt)?;
        let text = TextStream::new(decoder, job.stop.clone(), self.end_tokens);
        let sampler = Sampler::new(job.sampling, seed)?;
        let request = Request {
            logprobs: job.logprobs,
            prompt_logprobs: job.prompt_logprobs,
            sources: job.sources,
            ..Request::new(prompt.to_vec(), job.max_tokens, sampler)
        };
        let id = self.engine.submit(request)?;
        self.active.insert(id, Active { job: job.clone(), choice, text, has_token: false });
        Ok(())
    }

    /// Ends the sequences whose clients are gone or whose time is over.
    fn end_overdue(&mut self) {
        let now = Instant::now();
        let mut ended = Vec::new();
        self.active.retain(|id, active| {
            let overdue = now >= active.job.deadline;
            if overdue {
                let limit = active.job.deadline - active.job.start;
                active.send(Update::Failed(ApiError::timeout(limit.as_secs())));
            }
            let stays = !overdue && !active.job.updates.is_closed();
            if !stays {
                ended.push(*id);
            }
            stays
        });
        if ended.is_empty() {
            return;
        }
        if let Err(error) = self.engine.cancel(&ended) {
            self.fail_all(error);
        }
        self.metrics.engine(&self.engine);
    }

    fn step(&mut self) {
        let (start, mut ended) = (Instant::now(), Vec::new());
        let (active, metrics) = (&mut self.active, &self.metrics);
        let result = self.engine.step(|id, event| {
            let goes_on = active.get_mut(&id).is_some_and(|active| active.take(event, metrics));
            if !goes_on {
                ended.push(id);
            }
            goes_on
        });
        for id in ended {
            self.active.remove(&id);
        }
        if let Err(error) = result {
            self.fail_all(error);
        }
        self.metrics.step(&self.engine, start.elapsed());
    }

    /// Reports an error of the device to all clients. The engine has no sequences then.
    fn fail_all(&mut self, error: Error) {
        let error = internal(error);
        for active in std::mem::take(&mut self.active).into_values() {
            active.send(Update::Failed(error.clone()));
        }
    }
}
