//! Dropout whose mask is a function of a seed and of the place of an element.

use candle_core::Tensor;

use crate::backend::cpu::parallel::for_chunks;
use crate::error::{Error, Result};

/// Elements of a mask that are drawn at once.
const CHUNK_ELEMENTS: usize = 1 << 13;

/// Dropout (Srivastava et al., 2014): an element becomes 0 with this probability, and is otherwise divided by the probability
/// of the opposite.
///
/// Whether an element is dropped depends on the seed and on its place alone, so that a pass can be computed again, in parts,
/// on any device and by any number of threads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The probability that an element is dropped, in [0, 1).
    pub probability: f64,
    /// The seed of the mask.
    pub seed: u64,
    /// The place of the first element; the others follow in the order of the elements.
    pub first: u64,
}

impl Dropout {
    pub(super) fn validate(self) -> Result<()> {
        if (0.0..1.0).contains(&self.probability) {
            return Ok(());
        }
        Err(Error::Invalid(format!("a dropout of {}; from 0 to below 1 is expected", self.probability)))
    }

    /// The factor of the elements that are not dropped.
    pub(super) fn factor(self) -> f64 {
        1.0 / (1.0 - self.probability)
    }

    /// 1 for every element of `like` that is left, and 0 for those that are dropped, in its shape and dtype.
    pub(super) fn mask(self, like: &Tensor) -> candle_core::Result<Tensor> {
        // An element is dropped if a number that is uniform in 0..2^64 lies below this.
        let below = (self.probability * 2f64.powi(64)) as u64;
        let mut mask = vec![0f32; like.elem_count()];
        for_chunks(&mut mask, CHUNK_ELEMENTS, |chunk, values| {
            let first = self.first.wrapping_add((chunk * CHUNK_ELEMENTS) as u64);
            for (i, value) in values.iter_mut().enumerate() {
                *value = f32::from(u8::from(random(self.seed, first.wrapping_add(i as u64)) >= below));
            }
        });
        Tensor::from_vec(mask, like.shape(), like.device())?.to_dtype(like.dtype())
    }
}

/// Number `place` of SplitMix64 (Steele, Lea and Flood, 2014) with this seed.
fn random(seed: u64, place: u64) -> u64 {
    let mut z = seed.wrapping_add(place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn mask(dropout: Dropout, rows: usize) -> Vec<f32> {
        let like = Tensor::zeros((rows, 100), DType::F32, &Device::Cpu).unwrap();
        dropout.mask(&like).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn random_numbers_are_those_of_the_published_generator() {
        // Its first outputs with the seed 1234567.
        let expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431];
        assert_eq!([0, 1, 2, 3].map(|place| random(1_234_567, place)), expected);
    }

    #[test]
    fn the_share_of_dropped_elements_is_the_probability() {
        for probability in [0.0, 0.05, 0.5, 0.9] {
            let mask = mask(Dropout { probability, seed: 1, first: 0 }, 2000);
            let dropped = mask.iter().filter(|&&value| value == 0.0).count() as f64 / mask.len() as f64;
            assert!((dropped - probability).abs() < 4.0 * (0.25 / mask.len() as f64).sqrt(), "{dropped}");
        }
    }

    #[test]
    fn parts_have_the_mask_of_the_whole_and_seeds_differ() {
        let dropout = Dropout { probability: 0.5, seed: 7, first: 300 };
        let whole = mask(dropout, 200);
        assert_eq!(mask(Dropout { first: 300 + 50 * 100, ..dropout }, 150), whole[5000..]);
        let same =
            mask(Dropout { seed: 8, ..dropout }, 200).iter().zip(&whole).filter(|(a, b)| a == b).count();
        assert!((9_000..11_000).contains(&same), "{same} of 20000 elements");
    }
}
