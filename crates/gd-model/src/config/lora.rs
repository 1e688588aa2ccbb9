//! Settings of an adapter of low rank, which is trained in the place of the weights of a model.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::checks::{Checks, first};
use super::model::MAX_SIZE;
use crate::error::{Error, Result};

/// A target that stands for all projections of the blocks.
pub const ALL_LINEAR: &str = "all-linear";

/// The adapter of a run (LoRA, Hu et al., arXiv 2106.09685): the block `train.lora` of a recipe. The names and defaults are
/// those of the library PEFT.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// The model that the adapter belongs to: a path, or the name of a model of the Hugging Face Hub.
    pub base: PathBuf,
    /// The rank of the matrix that is added to the weights of a projection.
    #[serde(default = "r")]
    pub r: usize,
    /// This matrix is multiplied by alpha / r. Above 0.
    #[serde(default = "alpha")]
    pub alpha: f64,
    /// The probability with which the training drops an element of the input of an adapter, from 0 to below 1.
    #[serde(default)]
    pub dropout: f64,
    /// The projections that get such a matrix, by the ends of their names, or `all-linear` for all projections of the blocks.
    #[serde(default = "targets")]
    pub targets: Vec<String>,
}

fn r() -> usize {
    8
}
fn alpha() -> f64 {
    8.0
}
fn targets() -> Vec<String> {
    ["q_proj", "v_proj"].map(String::from).into()
}

impl LoraConfig {
    /// The factor of the product of the two matrices of an adapter.
    pub fn scale(&self) -> f64 {
        self.alpha / self.r as f64
    }

    /// Checks the range of every value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for the first value outside its range.
    pub fn validate(&self) -> Result<()> {
        first(self.problems())
    }

    /// All values outside their range.
    pub(super) fn problems(&self) -> Vec<Error> {
        let mut checks = Checks::default();
        let (r, alpha, dropout) = (self.r, self.alpha, self.dropout);
        checks.require((1..=MAX_SIZE).contains(&r), "train.lora.r", r, format!("from 1 to {MAX_SIZE}"));
        checks.require(alpha > 0.0 && alpha.is_finite(), "train.lora.alpha", alpha, "above 0");
        let is_probability = (0.0..1.0).contains(&dropout);
        checks.require(is_probability, "train.lora.dropout", dropout, "from 0 to below 1");
        checks.require(!self.targets.is_empty(), "train.lora.targets", "[]", "at least one projection");
        checks.into_problems()
    }
}
