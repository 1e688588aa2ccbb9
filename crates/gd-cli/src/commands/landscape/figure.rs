//! The figure of `gd landscape`: energies along the passages in a line chart, and over a plane in a heat map.

use std::ops::Range;

use anyhow::Result;
use gd_kernels::reference::distance2;
use gd_model::analysis::landscape::{Jump, Landscape, Plane, Point};

use crate::render::plot::{Figure, HEAT_MAP_CELLS, HeatMap, Line, LineChart, Mark, Symbol};

/// The x axis of the line chart, as shares of the passage from the query (0) to the key (1).
const PASSAGE_RANGE: [f64; 2] = [-0.15, 1.15];
/// Intervals between the points of a line.
const LINE_INTERVALS: usize = 400;
/// Margin around the marks of a heat map, as a share of their extent.
const MARGIN_SHARE: f64 = 0.3;
/// A point is in the plane if at most this share of its squared distance from the query is orthogonal to the plane.
const IN_PLANE_TOLERANCE: f64 = 1e-9;

/// Creates the figure: the passages to the winner and the runner-up, and the plane if there is one.
///
/// # Errors
/// Names a key of the plane that is not visible to the query.
pub(super) fn figure(landscape: &Landscape, title: &str, plane: Option<&Plane>) -> Result<Figure> {
    let heat_map = plane.map(|plane| heat_map(landscape, plane)).transpose()?;
    Ok(Figure { line_chart: line_chart(landscape, title), heat_map })
}

