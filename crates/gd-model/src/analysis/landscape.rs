//! The energy landscape of one query: on the segments (passages) from the query to the two keys of least energy, and on
//! a plane through the query and two keys.
//!
//! With the query q `[D]`, a key k `[D]`, the weight alpha of the query's well and the inverse bandwidth beta, the
//! energy of a point s is `Phi(s) = -ln(alpha e^(-beta |s-q|^2) + (1-alpha) e^(-beta |s-k|^2))`. Everything is f64.

use gd_kernels::CoherenceMode;
use gd_kernels::reference::theory::{Coherence, Pair, minimal_energy, passage_energy};
use gd_kernels::reference::{distance2, dot};
use serde::Serialize;

use crate::error::{Error, Result};

/// A direction counts as collinear with the first axis if its component orthogonal to that axis is at most this fraction
/// of its length.
const COLLINEAR_FRACTION: f64 = 1e-9;

/// A key that is visible to the query.
#[derive(Debug, Clone, PartialEq)]
pub struct VisibleKey {
    /// Its position.
    pub position: usize,
    /// The key `[D]`.
    pub key: Vec<f64>,
    /// Its prior `b`, subtracted from its energy.
    pub prior: f64,
}

/// A query `[D]`, the keys visible to it, and the parameters of its head.
#[derive(Debug, Clone, PartialEq)]
pub struct Landscape {
    query: Vec<f64>,
    keys: Vec<VisibleKey>,
    alpha: f64,
    beta: f64,
}

/// The coherence point of a pair under one mode.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Point {
    /// The coordinate `u*` on the segment from the query (0) to the key (1).
    pub u: f64,
    /// The energy at this point; with [`CoherenceMode::Global`] the minimal energy `E*`.
    #[serde(rename = "E")]
    pub energy: f64,
}

/// The jump from the query to a key.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Jump {
    /// The position of the key.
    pub key: usize,
    /// The jump length `|k - q|`.
    #[serde(rename = "L")]
    pub length: f64,
    /// `beta L^2`.
    pub t: f64,
    /// The selection energy `t - b` with the prior `b` of the key.
    pub energy: f64,
    /// The coherence point of least energy.
    pub global: Point,
    /// The coherence point that bisection on the passage finds.
    pub passage: Point,
}

impl Jump {
    /// Whether the point of least energy and the root that bisection finds are different.
    pub fn has_two_roots(&self) -> bool {
        (self.global.u - self.passage.u).abs() > 1e-6
    }
}

/// A plane through the query, with two orthonormal axes `[D]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Plane {
    /// The positions of the one or two keys that span it.
    pub keys: Vec<usize>,
    /// Whether the second axis is arbitrary because the query and the keys are collinear.
    pub free: bool,
    axes: [Vec<f64>; 2],
}

impl Landscape {
    /// Creates the landscape of `query` with the visible `keys`, `alpha` in (0, 1) and `beta` greater than 0.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a parameter, coordinate or prior that is out of range, for a key whose length differs
    /// from that of the query, and for an empty list of keys.
    pub fn new(query: Vec<f64>, keys: Vec<VisibleKey>, alpha: f64, beta: f64) -> Result<Self> {
        let invalid = |text: String| Err(Error::Invalid(text));
        if !(alpha > 0.0 && alpha < 1.0) {
            return invalid(format!("alpha {alpha} is not between 0 and 1"));
        }
        if !(beta > 0.0 && beta.is_finite()) {
            return invalid(format!("beta {beta} is not a number above 0"));
        }
        if keys.is_empty() {
            return invalid("the query sees no key".into());
        }
        let not_finite = |row: &[f64]| row.iter().position(|x| !x.is_finite());
        if let Some(d) = not_finite(&query) {
            return invalid(format!("coordinate {d} of the query is {}", query[d]));
        }
        for VisibleKey { position, key, prior } in &keys {
            if key.len() != query.len() {
                let (actual, expected) = (key.len(), query.len());
                return invalid(format!("key {position} has {actual} coordinates, and the query {expected}"));
            }
            if let Some(d) = not_finite(key) {
                return invalid(format!("coordinate {d} of key {position} is {}", key[d]));
            }
            if !prior.is_finite() {
                return invalid(format!("the prior of key {position} is {prior}"));
            }
        }
        Ok(Self { query, keys, alpha, beta })
    }

