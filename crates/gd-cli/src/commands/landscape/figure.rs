//! The figure of an energy landscape: the energies along the passages above, and over a plane below.

use gd_kernels::reference::distance2;
use gd_model::analysis::landscape::{Jump, Landscape, Plane, Point};
use gd_model::error::Result;

use crate::plot::{Field, Figure, Line, Lines, Mark, Symbol};

/// The passages are drawn from a little before the query to a little behind the key, in shares of the way.
const PASSAGE: [f64; 2] = [-0.15, 1.15];
/// Points of a drawn line.
const POINTS: usize = 400;
/// What a plane shows around its marks, as a share of their spread.
const AROUND: f64 = 0.3;
/// The winner counts as lying in the plane if at most this share of its squared distance lies outside it.
const IN_PLANE: f64 = 1e-9;

/// The figure: passages above, a plane below.
///
/// # Errors
/// Names a key of the plane that the query does not see.
pub(super) fn figure(landscape: &Landscape, title: &str, plane: Option<&Plane>) -> Result<Figure> {
    let field = plane.map(|plane| field(landscape, plane)).transpose()?;
    Ok(Figure { lines: passages(landscape, title), field })
}

fn passages(landscape: &Landscape, title: &str) -> Lines {
    let (winner, runner_up) = landscape.best();
    let (mut lines, mut marks) = (Vec::new(), Vec::new());
    for (n, (jump, name)) in [(Some(winner), "winner"), (runner_up, "runner-up")].into_iter().enumerate() {
        let Some(jump) = jump else { continue };
        let at = |i: usize| {
            let u = PASSAGE[0] + (PASSAGE[1] - PASSAGE[0]) * i as f64 / POINTS as f64;
            (u, landscape.passage_energy(jump.t, u))
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
        if jump.has_two_roots() {
            let label = format!("first root of bisection\nu {:.4}, energy {:.4}", passage.u, passage.energy);
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

fn field(landscape: &Landscape, plane: &Plane) -> Result<Field> {
    let winner = landscape.best().0;
    let mut marks =
        vec![Mark { at: (0.0, 0.0), symbol: Symbol::Square, colour: None, label: "query".into() }];
    for (n, &position) in plane.keys.iter().enumerate() {
        let (jump, colour) = (landscape.jump_to(position)?, Some(2 + 2 * n));
        let symbol = [Symbol::Circle, Symbol::Triangle][n % 2];
        let mark = |point: &[f64], symbol, label| Mark {
            at: landscape.project(plane, point),
            symbol,
            colour,
            label,
        };
        marks.push(mark(landscape.key(position)?, symbol, format!("key {position}")));
        let at = |point: Point| landscape.passage_point(position, point.u);
        marks.push(mark(&at(jump.global)?, Symbol::Diamond, format!("coherence point to {}", position)));
        if jump.has_two_roots() {
            let label = format!("first root to {}", position);
            marks.push(mark(&at(jump.passage)?, Symbol::Cross, label));
        }
    }
    let key = landscape.key(winner.key)?;
    let at = landscape.project(plane, key);
    let (all, within) = (distance2(key, landscape.query()), at.0 * at.0 + at.1 * at.1);
    let label = if all - within <= IN_PLANE * all { "winner" } else { "winner (projected)" };
    marks.push(Mark {
        at,
        symbol: Symbol::Ring,
        colour: None,
        label: format!("{label}\nkey {}", winner.key),
    });
    let span = frame(&marks, 1.0 / landscape.beta().sqrt());
    let values = landscape.plane_energies(plane, Field::places(&span))?;
    let names: Vec<_> = plane.keys.iter().map(|p| format!("key {p}")).collect();
    let line = if plane.free { " (all on one line)" } else { "" };
    let pair = if plane.keys.len() > 1 { ": the lower of the two pairs" } else { "" };
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
    use gd_kernels::CoherenceMode;
    use gd_kernels::reference::theory::minimal_energy;
    use gd_model::analysis::landscape::Seen;

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
        let field = figure(&scene, "", Some(&plane)).unwrap().field.unwrap();
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
            let figure = figure(&scene, "", Some(&plane)).unwrap();
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
    fn lines_points_and_one_dimension_have_a_figure_too() {
        let draw = |query: &[f64], keys: &[&[f64]], chosen: &[usize]| {
            let keys = keys.iter().enumerate().map(|(n, key)| seen(n, key)).collect();
            let scene = Landscape::new(query.to_vec(), keys, 0.4, 1.0).unwrap();
            let plane = scene.plane(chosen).unwrap();
            let figure = super::figure(&scene, "a title", plane.as_ref()).unwrap();
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
}
