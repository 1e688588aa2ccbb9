//! Fixed sparse patterns: strided and fixed (Child et al., arXiv 1904.10509), Longformer (Beltagy et al.,
//! arXiv 2004.05150) and BigBird (Zaheer et al., arXiv 2007.14062).

use candle_core::{D, DType, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, QKV, Sizes};
use super::masks::{Given, POSITIONS, positions};
use super::rows::{both, either};
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

/// The patterns as u8 `[.., N, M]`, from the positions of the queries `[.., N, 1]` and of the keys `[1, M]`.
impl Patterns {
    fn strided(&self, i: &Tensor, j: &Tensor) -> Result<Tensor> {
        let distance = i.broadcast_sub(j)?;
        let near = distance.lt(self.l as i64)?;
        both(&distance.ge(0i64)?, &either(&near, &remainder(&distance, self.l)?.eq(0i64)?)?)
    }

    fn fixed(&self, i: &Tensor, j: &Tensor) -> Result<Tensor> {
        let same = block(i, self.l)?.broadcast_eq(&block(j, self.l)?)?;
        let last = remainder(j, self.l)?.ge((self.l - self.c) as i64)?;
        both(&j.broadcast_le(i)?, &either(&same, &last)?)
    }

    fn longformer(&self, i: &Tensor, j: &Tensor) -> Result<Tensor> {
        let half = (self.w / 2) as i64;
        let distance = i.broadcast_sub(j)?;
        let near = both(&distance.le(half)?, &distance.ge(-half)?)?;
        if self.globals.is_empty() {
            return Ok(near);
        }
        let globals: Vec<i64> = self.globals.iter().map(|&position| position as i64).collect();
        let globals = Tensor::new(globals, i.device())?;
        let is_global = |position: &Tensor| -> Result<Tensor> {
            position.unsqueeze(position.rank())?.broadcast_eq(&globals)?.max(D::Minus1)
        };
        either(&near, &either(&is_global(i)?, &is_global(j)?)?)
    }

    fn bigbird(&self, i: &Tensor, j: &Tensor, run: &Run) -> Result<Tensor> {
        let blocks = j.dim(1)?.div_ceil(self.block);
        let random = run.inputs.get("rand_blocks")?.to_dtype(DType::I64)?;
        if random.rank() != 2 || random.dim(0)? != blocks {
            candle_core::bail!("rand_blocks {:?}: [{blocks}, R] expected, one row per block", random.dims());
        }
        let all = Tensor::arange(0i64, blocks as i64, i.device())?;
        // Which blocks are the random ones of a block: [blocks, blocks].
        let random = random.unsqueeze(1)?.broadcast_eq(&all.reshape((1, blocks, 1))?)?.max(D::Minus1)?;
        let (i, j) = (block(i, self.block)?, block(j, self.block)?);
        let random = random.index_select(&i.flatten_all()?, 0)?.index_select(&j.flatten_all()?, 1)?;
        let distance = i.broadcast_sub(&j)?;
        let near = both(&distance.le(1i64)?, &distance.ge(-1i64)?)?;
        let at_end = |b: &Tensor| either(&b.eq(0i64)?, &b.eq(blocks as i64 - 1)?);
        either(&either(&near, &random)?, &either(&at_end(&i)?, &at_end(&j)?)?)
    }
}

/// The number of the block of `length` positions that holds each position.
fn block(position: &Tensor, length: usize) -> Result<Tensor> {
    position.broadcast_div(&Tensor::new(&[length as i64], position.device())?)
}

/// The remainder of each position after division by `length`.
fn remainder(position: &Tensor, length: usize) -> Result<Tensor> {
    let whole = block(position, length)?.broadcast_mul(&Tensor::new(&[length as i64], position.device())?)?;
    position - whole
}
