//! Problems whose values have an offset that is large beside their spread, and the check of their candidates.

use gd_kernels::Score;
use gd_kernels::reference::{Problem, scan};
use rand::RngExt;

use super::{Case, Kind, Spec, rng, uniform};
use crate::ensure;
use crate::suite::Verdict;

/// Which vectors have the offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Queries and keys.
    Both,
    /// Keys.
    Keys,
    /// Queries.
    Queries,
    /// Queries and keys, of which a few keys are far away.
    Outliers,
    /// Queries and keys, each of one of two clusters; the second has few keys.
    Clusters,
}

const PLACES: [Place; 5] = [Place::Both, Place::Keys, Place::Queries, Place::Outliers, Place::Clusters];

/// Offsets in units of the spread of the values.
pub const OFFSETS: [f64; 4] = [0.0, 10.0, 1e3, 1e4];

/// Offset from which every row is ranked by differences, unless only the queries have it.
const LARGE_OFFSET: f64 = 1e3;

/// One key of this many is an outlier, or in the second cluster. It is prime, so that keys at a distance of a power of
/// two are not both.
const FEW: usize = 13;

impl Spec {
    /// The same problem with the offset of a seed, and whether all of its rows are ranked by differences.
    pub fn with_offset_of(mut self, seed: u64) -> (Self, bool) {
        let (mut offset, mut place) = (OFFSETS[seed as usize % 4], PLACES[seed as usize / 4 % 5]);
        let dot = self.raw.score == Score::Dot;
        if dot && matches!(place, Place::Outliers | Place::Clusters) {
            // The dot product with an outlier has no part that the others have, too.
            place = Place::Keys;
        }
        if matches!(self.kind, Kind::Duplicates | Kind::Integer) {
            // Three equal keys do not show that there is an offset.
            (offset, place) = (if dot { 0.0 } else { offset }, Place::Both);
        }
        if dot && offset > LARGE_OFFSET {
            // Keys of few bits are then equal, and a prior is lost beside their dot product.
            self.prior = None;
        }
        (self.with_offset(offset, place), offset >= LARGE_OFFSET && place != Place::Queries)
    }

    /// The same problem with an offset of `offset` times the spread of the values, which differs between key-value heads.
    fn with_offset(mut self, offset: f64, place: Place) -> Self {
        let mut rng = rng(self.seed ^ 0x0ff5_e700);
        let Problem { batch, q_heads, kv_heads, queries, keys, dim, .. } = self.raw;
        // Every coordinate has at least half of the offset.
        let centers: Vec<f64> = uniform(&mut rng, batch * kv_heads * dim)
            .iter()
            .map(|x| offset * (0.5 + 0.5 * x.abs()).copysign(*x))
            .collect();
        let few = |row: usize| row % FEW == 5;
        for (row, k) in self.raw.k.chunks_mut(dim).enumerate().filter(|_| place != Place::Queries) {
            let center = &centers[row / keys * dim..][..dim];
            let (scale, sign) = match place {
                Place::Outliers if few(row % keys) => (3.0 * offset, 1.0),
                Place::Clusters if few(row % keys) => (1.0, -1.0),
                _ => (1.0, 1.0),
            };
            k.iter_mut().zip(center).for_each(|(k, c)| *k = scale * *k + sign * c);
        }
        for (row, q) in self.raw.q.chunks_mut(dim).enumerate().filter(|_| place != Place::Keys) {
            let (b, h) = (row / queries / q_heads, row / queries % q_heads);
            let center = &centers[(b * kv_heads + h / (q_heads / kv_heads)) * dim..][..dim];
            let sign = if place == Place::Clusters && rng.random_bool(0.5) { -1.0 } else { 1.0 };
            q.iter_mut().zip(center).for_each(|(q, c)| *q += sign * c);
        }
        // Nothing is exact any more, and the values are neither huge nor tiny.
        self.kind = Kind::Plain;
        self
    }
}

impl Case {
    /// Checks the candidates of every row, `slots` each: their energies, and that no other key has a lower energy by more
    /// than the bound of the row, which is that of energies computed by differences (of the dot product: of keys less one
    /// of the keys) times `slack`. Protected keys are not covered.
    pub fn check_by_differences(&self, index: &[i32], energy: &[f64], slots: usize, slack: f64) -> Verdict {
        let (p, u) = (&self.problem, super::roundoff(super::acc(self.dtype)));
        let all = scan(p, p.keys);
        for (row, (b, h, i)) in p.rows() {
            let at = |text: String| format!("{text}, row {b} {h} {i} of {}", self.name());
            let expected = row * all.width..(row + 1) * all.width;
            let (ranked, energies) = (&all.index[expected.clone()], &all.energy[expected]);
            let listed = ranked.iter().take_while(|j| **j >= 0).count();
            let (index, energy) = (&index[row * slots..][..slots], &energy[row * slots..][..slots]);
            let used = index.iter().take_while(|j| **j >= 0).count();
            ensure!(used == slots.min(listed), "{}", at(format!("{used} of {listed} keys")));
            let query = &p.q[p.q_at(b, h, i)];
            let mut found: Vec<(usize, f64)> = Vec::new();
            for (&j, &e) in index[..used].iter().zip(energy) {
                let place = ranked[..listed].iter().position(|x| *x == j);
                let Some(place) = place else { return Err(at(format!("key {j} is no candidate"))) };
                let (limit, want) = (self.energy_bound(query, (b, h), j as usize), energies[place]);
                ensure!((e - want).abs() <= limit, "{}", at(format!("energy of {j}: {e} instead of {want}")));
                found.push((place, want));
            }
            found.sort_by_key(|x| x.0);
            ensure!(found.windows(2).all(|x| x[0].0 < x[1].0), "{}", at(format!("a key twice in {index:?}")));
            let best = ranked.first().map_or(0, |&j| j.max(0) as usize);
            for ((place, e), want) in found.iter().zip(energies) {
                let j = ranked[*place] as usize;
                let size = match p.score {
                    Score::Energy => self.energy_size(query, (b, h), j),
                    Score::Dot => self.relative_size(query, (b, h), [j, best]),
                };
                let bound = slack * u * (p.dim + 4) as f64 * size;
                ensure!(
                    e - want <= bound,
                    "{}",
                    at(format!("key {j} has {e}; {want} is possible, bound {bound}"))
                );
            }
        }
        Ok(())
    }

    /// `beta sum |q (k - c)|` and the priors.
    fn relative_size(&self, query: &[f64], (b, h): (usize, usize), [j, center]: [usize; 2]) -> f64 {
        let p = &self.problem;
        let (k, c) = (&p.k[p.k_at(b, h, j)], &p.k[p.k_at(b, h, center)]);
        let sum: f64 = query.iter().zip(k.iter().zip(c)).map(|(q, (k, c))| (q * (k - c)).abs()).sum();
        p.beta[h] * sum + p.prior_of(b, h, j).abs() + p.prior_of(b, h, center).abs()
    }
}
