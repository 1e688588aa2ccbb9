//! The rules of this repository, as functions over its files. The tests of this package apply them.
#![forbid(unsafe_code)]

pub mod repository;
