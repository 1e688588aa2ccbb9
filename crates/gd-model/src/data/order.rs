//! The order of the training windows. The window at a place in the run is computed from the seed and the place alone. So
//! no order is stored, and a run can be resumed at any step with any number of ranks.

use std::ops::Range;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The number of rounds of the Feistel network. From about four rounds on its permutations, even short ones, appear
/// random.
const ROUNDS: usize = 8;

/// The places of a micro-batch in the sequence of all windows of a run that belong to one of `world` data-parallel
/// processes. `micro` is the number of the micro-batch, counted from 0 over the whole run; each has `batch` windows. The
/// ranges of all ranks in their order form the micro-batch.
pub fn places(micro: u64, batch: usize, rank: usize, world: usize) -> Range<u64> {
    let first = micro * batch as u64;
    let start = |rank: usize| first + (batch as u128 * rank as u128 / world.max(1) as u128) as u64;
    start(rank)..start(rank + 1)
}

/// A random permutation of `0..len` that is computed element by element: a Feistel network over the next power of 4,
/// applied again until the result is below `len` (cycle walking).
#[derive(Clone, Debug)]
pub struct Permutation {
    len: u64,
    /// The number of bits in each half of a number.
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// A permutation drawn from `rng`.
    pub fn new(len: u64, rng: &mut impl Rng) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self { len, half_bits: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| rng.random()) }
    }

    /// The element at place `i`, which must be below the length.
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.len);
        let mut x = i;
        // The network permutes a set of which `0..len` is more than a quarter, so the cycle through i returns below `len`
        // after a few rounds.
        loop {
            x = self.network(x);
            if x < self.len {
                return x;
            }
        }
    }

    fn network(&self, x: u64) -> u64 {
        let low = u64::MAX >> (u64::BITS - self.half_bits);
        let (mut left, mut right) = (x >> self.half_bits, x & low);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & low));
        }
        left << self.half_bits | right
    }
}

/// The finalizer of SplitMix64: a change of an input bit changes each output bit with a probability near 1/2.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// One pass over a text, divided into windows of `context` inputs and as many targets. The phase, which is the start of
/// the first window, is random, so that windows of different epochs start at different tokens.
#[derive(Clone, Debug)]
pub(super) struct Epoch {
    phase: usize,
    context: usize,
    order: Permutation,
}

impl Epoch {
    /// The number of windows of an epoch. `tokens` must exceed `context`.
    pub(super) fn windows(tokens: usize, context: usize) -> usize {
        // One window less than fit, so that the phase can vary.
        (tokens.saturating_sub(1) / context.max(1)).saturating_sub(1).max(1)
    }

    /// Epoch `number` of a run. `tokens` must exceed `context`.
    pub(super) fn new(seed: u64, number: u64, tokens: usize, context: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number);
        let count = Self::windows(tokens, context);
        let phase = rng.random_range(0..=tokens - 1 - count * context);
        Self { phase, context, order: Permutation::new(count as u64, &mut rng) }
    }

    /// The first token of the window at `place`, which must be below the number of windows.
    pub(super) fn start(&self, place: u64) -> usize {
        self.phase + self.order.at(place) as usize * self.context
    }
}
