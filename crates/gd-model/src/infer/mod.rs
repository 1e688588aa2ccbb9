//! Text generation: sampling, stop strings and the decoding loop.

pub mod generate;
pub mod sampler;
pub mod stop;
