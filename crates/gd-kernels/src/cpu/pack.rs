//! Keys in the order in which the scan reads them.
//!
//! A panel holds W keys transposed, `[D][W]`, so that one register holds the same coordinate of
//! neighbouring keys and a score is one chain of fused multiply-adds over D.

use rayon::prelude::*;

use super::view::View;
use crate::element::{Element, Real};
use crate::options::Score;

/// All keys of a problem, packed: panels `[B, Hk, P, D, W]` and their bias `[B, Hk, P, W]`, P the
/// number of panels; keys beyond the last are zero.
pub(crate) struct Packed<A> {
    panels: Vec<A>,
    bias: Vec<A>,
    width: usize,
    head_dim: usize,
    per_head: usize,
}

impl<A: Real> Packed<A> {
    /// Packs k `[B, Hk, M, D]`. The bias of a key is `-|k|^2 / 2` for the energy score (so that
    /// `<q, k> + bias` falls as the distance grows), 0 for the dot product.
    pub(crate) fn new<T: Element<Acc = A>>(k: View<'_, T>, width: usize, score: Score) -> Self {
        let [batch, heads, keys, d] = k.dims;
        let per_head = keys.div_ceil(width);
        let mut panels = vec![A::zero(); batch * heads * per_head * d * width];
        let mut bias = vec![A::zero(); batch * heads * per_head * width];
        let half = A::of(-0.5);
        panels.par_chunks_mut((d * width).max(1)).zip(bias.par_chunks_mut(width)).enumerate().for_each(
            |(at, (panel, bias))| {
                let (head, p) = (at / per_head, at % per_head);
                let (b, h) = (head / heads, head % heads);
                for (w, j) in (p * width..keys.min((p + 1) * width)).enumerate() {
                    let mut norm = A::zero();
                    for (x, slot) in k.row(b, h, j).iter().zip(panel[w..].iter_mut().step_by(width)) {
                        let x = x.up();
                        *slot = x;
                        norm = x.mul_add(x, norm);
                    }
                    if score == Score::Energy {
                        bias[w] = half * norm;
                    }
                }
            },
        );
        Self { panels, bias, width, head_dim: d, per_head }
    }

    /// Panel `p` of flat head `b * Hk + h`: its keys `[D][W]` and their bias `[W]`.
    #[inline(always)]
    pub(crate) fn panel(&self, head: usize, p: usize) -> (&[A], &[A]) {
        let at = head * self.per_head + p;
        let size = self.head_dim * self.width;
        (&self.panels[at * size..(at + 1) * size], &self.bias[at * self.width..(at + 1) * self.width])
    }

    /// Keys per panel.
    #[inline(always)]
    pub(crate) fn width(&self) -> usize {
        self.width
    }
}
