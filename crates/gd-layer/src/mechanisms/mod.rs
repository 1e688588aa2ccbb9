//! Attention mechanisms, to compare selection with: exact, differentiable, and composed of stages.
//!
//! A mechanism is a struct of its parameters that implements [`Definition`], in a file of its own. The stages are those
//! of [`Stages`]: score, mask, warp, support, normalise, aggregate; a mechanism replaces the stages in which it differs
//! from softmax attention. [`AttentionMechanism`] has all of them, [`TABLE`] describes them.
//!
//! Shapes: q `[B, H, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`, with Hk a divisor of H; scores and weights
//! `[B, H, N, M]`. Every mechanism runs in f64 and f32; f16 and bf16 are computed in f32. A query that sees no key has
//! weights, output and gradients 0. Gradients flow to all inputs that the mechanism does not list as constants.

mod additive;
mod bahdanau;
mod definition;
mod differential;
mod dot;
mod energy_transformer;
mod entmax;
mod gated;
mod hard;
mod hopfield;
mod indices;
mod inputs;
mod linear_attention;
mod luong;
mod masks;
mod mocha;
mod monotonic;
mod native_sparse;
mod null_logit;
mod patterns;
mod pointer;
mod reformer;
mod resan;
mod routing;
mod rows;
mod scalable_softmax;
mod selective;
mod sigmoid;
mod sliding_window;
mod softmax;
mod sparsemax;
mod stages;
mod switch;
mod top_k;

use candle_core::Result;
use serde::{Deserialize, Serialize};

pub use bahdanau::Bahdanau;
pub use definition::{Definition, Info, MASK, Named, QKV, Reads, Sizes, State, Weight};
pub use differential::Differential;
pub use energy_transformer::EnergyTransformer;
pub use entmax::{Alpha, Entmax, EntmaxRows, Learned, entmax};
pub use gated::{Gated, Gates};
pub use hard::{Hard, Ties};
pub use hopfield::Hopfield;
pub use inputs::{Inputs, Outputs};
pub use linear_attention::{
    LinearAttention, LinearAttentionState, linear_attention, packed_linear_attention,
};
pub use luong::{Luong, LuongScore};
pub use mocha::{Mocha, mocha_hard, mocha_weights};
pub use monotonic::{Monotonic, monotonic_hard, monotonic_weights};
pub use native_sparse::NativeSparse;
pub use null_logit::{Sink, SoftmaxOffByOne};
pub use patterns::{Pattern, Patterns};
pub use pointer::Pointer;
pub use reformer::Reformer;
pub use resan::{Direction, Resan, reinforce_loss};
pub use routing::{Routing, update_centroids};
pub use scalable_softmax::ScalableSoftmax;
pub use selective::Selective;
pub use sigmoid::Sigmoid;
pub use sliding_window::SlidingWindow;
pub use softmax::Softmax;
pub use sparsemax::Sparsemax;
pub use stages::{
    Aggregate, Attend, Computation, Mask, Normalise, Normalised, Run, Score, Stages, Support, Warp,
};
pub use switch::Switch;
pub use top_k::{ExplicitSparse, TopK};

