//! The CPU backend: blocked, threaded, the same bits for any number of threads.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod best;
pub(crate) mod certified;
pub(crate) mod check;
pub(crate) mod choose;
pub(crate) mod few;
pub(crate) mod filter;
pub(crate) mod integer;
pub(crate) mod inverse;
pub(crate) mod lists;
pub(crate) mod native;
pub(crate) mod pack;
pub(crate) mod prefetch;
pub(crate) mod quantize;
pub(crate) mod rows;
pub(crate) mod scan;
pub(crate) mod settle;
pub(crate) mod tile;
pub(crate) mod view;
#[cfg(target_arch = "x86_64")]
pub(crate) mod x86;
