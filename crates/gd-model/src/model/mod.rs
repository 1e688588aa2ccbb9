//! The language model: parameters, transformer and loss, and loading pretrained models.

pub mod adapter;
pub mod flops;
mod folder;
pub mod params;
pub mod pretrained;
pub mod shapes;
pub mod swap;
mod transformer;
mod weights;

pub use transformer::Transformer;