/// The table: one line per mechanism, its name and the struct of its parameters.
macro_rules! table {
    ($($name:literal => $mechanism:ident),* $(,)?) => {
        /// A mechanism with its parameters. In a configuration its name is the key `name`, and the others are those
        /// of its struct: `{"name": "topk", "k": 8}`. Parameters that are absent have their default.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "name")]
        pub enum AttentionMechanism {
            $(
                #[doc = concat!("`", $name, "`")]
                #[serde(rename = $name)]
                $mechanism($mechanism),
            )*
        }

        /// The name of every mechanism.
        pub const NAMES: &[&str] = &[$($name),*];

        /// Name and description of every mechanism.
        pub const TABLE: &[(&str, Info)] = &[$(($name, $mechanism::INFO)),*];

        impl AttentionMechanism {
            /// The mechanism of this name with its default parameters, if there is one.
            pub fn named(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$mechanism($mechanism::default())),)*
                    _ => None,
                }
            }

            /// The name, as in the table.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$mechanism(_) => $name,)*
                }
            }

            /// The description.
            pub fn info(&self) -> Info {
                match self {
                    $(Self::$mechanism(_) => $mechanism::INFO,)*
                }
            }

            /// The learned parameters of a layer with this mechanism.
            pub fn weights(&self, sizes: &Sizes) -> Vec<Weight> {
                match self {
                    $(Self::$mechanism(mechanism) => mechanism.weights(sizes),)*
                }
            }

            /// The keys up to its own that a query sees in a layer; none for all that the mask leaves visible.
            pub fn window(&self) -> Option<usize> {
                match self {
                    $(Self::$mechanism(mechanism) => mechanism.window(),)*
                }
            }

            /// The mechanism in a layer of a model, where its parameters depend on the number of the layer, from 0.
            #[must_use]
            pub fn in_layer(&self, layer: usize) -> Self {
                match self {
                    $(Self::$mechanism(mechanism) => Self::$mechanism(mechanism.in_layer(layer)),)*
                }
            }

            /// The mechanism as it is compared with others at this context length in tokens, where its parameters would
            /// make it the same as another mechanism.
            #[must_use]
            pub fn at_context(&self, tokens: usize) -> Self {
                match self {
                    $(Self::$mechanism(mechanism) => Self::$mechanism(mechanism.at_context(tokens)),)*
                }
            }

            /// Checks whether a layer of these sizes can use the mechanism, and the parameters.
            ///
            /// # Errors
            /// Names what does not fit.
            pub fn validate_in_layer(&self, sizes: &Sizes) -> Result<()> {
                if let Some(reason) = self.info().not_in_models {
                    candle_core::bail!("the mechanism {} cannot be in a layer: {reason}", self.name());
                }
                self.validate()?;
                match self {
                    $(Self::$mechanism(mechanism) => mechanism.validate_in_layer(sizes),)*
                }
            }

            /// Checks the parameters.
            ///
            /// # Errors
            /// Names the parameter, its value and what is allowed.
            pub fn validate(&self) -> Result<()> {
                match self {
                    $(Self::$mechanism(mechanism) => mechanism.validate(),)*
                }
            }

            /// The computation: stages, or steps.
            pub fn computation(&self) -> Computation<'_> {
                match self {
                    $(Self::$mechanism(mechanism) => mechanism.computation(),)*
                }
            }
        }
    };
}

table! {
    "softmax" => Softmax,
    "luong" => Luong,
    "bahdanau" => Bahdanau,
    "pointer" => Pointer,
    "sparsemax" => Sparsemax,
    "entmax" => Entmax,
    "topk" => TopK,
    "explicit_sparse" => ExplicitSparse,
    "hard" => Hard,
    "patterns" => Patterns,
    "selective" => Selective,
    "differential" => Differential,
    "ssmax" => ScalableSoftmax,
    "gated" => Gated,
    "sigmoid" => Sigmoid,
    "softmax1" => SoftmaxOffByOne,
    "sink" => Sink,
    "hopfield" => Hopfield,
    "monotonic" => Monotonic,
    "mocha" => Mocha,
    "energy_transformer" => EnergyTransformer,
    "routing" => Routing,
    "reformer" => Reformer,
    "nsa" => NativeSparse,
    "resan" => Resan,
    "linear" => LinearAttention,
    "sliding_window" => SlidingWindow,
    "switch" => Switch,
}

impl AttentionMechanism {
    /// The outputs for these inputs, differentiable. Inputs in f16 or bf16 are computed in f32, and the outputs are in
    /// the dtype of the inputs; a state of constant size, which sums over all positions, stays in f32.
    ///
    /// # Errors
    /// A tensor that is missing or does not fit, or a parameter that cannot be used.
    pub fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        self.validate()?;
        let (inputs, narrow) = inputs.widened()?;
        let outputs = self.computation().attend(&inputs)?;
        let state = match self.info().state {
            State::Constant(names) => names,
            State::None | State::PerPosition { .. } => &[],
        };
        match narrow {
            Some(dtype) => outputs.narrowed(dtype, state),
            None => Ok(outputs),
        }
    }
}
