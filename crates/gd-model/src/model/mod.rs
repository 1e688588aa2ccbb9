//! The language model: parameters, transformer and loss, and loading pretrained models.

pub mod flops;
pub mod params;
pub mod pretrained;
pub mod shapes;
pub mod swap;
mod transformer;

pub use transformer::Transformer;
