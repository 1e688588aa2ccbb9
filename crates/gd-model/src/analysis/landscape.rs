//! The energy landscape of one query: along the passages to its two keys of least energy, and over a plane
//! through it and two keys.
//!
//! With the query q `[D]`, a key k `[D]`, the weight alpha of the query's well and the inverse bandwidth beta, the
//! energy of a point s is `Phi(s) = -ln(alpha e^(-beta |s-q|^2) + (1-alpha) e^(-beta |s-k|^2))`. Everything is f64.

use gd_kernels::CoherenceMode;
use gd_kernels::reference::theory::{Coherence, Pair, minimal_energy, passage_energy};
use gd_kernels::reference::{distance2, dot};
use serde::Serialize;

use crate::error::{Error, Result};

/// Directions whose part across the first axis is shorter than this share of their length lie on one line with it.
const COLLINEAR: f64 = 1e-9;

/// A key that the query sees.
#[derive(Debug, Clone, PartialEq)]
pub struct VisibleKey {
    /// Its position.
    pub position: usize,
    /// The key `[D]`.
    pub key: Vec<f64>,
    /// Its prior b.
    pub prior: f64,
}

/// A query `[D]`, the keys that it sees, and its head's parameters.
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
    /// `u*`, the share of the way from the query to the key.
    pub u: f64,
    /// The energy there; under [`CoherenceMode::Global`] the least, `E*`.
    #[serde(rename = "E")]
    pub energy: f64,
}

/// The way from the query to a key.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Jump {
    /// The key's position.
    pub key: usize,
    /// The jump length `|k - q|`.
    #[serde(rename = "L")]
    pub length: f64,
    /// `beta L^2`.
    pub t: f64,
    /// The selection energy `t - b`.
    pub energy: f64,
    /// The coherence point of least energy.
    pub global: Point,
    /// The one that bisection meets first.
    pub passage: Point,
}

impl Jump {
    /// Whether the least energy and the root that bisection finds first are at different points.
    pub fn has_two_roots(&self) -> bool {
        (self.global.u - self.passage.u).abs() > 1e-6
    }
}

/// A plane through the query, with an orthonormal pair of axes `[D]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Plane {
    /// The positions of the keys that span it: two, or one where the query sees no other.
    pub keys: Vec<usize>,
    /// Whether the second axis was free to choose, as query and keys lie on one line.
    pub free: bool,
    axes: [Vec<f64>; 2],
}

