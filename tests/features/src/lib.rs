//! Empty: this package exists for the dependencies in its manifest.
#![forbid(unsafe_code)]
