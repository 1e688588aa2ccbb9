//! Causal sliding-window attention in blocks, without a matrix of queries by keys.

use candle_core::{Device, Result, Tensor, bail};
use serde::{Deserialize, Serialize};

use super::definition::{Definition, Info, QKV};
use super::indices::{arange, grouped, matmul, visible_softmax};
use super::inputs::Outputs;
use super::stages::{Computation, Stages};

/// Softmax attention of position t over the keys t - window + 1 .. t.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SlidingWindow {
    /// Keys of the window.
    pub window: usize,
}

impl Default for SlidingWindow {
    fn default() -> Self {
        Self { window: 256 }
    }
}

impl Definition for SlidingWindow {
    const INFO: Info = Info {
        formula: "softmax(q k^T / sqrt(D)) v over the keys t - window + 1 .. t",
        source: "Beltagy et al. 2020 (causal form)",
        inputs: &[QKV[0], ("k", "[B,Hk,N,D]"), ("v", "[B,Hk,N,Dv]")],
        constants: &[("mask", "[N,M], optional: the keys of the window, in place of window")],
        parameters: &[("window", "keys of the window, at least 1")],
        memory: "N x window",
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("scaled dot within blocks > softmax within the window > values", |inputs| {
            // A layer passes the keys that a block of its queries sees.
            if inputs.optional("mask").is_some() {
                return Stages::default().attend(inputs);
            }
            let mut outputs = Outputs::default();
            let out = sliding_window(inputs.get("q")?, inputs.get("k")?, inputs.get("v")?, self.window)?;
            outputs.insert("out", out);
            Ok(outputs)
        })
    }

    fn validate(&self) -> Result<()> {
        match self.window {
            0 => bail!("window 0: at least 1 key expected"),
            _ => Ok(()),
        }
    }

    fn window(&self) -> Option<usize> {
        Some(self.window)
    }

    /// At most an eighth of the context: a longer window is full attention for most queries.
    fn at_context(&self, tokens: usize) -> Self {
        Self { window: self.window.min((tokens / 8).max(1)) }
    }
}

/// The output of [`SlidingWindow`] for q `[B, H, N, D]`, k `[B, Hk, N, D]`, v `[B, Hk, N, Dv]`: `[B, H, N, Dv]`.
///
/// Blocks of `window` queries read their own and the previous block of keys.
///
/// # Errors
/// Shapes that do not fit.
pub(super) fn sliding_window(q: &Tensor, k: &Tensor, v: &Tensor, window: usize) -> Result<Tensor> {
    let (b, h, n, d) = q.dims4()?;
    let (hk, width) = (k.dim(1)?, v.dim(3)?);
    if k.dims() != [b, hk, n, d] || v.dims() != [b, hk, n, width] {
        let (q, k, v) = (q.dims(), k.dims(), v.dims());
        bail!("q {q:?}, k {k:?}, v {v:?}: [B,H,N,D], [B,Hk,N,D] and [B,Hk,N,Dv] expected");
    }
    let (w, group) = (window.min(n), h / hk.max(1));
    let blocks = n.div_ceil(w);
    let padded = |x: &Tensor, dim: usize| x.pad_with_zeros(dim, 0, blocks * w - n);
    let q = padded(&grouped(q, hk)?, 3)?.reshape((b, hk, group, blocks, w, d))?;
    // The heads of a group are further rows of their block.
    let q = q.transpose(2, 3)?.reshape((b, hk, blocks, group * w, d))?;
    let with_previous = |x: &Tensor| {
        let own = padded(&x.contiguous()?, 2)?.reshape((b, hk, blocks, w, x.dim(3)?))?;
        let before = own.pad_with_zeros(2, 1, 0)?.narrow(2, 0, blocks)?;
        Tensor::cat(&[before, own], 3)
    };
    let scores = (matmul(&q, &with_previous(k)?.t()?)? * (d as f64).sqrt().recip())?;
    let weights = visible_softmax(&scores, &band(blocks, group, w, q.device())?)?;
    let out = matmul(&weights, &with_previous(v)?)?.reshape((b, hk, blocks, group, w, width))?;
    out.transpose(2, 3)?.reshape((b, h, blocks * w, width))?.narrow(2, 0, n)
}

/// Which of 2w keys each of `group · w` queries of a block sees: u8 `[blocks, group · w, 2w]`.
fn band(blocks: usize, group: usize, w: usize, device: &Device) -> Result<Tensor> {
    let query = arange(w, device)?.unsqueeze(0)?.broadcast_as((group, w))?.reshape((1, group * w, 1))?;
    let key = arange(2 * w, device)?.reshape((1, 1, 2 * w))?;
    let first = arange(blocks, device)?.eq(0u32)?.reshape((blocks, 1, 1))?;
    // Key c of a block stands w − c positions before its first query; block 0 has no block before it.
    let inside = key.broadcast_gt(&query)?.broadcast_mul(&key.broadcast_le(&(query + w as f64)?)?)?;
    let exists = first.eq(0u8)?.broadcast_maximum(&key.ge(w as u32)?)?;
    inside.broadcast_mul(&exists)
}