impl Landscape {
    /// # Errors
    /// Names alpha, beta or the coordinate that is out of range, a key of another length, or the absence of keys.
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
        let strange = |row: &[f64]| row.iter().position(|x| !x.is_finite());
        if let Some(d) = strange(&query) {
            return invalid(format!("coordinate {d} of the query is {}", query[d]));
        }
        for VisibleKey { position, key, prior } in &keys {
            if key.len() != query.len() {
                let (actual, expected) = (key.len(), query.len());
                return invalid(format!("key {position} has {actual} coordinates, and the query {expected}"));
            }
            if let Some(d) = strange(key) {
                return invalid(format!("coordinate {d} of key {position} is {}", key[d]));
            }
            if !prior.is_finite() {
                return invalid(format!("the prior of key {position} is {prior}"));
            }
        }
        Ok(Self { query, keys, alpha, beta })
    }

    /// The number of keys that the query sees.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// The winner, and the runner-up where there is one: the keys of least selection energy, the first of equals.
    pub fn winner_and_runner_up(&self) -> (Jump, Option<Jump>) {
        let energy = |n: usize| self.beta * distance2(&self.query, &self.keys[n].key) - self.keys[n].prior;
        let least = |skip: Option<usize>| {
            let rest = (0..self.keys.len()).filter(|n| Some(*n) != skip);
            rest.min_by(|a, b| energy(*a).total_cmp(&energy(*b)))
        };
        // `new` ensures that there is a key.
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

    /// The plane through the query and the keys at these positions, one or two. A space of one dimension has none.
    ///
    /// # Errors
    /// Names a position that the query does not see, or one given twice.
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
            unit(v.iter().zip(&first).map(|(v, f)| v - along * f).collect(), COLLINEAR * dot(v, v).sqrt())
        };
        let second = jumps.iter().find_map(|jump| across(jump));
        // Any direction across the first serves a line; that of the least coordinate is far from it.
        let smallest = (0..d).min_by(|&a, &b| first[a].abs().total_cmp(&first[b].abs())).unwrap_or(0);
        let free = second.is_none();
        let second = second.or_else(|| across(&basis(smallest, d)));
        Ok(second.map(|second| Plane { keys: positions.to_vec(), free, axes: [first, second] }))
    }

    /// The energies at `points`, which are coordinates along the two axes of `plane`. For a plane through two keys
    /// it is the lower of the two pairs' energies.
    ///
    /// # Errors
    /// Names a key of the plane that the query does not see.
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

    /// The energy at the share `u` of the way from the query (0) to a key (1) whose jump has this `t`.
    pub fn passage_energy(&self, t: f64, u: f64) -> f64 {
        passage_energy(t, Coherence { u, rest: 1.0 - u }, self.alpha)
    }

    /// The point `[D]` at the share `u` of the way from the query to the key at `position`.
    ///
    /// # Errors
    /// A position that the query does not see.
    pub fn passage_point(&self, position: usize, u: f64) -> Result<Vec<f64>> {
        let pair = self.pair(self.key(position)?);
        Ok(pair.passage(u * pair.length))
    }

    /// The query `[D]`.
    pub fn query(&self) -> &[f64] {
        &self.query
    }

    /// The inverse bandwidth.
    pub fn beta(&self) -> f64 {
        self.beta
    }

    /// The key `[D]` at `position`.
    ///
    /// # Errors
    /// A position that the query does not see.
    pub fn key(&self, position: usize) -> Result<&[f64]> {
        Ok(&self.visible_key(position)?.key)
    }

    /// The jump from the query to the key at `position`.
    ///
    /// # Errors
    /// A position that the query does not see.
    pub fn jump_to(&self, position: usize) -> Result<Jump> {
        Ok(self.jump(self.visible_key(position)?))
    }

    /// Projects a point `[D]` onto a plane: its coordinates along the two axes, from the query.
    pub fn project(&self, plane: &Plane, point: &[f64]) -> (f64, f64) {
        let offset = difference(point, &self.query);
        (dot(&offset, &plane.axes[0]), dot(&offset, &plane.axes[1]))
    }
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

fn basis(at: usize, d: usize) -> Vec<f64> {
    (0..d).map(|n| f64::from(u8::from(n == at))).collect()
}

/// The direction of a row longer than `least`.
fn unit(row: Vec<f64>, least: f64) -> Option<Vec<f64>> {
    let length = dot(&row, &row).sqrt();
    (length > least).then(|| row.into_iter().map(|x| x / length).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visible_key(position: usize, key: &[f64]) -> VisibleKey {
        VisibleKey { position, key: key.to_vec(), prior: 0.0 }
    }

    /// A query at 1, 0, 0 and keys at a distance of 2, 3 and 5 from it, in a space of three dimensions.
    fn scene(alpha: f64, beta: f64) -> Landscape {
        let keys = vec![
            visible_key(4, &[1.0, 3.0, 0.0]),
            visible_key(7, &[3.0, 0.0, 0.0]),
            visible_key(9, &[1.0, 3.0, 4.0]),
        ];
        Landscape::new(vec![1.0, 0.0, 0.0], keys, alpha, beta).unwrap()
    }

    #[test]
    fn the_winner_has_the_least_energy_with_its_prior_and_the_first_of_equals_wins() {
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
    fn what_cannot_be_drawn_is_named() {
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