    /// The number of keys visible to the query.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// The winner and, if there is more than one key, the runner-up: the keys of lowest selection energy. Of equal
    /// energies, the earlier key wins.
    pub fn winner_and_runner_up(&self) -> (Jump, Option<Jump>) {
        let energy = |n: usize| self.beta * distance2(&self.query, &self.keys[n].key) - self.keys[n].prior;
        let least = |skip: Option<usize>| {
            let rest = (0..self.keys.len()).filter(|n| Some(*n) != skip);
            rest.min_by(|a, b| energy(*a).total_cmp(&energy(*b)))
        };
        // `new` refuses an empty list of keys.
        let winner = least(None).unwrap_or(0);
        (self.jump(&self.keys[winner]), least(Some(winner)).map(|n| self.jump(&self.keys[n])))
    }

    fn jump(&self, visible_key: &VisibleKey) -> Jump {
        let length = self.pair(&visible_key.key).length;
        let t = self.beta * length * length;
        let point = |mode| {
            let least = minimal_energy(t, self.alpha, mode);
            Point { u: least.at.u, energy: least.value }
        };
        Jump {
            key: visible_key.position,
            length,
            t,
            energy: t - visible_key.prior,
            global: point(CoherenceMode::Global),
            passage: point(CoherenceMode::Passage),
        }
    }

    fn pair<'a>(&'a self, key: &'a [f64]) -> Pair<'a> {
        Pair::new(&self.query, key)
    }

    fn visible_key(&self, position: usize) -> Result<&VisibleKey> {
        let key = self.keys.iter().find(|key| key.position == position);
        key.ok_or_else(|| Error::Invalid(format!("the query does not see key {position}")))
    }

    /// The plane through the query and the keys at one or two positions; `None` if D is 1.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a position that is not visible to the query or is given twice.
    pub fn plane(&self, positions: &[usize]) -> Result<Option<Plane>> {
        if let [a, b] = positions
            && a == b
        {
            return Err(Error::Invalid(format!("key {a} is given twice: a plane needs two keys")));
        }
        let jumps = positions.iter().map(|&p| Ok(difference(&self.visible_key(p)?.key, &self.query)));
        let jumps = jumps.collect::<Result<Vec<_>>>()?;
        let d = self.query.len();
        if d < 2 {
            return Ok(None);
        }
        let first = jumps.iter().find_map(|jump| unit(jump.clone(), 0.0)).unwrap_or_else(|| basis(0, d));
        let across = |v: &[f64]| {
            let along = dot(v, &first);
            unit(
                v.iter().zip(&first).map(|(v, f)| v - along * f).collect(),
                COLLINEAR_FRACTION * dot(v, v).sqrt(),
            )
        };
        let second = jumps.iter().find_map(|jump| across(jump));
        // Collinear points: any second axis will do. The basis vector of the coordinate in which the first axis is
        // smallest is far from parallel to it.
        let smallest = (0..d).min_by(|&a, &b| first[a].abs().total_cmp(&first[b].abs())).unwrap_or(0);
        let free = second.is_none();
        let second = second.or_else(|| across(&basis(smallest, d)));
        Ok(second.map(|second| Plane { keys: positions.to_vec(), free, axes: [first, second] }))
    }

    /// The energies at `points`, given by their coordinates along the two axes of `plane` from the query. For a plane
    /// through two keys it is the minimum of the energies with respect to each key.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a key of the plane that is not visible to the query.
    pub fn plane_energies(
        &self,
        plane: &Plane,
        points: impl Iterator<Item = (f64, f64)>,
    ) -> Result<Vec<f64>> {
        let keys = plane.keys.iter().map(|&p| self.key(p)).collect::<Result<Vec<_>>>()?;
        let [a, b] = &plane.axes;
        let energy = |(x, y): (f64, f64)| {
            let point: Vec<f64> =
                self.query.iter().zip(a).zip(b).map(|((q, a), b)| q + x * a + y * b).collect();
            let of = |key: &&[f64]| self.pair(key).energy(&point, self.alpha, self.beta);
            keys.iter().map(of).fold(f64::MAX, f64::min)
        };
        Ok(points.map(energy).collect())
    }

    /// The energy at the coordinate `u` on the segment from the query (0) to a key (1) with `t = beta |k - q|^2`.
    pub fn passage_energy(&self, t: f64, u: f64) -> f64 {
        passage_energy(t, Coherence { u, rest: 1.0 - u }, self.alpha)
    }

    /// The point `[D]` at the coordinate `u` on the segment from the query (0) to the key at `position` (1).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a position that is not visible to the query.
    pub fn passage_point(&self, position: usize, u: f64) -> Result<Vec<f64>> {
        let pair = self.pair(self.key(position)?);
        Ok(pair.passage(u * pair.length))
    }

    /// The query `[D]`.
    pub fn query(&self) -> &[f64] {
        &self.query
    }

    /// The inverse bandwidth beta.
    pub fn beta(&self) -> f64 {
        self.beta
    }

