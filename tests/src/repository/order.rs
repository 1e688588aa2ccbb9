//! The order of the modules of each crate, and where the terms of the field are enforced.

use super::imports::Order;

/// The order of the modules, crate by crate.
pub const ORDERS: &[Order] = &[];

/// Folders whose names must not use a refused word.
pub const TERMS_ENFORCED: &[&str] = &[];
