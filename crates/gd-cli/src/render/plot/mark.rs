//! Marked points and the legend of a figure.

use plotters::coord::Shift;
use plotters::prelude::*;

use super::DrawResult;
use super::style::{COLORS, Chart, legend_text};

/// The shape of a mark. Shapes distinguish marks without color.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Symbol {
    /// A filled square.
    Square,
    /// A filled circle.
    Circle,
    /// A filled triangle.
    Triangle,
    /// A ring that can surround another mark.
    Ring,
    /// A filled diamond.
    Diamond,
    /// A diagonal cross.
    Cross,
}

/// A marked point.
#[derive(Debug, Clone, PartialEq)]
pub struct Mark {
    /// Position (x, y) in the coordinates of the axes.
    pub at: (f64, f64),
    /// Shape.
    pub symbol: Symbol,
    /// Index of the color; black if `None`.
    pub color: Option<usize>,
    /// Text in the legend, may be empty.
    pub label: String,
}

/// Draws a mark at a pixel position. A white outline separates it from the background.
fn draw_mark<B: DrawingBackend>(area: &DrawingArea<B, Shift>, (x, y): (i32, i32), mark: &Mark) -> DrawResult
where
    B::ErrorType: 'static,
{
    let ink = mark.color.map_or(BLACK, |c| COLORS[c % COLORS.len()]);
    let polygon = |corners: &[(i32, i32)]| -> DrawResult {
        let scaled = |scale: f64| {
            let corner = |&(dx, dy): &(i32, i32)| {
                (x + (f64::from(dx) * scale) as i32, y + (f64::from(dy) * scale) as i32)
            };
            corners.iter().map(corner).collect::<Vec<_>>()
        };
        area.draw(&Polygon::new(scaled(1.4), WHITE.filled()))?;
        Ok(area.draw(&Polygon::new(scaled(1.0), ink.filled()))?)
    };
    match mark.symbol {
        Symbol::Square => polygon(&[(-8, -8), (8, -8), (8, 8), (-8, 8)]),
        Symbol::Triangle => polygon(&[(-8, 6), (8, 6), (0, -8)]),
        Symbol::Diamond => polygon(&[(-6, 0), (0, -6), (6, 0), (0, 6)]),
        Symbol::Circle => {
            area.draw(&Circle::new((x, y), 8, WHITE.filled()))?;
            Ok(area.draw(&Circle::new((x, y), 6, ink.filled()))?)
        }
        Symbol::Ring => {
            area.draw(&Circle::new((x, y), 12, WHITE.stroke_width(5)))?;
            Ok(area.draw(&Circle::new((x, y), 12, ink.stroke_width(2)))?)
        }
        Symbol::Cross => {
            for (color, width) in [(WHITE, 5), (ink, 2)] {
                for [start, end] in [[(-6, -6), (6, 6)], [(-6, 6), (6, -6)]] {
                    let ends = vec![(x + start.0, y + start.1), (x + end.0, y + end.1)];
                    area.draw(&PathElement::new(ends, color.stroke_width(width)))?;
                }
            }
            Ok(())
        }
    }
}

/// The labels of marks, each of them once.
pub(super) fn mark_labels(marks: &[Mark]) -> Vec<&str> {
    let mut labels: Vec<&str> = Vec::new();
    for mark in marks {
        if !mark.label.is_empty() && !labels.contains(&mark.label.as_str()) {
            labels.push(&mark.label);
        }
    }
    labels
}

/// Draws marks in a chart and lists them in the legend, starting at pixel row `row`. Equal labels are listed once.
pub(super) fn draw_marks<B: DrawingBackend>(
    chart: &Chart<B>,
    legend: &DrawingArea<B, Shift>,
    marks: &[Mark],
    mut row: i32,
) -> DrawResult
where
    B::ErrorType: 'static,
{
    let (plot, screen) = (chart.plotting_area(), chart.plotting_area().use_screen_coord());
    for mark in marks {
        draw_mark(&screen, plot.map_coordinate(&mark.at), mark)?;
    }
    for label in mark_labels(marks) {
        let Some(mark) = marks.iter().find(|mark| mark.label == label) else { continue };
        draw_mark(legend, (28, row + 10), mark)?;
        row = legend_text(legend, row, label)?;
    }
    Ok(())
}
