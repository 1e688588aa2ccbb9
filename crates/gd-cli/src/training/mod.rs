//! Training runs, as `gd train`, `gd convert --uptrain` and `gd compare` start them.

mod model_card;
mod recipe;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use gd_model::config::Recipe;
use gd_model::data::{Corpus, counted};
use gd_model::eval::Evaluation;
use gd_model::infer::generate::sample;
use gd_model::io::checkpoint;
use gd_model::model::pretrained::{self, Parts};
use gd_model::train::log::Event;
use gd_model::train::parallel::Group;
use gd_model::train::run::{About, Run};
use gd_model::train::{Step, Trainer};
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

pub use self::recipe::{
    Chats, DEFAULT_CONFIG, LoadedCorpus, load_corpus, load_corpus_for, load_recipe, placeholder_corpus,
    vocabulary_line,
};

use crate::context::{Context, exit_code, one_line};
use crate::history::History;
use crate::progress::TrainingProgress;
use crate::render::report;
use crate::terminal::note;

/// Exit code after a second Ctrl-C: 128 + SIGINT.
const EXIT_INTERRUPTED: i32 = 130;
/// Time between two looks at whether a signal has come, to announce the stop.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The signals that stop a run.
#[cfg(unix)]
const STOP_SIGNALS: [i32; 3] = [signal_hook::consts::SIGHUP, SIGINT, SIGTERM];
#[cfg(not(unix))]
const STOP_SIGNALS: [i32; 2] = [SIGINT, SIGTERM];

/// Runs `work` in every process of a distributed job. If it fails in one process, all processes end.
///
/// # Errors
/// Reports the error of `work`, or that the processes cannot connect.
pub fn in_group(ctx: &Context, work: impl FnOnce(&Group) -> Result<()>) -> Result<()> {
    let group = Group::start(&ctx.device)?;
    match work(&group) {
        Err(e) if group.world() > 1 => group.abort(&one_line(&e), exit_code(&e)),
        result => result,
    }
}

/// Creates a trainer that is a member of `group`. It goes on from the model `source`, if there is one, or distills it if
/// the recipe says so.
///
/// # Errors
/// A recipe, corpus or model that do not fit together.
pub fn new_trainer(
    group: &Group,
    recipe: Recipe,
    source: Option<Parts>,
    corpus: Corpus,
    about: &About,
    ctx: &Context,
) -> Result<Trainer> {
    let mut trainer = match source {
        Some(teacher) if recipe.train.uptrain.is_some() => {
            Trainer::uptrain(recipe, corpus, about.seed, teacher, &ctx.device)?
        }
        Some(source) => Trainer::finetune(recipe, corpus, about.seed, source, &ctx.device)?,
        None => Trainer::new(recipe, corpus, about.seed, &ctx.device)?,
    };
    trainer.join(group.clone())?;
    Ok(trainer)
}

/// Trains all remaining steps and displays the progress. `watch` is called after every step.
///
/// # Errors
/// Reports the error of a step.
pub fn train_all(trainer: &mut Trainer, mut watch: impl FnMut(&Step)) -> Result<()> {
    let mut progress = TrainingProgress::new(trainer)?;
    let result = trainer.run(|step| {
        progress.show(step, None);
        watch(step);
        Ok(())
    });
    progress.finish();
    Ok(result?)
}

/// Trains a run to its end, or for at most `stop_after` steps, saves it and prints the result. A finished run is
/// loaded again from its folder for the sample that is printed. All processes of the run's group call this;
/// `skipped_files` lists damaged files that a resumed run could not use.
///
/// # Errors
/// Reports the error of a step, or names the file that cannot be written.
pub fn run_to_end(
    mut run: Run,
    skipped_files: Vec<String>,
    stop_after: Option<u64>,
    ctx: &Context,
) -> Result<()> {
    let leads = run.trainer.group().leads();
    if leads {
        let train = &run.trainer.recipe().train;
        let (trained, all) = (run.trainer.params.count(), run.trainer.parameter_count());
        let of = if trained == all { String::new() } else { format!(" of {all}") };
        note(format_args!(
            "{}: {trained}{of} parameters, {} steps of {} tokens in {}",
            run.about().name,
            train.steps,
            train.batch * train.context * train.accumulation,
            train.precision(run.trainer.device()).name()
        ));
    }
    let stop = stop_on_signal()?;
    let mut progress = TrainingProgress::new(&run.trainer)?;
    let finished = run.train(stop_after, &stop, |step, sample| {
        progress.show(step, sample.as_deref());
        Ok(())
    })?;
    progress.finish();
    match (leads, finished) {
        (false, _) => Ok(()),
        (true, false) => report_stopped(&mut run, &skipped_files, ctx),
        (true, true) => finish_run(&mut run, &skipped_files, ctx),
    }
}

