//! The interface that all caches share.

use candle_core::Tensor;

use crate::cache::position::{WritePosition, ends};
use crate::error::Result;

/// A cache with one length per sequence.
///
/// Cloning is cheap: clones share their memory until one of them is written to.
pub trait SequenceCache: Sized {
    /// Rows stored for every sequence.
    fn lengths(&self) -> &[usize];

    /// Writes `rows` `[R, heads, m, ..]`: entry `r` goes to sequence `at[r][0]`, rows `at[r][1]..at[r][1] + m`.
    /// Rows that are already stored there are replaced; the sequence becomes longer where the new rows end behind it.
    ///
    /// # Errors
    /// Rows of another shape, dtype or device than the cache; positions that are not one for each entry, name a
    /// missing sequence or one sequence twice, or would leave a gap behind the stored rows.
    fn write(&mut self, rows: &Tensor, at: &[WritePosition]) -> Result<()>;

    /// Some of the sequences, in the given order; a sequence may be named more than once.
    ///
    /// # Errors
    /// A sequence that the cache does not have.
    fn select(&self, sequences: &[usize]) -> Result<Self>;

    /// The sequences of several caches, one after the other.
    ///
    /// # Errors
    /// No cache, or caches for other shapes, dtypes or devices than the first.
    fn stack(caches: &[&Self]) -> Result<Self>;

    /// Appends `rows` `[sequences, heads, m, ..]`, to every sequence behind its last row.
    ///
    /// # Errors
    /// As [`SequenceCache::write`].
    fn append(&mut self, rows: &Tensor) -> Result<()> {
        let at = ends(self.lengths());
        self.write(rows, &at)
    }

    /// Rows of the longest sequence.
    fn longest(&self) -> usize {
        self.lengths().iter().copied().max().unwrap_or(0)
    }
}
