//! Scatter plots of labelled points with intervals and a color scale.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::colors::colormaps::ViridisRGB;

use super::figure::{chart_size, split_area};
use super::style::{Axes, INK, LABEL_PX, Layout, draw_axes, legend_text, text};
use super::{DrawResult, Picture};

/// Height of a plot without its title and labels.
const WIDE_HEIGHT_PX: u32 = 608;
const NARROW_HEIGHT_PX: u32 = 320;
/// Radius of a point.
const RADIUS_PX: i32 = 7;
/// Width and height that the number of a point takes.
const NUMBER_PX: (i32, i32) = (20, 15);
/// Distances from a point at which its number is tried.
const NUMBER_DISTANCES_PX: [i32; 7] = [17, 30, 46, 64, 84, 106, 130];
/// Directions in which its number is tried, in eighths of a turn from the right, upwards first.
const DIRECTIONS: [(i32, i32); 8] = [(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)];
/// Length of the color scale, its height with its labels, and the height of a line of its title.
const SCALE_PX: i32 = 120;
const SCALE_HEIGHT_PX: i32 = 52;
const SCALE_LINE_PX: i32 = 18;
/// Height of a line of the legend.
const POINT_LINE_PX: i32 = 21;
/// Colors of the scale.
const COLOR_STEPS: i32 = 40;

/// A point of a scatter plot.
#[derive(Debug, Clone, PartialEq)]
pub struct ScatterPoint {
    /// Number in the plot and in the legend. Points of several plots with the same number are listed alike.
    pub number: usize,
    /// Name in the legend.
    pub label: String,
    /// Position on the x axis, with the limits of its interval.
    pub x: [f64; 3],
    /// Position on the y axis, with the limits of its interval.
    pub y: [f64; 3],
    /// Value in [0, 1] that colors the point; without one it is white.
    pub value: Option<f64>,
}

/// A scatter plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Scatter {
    /// Title.
    pub title: String,
    /// Label of the x axis.
    pub x: String,
    /// Label of the y axis.
    pub y: String,
    /// Title of the color scale, may have several lines.
    pub value: String,
    /// Ranges of the x and the y axis, which contain all points.
    pub axes: Axes,
    /// The points.
    pub points: Vec<ScatterPoint>,
}

impl Picture for [Scatter] {
    fn size(&self, layout: Layout) -> (u32, u32) {
        (layout.width(), self.iter().map(|scatter| scatter.height(layout)).sum::<u32>().max(1))
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, layout: Layout) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let mut rest = root.clone();
        for scatter in self {
            let (area, below) = rest.split_vertically(scatter.height(layout));
            scatter.draw(&area, layout)?;
            rest = below;
        }
        Ok(())
    }
}

/// Height of a plot without its title and labels.
const fn plot_height(layout: Layout) -> u32 {
    match layout {
        Layout::Wide => WIDE_HEIGHT_PX,
        Layout::Narrow => NARROW_HEIGHT_PX,
    }
}

impl Scatter {
    fn height(&self, layout: Layout) -> u32 {
        let lines = self.value.split('\n').count() as i32;
        let legend = lines * SCALE_LINE_PX + SCALE_HEIGHT_PX + self.points.len() as i32 * POINT_LINE_PX;
        let (_, chart) = chart_size(layout, plot_height(layout));
        layout.title_height(&self.title) + chart + layout.below(legend as u32)
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>, layout: Layout) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let [plot, legend] = split_area(area, &self.title, plot_height(layout), layout)?;
        let chart = draw_axes(&plot, (&self.x, &self.y), &self.axes, layout)?;
        let (coordinates, screen) = (chart.plotting_area(), chart.plotting_area().use_screen_coord());
        let pixel = |x: f64, y: f64| coordinates.map_coordinate(&(x, y));
        for point in &self.points {
            let ([x, x_low, x_high], [y, y_low, y_high]) = (point.x, point.y);
            for ends in [[pixel(x_low, y), pixel(x_high, y)], [pixel(x, y_low), pixel(x, y_high)]] {
                screen.draw(&PathElement::new(ends.to_vec(), INK.mix(0.6).stroke_width(2)))?;
            }
        }
        let centers: Vec<(i32, i32)> = self.points.iter().map(|p| pixel(p.x[0], p.y[0])).collect();
        let numbers = number_positions(&centers, &plot.get_pixel_range());
        for ((point, &center), &number) in self.points.iter().zip(&centers).zip(&numbers) {
            screen.draw(&PathElement::new(vec![center, number], INK.mix(0.4).stroke_width(1)))?;
            draw_point(&screen, center, point.value)?;
            let corner = (number.0 - NUMBER_PX.0 / 2 + 2, number.1 - NUMBER_PX.1 / 2);
            screen.draw(&text(point.number.to_string(), corner, LABEL_PX))?;
        }
        self.draw_legend(&legend)
    }

    fn draw_legend<B: DrawingBackend>(&self, legend: &DrawingArea<B, Shift>) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let mut row = 0;
        for line in self.value.split('\n') {
            legend.draw(&text(line, (14, row), LABEL_PX))?;
            row += SCALE_LINE_PX;
        }
        let below = row + SCALE_HEIGHT_PX;
        row += 4;
        for step in 0..COLOR_STEPS {
            let x = |step: i32| 14 + step * SCALE_PX / COLOR_STEPS;
            let color = color(f64::from(step) / f64::from(COLOR_STEPS - 1));
            legend.draw(&Rectangle::new([(x(step), row), (x(step + 1), row + 16)], color.filled()))?;
        }
        for (label, x) in [("0", 14), ("1", 14 + SCALE_PX - 6)] {
            legend.draw(&text(label, (x, row + 20), LABEL_PX))?;
        }
        for (at, point) in self.points.iter().enumerate() {
            let row = below + at as i32 * POINT_LINE_PX;
            draw_point(legend, (22, row + 9), point.value)?;
            legend_text(legend, row, &format!("{} {}", point.number, point.label))?;
        }
        Ok(())
    }
}

