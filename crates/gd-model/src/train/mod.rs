//! Training: the trainer, its optimizers and schedules, runs in a folder and their log.
//!
//! [`Trainer`] trains a model in memory. [`run::Run`] trains in a folder, with a log and checkpoints from which it can be
//! resumed. The example trains a small model on a short text:
//!
//! ```
//! use candle_core::Device;
//! use gd_model::config::{Recipe, Setting};
//! use gd_model::data::{Corpus, Texts};
//! use gd_model::io::tokenizer::Tokenizer;
//! use gd_model::train::Trainer;
//!
//! # fn main() -> gd_model::Result<()> {
//! let text = "A text to learn from, line by line.\n".repeat(40);
//! let tokenizer = Tokenizer::bytes()?;
//! let corpus = Corpus::encode(&Texts::split(&[text], 0.1)?, &tokenizer)?;
//!
//! let settings = ["model.hidden_size=16", "model.intermediate_size=32", "model.num_hidden_layers=1",
//!     "model.num_attention_heads=2", "model.num_key_value_heads=1", "model.head_dim=8",
//!     "train.steps=3", "train.lr.warmup=1", "train.batch=2", "train.context=16"]
//!     .map(|text| text.parse::<Setting>().expect("a valid setting"));
//! let mut recipe = Recipe::load_with("tiny", &settings)?;
//! recipe.model.vocab_size = tokenizer.vocab_size();
//!
//! let mut trainer = Trainer::new(recipe, corpus, 0, &Device::Cpu)?;
//! trainer.run(|step| {
//!     println!("step {}: loss {:.3}", step.step, step.loss);
//!     Ok(())
//! })?;
//! assert!(trainer.validate()?.loss.is_finite());
//! # Ok(())
//! # }
//! ```

pub mod calibrate;
mod churn;
pub mod ema;
pub mod estimate;
mod gradients;
pub mod guard;
pub mod log;
pub mod memory;
pub mod optimizer;
pub mod parallel;
pub mod run;
pub mod schedule;
pub mod state;
mod step;
pub mod teacher;
mod trainer;

pub use gradients::Gradients;
pub use step::{Step, StepEvaluation};
pub use trainer::{Inherited, Trainer};