    /// The key `[D]` at `position`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a position that is not visible to the query.
    pub fn key(&self, position: usize) -> Result<&[f64]> {
        Ok(&self.visible_key(position)?.key)
    }

    /// The jump from the query to the key at `position`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a position that is not visible to the query.
    pub fn jump_to(&self, position: usize) -> Result<Jump> {
        Ok(self.jump(self.visible_key(position)?))
    }

    /// The coordinates of the projection of a point `[D]` onto a plane, along the two axes from the query.
    pub fn project(&self, plane: &Plane, point: &[f64]) -> (f64, f64) {
        let offset = difference(point, &self.query);
        (dot(&offset, &plane.axes[0]), dot(&offset, &plane.axes[1]))
    }
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// The basis vector `[d]` of coordinate `at`.
fn basis(at: usize, d: usize) -> Vec<f64> {
    (0..d).map(|n| f64::from(u8::from(n == at))).collect()
}

/// The vector scaled to length 1; `None` if it is not longer than `min_length`.
fn unit(row: Vec<f64>, min_length: f64) -> Option<Vec<f64>> {
    let length = dot(&row, &row).sqrt();
    (length > min_length).then(|| row.into_iter().map(|x| x / length).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visible_key(position: usize, key: &[f64]) -> VisibleKey {
        VisibleKey { position, key: key.to_vec(), prior: 0.0 }
    }

    /// A query at (1, 0, 0) and keys at the distances 2, 3 and 5 from it.
    fn scene(alpha: f64, beta: f64) -> Landscape {
        let keys = vec![
            visible_key(4, &[1.0, 3.0, 0.0]),
            visible_key(7, &[3.0, 0.0, 0.0]),
            visible_key(9, &[1.0, 3.0, 4.0]),
        ];
        Landscape::new(vec![1.0, 0.0, 0.0], keys, alpha, beta).unwrap()
    }

    #[test]
    fn the_winner_has_the_least_energy_with_its_prior_and_ties_go_to_the_earlier_key() {
        let mut scene = scene(0.5, 2.0);
        let (winner, runner_up) = scene.winner_and_runner_up();
        assert_eq!((winner.key, winner.length, winner.t, winner.energy), (7, 2.0, 8.0, 8.0));
        assert_eq!(runner_up.map(|r| (r.key, r.length, r.t)), Some((4, 3.0, 18.0)));
        // At alpha = 1/2 beyond t = 2 the tie goes to the query, and bisection stops on the saddle.
        assert!(winner.global.u < 0.01 && winner.passage.u == 0.5 && winner.has_two_roots(), "{winner:?}");
        scene.keys[2].prior = 45.0;
        let (winner, runner_up) = scene.winner_and_runner_up();
        assert_eq!((winner.key, winner.t, winner.energy), (9, 50.0, 5.0));
        assert_eq!(runner_up.map(|r| r.key), Some(7));
        scene.keys[1] = visible_key(1, &[1.0, 0.0, 5.0]);
        scene.keys[2] = visible_key(2, &[1.0, 0.0, 3.0]);
        assert_eq!(scene.winner_and_runner_up().0.key, 4);
    }

    #[test]
    fn invalid_values_are_named() {
        let refused = |query: &[f64], key: &[f64], prior: f64, alpha: f64, beta: f64, word: &str| {
            let keys = vec![visible_key(2, &[0.0; 2]), VisibleKey { position: 3, key: key.to_vec(), prior }];
            let text = Landscape::new(query.to_vec(), keys, alpha, beta).unwrap_err().to_string();
            assert!(text.contains(word), "{word}: {text}");
        };
        let (q, k) = ([1.0, 2.0], [3.0, 4.0]);
        refused(&[1.0, f64::NAN], &k, 0.0, 0.5, 1.0, "coordinate 1 of the query is NaN");
        refused(&q, &[f64::INFINITY, 0.0], 0.0, 0.5, 1.0, "coordinate 0 of key 3 is inf");
        refused(&q, &[1.0], 0.0, 0.5, 1.0, "key 3 has 1 coordinates");
        refused(&q, &k, f64::NAN, 0.5, 1.0, "prior of key 3");
        refused(&q, &k, 0.0, 1.0, 1.0, "alpha 1");
        refused(&q, &k, 0.0, 0.5, 0.0, "beta 0");
        assert!(Landscape::new(q.to_vec(), Vec::new(), 0.5, 1.0).unwrap_err().to_string().contains("no key"));
        let scene = scene(0.5, 1.0);
        assert!(scene.plane(&[4, 5]).unwrap_err().to_string().contains("does not see key 5"));
        assert!(scene.plane(&[4, 4]).unwrap_err().to_string().contains("twice"));
    }
}
