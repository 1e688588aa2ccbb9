//! Rows that are read once, in the dtype in which they are stored: weights, and the keys and values of a cache.

use half::slice::HalfFloatSliceExt;

use crate::backend::cpu::element::{Bf16, Element, F16};
use crate::backend::cpu::lanes::{LANES, Lanes};
use crate::backend::cpu::prefetch::prefetch_at;

/// Elements of a row that are multiplied in one step: those of two registers, whose sums do not depend on each other.
pub(crate) const STEP: usize = 2 * LANES;
/// Bytes between an element that is multiplied and the one that is prefetched meanwhile.
pub(crate) const PREFETCH_DISTANCE_BYTES: usize = 1 << 12;

/// An element type that is widened to f32 as it is read.
pub(crate) trait Stored: Element<Acc = f32> {
    /// The elements as f32.
    fn load<V: Lanes>(x: &[Self; LANES]) -> V::Float;
}

impl Stored for f32 {
    #[inline(always)]
    fn load<V: Lanes>(x: &[f32; LANES]) -> V::Float {
        V::load_float(x)
    }
}

impl Stored for F16 {
    #[inline(always)]
    fn load<V: Lanes>(x: &[F16; LANES]) -> V::Float {
        V::load_half(bytes_of(x.reinterpret_cast()))
    }
}

impl Stored for Bf16 {
    #[inline(always)]
    fn load<V: Lanes>(x: &[Bf16; LANES]) -> V::Float {
        V::load_bfloat(bytes_of(x.reinterpret_cast()))
    }
}

/// The bytes of 16 numbers.
#[inline(always)]
fn bytes_of(x: &[u16]) -> &[u8; 2 * LANES] {
    let Some(bytes) = bytemuck::cast_slice(x).first_chunk() else { unreachable!("16 numbers") };
    bytes
}

/// The products of `R` rows with `W` stored rows. The order of the additions is the same for all `R` and `W`.
#[inline(always)]
pub(crate) fn row_products<V: Lanes, T: Stored, const R: usize, const W: usize>(
    x: [&[f32]; R],
    stored: [&[T]; W],
) -> [[f32; W]; R] {
    let parts = stored.map(|row| row.as_chunks::<STEP>());
    let steps = parts.iter().map(|(steps, _)| steps.len()).min().unwrap_or_default();
    let mut sums = [[[V::splat_float(0.0); 2]; W]; R];
    for i in 0..steps {
        for (steps, _) in parts {
            prefetch_at(&steps[i], PREFETCH_DISTANCE_BYTES);
        }
        for half in 0..2 {
            for w in 0..W {
                let row = T::load::<V>(&parts[w].0[i].as_chunks::<LANES>().0[half]);
                for r in 0..R {
                    let Some(x) = x[r][i * STEP + half * LANES..].first_chunk() else {
                        unreachable!("rows of one length")
                    };
                    sums[r][w][half] = V::plus(sums[r][w][half], V::times(V::load_float(x), row));
                }
            }
        }
    }
    let mut totals = [[0.0; W]; R];
    for r in 0..R {
        for w in 0..W {
            let mut tail = 0.0;
            for (x, row) in x[r][steps * STEP..].iter().zip(parts[w].1) {
                tail += x * row.up();
            }
            totals[r][w] = V::total(V::plus(sums[r][w][0], sums[r][w][1])) + tail;
        }
    }
    totals
}
