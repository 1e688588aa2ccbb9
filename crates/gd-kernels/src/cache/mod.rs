//! Key-value caches, and data derived from cached keys.

pub(crate) mod append_buffer;
pub(crate) mod int8_keys;
pub(crate) mod key_bias;
pub(crate) mod key_cache;
