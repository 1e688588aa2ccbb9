//! `gd task`: trains small models on a task that needs attention, and tests them far outside the training sizes.

mod table;

use std::path::{Path, PathBuf};

use anyhow::Result;
use gd_model::analysis::variants::equalize;
use gd_model::config::{Recipe, Setting};
use gd_model::io::files::{check_writable, write_file};
use gd_model::tasks::{self, Contender, ENCODER_DECODERS, Progress, TASKS, Task, TaskRun};
use serde::{Deserialize, Serialize};

use self::table::{chart, table};
use super::compare::parse_mechanisms;
use crate::context::{Context, usage};
use crate::render::plot;
use crate::render::table::{MARKDOWN, TERMINAL};
use crate::saved_runs::saved_or_new;
use crate::terminal::note;

/// Steps between two lines of progress.
const STEPS_PER_LINE: u64 = 100;

/// Train mechanisms on a task that needs attention, and test them far outside the training sizes
#[derive(Debug, clap::Args)]
#[command(after_help = help())]
pub struct Args {
    /// The task
    #[arg(value_name = "TASK")]
    pub task: String,
    /// Mechanisms, separated by commas (default: gd and its controls, or those of the task)
    #[arg(long, value_name = "A,B,..", value_delimiter = ',')]
    pub mechanisms: Vec<String>,
    /// Runs per mechanism, with seeds 0 to N-1, or starting with --seed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub seeds: u64,
    /// Override a value of the task's configuration by its dotted path. Can be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
    /// Optimizer steps of each run (default: from the task)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Longest test in positions: the memory of a softmax layer grows with its square
    #[arg(long, value_name = "N", default_value_t = 16384)]
    pub longest: usize,
    /// Folder for runs, table and figure. Runs that it already has are not repeated (default: out/task/TASK)
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

fn help() -> String {
    let line = |task: &&dyn Task| format!("  {:<15} {}", task.name(), task.about());
    let tasks = TASKS.iter().map(line).collect::<Vec<_>>().join("\n");
    let strings = TASKS.iter().filter(|task| task.writes_a_string()).map(|task| task.name());
    let strings = strings.collect::<Vec<_>>().join(", ");
    format!(
        "Tasks:\n{tasks}\n\n\
         The mechanisms are those of `gd compare`; their models have equal numbers of parameters. Where a string is \
         written from another one ({strings}), luong, bahdanau, pointer and monotonic are the attention of a small \
         encoder-decoder instead. Loss and accuracy are \
         those of the answers alone. `cut` is the accuracy without what the heads read. The folder receives a file for \
         each run, table.md, task.svg, task.html and task.json.\n\n\
         Examples:\n  gd task mqar-small --mechanisms softmax+beacon+null,gd --seeds 3\n  \
         gd task max-retrieval --mechanisms softmax,gd --set model.gd.select.temperature=0.5"
    )
}

/// What determines a run besides the task, the mechanism and the seed, which its file is named after.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Key {
    recipe: Recipe,
}

/// Runs the command.
///
/// # Errors
/// Names the flag or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let task = tasks::named(&args.task).map_err(|e| usage(e.to_string()))?;
    let base = recipe(task, &args)?;
    let controls: &[&str] = match base.model.gd.beacon.is_some() {
        true => &["softmax+beacon+null", "gd", "beacon"],
        false => &["softmax", "softmax+null", "gd"],
    };
    let names = match args.mechanisms.is_empty() {
        true => task.mechanisms().unwrap_or(controls).iter().map(|&name| name.to_owned()).collect(),
        false => args.mechanisms.clone(),
    };
    let contenders = contenders(&names, &base)?;
    let out = args.out.clone().unwrap_or_else(|| Path::new("out/task").join(task.name()));
    check_writable(&out)?;
    let mut runs = Vec::new();
    for seed in (0..args.seeds).map(|i| ctx.seed().wrapping_add(i)) {
        for (name, recipe) in &contenders {
            let path = out.join(format!("{name}-seed{seed}.json"));
            let tests = task.tests().iter().filter(|test| test.length <= args.longest).count();
            let is_complete = |run: &TaskRun| run.tests.len() == tests;
            let new = || train(task, Contender { name, recipe }, seed, args.longest, ctx);
            runs.push(saved_or_new(&path, Key { recipe: recipe.clone() }, is_complete, new)?);
        }
    }
    write_file(&out.join("task.json"), serde_json::to_string_pretty(&runs)?.as_bytes())?;
    write_file(&out.join("table.md"), format!("{}\n", table(&runs, MARKDOWN)).as_bytes())?;
    let chart = chart(task, &runs);
    ["task.svg", "task.html"].iter().try_for_each(|file| plot::save(&out.join(file), &chart))?;
    if ctx.json {
        return ctx.print(serde_json::to_string(&runs)?);
    }
    ctx.print(format_args!("{}\nwrote {}", table(&runs, TERMINAL), out.display()))
}

/// The recipe of a task with the values of the flags.
fn recipe(task: &dyn Task, args: &Args) -> Result<Recipe> {
    let mut preset = task.preset();
    preset.steps = args.steps.unwrap_or(preset.steps);
    Ok(preset.recipe(&args.set)?)
}

/// The names and recipes of the models: decoders with equal numbers of parameters, then encoder-decoders.
fn contenders(names: &[String], base: &Recipe) -> Result<Vec<(String, Recipe)>> {
    let is_encoder = |name: &&String| ENCODER_DECODERS.contains(&name.as_str());
    let (encoders, decoders): (Vec<&String>, Vec<&String>) = names.iter().partition(is_encoder);
    let decoders: Vec<String> = decoders.into_iter().cloned().collect();
    let variants = parse_mechanisms(&decoders, base)?;
    let mut models = variants.iter().map(|v| v.config(&base.model)).collect::<gd_model::Result<Vec<_>>>()?;
    equalize(&mut models)?;
    let recipe = |model| Recipe { model, ..base.clone() };
    let decoders = variants.iter().zip(models).map(|(v, model)| (v.name.to_owned(), recipe(model)));
    Ok(decoders.chain(encoders.into_iter().map(|name| (name.clone(), base.clone()))).collect())
}

/// Trains and tests a model, and reports its progress.
fn train(task: &dyn Task, contender: Contender, seed: u64, longest: usize, ctx: &Context) -> Result<TaskRun> {
    note(format_args!("{} on {}, seed {seed}", contender.name, task.name()));
    let steps = contender.recipe.train.steps;
    let run = tasks::run(task, contender, seed, longest, &ctx.device, |progress| {
        match progress {
            Progress::Step(step, loss) if step.is_multiple_of(STEPS_PER_LINE) || step == steps => {
                note(format_args!("step {step}/{steps}  loss {loss:.4}"));
            }
            Progress::Step(..) => {}
            Progress::Test(test) => note(format_args!("{}: {:.2} %", test.name, 100.0 * test.accuracy)),
        }
        Ok(())
    })?;
    Ok(run)
}
