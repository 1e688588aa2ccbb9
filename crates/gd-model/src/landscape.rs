//! The energy landscape of one query: along the passages to its best keys, and over a plane through it and two keys.
//!
//! With the query q `[D]`, a key k `[D]`, the weight alpha of the query's well and the inverse bandwidth beta, the
//! energy of a point s is `Phi(s) = -ln(alpha e^(-beta |s-q|^2) + (1-alpha) e^(-beta |s-k|^2))`. Everything is f64.

use gd_kernels::CoherenceMode;
use gd_kernels::reference::theory::{Coherence, Pair, minimal_energy, passage_energy};
use gd_kernels::reference::{distance2, dot};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::plot::{Field, Figure, Line, Lines, Mark, Symbol};

/// The passages are drawn from a little before the query to a little behind the key, in shares of the way.
const PASSAGE: [f64; 2] = [-0.15, 1.15];
/// Points of a drawn line.
const POINTS: usize = 400;
/// What a plane shows around its marks, as a share of their spread.
const AROUND: f64 = 0.3;
/// Directions whose part across the first axis is shorter than this share of their length lie on one line with it.
const COLLINEAR: f64 = 1e-9;

/// A key that the query sees.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
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
    keys: Vec<Seen>,
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
    pub fn new(query: Vec<f64>, keys: Vec<Seen>, alpha: f64, beta: f64) -> Result<Self> {
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
        for Seen { position, key, prior } in &keys {
            if key.len() != query.len() {
                let (found, expected) = (key.len(), query.len());
                return invalid(format!("key {position} has {found} coordinates, and the query {expected}"));
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
    pub fn best(&self) -> (Jump, Option<Jump>) {
        let energy = |n: usize| self.beta * distance2(&self.query, &self.keys[n].key) - self.keys[n].prior;
        let least = |skip: Option<usize>| {
            let rest = (0..self.keys.len()).filter(|n| Some(*n) != skip);
            rest.min_by(|a, b| energy(*a).total_cmp(&energy(*b)))
        };
        // There is a key: `new` has seen to that.
        let winner = least(None).unwrap_or(0);
        (self.jump(&self.keys[winner]), least(Some(winner)).map(|n| self.jump(&self.keys[n])))
    }

    fn jump(&self, seen: &Seen) -> Jump {
        let length = self.pair(&seen.key).length;
        let t = self.beta * length * length;
        let point = |mode| {
            let least = minimal_energy(t, self.alpha, mode);
            Point { u: least.at.u, energy: least.value }
        };
        Jump {
            key: seen.position,
            length,
            t,
            energy: t - seen.prior,
            global: point(CoherenceMode::Global),
            passage: point(CoherenceMode::Passage),
        }
    }

    fn pair<'a>(&'a self, key: &'a [f64]) -> Pair<'a> {
        Pair::new(&self.query, key)
    }

    fn seen(&self, position: usize) -> Result<&Seen> {
        let found = self.keys.iter().find(|seen| seen.position == position);
        found.ok_or_else(|| Error::Invalid(format!("the query does not see key {position}")))
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
        let jumps = positions.iter().map(|&p| Ok(difference(&self.seen(p)?.key, &self.query)));
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

    /// The energy of the point at `(x, y)` of a plane: for two keys, of the better pair.
    fn energy(&self, plane: &Plane, keys: &[&Seen], (x, y): (f64, f64)) -> f64 {
        let [a, b] = &plane.axes;
        let point: Vec<f64> = self.query.iter().zip(a).zip(b).map(|((q, a), b)| q + x * a + y * b).collect();
        keys.iter()
            .map(|seen| self.pair(&seen.key).energy(&point, self.alpha, self.beta))
            .fold(f64::MAX, f64::min)
    }

    /// Where a point lies in a plane, or the foot of its perpendicular.
    fn place(&self, plane: &Plane, point: &[f64]) -> (f64, f64) {
        let offset = difference(point, &self.query);
        (dot(&offset, &plane.axes[0]), dot(&offset, &plane.axes[1]))
    }

    /// The figure: passages above, a plane below.
    ///
    /// # Errors
    /// Names a key of the plane that the query does not see.
    pub fn figure(&self, title: &str, plane: Option<&Plane>) -> Result<Figure> {
        let field = plane.map(|plane| self.field(plane)).transpose()?;
        Ok(Figure { lines: self.passages(title), field })
    }

    fn passages(&self, title: &str) -> Lines {
        let (winner, runner_up) = self.best();
        let (mut lines, mut marks) = (Vec::new(), Vec::new());
        for (n, (jump, name)) in [(Some(winner), "winner"), (runner_up, "runner-up")].into_iter().enumerate()
        {
            let Some(jump) = jump else { continue };
            let at = |i: usize| {
                let u = PASSAGE[0] + (PASSAGE[1] - PASSAGE[0]) * i as f64 / POINTS as f64;
                (u, passage_energy(jump.t, Coherence { u, rest: 1.0 - u }, self.alpha))
            };
            lines.push(Line {
                label: format!("key {} ({name})\nL {:.4}, t {:.4}", jump.key, jump.length, jump.t),
                colour: 2 * n,
                dashed: n > 0,
                points: (0..=POINTS).map(at).collect(),
            });
            let mark = |point: Point, symbol, label| Mark {
                at: (point.u, point.energy),
                symbol,
                colour: Some(2 * n),
                label,
            };
            let Jump { global, passage, .. } = jump;
            let label = format!("coherence point\nu* {:.4}, E* {:.4}", global.u, global.energy);
            marks.push(mark(global, Symbol::Diamond, label));
            if apart(&jump) {
                let label =
                    format!("first root of bisection\nu {:.4}, energy {:.4}", passage.u, passage.energy);
                marks.push(mark(passage, Symbol::Cross, label));
            }
        }
        // A runner-up far away must not flatten the winner's line.
        let reach = |line: &Line| line.points.iter().map(|p| p.1).fold(f64::MIN, f64::max);
        let tops: Vec<f64> = lines.iter().map(reach).collect();
        let first = if tops[0] > 1e-9 { tops[0] } else { f64::MAX };
        let top = tops.iter().copied().fold(tops[0], f64::max).min(4.0 * first);
        let low = lines.iter().flat_map(|line| &line.points).map(|p| p.1).fold(top, f64::min);
        let pad = 0.06 * (top - low).max(0.1);
        Lines {
            title: title.to_owned(),
            x: "share u of the way from query (0) to key (1)".into(),
            y: "energy".into(),
            span: [PASSAGE[0]..PASSAGE[1], low - pad..top + pad],
            lines,
            marks,
        }
    }

    fn field(&self, plane: &Plane) -> Result<Field> {
        let keys = plane.keys.iter().map(|&p| self.seen(p)).collect::<Result<Vec<_>>>()?;
        let winner = self.best().0;
        let mut marks =
            vec![Mark { at: (0.0, 0.0), symbol: Symbol::Square, colour: None, label: "query".into() }];
        for (n, seen) in keys.iter().enumerate() {
            let (jump, colour) = (self.jump(seen), Some(2 + 2 * n));
            let symbol = [Symbol::Circle, Symbol::Triangle][n % 2];
            let mark =
                |point: &[f64], symbol, label| Mark { at: self.place(plane, point), symbol, colour, label };
            marks.push(mark(&seen.key, symbol, format!("key {}", seen.position)));
            let pair = self.pair(&seen.key);
            let at = |point: Point| pair.passage(point.u * pair.length);
            marks.push(mark(
                &at(jump.global),
                Symbol::Diamond,
                format!("coherence point to {}", seen.position),
            ));
            if apart(&jump) {
                let label = format!("first root to {}", seen.position);
                marks.push(mark(&at(jump.passage), Symbol::Cross, label));
            }
        }
        let key = &self.seen(winner.key)?.key;
        let at = self.place(plane, key);
        let (all, within) = (distance2(key, &self.query), at.0 * at.0 + at.1 * at.1);
        let label = if all - within <= COLLINEAR * all { "winner" } else { "winner (projected)" };
        marks.push(Mark {
            at,
            symbol: Symbol::Ring,
            colour: None,
            label: format!("{label}\nkey {}", winner.key),
        });
        let span = frame(&marks, 1.0 / self.beta.sqrt());
        let values = Field::places(&span).map(|place| self.energy(plane, &keys, place)).collect();
        let names: Vec<_> = plane.keys.iter().map(|p| format!("key {p}")).collect();
        let line = if plane.free { " (all on one line)" } else { "" };
        let pair = if keys.len() > 1 { ": the lower of the two pairs" } else { "" };
        Ok(Field {
            title: format!("Energy over the plane of the query, {}{pair}{line}", names.join(" and ")),
            x: format!("distance from the query towards {}", names[0]),
            y: "distance across".into(),
            value: "energy".into(),
            span,
            values,
            marks,
        })
    }
}

/// Whether the two modes name different points.
fn apart(jump: &Jump) -> bool {
    (jump.global.u - jump.passage.u).abs() > 1e-6
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

/// What the axes span, so that every mark is inside and a unit is as long across as up: `unit` around a lone point.
fn frame(marks: &[Mark], unit: f64) -> [std::ops::Range<f64>; 2] {
    let ends = |of: fn(&Mark) -> f64| {
        marks.iter().map(of).fold((f64::MAX, f64::MIN), |(l, h), x| (l.min(x), h.max(x)))
    };
    let (x, y) = (ends(|m| m.at.0), ends(|m| m.at.1));
    let ratio = crate::plot::FIELD.0 as f64 / crate::plot::FIELD.1 as f64;
    let spread = (x.1 - x.0).max((y.1 - y.0) * ratio);
    let width = if spread > 0.0 { spread * (1.0 + 2.0 * AROUND) } else { 4.0 * unit };
    let around = |(low, high): (f64, f64), width: f64| 0.5 * (low + high - width)..0.5 * (low + high + width);
    [around(x, width), around(y, width / ratio)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(position: usize, key: &[f64]) -> Seen {
        Seen { position, key: key.to_vec(), prior: 0.0 }
    }

    /// A query at 1, 0, 0 and keys at a distance of 2, 3 and 5 from it, in a space of three dimensions.
    fn scene(alpha: f64, beta: f64) -> Landscape {
        let keys = vec![seen(4, &[1.0, 3.0, 0.0]), seen(7, &[3.0, 0.0, 0.0]), seen(9, &[1.0, 3.0, 4.0])];
        Landscape::new(vec![1.0, 0.0, 0.0], keys, alpha, beta).unwrap()
    }

    #[test]
    fn the_field_is_the_formula_at_every_cell() {
        let (alpha, beta) = (0.3, 0.7);
        let scene = scene(alpha, beta);
        let plane = scene.plane(&[7, 4]).unwrap().unwrap();
        assert!(!plane.free);
        let field = scene.figure("", Some(&plane)).unwrap().field.unwrap();
        // The plane is that of the first two coordinates: x towards key 7, y towards key 4, from the query at 1, 0.
        let well = |weight: f64, x: f64, y: f64| weight * (-beta * (x * x + y * y)).exp();
        for (place, value) in Field::places(&field.span).zip(&field.values) {
            let (x, y) = place;
            let q = well(alpha, x, y);
            let phi = |key: f64| -(q + key).ln();
            let expected = phi(well(1.0 - alpha, x - 2.0, y)).min(phi(well(1.0 - alpha, x, y - 3.0)));
            assert!(
                (value - expected).abs() <= 1e-9 * (1.0 + expected.abs()),
                "{place:?}: {value}, {expected}"
            );
        }
        let at = |label: &str| field.marks.iter().find(|m| m.label.starts_with(label)).unwrap().at;
        let near = |a: (f64, f64), b: (f64, f64)| (a.0 - b.0).abs() < 1e-12 && (a.1 - b.1).abs() < 1e-12;
        assert!(near(at("key 7"), (2.0, 0.0)) && near(at("key 4"), (0.0, 3.0)), "{:?}", field.marks);
        assert!(near(at("winner"), (2.0, 0.0)) && at("query") == (0.0, 0.0));
        // Every mark is inside, and a unit is as long across as up.
        let [x, y] = &field.span;
        assert!(field.marks.iter().all(|m| x.contains(&m.at.0) && y.contains(&m.at.1)));
        let ratio = (x.end - x.start) / (y.end - y.start);
        assert!((ratio - 4.0 / 3.0).abs() < 1e-12, "{ratio}");
    }

    #[test]
    fn the_coherence_point_is_where_the_field_and_the_line_are_least() {
        for (alpha, beta) in [(0.3, 0.7), (0.5, 0.2), (0.8, 1.5)] {
            let scene = scene(alpha, beta);
            let (winner, _) = scene.best();
            let plane = scene.plane(&[7, 4]).unwrap().unwrap();
            let figure = scene.figure("", Some(&plane)).unwrap();
            let field = figure.field.unwrap();
            let least = field.values.iter().copied().fold(f64::MAX, f64::min);
            // The grid misses the least point by half a cell at most, where the slope is 0.
            let best = minimal_energy(beta * 4.0, alpha, CoherenceMode::Global).value;
            let cell = (field.span[0].end - field.span[0].start) / 320.0;
            assert!(least >= best - 1e-12 && least - best <= beta * cell * cell, "{least}, {best}");
            assert_eq!(winner.global.energy, best);
            let line = &figure.lines.lines[0];
            let lowest = line.points.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
            assert!(lowest.1 >= best - 1e-12 && lowest.1 - best < 1e-3, "{lowest:?}, {best}");
        }
    }

    #[test]
    fn the_winner_has_the_least_energy_with_its_prior_and_the_first_of_equals_wins() {
        let mut scene = scene(0.5, 2.0);
        let (winner, runner_up) = scene.best();
        assert_eq!((winner.key, winner.length, winner.t, winner.energy), (7, 2.0, 8.0, 8.0));
        assert_eq!(runner_up.map(|r| (r.key, r.length, r.t)), Some((4, 3.0, 18.0)));
        // At alpha = 1/2 beyond t = 2 the tie goes to the query, and bisection stops on the saddle.
        assert!(winner.global.u < 0.01 && winner.passage.u == 0.5 && apart(&winner), "{winner:?}");
        scene.keys[2].prior = 45.0;
        let (winner, runner_up) = scene.best();
        assert_eq!((winner.key, winner.t, winner.energy), (9, 50.0, 5.0));
        assert_eq!(runner_up.map(|r| r.key), Some(7));
        scene.keys[1] = seen(1, &[1.0, 0.0, 5.0]);
        scene.keys[2] = seen(2, &[1.0, 0.0, 3.0]);
        assert_eq!(scene.best().0.key, 4);
    }

    #[test]
    fn lines_points_and_one_dimension_have_a_figure_too() {
        let draw = |query: &[f64], keys: &[&[f64]], chosen: &[usize]| {
            let keys = keys.iter().enumerate().map(|(n, key)| seen(n, key)).collect();
            let scene = Landscape::new(query.to_vec(), keys, 0.4, 1.0).unwrap();
            let plane = scene.plane(chosen).unwrap();
            let figure = scene.figure("a title", plane.as_ref()).unwrap();
            let finite = |points: &[(f64, f64)]| points.iter().all(|p| p.0.is_finite() && p.1.is_finite());
            assert!(figure.lines.lines.iter().all(|line| finite(&line.points)));
            let field = figure.field.as_ref();
            assert!(field.is_none_or(|f| f.values.iter().all(|v| v.is_finite()) && f.span[0].start < f.span[0].end));
            let text = figure.svg().unwrap();
            assert!(text.contains("</svg>") && text.contains("a title") && !text.contains("NaN"));
            plane.map(|plane| plane.free)
        };
        // Keys in line with the query; one key; a key that is the query; all three the same; one dimension.
        assert_eq!(draw(&[0.0, 0.0], &[&[1.0, 1.0], &[-3.0, -3.0]], &[0, 1]), Some(true));
        assert_eq!(draw(&[0.0, 0.0], &[&[1.0, 1.0]], &[0]), Some(true));
        assert_eq!(draw(&[2.0, 1.0, 0.0], &[&[2.0, 1.0, 0.0], &[1.0, 1.0, 0.0]], &[0, 1]), Some(true));
        assert_eq!(draw(&[2.0, 1.0], &[&[2.0, 1.0], &[2.0, 1.0]], &[0, 1]), Some(true));
        assert_eq!(draw(&[2.0], &[&[3.0], &[5.0]], &[0, 1]), None);
        assert_eq!(draw(&[2.0, 0.0], &[&[3.0, 0.0], &[5.0, 1.0]], &[1, 0]), Some(false));
        // Far apart: the wells are points in a wide plain.
        assert_eq!(draw(&[0.0, 0.0], &[&[300.0, 0.0], &[0.0, 4e3]], &[0, 1]), Some(false));
    }

    #[test]
    fn what_cannot_be_drawn_is_named() {
        let refused = |query: &[f64], key: &[f64], prior: f64, alpha: f64, beta: f64, word: &str| {
            let keys = vec![seen(2, &[0.0; 2]), Seen { position: 3, key: key.to_vec(), prior }];
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
