//! Nothing: the dependencies in the manifest are the purpose of this package.
#![forbid(unsafe_code)]
