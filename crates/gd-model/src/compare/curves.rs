//! The loss curves of a comparison as SVG.

use plotters::prelude::*;

use super::{Run, by_mechanism};
use crate::error::{Error, Result};

const SIZE: (u32, u32) = (960, 600);
/// Colours that stay apart for colour-blind eyes too.
const COLOURS: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(0, 158, 115), RGBColor(213, 94, 0), RGBColor(204, 121, 167)];

/// The curves of one mechanism, means over its seeds.
struct Curves {
    label: String,
    train: Vec<(f64, f64)>,
    valid: Vec<(f64, f64)>,
}

impl Curves {
    fn new(runs: &[&Run]) -> Self {
        let n = runs.len() as f64;
        let steps = runs.iter().map(|r| r.train_loss.len()).min().unwrap_or(0);
        let raw: Vec<f64> =
            (0..steps).map(|i| runs.iter().map(|r| r.train_loss[i]).sum::<f64>() / n).collect();
        let looks = runs.iter().map(|r| r.valid_loss.len()).min().unwrap_or(0);
        let valid = |i: usize| {
            let loss = runs.iter().map(|r| r.valid_loss[i].1).sum::<f64>() / n;
            (runs[0].valid_loss[i].0 as f64, loss)
        };
        Self {
            label: format!(
                "{}: {:.4}",
                runs[0].mechanism,
                runs.iter().map(|r| r.result.loss).sum::<f64>() / n
            ),
            train: smooth(&raw).into_iter().enumerate().map(|(i, y)| ((i + 1) as f64, y)).collect(),
            valid: (0..looks).map(valid).collect(),
        }
    }
}

/// A running mean over about a thirtieth of the run, unbiased at its start.
fn smooth(raw: &[f64]) -> Vec<f64> {
    let keep = 1.0 - 1.0 / (raw.len() as f64 / 30.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let next = |&x: &f64| {
        sum = keep * sum + x;
        weight = keep * weight + 1.0;
        sum / weight
    };
    raw.iter().map(next).collect()
}

/// Draws every mechanism in its own colour: a line for the training loss, points on a line for the
/// validation loss. The steep start is cut off, so that the ends can be told apart.
///
/// # Errors
/// What the plotting library reports.
pub fn svg(runs: &[Run]) -> Result<String> {
    let mut text = String::new();
    draw(runs, &mut text).map_err(|e| Error::Invalid(format!("the curves cannot be drawn: {e}")))?;
    Ok(text)
}

fn draw(runs: &[Run], text: &mut String) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let curves: Vec<Curves> = by_mechanism(runs).iter().map(|g| Curves::new(g)).collect();
    let last = curves.iter().map(|c| c.train.len()).max().unwrap_or(1) as f64;
    let points = |from: f64| {
        let all = curves.iter().flat_map(|c| c.train.iter().chain(&c.valid));
        all.filter(move |p| p.0 >= from).map(|p| p.1)
    };
    let (low, high) = (points(0.0).fold(f64::MAX, f64::min), points(last / 8.0).fold(f64::MIN, f64::max));
    let pad = 0.05 * (high - low).max(1e-3);
    let (low, high) = (low - pad, high + pad);
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(
            "Loss by step: line = training (smoothed), points = validation, number = whole validation text",
            ("sans-serif", 20),
        )
        .margin(16)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..last, low..high)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("nats per token")
        .label_style(("sans-serif", 18))
        .light_line_style(WHITE)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let inside = |p: &&(f64, f64)| p.1 <= high;
        let valid: Vec<_> = curve.valid.iter().filter(inside).copied().collect();
        chart.draw_series(LineSeries::new(
            curve.train.iter().filter(inside).copied(),
            colour.mix(0.55).stroke_width(1),
        ))?;
        chart
            .draw_series(LineSeries::new(valid.iter().copied(), colour.stroke_width(2)))?
            .label(curve.label.clone())
            .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], colour.stroke_width(3)));
        chart.draw_series(valid.iter().map(|&p| Circle::new(p, 4, colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(16)
        .legend_area_size(34)
        .label_font(("sans-serif", 18))
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::run;
    use super::*;

    #[test]
    fn every_mechanism_has_a_label_and_a_colour_of_its_own() {
        let runs = [run("softmax", 0, 2.0), run("gd", 0, 2.25), run("gd", 1, 2.75)];
        let svg = svg(&runs).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["softmax: 2.0000", "gd: 2.5000", "nats per token", "#0072B2", "#009E73"] {
            assert!(svg.contains(text), "{text} is missing");
        }
        assert!(!svg.contains("#D55E00") && !svg.contains("NaN"));
    }

    #[test]
    fn smoothing_keeps_a_constant_and_halves_a_jump_in_its_window() {
        assert!(smooth(&[2.0; 90]).iter().all(|x| (x - 2.0).abs() < 1e-12));
        let step: Vec<f64> = (0..90).map(|i| f64::from(i / 60)).collect();
        let smoothed = smooth(&step);
        assert!(smoothed[59] == 0.0 && (smoothed[60] - 1.0 / 3.0).abs() < 1e-6 && smoothed[89] > 0.99);
    }

    #[test]
    fn a_run_of_one_step_is_drawn() {
        let mut only = run("gd", 0, 2.0);
        only.train_loss.truncate(1);
        only.valid_loss = vec![(1, 2.0)];
        assert!(svg(&[only]).unwrap().contains("gd: 2.0000"));
    }
}
