//! Which keys are visible to a query.
//!
//! Every supported mask makes one contiguous interval of keys visible to each query. Kernels therefore read no
//! mask tensor and do not test each position: they loop over `Mask::visible`.
//!
//! Shapes: N queries, M keys, B batch entries. Query `i` stands at key position `i + offset`; each batch entry
//! may have its own offset.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};

/// The set of keys that each query may select from.
///
/// Built from one of [`Mask::none`], [`Mask::causal`], [`Mask::window`], and narrowed by
/// [`Mask::packed`] and [`Mask::kv_len`]; the conditions intersect.
///
/// ```
/// use gd_kernels::Mask;
///
/// // The last 4 of 10 queries see at most 3 keys, up to their own position.
/// let mask = Mask::window(3, 6);
/// assert_eq!(mask.visible(0, 0, 10), 4..7);
/// assert_eq!(mask.visible(0, 3, 10), 7..10);
///
/// // Two sequences of 4 and 6 positions in one row: neither sees the other.
/// let mask = Mask::causal(0).packed(vec![vec![0, 4, 10]]);
/// assert_eq!(mask.visible(0, 3, 10), 0..4);
/// assert_eq!(mask.visible(0, 5, 10), 4..6);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mask {
    causal: bool,
    window: Option<usize>,
    offset: i64,
    offsets: Option<Arc<Vec<i64>>>,
    packed: Option<Arc<Vec<Vec<usize>>>>,
    kv_len: Option<Arc<Vec<usize>>>,
}

impl Mask {
    /// Every key is visible to every query.
    pub fn none() -> Self {
        Self::default()
    }

    /// The keys `j <= i + offset` are visible to query `i`.
    pub fn causal(offset: i64) -> Self {
        Self { causal: true, offset, ..Self::default() }
    }

    /// The `window` keys with `i + offset - window < j <= i + offset` are visible to query `i`.
    pub fn window(window: usize, offset: i64) -> Self {
        Self { causal: true, window: Some(window), offset, ..Self::default() }
    }

    /// Sets an offset for every batch entry: query `i` of entry `b` stands at key position
    /// `i + offsets[b]` (one entry may serve all).
    pub fn with_offsets(mut self, offsets: Vec<i64>) -> Self {
        self.offsets = Some(Arc::new(offsets));
        self
    }

    /// Restricts each query to its own packed sequence. `cumulative` holds, per batch entry (or
    /// once for all), the boundaries `[0, e1, e2, .., M]` on the key axis; the query's sequence is
    /// the one that contains its position `i + offset`.
    pub fn packed(mut self, cumulative: Vec<Vec<usize>>) -> Self {
        self.packed = Some(Arc::new(cumulative));
        self
    }

    /// Limits batch entry `b` to its first `lengths[b]` keys (one entry may serve all).
    pub fn kv_len(mut self, lengths: Vec<usize>) -> Self {
        self.kv_len = Some(Arc::new(lengths));
        self
    }

    /// Limits each query to the last `window` keys up to its own position, unless a smaller window is set.
    pub fn windowed(mut self, window: usize) -> Self {
        self.window = Some(self.window.map_or(window, |w| w.min(window)));
        self
    }

    /// The mask of the queries from `first` on.
    pub fn from_query(mut self, first: usize) -> Self {
        let first = first as i64;
        self.offset = self.offset.saturating_add(first);
        self.offsets = self
            .offsets
            .map(|offsets| Arc::new(offsets.iter().map(|offset| offset.saturating_add(first)).collect()));
        self
    }

    /// The offset of query 0 of batch entry `b` on the key axis.
    pub fn offset(&self, b: usize) -> i64 {
        match self.offsets.as_deref().map(Vec::as_slice) {
            Some([offset]) => *offset,
            Some(offsets) => offsets[b],
            None => self.offset,
        }
    }

    /// Whether the visible keys differ between batch entries.
    pub fn differs(&self) -> bool {
        let several = |n: Option<usize>| n.is_some_and(|n| n > 1);
        several(self.offsets.as_ref().map(|o| o.len()))
            || several(self.boundaries().map(<[_]>::len))
            || several(self.lengths().map(<[_]>::len))
    }

    /// Whether the keys behind the position of a query are invisible to it.
    pub fn is_causal(&self) -> bool {
        self.causal
    }

    /// The sliding window, if there is one.
    pub fn window_len(&self) -> Option<usize> {
        self.window
    }

