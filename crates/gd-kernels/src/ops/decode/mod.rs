//! `decode`: one or a few queries against a key-value cache.

#[cfg(feature = "gpu")]
pub(crate) mod gpu;
pub(crate) mod paged;

use crate::cache::key_bias::BIAS_TILE;

/// Most queries a sequence.
pub const MAX_QUERIES: usize = 16;
/// What the keys of a page are a multiple of: tiles do not cross pages.
pub(crate) const PAGE_STEP: usize = BIAS_TILE;
