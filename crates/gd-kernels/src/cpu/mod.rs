//! The CPU backend: blocked, threaded, the same bits for any number of threads.

pub(crate) mod best;
pub(crate) mod check;
pub(crate) mod choose;
pub(crate) mod inverse;
pub(crate) mod pack;
pub(crate) mod rows;
pub(crate) mod scan;
pub(crate) mod view;
