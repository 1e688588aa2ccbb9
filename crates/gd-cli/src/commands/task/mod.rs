//! `gd task`: trains small models on a task that needs attention, and tests them far outside the training sizes.

mod table;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use gd_model::analysis::variants::{Variant, equalize};
use gd_model::config::{Recipe, Setting};
use gd_model::io::files::{check_writable, write_file};
use gd_model::tasks::{self, Progress, TASKS, Task, TaskRun};
use serde::{Deserialize, Serialize};

use self::table::{chart, table};
use super::compare::parse_mechanisms;
use crate::context::{Context, usage};
use crate::render::plot;
use crate::render::table::{MARKDOWN, TERMINAL};
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
    /// Mechanisms, separated by commas (default: gd and its controls)
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
    format!(
        "Tasks:\n{tasks}\n\n\
         The mechanisms are those of `gd compare`; their models have equal numbers of parameters. Loss and accuracy are \
         those of the answers alone. `cut` is the accuracy without what the heads read. The folder receives a file for \
         each run, table.md, task.svg and task.json.\n\n\
         Examples:\n  gd task mqar-small --mechanisms softmax+beacon+null,gd --seeds 3\n  \
         gd task max-retrieval --mechanisms softmax,gd --set model.gd.select.temperature=0.5"
    )
}

/// A run with what determines it.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    recipe: Recipe,
    #[serde(flatten)]
    run: TaskRun,
}

/// Runs the command.
///
/// # Errors
/// Names the flag or value that is not valid.
pub fn run(args: Args, ctx: &Context) -> Result<()> {
    let task = tasks::named(&args.task).map_err(|e| usage(e.to_string()))?;
    let base = recipe(task, &args)?;
    let default = match base.model.gd.beacon.is_some() {
        true => ["softmax+beacon+null", "gd", "beacon"],
        false => ["softmax", "softmax+null", "gd"],
    };
    let variants = match args.mechanisms.is_empty() {
        true => parse_mechanisms(&default.map(String::from))?,
        false => parse_mechanisms(&args.mechanisms)?,
    };
    let mut models = variants.iter().map(|v| v.config(&base.model)).collect::<gd_model::Result<Vec<_>>>()?;
    equalize(&mut models)?;
    let out = args.out.clone().unwrap_or_else(|| Path::new("out/task").join(task.name()));
    check_writable(&out)?;
    let mut runs = Vec::new();
    for seed in (0..args.seeds).map(|i| ctx.seed().wrapping_add(i)) {
        for (variant, model) in variants.iter().zip(&models) {
            let recipe = Recipe { model: model.clone(), ..base.clone() };
            runs.push(saved_or_new(task, (variant, recipe), seed, (&out, args.longest), ctx)?);
        }
    }
    write_file(&out.join("task.json"), serde_json::to_string_pretty(&runs)?.as_bytes())?;
    write_file(&out.join("table.md"), format!("{}\n", table(&runs, MARKDOWN)).as_bytes())?;
    plot::save(&out.join("task.svg"), &chart(task, &runs))?;
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

/// The run of this recipe and seed in the folder, or a new one, which is saved there.
fn saved_or_new(
    task: &dyn Task,
    (variant, recipe): (&Variant, Recipe),
    seed: u64,
    (out, longest): (&Path, usize),
    ctx: &Context,
) -> Result<TaskRun> {
    let path = out.join(format!("{}-seed{seed}.json", variant.name));
    let tests = task.tests().iter().filter(|test| test.length <= longest).count();
    if path.exists() {
        let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
        match serde_json::from_slice::<Saved>(&text) {
            Ok(saved) if saved.recipe == recipe && saved.run.tests.len() == tests => return Ok(saved.run),
            _ => note(format_args!("{}: a run of another configuration; it is repeated", path.display())),
        }
    }
    note(format_args!("{} on {}, seed {seed}", variant.name, task.name()));
    let steps = recipe.train.steps;
    let run = tasks::run(task, (variant.name, &recipe), seed, longest, &ctx.device, |progress| {
        match progress {
            Progress::Step(step, loss) if step.is_multiple_of(STEPS_PER_LINE) || step == steps => {
                note(format_args!("step {step}/{steps}  loss {loss:.4}"));
            }
            Progress::Step(..) => {}
            Progress::Test(test) => note(format_args!("{}: {:.2} %", test.name, 100.0 * test.accuracy)),
        }
        Ok(())
    })?;
    let saved = Saved { recipe, run };
    write_file(&path, serde_json::to_string_pretty(&saved)?.as_bytes())?;
    Ok(saved.run)
}
