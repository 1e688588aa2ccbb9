//! A language model with selection attention, as a library.
#![doc = include_str!("../README.md")]
//! ## Loading a model and generating text
//!
//! [`load`] reads a checkpoint folder, a safetensors file in one, the folder of a training run, or a GGUF file:
//!
//! ```no_run
//! use std::path::Path;
//!
//! use candle_core::Device;
//! use gd_model::{Sampler, Sampling, generate, load};
//!
//! let device = Device::Cpu;
//! let loaded = load(Path::new("out/tiny"), &device)?;
//! let prompt = loaded.tokenizer.encode("Call me")?;
//! let mut sampler = Sampler::new(Sampling { temperature: 0.8, ..Sampling::default() }, 7)?;
//! let new = generate(&loaded.model, &prompt, 100, &mut sampler, &device, |_token| Ok(true))?;
//! println!("{}", loaded.tokenizer.decode(&new)?);
//! # Ok::<(), gd_model::Error>(())
//! ```
//!
//! ## Order of the modules
//!
//! A module uses only itself and the modules before it in this order: [`error`], [`io::files`], [`config`], [`io`],
//! [`data`], [`model`], [`eval`], [`infer`], [`trace`], [`train`],
//! [`tasks`], [`analysis`].
#![deny(unsafe_code)]

pub mod analysis;
pub mod config;
pub mod data;
pub mod error;
pub mod eval;
pub mod infer;
pub mod io;
pub mod model;
pub mod tasks;
pub mod trace;
pub mod train;

pub use error::{Error, Result};
pub use infer::generate::generate;
pub use infer::sampler::{Sampler, Sampling};
pub use model::Transformer;
pub use model::pretrained::{Loaded, load};