fn draw_point<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    center: (i32, i32),
    value: Option<f64>,
) -> DrawResult
where
    B::ErrorType: 'static,
{
    let fill = value.map_or(WHITE, color);
    area.draw(&Circle::new(center, RADIUS_PX, INK.filled()))?;
    Ok(area.draw(&Circle::new(center, RADIUS_PX - 1, fill.filled()))?)
}

/// A color of the viridis map, which is perceptually uniform, with color vision deficiencies too.
fn color(value: f64) -> RGBColor {
    ViridisRGB.get_color(value.clamp(0.0, 1.0))
}

/// Where the numbers of points are centered: the nearest position of those that are tried at which a number lies inside of
/// the ranges of pixels and covers no point and no other number.
fn number_positions(centers: &[(i32, i32)], (xs, ys): &(Range<i32>, Range<i32>)) -> Vec<(i32, i32)> {
    let mut placed: Vec<(i32, i32)> = Vec::new();
    let overlaps = |a: (i32, i32), b: (i32, i32), width: i32, height: i32| {
        (a.0 - b.0).abs() < width && (a.1 - b.1).abs() < height
    };
    for &(x, y) in centers {
        let tried = NUMBER_DISTANCES_PX.iter().flat_map(|distance| {
            DIRECTIONS.iter().map(move |(dx, dy)| (x + dx * distance, y + dy * distance))
        });
        let margin = RADIUS_PX + 1;
        let is_free = |at: &(i32, i32)| {
            let clear_of_points = centers
                .iter()
                .all(|&c| !overlaps(*at, c, NUMBER_PX.0 / 2 + margin, NUMBER_PX.1 / 2 + margin));
            let inside = [at.0 - NUMBER_PX.0 / 2, at.0 + NUMBER_PX.0 / 2].iter().all(|x| xs.contains(x))
                && [at.1 - NUMBER_PX.1 / 2, at.1 + NUMBER_PX.1 / 2].iter().all(|y| ys.contains(y));
            inside
                && clear_of_points
                && placed.iter().all(|&other| !overlaps(*at, other, NUMBER_PX.0, NUMBER_PX.1))
        };
        let position = tried.clone().find(is_free).or_else(|| tried.clone().next()).unwrap_or((x, y));
        placed.push(position);
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::super::svg;
    use super::*;

    fn scatter() -> Scatter {
        let point = |number: usize, x: f64, value| ScatterPoint {
            number,
            label: format!("point {number}"),
            x: [x, x - 0.1, x + 0.1],
            y: [0.5, 0.4, 0.6],
            value,
        };
        Scatter {
            title: "title".into(),
            x: "across".into(),
            y: "up".into(),
            value: "share\nof all".into(),
            axes: [0.0..1.0, 0.0..1.0],
            points: vec![point(1, 0.2, Some(0.0)), point(2, 0.5, Some(1.0)), point(3, 0.8, None)],
        }
    }

    #[test]
    fn points_have_intervals_numbers_and_colors() {
        let text = svg(&[scatter(), scatter()][..]).unwrap();
        for part in ["title", "across", "up", "share", "of all", "1 point 1", "3 point 3"] {
            assert_eq!(text.matches(&format!("\n{part}\n")).count(), 2, "{part}");
        }
        let hex = |c: RGBColor| format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2);
        for fill in [color(0.0), color(1.0)] {
            assert!(text.contains(&hex(fill)), "{}", hex(fill));
        }
        // Two circles for every point, in the plot and in the legend.
        assert_eq!(text.matches("<circle").count(), 2 * 2 * 2 * 3);
        // Two intervals and the line to the number for every point.
        assert!(text.matches("<polyline").count() >= 2 * 3 * 3);
    }

    #[test]
    fn numbers_cover_neither_points_nor_each_other_and_stay_inside() {
        // Twelve points that lie close together at the right edge.
        let centers: Vec<(i32, i32)> = (0..12).map(|i| (390, 100 + 6 * i)).collect();
        let numbers = number_positions(&centers, &(0..400, 0..300));
        for (i, a) in numbers.iter().enumerate() {
            let apart = |b: &(i32, i32), width: i32, height: i32| {
                (a.0 - b.0).abs() >= width || (a.1 - b.1).abs() >= height
            };
            assert!(numbers[..i].iter().all(|b| apart(b, NUMBER_PX.0, NUMBER_PX.1)), "{numbers:?}");
            assert!(centers.iter().all(|b| apart(b, RADIUS_PX, RADIUS_PX)), "{numbers:?}");
            assert!(a.0 + NUMBER_PX.0 / 2 < 400, "{numbers:?}");
        }
    }
}
