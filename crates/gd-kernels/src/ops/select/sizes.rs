//! The sizes of a selection.

use candle_core::DType;

/// The sizes of a selection: q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`, candidates `[B, Hq, N, K]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    not(feature = "gpu"),
    allow(unreachable_pub, reason = "builds for a GPU export it to tests of launches")
)]
pub struct Sizes {
    /// B.
    pub batch: usize,
    /// Hq, a multiple of Hk.
    pub q_heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// N.
    pub queries: usize,
    /// M.
    pub keys: usize,
    /// D.
    pub head_dim: usize,
    /// Dv.
    pub value_dim: usize,
    /// K: candidates of a query, protected ones included.
    pub slots: usize,
    /// The dtype of q and of the output. That of k and v is the same, but on the CPU f16 or bf16 where this is f32.
    pub dtype: DType,
}

impl Sizes {
    /// Query rows: B * Hq * N.
    #[cfg_attr(not(feature = "gpu"), allow(unreachable_pub, reason = "as for the type"))]
    pub fn rows(&self) -> usize {
        self.batch * self.q_heads * self.queries
    }

    /// The sizes of a step with one key for every query: K = 1.
    pub(crate) fn single(&self) -> Self {
        Self { slots: 1, ..*self }
    }

    /// The sizes of the same rows as heads of one query each, in one batch entry: B = 1, Hq = B Hq N, Hk = B Hk, N = 1. A
    /// value per head is then one per row.
    #[cfg(feature = "gpu")]
    pub(crate) fn rows_as_heads(&self) -> Self {
        let (q_heads, kv_heads) = (self.rows(), self.batch * self.kv_heads);
        Self { batch: 1, q_heads, kv_heads, queries: 1, ..*self }
    }

    /// `[B, Hq, N]`.
    pub(crate) fn row_shape(&self) -> (usize, usize, usize) {
        (self.batch, self.q_heads, self.queries)
    }

    /// `[B, Hq, N, K]`.
    pub(crate) fn slot_shape(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.q_heads, self.queries, self.slots)
    }

    /// `[B, Hq, N, Dv]`.
    pub(crate) fn output_shape(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.q_heads, self.queries, self.value_dim)
    }

    /// Batch entry, query head, key-value head and query of a flat row.
    #[inline(always)]
    pub(crate) fn coordinates(&self, row: usize) -> [usize; 4] {
        let (head, query) = (row / self.queries, row % self.queries);
        let q_head = head % self.q_heads;
        [head / self.q_heads, q_head, q_head / (self.q_heads / self.kv_heads), query]
    }
}
