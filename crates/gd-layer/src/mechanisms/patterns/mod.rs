//! Fixed sparse patterns: strided and fixed (Child et al., arXiv 1904.10509), Longformer (Beltagy et al.,
//! arXiv 2004.05150) and BigBird (Zaheer et al., arXiv 2007.14062).

mod sets;

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, QKV, Sizes};
use super::masks::{Given, POSITIONS, positions};
use super::rows::both;
use super::stages::{Computation, Mask, Run, Stages};

/// Softmax attention over the keys of a pattern, within the given mask. All patterns are plain masks: a key that two
/// rules name counts once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Patterns {
    /// The pattern.
    pub pattern: Pattern,
    /// Stride of `strided`, block length of `fixed`, 1 or more.
    pub l: usize,
    /// Keys at the end of every block that all later queries see in `fixed`, at most `l`.
    pub c: usize,
    /// Window of `longformer`: w / 2 keys on each side.
    pub w: usize,
    /// Positions that see all keys and are seen by all queries in `longformer`.
    pub globals: Vec<usize>,
    /// Block length of `bigbird`, 1 or more.
    pub block: usize,
}

/// The patterns of [`Patterns`] for the query at position i and the key at position j.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// j <= i, and i - j < l or i - j a multiple of l.
    #[default]
    Strided,
    /// j <= i, in the same block of l positions or among the last c of a block.
    Fixed,
    /// |i - j| <= w / 2, or i or j is global. Not causal.
    Longformer,
    /// The own block of positions and one on each side, the first and the last block for all, and the random blocks of
    /// the input `rand_blocks` `[blocks, R]`. Not causal.
    Bigbird,
}

impl Default for Patterns {
    fn default() -> Self {
        Self { pattern: Pattern::default(), l: 16, c: 4, w: 32, globals: Vec::new(), block: 16 }
    }
}

impl Definition for Patterns {
    const INFO: Info = Info {
        formula: "softmax(q k^T / sqrt(D)) v over the keys of a pattern",
        source: "Child et al. 2019; Beltagy et al. 2020; Zaheer et al. 2020",
        inputs: QKV,
        constants: &[("mask", "[N,M]"), POSITIONS[0], POSITIONS[1], ("rand_blocks", "bigbird [blocks,R]")],
        parameters: &[
            ("pattern", "strided, fixed, longformer or bigbird"),
            ("l", "stride of strided, block length of fixed"),
            ("c", "keys at the end of each block that stay visible in fixed, at most l"),
            ("w", "window of longformer, w / 2 keys on each side"),
            ("globals", "global positions of longformer"),
            ("block", "block length of bigbird"),
        ],
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::Stages(Stages { mask: Box::new(self.clone()), ..Stages::default() })
    }

    fn validate(&self) -> Result<()> {
        let Self { l, c, block, .. } = *self;
        match self.pattern {
            Pattern::Strided | Pattern::Fixed if l == 0 => candle_core::bail!("l is 0: 1 or more expected"),
            Pattern::Fixed if c > l => candle_core::bail!("c {c}: at most the block length l {l} expected"),
            Pattern::Bigbird if block == 0 => candle_core::bail!("block is 0: 1 or more expected"),
            _ => Ok(()),
        }
    }

    fn validate_in_layer(&self, _sizes: &Sizes) -> Result<()> {
        if self.pattern == Pattern::Bigbird {
            candle_core::bail!(
                "the pattern bigbird needs random blocks as an input, and its last block depends on the length"
            );
        }
        Ok(())
    }
}

impl Mask for Patterns {
    fn name(&self) -> &'static str {
        match self.pattern {
            Pattern::Strided => "strided",
            Pattern::Fixed => "fixed",
            Pattern::Longformer => "longformer",
            Pattern::Bigbird => "bigbird",
        }
    }

    fn mask(&self, scores: &Tensor, run: &mut Run) -> Result<Tensor> {
        let (i, j) = positions(scores, run)?;
        let pattern = match self.pattern {
            Pattern::Strided => self.strided(&i, &j)?,
            Pattern::Fixed => self.fixed(&i, &j)?,
            Pattern::Longformer => self.longformer(&i, &j)?,
            Pattern::Bigbird => self.bigbird(&i, &j, run)?,
        };
        run.outputs.insert(&format!("mask.{}", self.name()), pattern.clone());
        both(&Given.mask(scores, run)?, &pattern)
    }
}
