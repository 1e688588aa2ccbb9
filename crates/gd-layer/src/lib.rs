//! candle Modules for selection attention.
#![forbid(unsafe_code)]
