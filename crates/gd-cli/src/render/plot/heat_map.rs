//! A heat map: values over a plane with marks and a color scale.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::colors::colormaps::ViridisRGB;

use super::DrawResult;
use super::figure::{chart_size, split_area};
use super::mark::{Mark, draw_marks, mark_labels};
use super::style::{Axes, LABEL_PX, Layout, axis_label, draw_axes, legend_height, text};

/// Columns and rows of the values of a heat map. A cell is a square, so the plane should have this aspect ratio.
pub const HEAT_MAP_CELLS: (usize, usize) = (320, 240);
/// Distinct colors of a heat map.
const COLOR_STEPS: usize = 32;
/// Labels of the color scale.
const SCALE_TICKS: usize = 6;
/// Top of the color scale below its title.
const SCALE_TOP_PX: i32 = 26;
/// Distance of two labels of the color scale.
const TICK_DISTANCE_PX: i32 = 30;
/// Height of the color scale with its title and the space below it.
const SCALE_HEIGHT_PX: i32 = SCALE_TOP_PX + (SCALE_TICKS as i32 - 1) * TICK_DISTANCE_PX + 24;

/// Width and height of a cell.
pub(super) const fn cell_px(layout: Layout) -> u32 {
    match layout {
        Layout::Wide => 2,
        Layout::Narrow => 1,
    }
}

/// Values over a plane.
#[derive(Debug, Clone, PartialEq)]
pub struct HeatMap {
    /// Title.
    pub title: String,
    /// Label of the x axis.
    pub x: String,
    /// Label of the y axis.
    pub y: String,
    /// Title of the color scale.
    pub value: String,
    /// Ranges of the x and the y axis.
    pub axes: Axes,
    /// The values at the cell centers, [`HEAT_MAP_CELLS`] in rows; the row with the smallest y comes first.
    pub values: Vec<f64>,
    /// The marks.
    pub marks: Vec<Mark>,
}

/// The range of the values and the color scale over it. The steps of the scale are equal in ln(1 + v - min), so that
/// they are fine near the minimum and coarse far above it.
#[derive(Debug, Clone, Copy)]
struct ColorScale {
    min: f64,
    max: f64,
}

impl ColorScale {
    fn new(values: &[f64]) -> Self {
        let (min, max) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)));
        Self { min, max }
    }

    /// Index of the color of a value.
    fn step(self, value: f64) -> usize {
        let share = (value - self.min).ln_1p() / (self.max - self.min).ln_1p().max(1e-300);
        ((share * COLOR_STEPS as f64) as usize).min(COLOR_STEPS - 1)
    }

    /// The value at a share, in [0, 1], of the color scale.
    fn value_at(self, share: f64) -> f64 {
        self.min + (share * (self.max - self.min).ln_1p()).exp_m1()
    }
}

/// A color of the viridis map, which is perceptually uniform, with color vision deficiencies too.
fn color(step: usize) -> RGBColor {
    ViridisRGB.get_color((step as f64 + 0.5) / COLOR_STEPS as f64)
}

impl HeatMap {
    /// The cell centers of a heat map over a plane, in the order of its values.
    pub fn cell_centers(axes: &Axes) -> impl Iterator<Item = (f64, f64)> + use<> {
        let [x, y] = axes.clone();
        let (columns, rows) = HEAT_MAP_CELLS;
        let center = |start: f64, end: f64, n: usize, count: usize| {
            start + (end - start) * (n as f64 + 0.5) / count as f64
        };
        (0..columns * rows).map(move |n| {
            (center(x.start, x.end, n % columns, columns), center(y.start, y.end, n / columns, rows))
        })
    }

    pub(super) fn height(&self, layout: Layout) -> u32 {
        let legend = SCALE_HEIGHT_PX as u32 + legend_height(mark_labels(&self.marks));
        let (_, chart) = chart_size(layout, HEAT_MAP_CELLS.1 as u32 * cell_px(layout));
        layout.title_height(&self.title) + chart + layout.below(legend)
    }

    pub(super) fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>, layout: Layout) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let height = HEAT_MAP_CELLS.1 as u32 * cell_px(layout);
        let [plot, legend] = split_area(area, &self.title, height, layout)?;
        let mut chart = draw_axes(&plot, (&self.x, &self.y), &self.axes, layout)?;
        let [x, y] = &self.axes;
        let (columns, rows) = HEAT_MAP_CELLS;
        let cell = [(x.end - x.start) / columns as f64, (y.end - y.start) / rows as f64];
        let scale = ColorScale::new(&self.values);
        for (r, row) in self.values.chunks(columns).enumerate() {
            let bottom = y.start + r as f64 * cell[1];
            let mut first = 0;
            // Adjacent cells of one color are drawn as one rectangle.
            for run in row.chunk_by(|a, b| scale.step(*a) == scale.step(*b)) {
                let left = |column: usize| x.start + column as f64 * cell[0];
                let corners = [(left(first), bottom), (left(first + run.len()), bottom + cell[1])];
                let fill = color(scale.step(run[0])).filled();
                chart.draw_series(std::iter::once(Rectangle::new(corners, fill)))?;
                first += run.len();
            }
        }
        let row = self.draw_scale(&legend, scale)?;
        draw_marks(&chart, &legend, &self.marks, row)
    }

    /// Draws the color scale and returns the pixel row below it.
    fn draw_scale<B: DrawingBackend>(
        &self,
        legend: &DrawingArea<B, Shift>,
        scale: ColorScale,
    ) -> DrawResult<i32>
    where
        B::ErrorType: 'static,
    {
        let bottom = SCALE_HEIGHT_PX - 24;
        legend.draw(&text(self.value.as_str(), (14, 0), LABEL_PX))?;
        for step in 0..COLOR_STEPS {
            let y = |step: usize| bottom - (step as i32 * (bottom - SCALE_TOP_PX)) / COLOR_STEPS as i32;
            legend.draw(&Rectangle::new([(14, y(step + 1)), (34, y(step))], color(step).filled()))?;
        }
        for tick in 0..SCALE_TICKS {
            let y = bottom - (tick as i32 * (bottom - SCALE_TOP_PX)) / (SCALE_TICKS as i32 - 1);
            let value = scale.value_at(tick as f64 / (SCALE_TICKS as f64 - 1.0));
            let label = axis_label(value, scale.max - scale.min);
            legend.draw(&text(label, (42, y - 8), LABEL_PX))?;
        }
        Ok(SCALE_HEIGHT_PX)
    }
}

