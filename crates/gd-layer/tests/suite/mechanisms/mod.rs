//! The mechanisms of attention that take queries, keys and a mask: properties, limits and gradients. Reference values
//! are compared in gd-cli.

mod gradients;
mod layer;
mod problem;
mod properties;