fn line_chart(landscape: &Landscape, title: &str) -> LineChart {
    let (winner, runner_up) = landscape.winner_and_runner_up();
    let (mut lines, mut marks) = (Vec::new(), Vec::new());
    for (n, (jump, name)) in [(Some(winner), "winner"), (runner_up, "runner-up")].into_iter().enumerate() {
        let Some(jump) = jump else { continue };
        let point = |i: usize| {
            let u =
                PASSAGE_RANGE[0] + (PASSAGE_RANGE[1] - PASSAGE_RANGE[0]) * i as f64 / LINE_INTERVALS as f64;
            (u, landscape.passage_energy(jump.t, u))
        };
        lines.push(Line {
            label: format!("key {} ({name})\nL {:.4}, t {:.4}", jump.key, jump.length, jump.t),
            color: 2 * n,
            dashed: n > 0,
            points: (0..=LINE_INTERVALS).map(point).collect(),
        });
        let mark = |point: Point, symbol, label| Mark {
            at: (point.u, point.energy),
            symbol,
            color: Some(2 * n),
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
    let y_range = energy_range(&lines);
    LineChart {
        title: title.to_owned(),
        x: "share u of the passage from query (0) to key (1)".into(),
        y: "energy".into(),
        axes: [PASSAGE_RANGE[0]..PASSAGE_RANGE[1], y_range],
        lines,
        marks,
    }
}

/// The range of the energy axis. It ends at four times the maximum of the first line, so that a distant runner-up does
/// not flatten the line of the winner.
fn energy_range(lines: &[Line]) -> Range<f64> {
    let max = |line: &Line| line.points.iter().map(|p| p.1).fold(f64::MIN, f64::max);
    let maxima: Vec<f64> = lines.iter().map(max).collect();
    let first = if maxima[0] > 1e-9 { maxima[0] } else { f64::MAX };
    let high = maxima.iter().copied().fold(maxima[0], f64::max).min(4.0 * first);
    let low = lines.iter().flat_map(|line| &line.points).map(|p| p.1).fold(high, f64::min);
    let padding = 0.06 * (high - low).max(0.1);
    low - padding..high + padding
}

fn heat_map(landscape: &Landscape, plane: &Plane) -> Result<HeatMap> {
    let marks = plane_marks(landscape, plane)?;
    let axes = plane_axes(&marks, 1.0 / landscape.beta().sqrt());
    let values = landscape.plane_energies(plane, HeatMap::cell_centers(&axes))?;
    let keys: Vec<_> = plane.keys.iter().map(|p| format!("key {p}")).collect();
    let collinear = if plane.free { " (collinear)" } else { "" };
    let minimum = if plane.keys.len() > 1 { ": the lower of the two pairs" } else { "" };
    Ok(HeatMap {
        title: format!("Energy over the plane of the query, {}{minimum}{collinear}", keys.join(" and ")),
        x: format!("distance from the query towards {}", keys[0]),
        y: "orthogonal distance".into(),
        value: "energy".into(),
        axes,
        values,
        marks,
    })
}

/// The marks of the heat map: the query, the keys of the plane with their coherence points, and the winner.
fn plane_marks(landscape: &Landscape, plane: &Plane) -> Result<Vec<Mark>> {
    let mut marks = vec![Mark { at: (0.0, 0.0), symbol: Symbol::Square, color: None, label: "query".into() }];
    for (n, &position) in plane.keys.iter().enumerate() {
        let (jump, color) = (landscape.jump_to(position)?, Some(2 + 2 * n));
        let symbol = [Symbol::Circle, Symbol::Triangle][n % 2];
        let mark =
            |point: &[f64], symbol, label| Mark { at: landscape.project(plane, point), symbol, color, label };
        marks.push(mark(landscape.key(position)?, symbol, format!("key {position}")));
        let coherence = landscape.passage_point(position, jump.global.u)?;
        marks.push(mark(&coherence, Symbol::Diamond, format!("coherence point to {position}")));
        if jump.has_two_roots() {
            let root = landscape.passage_point(position, jump.passage.u)?;
            marks.push(mark(&root, Symbol::Cross, format!("first root to {position}")));
        }
    }
    let winner = landscape.winner_and_runner_up().0;
    let key = landscape.key(winner.key)?;
    let at = landscape.project(plane, key);
    let (squared, in_plane) = (distance2(key, landscape.query()), at.0 * at.0 + at.1 * at.1);
    let label =
        if squared - in_plane <= IN_PLANE_TOLERANCE * squared { "winner" } else { "winner (projected)" };
    marks.push(Mark { at, symbol: Symbol::Ring, color: None, label: format!("{label}\nkey {}", winner.key) });
    Ok(marks)
}

/// Axes that contain all marks, with the same scale in both directions. If all marks are at one point, the width is
/// four times `unit`.
fn plane_axes(marks: &[Mark], unit: f64) -> [Range<f64>; 2] {
    let extent = |coordinate: fn(&Mark) -> f64| {
        marks.iter().map(coordinate).fold((f64::MAX, f64::MIN), |(l, h), x| (l.min(x), h.max(x)))
    };
    let (x, y) = (extent(|m| m.at.0), extent(|m| m.at.1));
    let ratio = HEAT_MAP_CELLS.0 as f64 / HEAT_MAP_CELLS.1 as f64;
    let spread = (x.1 - x.0).max((y.1 - y.0) * ratio);
    let width = if spread > 0.0 { spread * (1.0 + 2.0 * MARGIN_SHARE) } else { 4.0 * unit };
    let centered =
        |(low, high): (f64, f64), width: f64| 0.5 * (low + high - width)..0.5 * (low + high + width);
    [centered(x, width), centered(y, width / ratio)]
}

#[cfg(test)]
mod tests {
    use gd_kernels::CoherenceMode;
    use gd_kernels::reference::theory::minimal_energy;
    use gd_model::analysis::landscape::VisibleKey;

    use super::*;
    use crate::render::plot::svg;

    fn visible_key(position: usize, key: &[f64]) -> VisibleKey {
        VisibleKey { position, key: key.to_vec(), prior: 0.0 }
    }

    /// A query (1, 0, 0) and three keys at distances 2, 3 and 5 from it.
    fn example(alpha: f64, beta: f64) -> Landscape {
        let keys = vec![
            visible_key(4, &[1.0, 3.0, 0.0]),
            visible_key(7, &[3.0, 0.0, 0.0]),
            visible_key(9, &[1.0, 3.0, 4.0]),
        ];
        Landscape::new(vec![1.0, 0.0, 0.0], keys, alpha, beta).unwrap()
    }

    #[test]
    fn the_heat_map_equals_the_formula_in_every_cell() {
        let (alpha, beta) = (0.3, 0.7);
        let landscape = example(alpha, beta);
        let plane = landscape.plane(&[7, 4]).unwrap().unwrap();
        assert!(!plane.free);
        let heat_map = figure(&landscape, "", Some(&plane)).unwrap().heat_map.unwrap();
        // The plane is spanned by the first two coordinates, with the query (1, 0) as its origin: x points to key 7, y to
        // key 4.
        let well = |weight: f64, x: f64, y: f64| weight * (-beta * (x * x + y * y)).exp();
        for (point, value) in HeatMap::cell_centers(&heat_map.axes).zip(&heat_map.values) {
            let (x, y) = point;
            let q = well(alpha, x, y);
            let phi = |key: f64| -(q + key).ln();
            let expected = phi(well(1.0 - alpha, x - 2.0, y)).min(phi(well(1.0 - alpha, x, y - 3.0)));
            assert!(
                (value - expected).abs() <= 1e-9 * (1.0 + expected.abs()),
                "{point:?}: {value}, {expected}"
            );
        }
        let at = |label: &str| heat_map.marks.iter().find(|m| m.label.starts_with(label)).unwrap().at;
        let near = |a: (f64, f64), b: (f64, f64)| (a.0 - b.0).abs() < 1e-12 && (a.1 - b.1).abs() < 1e-12;
        assert!(near(at("key 7"), (2.0, 0.0)) && near(at("key 4"), (0.0, 3.0)), "{:?}", heat_map.marks);
        assert!(near(at("winner"), (2.0, 0.0)) && at("query") == (0.0, 0.0));
        // All marks are inside, and both axes have the same scale.
        let [x, y] = &heat_map.axes;
        assert!(heat_map.marks.iter().all(|m| x.contains(&m.at.0) && y.contains(&m.at.1)));
        let ratio = (x.end - x.start) / (y.end - y.start);
        assert!((ratio - 4.0 / 3.0).abs() < 1e-12, "{ratio}");
    }

    #[test]
    fn the_coherence_point_is_the_minimum_of_the_heat_map_and_of_the_line() {
        for (alpha, beta) in [(0.3, 0.7), (0.5, 0.2), (0.8, 1.5)] {
            let landscape = example(alpha, beta);
            let (winner, _) = landscape.winner_and_runner_up();
            let plane = landscape.plane(&[7, 4]).unwrap().unwrap();
            let figure = figure(&landscape, "", Some(&plane)).unwrap();
            let heat_map = figure.heat_map.unwrap();
            let map_minimum = heat_map.values.iter().copied().fold(f64::MAX, f64::min);
            // The minimum is at most half a cell from a cell center, and the gradient is 0 there.
            let expected = minimal_energy(beta * 4.0, alpha, CoherenceMode::Global).value;
            let cell = (heat_map.axes[0].end - heat_map.axes[0].start) / 320.0;
            assert!(
                map_minimum >= expected - 1e-12 && map_minimum - expected <= beta * cell * cell,
                "{map_minimum}, {expected}"
            );
            assert_eq!(winner.global.energy, expected);
            let line = &figure.line_chart.lines[0];
            let lowest = line.points.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
            assert!(lowest.1 >= expected - 1e-12 && lowest.1 - expected < 1e-3, "{lowest:?}, {expected}");
        }
    }

    #[test]
    fn degenerate_landscapes_have_a_figure() {
        let draw = |query: &[f64], keys: &[&[f64]], chosen: &[usize]| {
            let keys = keys.iter().enumerate().map(|(n, key)| visible_key(n, key)).collect();
            let landscape = Landscape::new(query.to_vec(), keys, 0.4, 1.0).unwrap();
            let plane = landscape.plane(chosen).unwrap();
            let figure = super::figure(&landscape, "a title", plane.as_ref()).unwrap();
            let finite = |points: &[(f64, f64)]| points.iter().all(|p| p.0.is_finite() && p.1.is_finite());
            assert!(figure.line_chart.lines.iter().all(|line| finite(&line.points)));
            let heat_map = figure.heat_map.as_ref();
            assert!(heat_map.is_none_or(|map| {
                map.values.iter().all(|v| v.is_finite()) && map.axes[0].start < map.axes[0].end
            }));
            let text = svg(&figure).unwrap();
            assert!(text.contains("</svg>") && text.contains("a title") && !text.contains("NaN"));
            plane.map(|plane| plane.free)
        };
        // Keys collinear with the query; one key; a key equal to the query; all points equal; one dimension.
        assert_eq!(draw(&[0.0, 0.0], &[&[1.0, 1.0], &[-3.0, -3.0]], &[0, 1]), Some(true));
        assert_eq!(draw(&[0.0, 0.0], &[&[1.0, 1.0]], &[0]), Some(true));
        assert_eq!(draw(&[2.0, 1.0, 0.0], &[&[2.0, 1.0, 0.0], &[1.0, 1.0, 0.0]], &[0, 1]), Some(true));
        assert_eq!(draw(&[2.0, 1.0], &[&[2.0, 1.0], &[2.0, 1.0]], &[0, 1]), Some(true));
        assert_eq!(draw(&[2.0], &[&[3.0], &[5.0]], &[0, 1]), None);
        assert_eq!(draw(&[2.0, 0.0], &[&[3.0, 0.0], &[5.0, 1.0]], &[1, 0]), Some(false));
        // Distant keys: the wells are small compared to the plane.
        assert_eq!(draw(&[0.0, 0.0], &[&[300.0, 0.0], &[0.0, 4e3]], &[0, 1]), Some(false));
    }
}