/// Saves a checkpoint of a run that is not finished and prints how to resume it.
fn report_stopped(run: &mut Run, skipped_files: &[String], ctx: &Context) -> Result<()> {
    let checkpoint = run.save()?;
    let (step, steps) = (run.trainer.step(), run.trainer.steps());
    if ctx.json {
        return ctx.print(json!({
            "folder": run.folder(), "finished": false, "step": step, "steps": steps,
            "checkpoint": checkpoint, "passed_over": skipped_files,
        }));
    }
    ctx.print(format_args!(
        "stopped after step {step} of {steps}\nsaved {}\nresume with: gd train --resume {}",
        checkpoint.display(),
        run.folder().display()
    ))
}

/// Validates the model of a finished run, saves it with a sample and a report, and prints the result.
fn finish_run(run: &mut Run, skipped_files: &[String], ctx: &Context) -> Result<()> {
    let (step, out) = (run.trainer.step(), run.folder().to_path_buf());
    // Without a validation text there is nothing to measure.
    let (result, ema_result) = match run.trainer.has_validation() {
        true => (Some(run.trainer.validate()?), run.trainer.validate_ema()?),
        false => (None, None),
    };
    let (about, recipe) = (run.about().clone(), run.trainer.recipe().clone());
    let card = model_card::entries(&out, &about, &recipe, &run.trainer, result.as_ref());
    run.finish(&checkpoint::model_card(&card)?, result.as_ref())?;
    let loaded = pretrained::load(&out, &ctx.device)?;
    let mut not_written = Vec::new();
    let prompt = recipe.train.sample_prompt.clone();
    let text = sample(&loaded.model, &loaded.tokenizer, &prompt, about.seed, &ctx.device)?;
    let sample = format!("{prompt}{text}");
    if let Some(log) = run.log() {
        log.event(step, &Event::Sample { prompt, text });
        not_written.extend(log.failure().map(str::to_owned));
    }
    // The model is saved; a report that cannot be written is no reason to fail.
    let reported = History::load(&out).and_then(|run| report::save(&out.join(report::FILE), &[run]));
    not_written.extend(reported.err().map(|e| one_line(&e)));
    for error in &not_written {
        note(format_args!("warning: the log or the report of the run is not complete: {error}"));
    }
    if ctx.json {
        let mut json = json!({
            "folder": out, "finished": true, "parameters": run.trainer.params.count(),
            "steps": recipe.train.steps, "seed": about.seed, "skipped_updates": run.trainer.skipped_updates(),
            "loss": null, "ema": ema_result, "sample": sample, "passed_over": skipped_files,
            "not_written": not_written,
        });
        if let (Some(json), Value::Object(result)) = (json.as_object_mut(), serde_json::to_value(&result)?) {
            json.extend(result);
        }
        return ctx.print(json);
    }
    let skipped = match run.trainer.skipped_updates() {
        0 => String::new(),
        n => format!("skipped {} (train.jsonl has the reasons)\n", counted(n as usize, "update")),
    };
    ctx.print(format_args!(
        "{}\n{skipped}saved {}\n\nsample from the reloaded folder:\n{sample}",
        result_line(result.as_ref(), ema_result.as_ref()),
        out.display()
    ))
}

/// The validation result as text, with that of the averaged weights if there are some.
fn result_line(result: Option<&Evaluation>, ema_result: Option<&Evaluation>) -> String {
    let Some(result) = result else { return "no validation text".into() };
    let ema = ema_result.map(|e| {
        format!("\nwith averaged weights {:.4} nats/token, {:.4} bits/byte", e.loss, e.bits_per_byte)
    });
    format!(
        "validation loss {:.4} nats/token, {:.4} bits/byte, perplexity {:.2} over {} tokens{}",
        result.loss,
        result.bits_per_byte,
        result.perplexity,
        result.tokens,
        ema.unwrap_or_default()
    )
}

/// Returns a flag that Ctrl-C, SIGTERM or SIGHUP sets. A second signal ends the program immediately. A signal that is ignored
/// at the start of the program, as SIGHUP is by nohup, stays ignored.
fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let ignored = ignored_signals();
    for signal in STOP_SIGNALS.into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0) {
        // The order matters: only the second signal finds the flag set.
        flag::register_conditional_shutdown(signal, EXIT_INTERRUPTED, stop.clone())?;
        flag::register(signal, stop.clone())?;
    }
    let flag = stop.clone();
    std::thread::spawn(move || {
        while !flag.load(Ordering::Relaxed) {
            std::thread::sleep(POLL_INTERVAL);
        }
        note("stopping after this step; interrupt again to stop immediately");
    });
    Ok(stop)
}

/// The signals that the program ignores as a bit mask, bit 0 for signal 1. Only Linux tells; elsewhere none.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
