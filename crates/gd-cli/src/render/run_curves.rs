//! Curves from the logs of runs.

use super::plot::{Curve, CurveStyle, Panel, reduce_points, smooth};
use super::quantity::quantity;
use crate::history::{Axis, History};

/// The quantities that share a panel.
const LOSSES: [&str; 2] = ["loss", "valid_loss"];
/// The title of their panel.
const LOSS_TITLE: &str = "loss: line = training (smoothed), points = validation";

/// Creates one panel per quantity of the log, with one color per run. The losses share a panel. A run whose log
/// lacks a quantity has an empty curve in its panel.
pub fn panels(runs: &[History], axis: Axis, names: &[String]) -> Vec<Panel> {
    let mut panels: Vec<Panel> = Vec::new();
    for name in names {
        let is_loss = LOSSES.contains(&name.as_str());
        let quantity = quantity(name);
        let title = if is_loss { LOSS_TITLE.to_owned() } else { quantity.title.clone() };
        let index = panels.iter().position(|p| p.title == title).unwrap_or_else(|| {
            let x = match axis {
                Axis::Step => "step",
                Axis::Tokens => "tokens",
                Axis::Time => "minutes",
            };
            panels.push(Panel { title, x: x.into(), y: quantity.axis().into(), curves: Vec::new() });
            panels.len() - 1
        });
        for (color, run) in runs.iter().enumerate() {
            let mut curve = curve(run, color, axis, name);
            let first = !panels[index].curves.iter().any(|c| c.color == color);
            if runs.len() > 1 && first && !curve.points.is_empty() {
                curve.label = Some(run.name.clone());
            }
            panels[index].curves.push(curve);
        }
    }
    panels
}

/// The curve of one quantity of one run. The training loss is smoothed. A quantity that fewer than half of the steps
/// have, such as the validation loss, is drawn as points.
fn curve(run: &History, color: usize, axis: Axis, name: &str) -> Curve {
    let scale = quantity(name).scale;
    let mut points: Vec<(f64, f64)> =
        run.series(name, axis).into_iter().map(|(x, y)| (x, scale * y)).collect();
    let sparse = 2 * points.len() < run.steps.len() || name == "valid_loss";
    if name == "loss" {
        let raw: Vec<f64> = points.iter().map(|p| p.1).collect();
        points.iter_mut().zip(smooth(&raw)).for_each(|(p, y)| p.1 = y);
    }
    Curve {
        label: None,
        color,
        style: if sparse { CurveStyle::Points } else { CurveStyle::Line },
        points: reduce_points(points),
    }
}
