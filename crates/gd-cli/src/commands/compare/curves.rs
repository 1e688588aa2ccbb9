//! The loss curves of `gd compare`.

use gd_model::analysis::compare::{Run, by_mechanism};

use crate::render::plot::{Curve, CurveStyle, Panel, smooth};

/// Creates a panel with one color per mechanism: a line for the training loss, points for the validation loss.
pub(super) fn panel(runs: &[Run]) -> Panel {
    let groups = by_mechanism(runs);
    Panel {
        title:
            "Loss by step: line = training (smoothed), points = validation, number = whole validation text"
                .into(),
        x: "step".into(),
        y: "nats per token".into(),
        curves: groups.iter().enumerate().flat_map(|(color, runs)| curves(color, runs)).collect(),
    }
}

/// The training and the validation loss of one mechanism, as means over its seeds.
fn curves(color: usize, runs: &[&Run]) -> [Curve; 2] {
    let n = runs.len() as f64;
    let steps = runs.iter().map(|r| r.train_loss.len()).min().unwrap_or(0);
    let raw: Vec<f64> = (0..steps).map(|i| runs.iter().map(|r| r.train_loss[i]).sum::<f64>() / n).collect();
    let evaluations = runs.iter().map(|r| r.valid_loss.len()).min().unwrap_or(0);
    let valid = |i: usize| {
        let loss = runs.iter().map(|r| r.valid_loss[i].1).sum::<f64>() / n;
        (runs[0].valid_loss[i].0 as f64, loss)
    };
    let last = runs.iter().map(|r| r.result.loss).sum::<f64>() / n;
    let label = format!("{}: {last:.4}", runs[0].mechanism);
    let train = smooth(&raw).into_iter().enumerate().map(|(i, y)| ((i + 1) as f64, y)).collect();
    [
        Curve { label: None, color, style: CurveStyle::Line, points: train },
        Curve {
            label: Some(label),
            color,
            style: CurveStyle::Points,
            points: (0..evaluations).map(valid).collect(),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::run;
    use super::*;
    use crate::render::plot::svg;

    #[test]
    fn every_mechanism_has_its_own_label_and_color() {
        let runs = [run("softmax", 0, 2.0), run("gd", 0, 2.25), run("gd", 1, 2.75)];
        let svg = svg(&[panel(&runs)][..]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["softmax: 2.0000", "gd: 2.5000", "nats per token", "#0072B2", "#009E73"] {
            assert!(svg.contains(text), "{text} is missing");
        }
        assert!(!svg.contains("#D55E00") && !svg.contains("NaN"));
    }

    #[test]
    fn a_run_of_one_step_has_a_plot() {
        let mut short = run("gd", 0, 2.0);
        short.train_loss.truncate(1);
        short.valid_loss = vec![(1, 2.0)];
        assert!(svg(&[panel(&[short])][..]).unwrap().contains("gd: 2.0000"));
    }
}
