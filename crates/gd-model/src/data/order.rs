//! The order of training: which window of the text comes at which place. It is computed from seed and
//! place alone, so nothing is stored, and a run goes on at any step, with any number of ranks.

use std::ops::Range;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Rounds of the Feistel network; from about four on its permutations look random, also short ones.
const ROUNDS: usize = 8;

/// The places of one micro-batch in the sequence of all windows of a run, or of what one of `world`
/// data-parallel processes takes of it. `micro` counts the micro-batches from the start of the run, each of
/// `batch` windows. The shares of all ranks, in order, are the whole: the places of rank 0 of 1.
pub fn places(micro: u64, batch: usize, rank: usize, world: usize) -> Range<u64> {
    let first = micro * batch as u64;
    let cut = |rank: usize| first + (batch as u128 * rank as u128 / world.max(1) as u128) as u64;
    cut(rank)..cut(rank + 1)
}

/// A random order of `0..len`, computed one place at a time: a Feistel network over the next power of 4,
/// applied again until the result lies below `len`.
#[derive(Clone, Debug)]
pub struct Permutation {
    len: u64,
    /// Bits of each half of a number.
    half: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The order that `rng` draws.
    pub fn new(len: u64, rng: &mut impl Rng) -> Self {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        Self { len, half: bits.div_ceil(2).max(1), keys: std::array::from_fn(|_| rng.random()) }
    }

    /// What comes at place `i`, which is below the length.
    pub fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.len);
        let mut x = i;
        // The network permutes a set of which `0..len` is more than a quarter, so the cycle through i comes
        // back below `len`, and soon.
        loop {
            x = self.network(x);
            if x < self.len {
                return x;
            }
        }
    }

    fn network(&self, x: u64) -> u64 {
        let low = u64::MAX >> (u64::BITS - self.half);
        let (mut left, mut right) = (x >> self.half, x & low);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & low));
        }
        left << self.half | right
    }
}

/// The finaliser of SplitMix64: every input bit changes every output bit with probability 1/2.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// One pass over a text of `tokens`, cut into windows of `context` inputs and as many targets. Its phase,
/// the start of the first window, is random, so that over the epochs a window may start anywhere.
#[derive(Clone, Debug)]
pub(super) struct Epoch {
    phase: usize,
    context: usize,
    order: Permutation,
}

impl Epoch {
    /// How many windows every epoch has. `tokens` exceeds `context`.
    pub(super) fn windows(tokens: usize, context: usize) -> usize {
        // One window less than fit leaves room for the phase.
        (tokens.saturating_sub(1) / context.max(1)).saturating_sub(1).max(1)
    }

    /// Epoch `number` of a run. `tokens` exceeds `context`.
    pub(super) fn new(seed: u64, number: u64, tokens: usize, context: usize) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number);
        let count = Self::windows(tokens, context);
        let phase = rng.random_range(0..=tokens - 1 - count * context);
        Self { phase, context, order: Permutation::new(count as u64, &mut rng) }
    }

    /// The first token of the window at `place`, which is below the number of windows.
    pub(super) fn start(&self, place: u64) -> usize {
        self.phase + self.order.at(place) as usize * self.context
    }
}
