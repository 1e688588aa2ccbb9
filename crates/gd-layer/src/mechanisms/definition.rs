//! What a mechanism's file states about it.

use candle_core::Result;

use super::stages::Computation;

/// Name and shape of a tensor.
pub type Named = (&'static str, &'static str);

/// Queries, keys and values of H query heads and Hk key-value heads.
pub const QKV: &[Named] = &[("q", "[B,H,N,D]"), ("k", "[B,Hk,M,D]"), ("v", "[B,Hk,M,Dv]")];

/// The optional mask: 1 for a visible key.
pub const MASK: &[Named] = &[("mask", "[N,M]")];

/// The row of a mechanism in the table.
#[derive(Debug, Clone, Copy)]
pub struct Info {
    /// The formula in one line.
    pub formula: &'static str,
    /// Authors and year of the definition.
    pub source: &'static str,
    /// Activations that get gradients.
    pub inputs: &'static [Named],
    /// Learned parameters.
    pub learned: &'static [Named],
    /// Tensors without gradient: masks, noise, positions.
    pub constants: &'static [Named],
    /// Parameters of the configuration with their meaning. The struct of the mechanism has a field of each name.
    pub parameters: &'static [(&'static str, &'static str)],
    /// Memory of the forward pass besides inputs and outputs. A layer computes blocks of 64 queries if they are
    /// independent, so that N is at most 64 there.
    pub memory: &'static str,
    /// Whether the output of a query depends on no other query.
    pub independent_queries: bool,
    /// Query heads of q that belong to one head of the output, and likewise of k and v: 2 for a difference of two maps.
    pub maps: usize,
    /// Which keys the queries of a layer may see.
    pub reads: Reads,
    /// What a cache holds: the outputs of one pass that are inputs of the next, with the names of input and output.
    pub state: State,
    /// Why a layer of a model cannot use it; none where it can.
    pub not_in_models: Option<&'static str>,
}

impl Info {
    /// Attention over q, k and v with a mask, without parameters.
    pub const DEFAULT: Self = Self {
        formula: "",
        source: "",
        inputs: QKV,
        learned: &[],
        constants: MASK,
        parameters: &[],
        memory: "N x M",
        independent_queries: true,
        maps: 1,
        reads: Reads::Interval,
        state: State::None,
        not_in_models: None,
    };
}

/// The sets of keys that the queries of a mechanism can be given in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// Any interval of keys, such as a window.
    Interval,
    /// All keys of the own sequence up to the own position, also where a row holds several sequences.
    Sequence,
    /// All keys of the row up to the own position.
    Row,
}

/// What a cache holds of a mechanism.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Keys and values.
    None,
    /// Keys and values, and one number per position, `[B, M]`.
    PerPosition {
        /// The name of the input.
        input: &'static str,
        /// The name of the output of the pass before.
        output: &'static str,
    },
    /// No keys and values, but tensors `[B, ..]` of constant size, each an output and an input of the same name.
    Constant(&'static [&'static str]),
}

/// The sizes of a layer, from which the shapes of its learned parameters follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Width C of the model.
    pub hidden_size: usize,
    /// Query heads H.
    pub heads: usize,
    /// Key-value heads Hk.
    pub key_value_heads: usize,
    /// Dimension D of a head.
    pub head_dim: usize,
}

/// A learned parameter of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// The name among the inputs.
    pub name: &'static str,
    /// The shape.
    pub shape: Vec<usize>,
    /// The mean of the initial values.
    pub mean: f64,
    /// The standard deviation of the initial values, 0 for equal ones.
    pub standard_deviation: f64,
}

impl Weight {
    /// A parameter with equal initial values.
    pub fn constant(name: &'static str, shape: &[usize], value: f64) -> Self {
        Self { name, shape: shape.to_vec(), mean: value, standard_deviation: 0.0 }
    }

    /// A projection `[inputs, outputs]` with initial values of the standard deviation 1 / sqrt(inputs).
    pub fn projection(name: &'static str, [inputs, outputs]: [usize; 2]) -> Self {
        let standard_deviation = (inputs as f64).sqrt().recip();
        Self { name, shape: vec![inputs, outputs], mean: 0.0, standard_deviation }
    }
}

/// A mechanism: a struct of its parameters. See `docs/src/add-mechanism.md`.
pub trait Definition {
    /// The row in the table of mechanisms.
    const INFO: Info;

    /// Its computation with these parameters.
    fn computation(&self) -> Computation<'_>;

    /// Checks the parameters.
    ///
    /// # Errors
    /// Names the parameter, its value and what is allowed.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// The learned parameters of a layer with this mechanism.
    fn weights(&self, _sizes: &Sizes) -> Vec<Weight> {
        Vec::new()
    }

    /// The keys up to its own that a query sees in a layer; none for all that the mask of the layer leaves visible.
    fn window(&self) -> Option<usize> {
        None
    }

    /// The mechanism in a layer of a model, where its parameters depend on the number of the layer, from 0.
    #[must_use]
    fn in_layer(&self, _layer: usize) -> Self
    where
        Self: Clone,
    {
        self.clone()
    }

    /// The mechanism as it is compared with others at this context length in tokens, where its defaults would make it the
    /// same as another mechanism. It differs from the defaults in nothing else.
    #[must_use]
    fn at_context(&self, _tokens: usize) -> Self
    where
        Self: Clone,
    {
        self.clone()
    }

    /// Checks whether a layer of these sizes can use the mechanism.
    ///
    /// # Errors
    /// Names what does not fit.
    fn validate_in_layer(&self, _sizes: &Sizes) -> Result<()> {
        Ok(())
    }
}