    /// The packed boundaries, one list per batch entry or one for all.
    pub fn boundaries(&self) -> Option<&[Vec<usize>]> {
        self.packed.as_ref().map(|p| p.as_slice())
    }

    /// The per-batch key lengths, if given.
    pub fn lengths(&self) -> Option<&[usize]> {
        self.kv_len.as_ref().map(|l| l.as_slice())
    }

    /// Checks the mask against a problem with `batch` entries and `keys` keys.
    ///
    /// # Errors
    /// Names the first value that cannot be used: a window of 0, boundaries that do not rise from
    /// 0 to `keys`, a length beyond `keys`, or lists that fit neither 1 nor `batch` entries.
    pub fn validate(&self, batch: usize, keys: usize) -> Result<()> {
        if self.window == Some(0) {
            return Err(Error::Invalid("mask: a window of 0 keys selects nothing".into()));
        }
        if let Some(offsets) = &self.offsets {
            fits("offsets", offsets.len(), batch)?;
        }
        if let Some(packed) = &self.packed {
            check_boundaries(packed, batch, keys)?;
        }
        if let Some(lengths) = &self.kv_len {
            fits("key lengths", lengths.len(), batch)?;
            if let Some(n) = lengths.iter().find(|&&n| n > keys) {
                return Err(Error::Invalid(format!("mask: a key length of {n} exceeds the {keys} keys")));
            }
        }
        Ok(())
    }

    /// The keys that query `i` of batch entry `b` may see, as a range within `0..keys`.
    pub fn visible(&self, b: usize, i: usize, keys: usize) -> Range<usize> {
        // Offset and window may be any number of 64 bits.
        let (m, pos) = (keys as i128, i as i128 + i128::from(self.offset(b)));
        let (mut lo, mut hi) = (0, m);
        if self.causal {
            hi = hi.min(pos + 1);
        }
        if let Some(w) = self.window {
            lo = lo.max(pos + 1 - w as i128);
        }
        if let Some(packed) = &self.packed {
            if pos < 0 || pos >= m {
                return 0..0;
            }
            let own = sequence(packed, b, pos as usize);
            lo = lo.max(own.start as i128);
            hi = hi.min(own.end as i128);
        }
        if let Some(lengths) = &self.kv_len {
            hi = hi.min(lengths[if lengths.len() == 1 { 0 } else { b }] as i128);
        }
        let lo = lo.clamp(0, m);
        lo as usize..hi.clamp(lo, m) as usize
    }
}

/// The range from the first to the last key that one of the rows sees, from the visible keys of each.
pub(crate) fn reach(visible: &[Range<usize>]) -> Range<usize> {
    let nonempty = visible.iter().filter(|r| !r.is_empty());
    let (lo, hi) = nonempty.fold((usize::MAX, 0), |(lo, hi), r| (lo.min(r.start), hi.max(r.end)));
    if lo < hi { lo..hi } else { 0..0 }
}

/// Fails unless each list rises from 0 to `len`, and there is one list, or one per batch entry.
pub(crate) fn check_boundaries(packed: &[Vec<usize>], batch: usize, len: usize) -> Result<()> {
    fits("lists of packed boundaries", packed.len(), batch)?;
    for (b, cumulative) in packed.iter().enumerate() {
        let rises = cumulative.windows(2).all(|w| w[0] <= w[1]);
        if cumulative.first() != Some(&0) || cumulative.last() != Some(&len) || !rises {
            return Err(Error::Invalid(format!(
                "mask: packed boundaries {cumulative:?} of batch entry {b} do not rise from 0 to {len} keys"
            )));
        }
    }
    Ok(())
}

/// The packed sequence that holds position `at`, which lies before the last boundary.
pub(crate) fn sequence(packed: &[Vec<usize>], b: usize, at: usize) -> Range<usize> {
    let cumulative = &packed[if packed.len() == 1 { 0 } else { b }];
    // The last boundary at or before the position opens its sequence.
    let next = cumulative.partition_point(|&c| c <= at);
    cumulative[next - 1]..cumulative[next]
}

fn fits(what: &str, n: usize, batch: usize) -> Result<()> {
    if n == 1 || n == batch {
        return Ok(());
    }
    Err(Error::Invalid(format!("mask: {n} {what} for a batch of {batch} (1 or {batch} expected)")))
}
