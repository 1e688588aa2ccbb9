//! The recall task: queries near one of 64 keys, which should return its value, and queries that belong to none.

use candle_core::{D, Device, Tensor};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use crate::error::Result;

/// Keys of a bank.
const KEYS: usize = 64;
/// Dimensions of keys, queries and values.
pub(super) const DIMENSIONS: usize = 16;
/// Queries of a group.
const QUERIES: usize = 4096;
/// Length of the noise of a query, on average, relative to its key.
const NOISE: f64 = 0.8;
/// Random streams of the banks; those of the cells of X have lower numbers.
const FIRST_STREAM: u64 = 1 << 32;

/// A bank of unit keys and normal values, with groups of unit queries.
#[derive(Debug, Clone)]
pub(super) struct Recall {
    /// `[64, 16]`.
    pub(super) keys: Tensor,
    /// `[64, 16]`.
    pub(super) values: Tensor,
    /// Queries near keys by which mechanisms are tuned.
    pub(super) tuning: Queries,
    /// Queries near keys: `unit(k_i + 0.8 e)` with e of length 1 on average.
    pub(super) inside: Queries,
    /// Random unit vectors.
    pub(super) far: Queries,
    /// Queries between two keys: `unit(k_i + k_j + 0.8 e)`.
    pub(super) mix: Queries,
}

/// A group of queries.
#[derive(Debug, Clone)]
pub(super) struct Queries {
    /// `[Q, 16]`.
    pub(super) q: Tensor,
    /// Products with the keys `[Q, 64]`.
    pub(super) scores: Tensor,
    /// The key with the greatest product.
    pub(super) nearest: Vec<usize>,
    /// The key that a query belongs to; no entries for queries that belong to none.
    pub(super) label: Vec<usize>,
}

impl Recall {
    /// The bank of this number.
    ///
    /// # Errors
    /// An error of the device.
    pub(super) fn new(seed: u64, bank: u64) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(FIRST_STREAM + bank);
        let rng = &mut rng;
        let keys = unit_rows(&normal(rng, KEYS, DIMENSIONS)?)?;
        let values = normal(rng, KEYS, DIMENSIONS)?;
        let noise = |rng: &mut ChaCha8Rng| {
            Ok::<_, crate::Error>((normal(rng, QUERIES, DIMENSIONS)? * (NOISE / (DIMENSIONS as f64).sqrt()))?)
        };
        let near = |rng: &mut ChaCha8Rng| {
            let label: Vec<usize> = (0..QUERIES).map(|_| rng.random_range(0..KEYS)).collect();
            Queries::new((chosen(&keys, &label)? + noise(rng)?)?, &keys, label)
        };
        let (inside, tuning) = (near(rng)?, near(rng)?);
        let far = Queries::new(normal(rng, QUERIES, DIMENSIONS)?, &keys, Vec::new())?;
        let first: Vec<usize> = (0..QUERIES).map(|_| rng.random_range(0..KEYS)).collect();
        // One of the other keys.
        let second: Vec<usize> = first.iter().map(|i| (i + rng.random_range(1..KEYS)) % KEYS).collect();
        let between = ((chosen(&keys, &first)? + chosen(&keys, &second)?)? + noise(rng)?)?;
        let mix = Queries::new(between, &keys, Vec::new())?;
        Ok(Self { keys, values, tuning, inside, far, mix })
    }
}

impl Queries {
    /// The queries in the direction of these vectors `[Q, 16]`.
    fn new(vectors: Tensor, keys: &Tensor, label: Vec<usize>) -> Result<Self> {
        let q = unit_rows(&vectors)?;
        let scores = q.matmul(&keys.t()?)?;
        let nearest = scores.argmax(D::Minus1)?.to_vec1::<u32>()?.iter().map(|&j| j as usize).collect();
        Ok(Self { q, scores, nearest, label })
    }

    /// The number of queries.
    pub(super) fn len(&self) -> usize {
        self.nearest.len()
    }
}

/// The rows of `x` at these numbers.
pub(super) fn chosen(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let rows: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    Ok(x.index_select(&Tensor::new(rows, x.device())?, 0)?)
}

/// Standard normal numbers `[rows, columns]` in f64.
pub(super) fn normal(rng: &mut impl Rng, rows: usize, columns: usize) -> Result<Tensor> {
    let values: Vec<f64> = (0..rows * columns).map(|_| rng.sample(StandardNormal)).collect();
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

/// The rows of a matrix scaled to length 1.
pub(super) fn unit_rows(x: &Tensor) -> Result<Tensor> {
    Ok(x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)?)
}
