//! The sets of keys of the patterns.

use candle_core::{D, DType, Result, Tensor};

use super::Patterns;
use crate::mechanisms::rows::{both, either};
use crate::mechanisms::stages::Run;

/// The patterns as u8 `[.., N, M]`, from the positions of the queries `[.., N, 1]` and of the keys `[1, M]`.
impl Patterns {
    pub(super) fn strided(&self, i: &Tensor, j: &Tensor) -> Result<Tensor> {
        let distance = i.broadcast_sub(j)?;
        let near = distance.lt(self.l as i64)?;
        both(&distance.ge(0i64)?, &either(&near, &remainder(&distance, self.l)?.eq(0i64)?)?)
    }

    pub(super) fn fixed(&self, i: &Tensor, j: &Tensor) -> Result<Tensor> {
        let same = block(i, self.l)?.broadcast_eq(&block(j, self.l)?)?;
        let last = remainder(j, self.l)?.ge((self.l - self.c) as i64)?;
        both(&j.broadcast_le(i)?, &either(&same, &last)?)
    }

    pub(super) fn longformer(&self, i: &Tensor, j: &Tensor) -> Result<Tensor> {
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

    pub(super) fn bigbird(&self, i: &Tensor, j: &Tensor, run: &Run) -> Result<Tensor> {
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
