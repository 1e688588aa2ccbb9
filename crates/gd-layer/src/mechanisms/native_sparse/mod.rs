//! Native Sparse Attention (Yuan et al. 2025, arXiv 2502.11089): a branch over compressed keys, one over selected blocks
//! of keys and one over a sliding window, mixed by gates.

mod branches;
mod selection;

use candle_core::{Result, Tensor, bail};
use candle_nn::ops::sigmoid;
use serde::{Deserialize, Serialize};

use self::branches::Branches;
use super::definition::{Definition, Info, QKV, Reads, Sizes, Weight};
use super::indices::matmul;
use super::inputs::{Inputs, Outputs};
use super::stages::Computation;

/// The sizes of Native Sparse Attention, in tokens unless said otherwise. Blocks and compressed keys are counted from 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NativeSparse {
    /// Tokens that one compressed key is the mean of.
    pub l: usize,
    /// Distance between the first tokens of two compressed keys.
    pub stride: usize,
    /// Tokens of a selected block.
    pub block: usize,
    /// Blocks that a query selects, with those that it always takes.
    pub nsel: usize,
    /// First blocks that a query always takes.
    pub ninit: usize,
    /// Blocks up to its own that a query always takes.
    pub nlocal: usize,
    /// Tokens of the sliding window.
    pub w: usize,
}

impl Default for NativeSparse {
    fn default() -> Self {
        Self { l: 32, stride: 16, block: 64, nsel: 16, ninit: 1, nlocal: 2, w: 512 }
    }
}

impl Definition for NativeSparse {
    const INFO: Info = Info {
        formula: "sum over branches (compressed, selected, window) of sigmoid(gate) softmax(q k^T / sqrt(D)) v, causal",
        source: "Yuan et al. 2025",
        inputs: &[
            QKV[0],
            QKV[1],
            QKV[2],
            ("gates", "[B,H,N,3], logits: compressed, selected, window"),
            ("x", "[B,N,C], in place of gates: gates are x Wg"),
        ],
        learned: &[("Wg", "[C,3H], with x")],
        constants: &[("query_positions", "[B,N], optional: the last N of M keys if absent")],
        parameters: &[
            ("l", "tokens of a compressed key"),
            ("stride", "tokens between compressed keys"),
            ("block", "tokens of a selected block"),
            ("nsel", "selected blocks, at least ninit + nlocal"),
            ("ninit", "first blocks, always taken"),
            ("nlocal", "blocks up to the own one, always taken"),
            ("w", "tokens of the sliding window"),
        ],
        memory: "N x M / stride + 64 x M; N x nsel x block x (D + Dv) where M is above nsel x block x (D + Dv)",
        reads: Reads::Row,
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole(
            "compressed keys > scores of blocks > selected blocks > window > gates",
            |inputs| self.attend(inputs),
        )
    }

    fn validate(&self) -> Result<()> {
        let Self { l, stride, block, nsel, ninit, nlocal, w } = *self;
        for (name, size) in [("l", l), ("stride", stride), ("block", block), ("nsel", nsel), ("w", w)] {
            if size == 0 {
                bail!("{name} 0: at least 1 expected");
            }
        }
        if nsel < ninit + nlocal {
            bail!("nsel {nsel}: at least ninit + nlocal = {} expected", ninit + nlocal);
        }
        Ok(())
    }

    /// At most a quarter of the context in the selected blocks and an eighth in the window: more is full attention for most
    /// queries. A block is twice as long as a compressed key, as in the defaults, but at most 1/32 of the context.
    fn at_context(&self, tokens: usize) -> Self {
        let part = |of: usize, parts: usize| (of / parts).max(1);
        let block = self.block.min(part(tokens, 32));
        let l = self.l.min(part(block, 2));
        let least = self.ninit + self.nlocal + 1;
        Self {
            l,
            stride: self.stride.min(part(l, 2)),
            block,
            nsel: self.nsel.min(part(tokens, 4 * block).max(least)),
            w: self.w.min(part(tokens, 8)),
            ..self.clone()
        }
    }

    fn weights(&self, sizes: &Sizes) -> Vec<Weight> {
        vec![Weight::projection("Wg", [sizes.hidden_size, 3 * sizes.heads])]
    }
}

impl NativeSparse {
    fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        let gates = sigmoid(&gates(inputs)?)?;
        let branches = Branches::new(self, inputs)?;
        let (compressed, scores) = branches.compressed()?;
        let index = branches.chosen_blocks(&scores)?;
        let [selected, window] = branches.selected_and_window(&index)?;
        let gated = |branch: &Tensor, i: usize| branch.broadcast_mul(&gates.narrow(3, i, 1)?);
        let out = ((gated(&compressed, 0)? + gated(&selected, 1)?)? + gated(&window, 2)?)?;
        let mut outputs = Outputs::default();
        for (name, t) in [("o_cmp", compressed), ("o_slc", selected), ("o_win", window), ("out", out)] {
            outputs.insert(name, t);
        }
        outputs.insert("score", scores);
        outputs.insert("block_index", branches.padded(&index)?);
        Ok(outputs)
    }
}

/// The logits of the gates, `[B, H, N, 3]`: given, or projected from x.
fn gates(inputs: &Inputs) -> Result<Tensor> {
    let (b, h, n, _) = inputs.get("q")?.dims4()?;
    let gates = match inputs.optional("x") {
        Some(x) => matmul(x, inputs.get("Wg")?)?.reshape((b, n, h, 3))?.transpose(1, 2)?,
        None => inputs.get("gates")?.clone(),
    };
    if gates.dims() != [b, h, n, 3] {
        bail!("gates {:?}: [{b},{h},{n},3] expected for {h} heads and {n} queries", gates.dims());
    }
    Ok(gates)
}
