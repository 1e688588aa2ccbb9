//! Panels of curves, such as the loss curves of runs.

use plotters::coord::Shift;
use plotters::prelude::*;

use super::style::{COLORS, Layout, draw_axes, draw_title, legend_height, legend_text};
use super::{DrawResult, Picture};

/// Height of the panel of a plot with one panel.
const SINGLE_PANEL_HEIGHT_PX: u32 = 600;
/// Height of each panel of a plot with several panels.
const PANEL_HEIGHT_PX: u32 = 300;
/// Height of the chart of a narrow panel.
const NARROW_CHART_HEIGHT_PX: u32 = 260;
/// Width of the legend to the right of a chart.
const LEGEND_PX: u32 = 220;
/// [`reduce_points`] splits a curve into at most this many chunks.
const MAX_CHUNKS: usize = 1000;

/// How a curve is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CurveStyle {
    /// A pale thin line, the background of a smoothed one.
    Faint,
    /// A line.
    Line,
    /// A thick line with a circle at every point.
    Points,
}

/// A curve.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Name in the legend. A curve without a label does not appear in the legend.
    pub label: Option<String>,
    /// Index of the color. Curves that belong together have the same color.
    pub color: usize,
    /// How the curve is drawn.
    pub style: CurveStyle,
    /// Finite points (x, y), ordered by x.
    pub points: Vec<(f64, f64)>,
}

/// A pair of axes with curves.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    /// Title, may be empty.
    pub title: String,
    /// Label of the x axis with its unit.
    pub x: String,
    /// Label of the y axis with its unit.
    pub y: String,
    /// The curves.
    pub curves: Vec<Curve>,
}

/// Exponential moving average over about a thirtieth of the values, with bias correction.
pub fn smooth(values: &[f64]) -> Vec<f64> {
    let decay = 1.0 - 1.0 / (values.len() as f64 / 30.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let next = |&x: &f64| {
        sum = decay * sum + x;
        weight = decay * weight + 1.0;
        sum / weight
    };
    values.iter().map(next).collect()
}

/// Reduces a curve to at most 2000 points without a visible difference: of each chunk of points the lowest and the
/// highest remain.
pub fn reduce_points(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let chunk_len = points.len().div_ceil(MAX_CHUNKS);
    if chunk_len <= 2 {
        return points;
    }
    let extremes = |chunk: &[(f64, f64)]| {
        let by_y = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let mut extremes: Vec<_> =
            chunk.iter().min_by(by_y).into_iter().chain(chunk.iter().max_by(by_y)).copied().collect();
        extremes.sort_by(|a, b| a.0.total_cmp(&b.0));
        extremes
    };
    points.chunks(chunk_len).flat_map(extremes).collect()
}

impl Picture for [Panel] {
    fn size(&self, layout: Layout) -> (u32, u32) {
        (layout.width(), self.iter().map(|panel| panel.height(layout, self.len())).sum::<u32>().max(1))
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, layout: Layout) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let mut rest = root.clone();
        for panel in self {
            let (area, below) = rest.split_vertically(panel.height(layout, self.len()));
            panel.draw(&area, layout)?;
            rest = below;
        }
        Ok(())
    }
}

impl Panel {
    /// The height of one of `count` panels.
    fn height(&self, layout: Layout, count: usize) -> u32 {
        match layout {
            Layout::Wide if count > 1 => PANEL_HEIGHT_PX,
            Layout::Wide => SINGLE_PANEL_HEIGHT_PX,
            Layout::Narrow => {
                layout.title_height(&self.title) + NARROW_CHART_HEIGHT_PX + legend_height(self.labels())
            }
        }
    }

