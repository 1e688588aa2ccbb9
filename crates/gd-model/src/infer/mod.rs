//! Text generation: sampling, stop strings, the decoding loop, and the engine that decodes sequences together as they come
//! and go.

pub mod engine;
pub mod generate;
pub mod logprobs;
pub mod sampler;
pub mod stop;
pub mod text;
