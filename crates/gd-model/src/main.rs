//! The gd program.
fn main() {}
