//! Key-value caches, and data derived from cached keys that makes decoding faster.
//!
//! A cache holds rows for several *sequences*: the entries of a batch, or the pages of a
//! [`PagedCache`](crate::PagedCache). Every sequence has its own length, and [`SequenceCache`] is the interface that
//! all caches share.

pub(crate) mod append_buffer;
pub(crate) mod int8_keys;
pub(crate) mod key_bias;
pub(crate) mod key_cache;
pub(crate) mod key_shape;
pub(crate) mod paged;
pub(crate) mod position;
mod rounded;
pub(crate) mod sequence_cache;

pub use self::append_buffer::AppendBuffer;
pub use self::int8_keys::Int8Keys;
pub use self::key_bias::KeyBias;
pub use self::key_cache::{CachedKeys, DecodeUse, KeyCache};
pub use self::key_shape::KeyShape;
pub use self::paged::PagedCache;
pub use self::position::WritePosition;
pub use self::rounded::rounded_for_cache;
pub use self::sequence_cache::SequenceCache;
