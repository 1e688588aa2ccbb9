//! Activations as 16-bit integers.

use candle_core::{Layout, Storage};

use super::blocks::GROUP;
use crate::backend::cpu::parallel::vectorize;
use crate::backend::cpu::view::Rows;
use crate::error::Result;

/// The greatest integer.
const MAX: f32 = 32767.0;

/// Rows of activations, in groups of 32 elements: an element is the product of its integer and the scale of its group.
pub(super) struct Rows16 {
    pub(super) count: usize,
    /// Groups of a row.
    pub(super) groups: usize,
    /// Pairs of integers, the first of which is in the low half: 16 for each group.
    pub(super) pairs: Vec<u32>,
    /// The scales of the groups.
    pub(super) scales: Vec<f32>,
    /// The sums of the integers of the two halves of each group.
    pub(super) sums: Vec<[i32; 2]>,
}

impl Rows16 {
    /// Rounds the rows of a tensor in f32 whose last dimension is contiguous and a multiple of 32.
    pub(super) fn new(storage: &Storage, layout: &Layout) -> Result<Self> {
        let rows = Rows::<f32>::new(storage, layout)?;
        let groups = rows.len() / GROUP;
        let total = rows.count() * groups;
        let mut new = Self {
            count: rows.count(),
            groups,
            pairs: vec![0; total * GROUP / 2],
            scales: vec![0.0; total],
            sums: vec![[0; 2]; total],
        };
        vectorize(
            #[inline(always)]
            || {
                for r in 0..rows.count() {
                    for (g, x) in rows.row(r).chunks_exact(GROUP).enumerate() {
                        let at = r * groups + g;
                        let pairs = &mut new.pairs[at * GROUP / 2..][..GROUP / 2];
                        (new.scales[at], new.sums[at]) = round(x, pairs);
                    }
                }
            },
        );
        Ok(new)
    }
}

/// Rounds a group. Returns its scale and the sums of the halves.
#[inline(always)]
fn round(x: &[f32], pairs: &mut [u32]) -> (f32, [i32; 2]) {
    // Without the sign bit, the bits of floats are ordered as the floats, with NaN above infinity.
    let most = x.iter().fold(0, |most, x| (x.to_bits() & 0x7fff_ffff).max(most));
    let most = f32::from_bits(most);
    let inverse = MAX / most;
    if !most.is_finite() || !inverse.is_finite() {
        // Magnitudes below 1e-34 are rounded to 0.
        pairs.fill(0);
        return (if most.is_finite() { 0.0 } else { f32::NAN }, [0; 2]);
    }
    let mut sums = [0; 2];
    for (i, (pair, x)) in pairs.iter_mut().zip(x.chunks_exact(2)).enumerate() {
        let [a, b] = [x[0], x[1]].map(
            #[inline(always)]
            |x| (x * inverse).round_ties_even() as i32,
        );
        *pair = a as u32 & 0xFFFF | (b as u32) << 16;
        sums[i / (GROUP / 4)] += a + b;
    }
    (most / MAX, sums)
}
