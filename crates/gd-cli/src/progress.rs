//! Progress on stderr.

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::Result;
use gd_model::train::{Step, Trainer};
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::terminal::note;

/// Time between two redraws while there is no new progress.
const REDRAW_INTERVAL: Duration = Duration::from_millis(500);
/// Steps between two lines of progress if stderr is not a terminal.
const STEPS_PER_LINE: u64 = 25;

/// Creates a progress display that counts bytes.
///
/// # Errors
/// An invalid template, which does not occur.
pub fn byte_progress(task: &'static str, bytes: u64) -> Result<ProgressBar> {
    let progress = ProgressBar::new(bytes).with_message(task);
    let template = "{msg} {bar:30} {bytes}/{total_bytes}  {binary_bytes_per_sec}  {elapsed_precise}";
    progress.set_style(ProgressStyle::with_template(template)?);
    progress.enable_steady_tick(REDRAW_INTERVAL);
    Ok(progress)
}

/// The progress of a training run. Only the leading process of a group displays it.
pub struct TrainingProgress {
    display: ProgressBar,
    /// Whether lines are printed because stderr is a file or a pipe, where no display is drawn.
    print_lines: bool,
    valid_loss: Option<f64>,
}

impl TrainingProgress {
    /// Starts the display at the trainer's current step.
    ///
    /// # Errors
    /// An invalid template, which does not occur.
    pub fn new(trainer: &Trainer) -> Result<Self> {
        let display = ProgressBar::new(trainer.steps()).with_position(trainer.step());
        let template = "{bar:30} {pos}/{len} steps  {msg}  {elapsed_precise} (left {eta})";
        display.set_style(ProgressStyle::with_template(template)?);
        display.enable_steady_tick(REDRAW_INTERVAL);
        let leads = trainer.group().leads();
        if !leads {
            display.set_draw_target(ProgressDrawTarget::hidden());
        }
        Ok(Self { display, print_lines: leads && !std::io::stderr().is_terminal(), valid_loss: None })
    }

    /// Shows the result of a step, and the text that was sampled after it.
    pub fn show(&mut self, step: &Step, sample: Option<&str>) {
        self.valid_loss = step.valid_loss.or(self.valid_loss);
        let valid = self.valid_loss.map_or(String::new(), |v| format!("  valid {v:.4}"));
        let loss =
            if step.is_empty { "no token to predict".into() } else { format!("loss {:.4}", step.loss) };
        let message = format!("{loss}{valid}  {:.0} tokens/s", step.tokens_per_second);
        if self.print_lines && (step.valid_loss.is_some() || step.step.is_multiple_of(STEPS_PER_LINE)) {
            let left = HumanDuration(Duration::from_secs_f64(step.seconds_left));
            note(format_args!("{}/{} steps  {message}  left {left:#}", step.step, step.total));
        }
        self.display.set_message(message);
        self.display.set_position(step.step);
        if let Some(sample) = sample {
            let text = format!("sample after {} steps: {sample}", step.step);
            self.display.suspend(|| note(&text));
        }
    }

    /// Ends the display.
    pub fn finish(&self) {
        self.display.finish();
    }
}