#[cfg(test)]
mod tests {
    use super::super::figure::{Figure, LineChart};
    use super::super::{Picture, Symbol, save};
    use super::*;

    #[test]
    fn color_steps_rise_with_the_value_and_agree_with_the_scale() {
        let scale = ColorScale { min: -1.0, max: 60.0 };
        assert_eq!((scale.step(-1.0), scale.step(60.0)), (0, COLOR_STEPS - 1));
        for n in 0..COLOR_STEPS {
            let center = scale.value_at((n as f64 + 0.5) / COLOR_STEPS as f64);
            assert_eq!(scale.step(center), n, "{center}");
        }
        assert_eq!(ColorScale { min: 2.0, max: 2.0 }.step(2.0), 0);
        assert_ne!(color(0), color(COLOR_STEPS - 1));
    }

    #[test]
    fn cell_centers_start_at_the_bottom_left() {
        let axes = [0.0..320.0, -120.0..120.0];
        let centers: Vec<_> = HeatMap::cell_centers(&axes).collect();
        let (columns, rows) = HEAT_MAP_CELLS;
        assert_eq!(centers.len(), columns * rows);
        assert_eq!((centers[0], centers[1], centers[columns]), ((0.5, -119.5), (1.5, -119.5), (0.5, -118.5)));
        assert_eq!(centers.last(), Some(&(319.5, 119.5)));
    }

    #[test]
    fn cells_and_marks_are_drawn_at_their_coordinates() {
        let axes = [0.0..4.0, 0.0..3.0];
        let heat_map = |value: fn((f64, f64)) -> f64| HeatMap {
            title: "title".into(),
            x: "x".into(),
            y: "y".into(),
            value: "value".into(),
            axes: axes.clone(),
            values: HeatMap::cell_centers(&axes).map(value).collect(),
            marks: vec![Mark { at: (1.0, 1.0), symbol: Symbol::Cross, color: None, label: "here".into() }],
        };
        let line_chart = LineChart {
            title: "lines".into(),
            x: "x".into(),
            y: "y".into(),
            axes: [0.0..1.0, 0.0..1.0],
            lines: Vec::new(),
            marks: Vec::new(),
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        // Returns a function that gives the brightness at a point of the plane.
        let draw = |value: fn((f64, f64)) -> f64| {
            let figure = Figure { line_chart: line_chart.clone(), heat_map: Some(heat_map(value)) };
            save(&path, &figure).unwrap();
            let image = resvg::tiny_skia::Pixmap::load_png(&path).unwrap();
            let layout = Layout::Wide;
            let (width, height) = figure.size(layout);
            // Images may have more pixels than the plane has units.
            let scale = f64::from(image.width()) / f64::from(width);
            move |x: f64, y: f64| {
                let left = f64::from(layout.margin() + layout.label_area().0);
                let bottom = f64::from(height - layout.margin() - layout.label_area().1);
                let unit = f64::from(cell_px(layout)) * HEAT_MAP_CELLS.0 as f64 / 4.0;
                let at = |plane: f64| (plane * scale) as u32;
                let pixel = image.pixel(at(left + x * unit), at(bottom - y * unit)).unwrap();
                [pixel.red(), pixel.green(), pixel.blue()].into_iter().map(u32::from).sum::<u32>()
            }
        };
        // Low values are dark: on the left if the value rises with x, at the bottom if it rises with y.
        let brightness = draw(|(x, _)| x);
        assert!(brightness(0.1, 0.1) < brightness(2.0, 0.1) && brightness(2.0, 0.1) < brightness(3.9, 0.1));
        assert_eq!(brightness(0.1, 0.2), brightness(0.1, 2.9));
        let brightness = draw(|(_, y)| y);
        assert!(brightness(0.1, 0.1) < brightness(0.1, 1.5) && brightness(0.1, 1.5) < brightness(0.1, 2.9));
        assert_eq!(brightness(0.2, 0.1), brightness(3.9, 0.1));
        // The mark is dark, within a white outline.
        let (on, off) = (brightness(1.0, 1.0), brightness(1.3, 1.0));
        assert!(on < 150 && off > 250, "{on} {off}");
    }
}