    /// The entries of the legend.
    fn labels(&self) -> impl Iterator<Item = &str> {
        self.curves.iter().filter_map(|curve| curve.label.as_deref())
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>, layout: Layout) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let ([left, right], [low, high]) = (self.x_range(), self.y_range());
        let below = draw_title(area, &self.title, layout)?;
        // The legend is outside of the chart, so that it covers no curve.
        let legend_px = if self.labels().next().is_some() { LEGEND_PX } else { 0 };
        let [plot, legend] = layout.split(&below, (layout.width() - legend_px, NARROW_CHART_HEIGHT_PX));
        let mut chart = draw_axes(&plot, (&self.x, &self.y), &[left..right, low..high], layout)?;
        let mut row = 0;
        for curve in &self.curves {
            let color = COLORS[curve.color % COLORS.len()];
            let points = || curve.points.iter().copied();
            let line = match curve.style {
                CurveStyle::Faint => color.mix(0.35).stroke_width(1),
                CurveStyle::Line | CurveStyle::Points => color.stroke_width(2),
            };
            chart.draw_series(LineSeries::new(points(), line))?;
            if curve.style == CurveStyle::Points {
                chart.draw_series(points().map(|p| Circle::new(p, 4, color.filled())))?;
            }
            if let Some(label) = &curve.label {
                legend.draw(&PathElement::new([(14, row + 10), (40, row + 10)], color.stroke_width(3)))?;
                row = legend_text(&legend, row, label)?;
            }
        }
        Ok(())
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        self.curves.iter().flat_map(|c| c.points.iter().copied())
    }

    /// The x axis starts at 0 unless there are negative values. Its range is never empty.
    fn x_range(&self) -> [f64; 2] {
        let (low, high) = self.points().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(p.0), h.max(p.0)));
        if low > high { [0.0, 1.0] } else { [low.min(0.0), high.max(low.min(0.0) + 1e-3)] }
    }

    /// The y axis has the full range of the values.
    fn y_range(&self) -> [f64; 2] {
        let (low, high) = self.points().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(p.1), h.max(p.1)));
        if low > high {
            return [0.0, 1.0];
        }
        // A constant curve gets an axis as long as its value, or 1 if the value is 0.
        let spread = match high > low {
            true => high - low,
            false if high == 0.0 => 1.0,
            false => high.abs(),
        };
        let padding = 0.05 * spread.max(0.02 * high.abs());
        [low - padding, high + padding]
    }
}

#[cfg(test)]
mod tests {
    use super::super::{save, svg};
    use super::*;

    fn curve(label: &str, color: usize, style: CurveStyle) -> Curve {
        let points = (0..40).map(|i| (f64::from(i), 3.0 - 0.05 * f64::from(i))).collect();
        Curve { label: Some(label.to_owned()), color, style, points }
    }

    fn panel(curves: Vec<Curve>) -> Panel {
        Panel { title: "title".into(), x: "step".into(), y: "loss".into(), curves }
    }

    #[test]
    fn a_plot_has_axes_a_legend_and_one_color_per_curve() {
        let panels = [panel(vec![curve("one", 0, CurveStyle::Line), curve("two", 1, CurveStyle::Points)])];
        let text = svg(&panels[..]).unwrap();
        for part in ["<svg", "title", "step", "loss", "one", "two", "#0072B2", "#009E73", "<circle"] {
            assert!(text.contains(part), "{part} is missing");
        }
        assert!(!text.contains("#D55E00") && !text.contains("NaN"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        save(&path, &[panels[0].clone(), panel(Vec::new())][..]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[..8], *b"\x89PNG\r\n\x1a\n");
        assert_eq!(bytes[16..24], [960u32.to_be_bytes(), 600u32.to_be_bytes()].concat());
    }

    #[test]
    fn single_points_and_empty_panels_have_axes() {
        let mut single = curve("one", 0, CurveStyle::Points);
        single.points.truncate(1);
        for panel in [panel(vec![single]), panel(Vec::new())] {
            let ([left, right], [low, high]) = (panel.x_range(), panel.y_range());
            assert!(left < right && low < high, "{panel:?}");
            assert!(svg(&[panel][..]).unwrap().contains("</svg>"));
        }
    }

    #[test]
    fn reduced_curves_keep_their_spikes() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|i| (f64::from(i), 1.0)).collect();
        points[33_333].1 = 7.0;
        let reduced = reduce_points(points.clone());
        assert!(reduced.len() <= 2000 && reduced.contains(&(33_333.0, 7.0)), "{}", reduced.len());
        assert!(reduced.windows(2).all(|w| w[0].0 <= w[1].0));
        assert_eq!(reduce_points(points[..1500].to_vec()), points[..1500]);
    }

    #[test]
    fn smoothing_preserves_a_constant_and_damps_a_step() {
        assert!(smooth(&[2.0; 90]).iter().all(|x| (x - 2.0).abs() < 1e-12));
        let step: Vec<f64> = (0..90).map(|i| f64::from(i / 60)).collect();
        let smoothed = smooth(&step);
        assert!(smoothed[59] == 0.0 && (smoothed[60] - 1.0 / 3.0).abs() < 1e-6 && smoothed[89] > 0.99);
    }
}
