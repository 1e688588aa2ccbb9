//! The figure of `gd map`: X against Y, and X against C.

use gd_model::analysis::mechanism_map::{Interval, Measurement};

use crate::render::plot::{Scatter, ScatterPoint};

/// Empty margin around the unit square, as a share of an axis.
const MARGIN: f64 = 0.06;
/// The title of the color scale.
const COLOR_TITLE: &str = "share of outputs that\nare one value row";

/// The plots of the measurements: the map, and below it selectivity against concentration. A mechanism has the same number
/// in both.
pub(super) fn plots(measurements: &[Measurement], seeds: usize) -> Vec<Scatter> {
    let values = |i: Interval| [i.mean, i.low, i.high];
    let points = |y: fn(&Measurement) -> Option<Interval>| -> Vec<ScatterPoint> {
        let point = |(i, m): (usize, &Measurement)| {
            Some(ScatterPoint {
                number: i + 1,
                label: m.name.to_owned(),
                x: values(m.selectivity.x),
                y: values(y(m)?),
                value: m.consistency.as_ref().map(|c| c.colour_one_value),
            })
        };
        measurements.iter().enumerate().filter_map(point).collect()
    };
    let scatter = |title: &str, y: &str, points: Vec<ScatterPoint>| Scatter {
        title: title.to_owned(),
        x: "X: selectivity, 1 - H / ln n".into(),
        y: y.to_owned(),
        value: COLOR_TITLE.into(),
        axes: [-MARGIN..1.0 + MARGIN, y_range(&points)],
        points,
    };
    vec![
        scatter(
            &format!("Selectivity and consistency control ({seeds} key banks, 95 % intervals)"),
            "Y: consistency control, (G + J + R) / 3",
            points(|m| m.consistency.as_ref().map(|c| c.y)),
        ),
        scatter(
            "Selectivity and concentration on high scores",
            "C: concentration",
            points(|m| Some(m.selectivity.c)),
        ),
    ]
}

/// The range from 0 to 1, or to the intervals beyond, with a margin.
fn y_range(points: &[ScatterPoint]) -> std::ops::Range<f64> {
    let low = points.iter().map(|p| p.y[1]).fold(0.0, f64::min);
    let high = points.iter().map(|p| p.y[2]).fold(1.0, f64::max);
    let margin = MARGIN * (high - low);
    low - margin..high + margin
}
