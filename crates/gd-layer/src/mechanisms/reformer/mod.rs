//! The attention of the Reformer (Kitaev et al. 2020, arXiv 2001.04451): locality-sensitive hashing sorts positions into
//! buckets, and each chunk of the sorted sequence reads itself and the chunk before.

mod chunks;
mod hashing;

use candle_core::{D, DType, Result, Tensor, bail};
use candle_nn::ops::softmax;
use serde::{Deserialize, Serialize};

use self::hashing::{bucket, sorted_order};
use super::definition::{Definition, Info};
use super::indices::take_rows;
use super::inputs::{Inputs, Outputs};
use super::stages::Computation;

/// Attention among positions with similar hashes, in several rounds that are mixed by the softmax of their log-sum-exp.
/// There is no mask of equal buckets, and a key that several rounds read is not removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reformer {
    /// Positions of a chunk, a divisor of N.
    pub chunk: usize,
    /// Whether a position reads positions at or before its own only.
    pub causal: bool,
    /// Whether the first chunk reads the last chunk of its round too, or itself alone as in the paper.
    pub wrap: bool,
}

impl Default for Reformer {
    fn default() -> Self {
        Self { chunk: 64, causal: true, wrap: false }
    }
}

impl Definition for Reformer {
    const INFO: Info = Info {
        formula: "softmax(q.k / (|k| sqrt(D))) v over the own and the previous chunk, in the order of argmax [xR; -xR]",
        source: "Kitaev et al. 2020",
        inputs: &[("qk", "[B,H,N,D], queries and keys"), ("v", "[B,H,N,Dv]")],
        constants: &[("R", "[rounds,D,buckets/2], random rotations")],
        parameters: &[
            ("chunk", "positions of a chunk, a divisor of N"),
            ("causal", "true: positions at or before the own one"),
            ("wrap", "true: the first chunk reads the last one of its round"),
        ],
        memory: "rounds x N x chunk",
        not_in_models: Some("queries and keys are one tensor"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("hash > sort > softmax within chunks > mixture of rounds", |inputs| {
            self.attend(inputs)
        })
    }

    fn validate(&self) -> Result<()> {
        match self.chunk {
            0 => bail!("chunk 0: a divisor of the number of positions expected"),
            _ => Ok(()),
        }
    }
}

impl Reformer {
    fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        let (qk, v, rotations) = (inputs.get("qk")?, inputs.get("v")?, inputs.get("R")?);
        let (_, _, n, d) = qk.dims4()?;
        let (rounds, width, _) = rotations.dims3()?;
        if v.rank() != 4 || v.dims()[..3] != qk.dims()[..3] || width != d || rounds == 0 {
            let (qk, v, rotations) = (qk.dims(), v.dims(), rotations.dims());
            bail!(
                "qk {qk:?}, v {v:?}, R {rotations:?}: [B,H,N,D], [B,H,N,Dv] and [rounds,D,buckets/2] expected"
            );
        }
        if n % self.chunk != 0 {
            bail!("chunk {}: a divisor of the {n} positions expected", self.chunk);
        }
        let (mut outs, mut lses, mut buckets) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..rounds {
            let bucket = bucket(qk, &rotations.get(round)?)?;
            let order = sorted_order(&bucket)?;
            let (out, lse) = self.sorted_attention(qk, v, &order)?;
            let place = order.arg_sort_last_dim(true)?;
            outs.push(take_rows(&out, &place)?);
            lses.push(take_rows(&lse, &place)?);
            buckets.push(bucket);
        }
        let lse = Tensor::stack(&lses, 0)?;
        let mut outputs = Outputs::default();
        outputs.insert("out", Tensor::stack(&outs, 0)?.broadcast_mul(&softmax(&lse, 0)?)?.sum(0)?);
        outputs.insert("lse", lse.squeeze(D::Minus1)?);
        outputs.insert("bucket", Tensor::stack(&buckets, 0)?.to_dtype(DType::I64)?);
        Ok(outputs)
    }
}
