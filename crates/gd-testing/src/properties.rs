//! Property tests.

use proptest::test_runner::{Config, RngSeed};

/// The configuration of a property test: this number of generated cases, which are the same in every run, so that a test
/// does not depend on luck. The environment variable `PROPTEST_RNG_SEED` has the seed of others.
#[must_use]
pub fn properties(cases: u32) -> Config {
    let config = Config::default();
    let rng_seed = match config.rng_seed {
        RngSeed::Random => RngSeed::Fixed(0),
        given => given,
    };
    Config { cases, rng_seed, failure_persistence: None, ..config }
}
