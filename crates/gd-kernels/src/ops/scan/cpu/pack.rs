//! Keys in the order in which the dense scan reads them.
//!
//! A panel holds W keys transposed, `[D][W]`: one register holds the same coordinate of neighbouring keys, and a score is
//! one chain of fused multiply-adds over D.

use std::ops::Range;

use num_traits::Float;

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::parallel::{par_chunks2, vectorize};
use crate::backend::cpu::view::View;
use crate::options::Score;

/// Transposes keys `[W][D]` into a panel `[D][W]` of zeros and computes their biases: `-|k|^2 / 2` for the energy score,
/// so that `<q, k> + bias` falls as the distance grows, and 0 for the dot product.
#[inline(always)]
pub(crate) fn pack_panel<T: Element>(
    k: View<'_, T>,
    [b, h]: [usize; 2],
    keys: Range<usize>,
    score: Score,
    panel: &mut [T::Acc],
    bias: &mut [T::Acc],
) {
    let width = bias.len();
    for (w, j) in keys.enumerate() {
        for (slot, x) in panel[w..].iter_mut().step_by(width).zip(k.row(b, h, j)) {
            *slot = x.up();
        }
    }
    if score == Score::Energy {
        for row in panel.chunks_exact(width) {
            bias.iter_mut().zip(row).for_each(|(b, &x)| *b = x.mul_add(x, *b));
        }
        let half = T::Acc::of(-0.5);
        bias.iter_mut().for_each(|b| *b *= half);
    }
}

/// All keys of a problem, packed: panels `[B, Hk, P, D, W]` and their biases `[B, Hk, P, W]`, with P the number of panels.
/// Keys behind the last are zero.
pub(crate) struct PackedKeys<A> {
    panels: Vec<A>,
    bias: Vec<A>,
    width: usize,
    head_dim: usize,
    per_head: usize,
}

impl<A: Real> PackedKeys<A> {
    /// Packs k `[B, Hk, M, D]`.
    pub(crate) fn new<T: Element<Acc = A>>(k: View<'_, T>, width: usize, score: Score) -> Self {
        let [batch, heads, keys, d] = k.dims;
        let per_head = keys.div_ceil(width);
        let mut panels = vec![A::zero(); batch * heads * per_head * d * width];
        let mut bias = vec![A::zero(); batch * heads * per_head * width];
        par_chunks2((&mut panels, d * width), (&mut bias, width), &|at, panel, bias| {
            let (head, p) = (at / per_head, at % per_head);
            let (b, h) = (head / heads, head % heads);
            let keys = p * width..keys.min((p + 1) * width);
            vectorize(
                #[inline(always)]
                || pack_panel(k, [b, h], keys, score, panel, bias),
            );
        });
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
