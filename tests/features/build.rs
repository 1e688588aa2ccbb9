//! Nothing to build: with a build script, its dependencies count.
fn main() {}
