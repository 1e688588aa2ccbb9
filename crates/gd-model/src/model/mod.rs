//! The language model: parameters, transformer, loss, and loading a pretrained model.

pub mod flops;
pub mod params;
pub mod pretrained;
pub mod shapes;
pub mod swap;
mod transformer;

pub use transformer::Transformer;
