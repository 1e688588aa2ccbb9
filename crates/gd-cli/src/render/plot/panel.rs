//! Panels of curves, such as the loss curves of runs.

use plotters::coord::Shift;
use plotters::prelude::*;

use super::{COLORS, DrawResult, FONT, Picture, WIDTH_PX, axis_label};

/// Height of the panel of a plot with one panel.
const SINGLE_PANEL_HEIGHT_PX: u32 = 600;
/// Height of each panel of a plot with several panels.
const PANEL_HEIGHT_PX: u32 = 300;
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
    fn size(&self) -> (u32, u32) {
        let height = if self.len() > 1 { PANEL_HEIGHT_PX } else { SINGLE_PANEL_HEIGHT_PX };
        (WIDTH_PX, height * self.len().max(1) as u32)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        for (area, panel) in root.split_evenly((self.len().max(1), 1)).iter().zip(self) {
            panel.draw(area)?;
        }
        Ok(())
    }
}

impl Panel {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let ([left, right], [low, high]) = (self.x_range(), self.y_range());
        let mut chart = ChartBuilder::on(area);
        chart.margin(16).x_label_area_size(48).y_label_area_size(84);
        if !self.title.is_empty() {
            chart.caption(&self.title, (FONT, 20));
        }
        let mut chart = chart.build_cartesian_2d(left..right, low..high)?;
        chart
            .configure_mesh()
            .x_desc(&self.x)
            .y_desc(&self.y)
            .label_style((FONT, 16))
            .axis_desc_style((FONT, 18))
            .light_line_style(WHITE)
            .x_label_formatter(&|x| axis_label(*x, right - left))
            .y_label_formatter(&|y| axis_label(*y, high - low))
            .draw()?;
        for curve in &self.curves {
            let color = COLORS[curve.color % COLORS.len()];
            let visible: Vec<_> = curve.points.iter().filter(|p| p.1 <= high).copied().collect();
            let line = match curve.style {
                CurveStyle::Faint => color.mix(0.35).stroke_width(1),
                CurveStyle::Line | CurveStyle::Points => color.stroke_width(2),
            };
            let series = chart.draw_series(LineSeries::new(visible.iter().copied(), line))?;
            if let Some(label) = &curve.label {
                series
                    .label(label)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)));
            }
            if curve.style == CurveStyle::Points {
                chart.draw_series(visible.iter().map(|&p| Circle::new(p, 4, color.filled())))?;
            }
        }
        if self.curves.iter().any(|c| c.label.is_some()) {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .margin(12)
                .legend_area_size(34)
                .label_font((FONT, 18))
                .background_style(WHITE)
                .border_style(BLACK.mix(0.3))
                .draw()?;
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

    /// The y axis ends at the maximum of the last seven eighths of the x axis. The steep start of a loss curve is
    /// cut off so that the differences at the end are visible.
    fn y_range(&self) -> [f64; 2] {
        let [left, right] = self.x_range();
        let start = left + (right - left) / 8.0;
        let low = self.points().map(|p| p.1).fold(f64::MAX, f64::min);
        let high = self.points().filter(|p| p.0 >= start).map(|p| p.1).fold(f64::MIN, f64::max);
        if low > high {
            return [0.0, 1.0];
        }
        // A constant curve gets an axis as long as its value, or 1 if the value is 0.
        let spread = match high > low {
            true => high - low,
            false if high == 0.0 => 20.0,
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
