//! A figure: a line chart with marks, and an optional heat map below it.

use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::heat_map::{HEAT_MAP_CELLS, HeatMap, cell_px};
use super::mark::{Mark, draw_marks, mark_labels};
use super::style::{Axes, COLORS, Layout, draw_axes, draw_title, legend_height, legend_text};
use super::{DrawResult, Picture};

/// Height of a line chart without labels and margin.
const CHART_HEIGHT_PX: u32 = 300;
/// A dashed line draws the first 6 of every 10 points.
const DASH_POINTS: (usize, usize) = (6, 10);

/// A line of a chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Name in the legend.
    pub label: String,
    /// Index of the color.
    pub color: usize,
    /// Whether the line is dashed.
    pub dashed: bool,
    /// Points (x, y), ordered by x.
    pub points: Vec<(f64, f64)>,
}

/// A chart of lines and marks.
#[derive(Debug, Clone, PartialEq)]
pub struct LineChart {
    /// Title.
    pub title: String,
    /// Label of the x axis.
    pub x: String,
    /// Label of the y axis.
    pub y: String,
    /// Ranges of the x and the y axis. Points outside are not drawn.
    pub axes: Axes,
    /// The lines.
    pub lines: Vec<Line>,
    /// The marks.
    pub marks: Vec<Mark>,
}

/// A line chart with an optional heat map below it.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// The line chart.
    pub line_chart: LineChart,
    /// The heat map.
    pub heat_map: Option<HeatMap>,
}

impl Picture for Figure {
    fn size(&self, layout: Layout) -> (u32, u32) {
        let heat_map = self.heat_map.as_ref().map_or(0, |map| map.height(layout));
        (layout.width(), self.line_chart.height(layout) + heat_map)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, layout: Layout) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let (top, bottom) = root.split_vertically(self.line_chart.height(layout));
        self.line_chart.draw(&top, layout)?;
        self.heat_map.as_ref().map_or(Ok(()), |map| map.draw(&bottom, layout))
    }
}

/// The size of a chart of this height with its labels and margins. Its width is that of a heat map.
pub(super) fn chart_size(layout: Layout, height: u32) -> (u32, u32) {
    let (left, below) = layout.label_area();
    let width = 2 * layout.margin() + left + HEAT_MAP_CELLS.0 as u32 * cell_px(layout);
    (width, height + below + layout.margin())
}

/// Draws a title and splits the area below it into a chart of this height and a legend.
pub(super) fn split_area<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    height: u32,
    layout: Layout,
) -> DrawResult<[DrawingArea<B, Shift>; 2]>
where
    B::ErrorType: 'static,
{
    Ok(layout.split(&draw_title(area, title, layout)?, chart_size(layout, height)))
}

impl LineChart {
    fn height(&self, layout: Layout) -> u32 {
        let labels = self.lines.iter().map(|line| line.label.as_str()).chain(mark_labels(&self.marks));
        let chart = layout.title_height(&self.title) + chart_size(layout, CHART_HEIGHT_PX).1;
        chart + layout.below(legend_height(labels))
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>, layout: Layout) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let [plot, legend] = split_area(area, &self.title, CHART_HEIGHT_PX, layout)?;
        let mut chart = draw_axes(&plot, (&self.x, &self.y), &self.axes, layout)?;
        let mut row = 0;
        for line in &self.lines {
            let style = COLORS[line.color % COLORS.len()].stroke_width(2);
            let inside = |p: &&(f64, f64)| self.axes[0].contains(&p.0) && self.axes[1].contains(&p.1);
            // A line that leaves the axes and returns is drawn as several segments.
            for segment in line.points.split(|p| !inside(&p)).filter(|segment| segment.len() > 1) {
                let (dash, period) = if line.dashed { DASH_POINTS } else { (segment.len(), segment.len()) };
                for chunk in segment.chunks(period) {
                    let points = chunk.iter().take(dash).copied();
                    chart.draw_series(LineSeries::new(points, style))?;
                }
            }
            let (length, gap) = if line.dashed { (8, 5) } else { (1000, 0) };
            legend.draw(&DashedPathElement::new([(14, row + 10), (42, row + 10)], length, gap, style))?;
            row = legend_text(&legend, row, &line.label)?;
        }
        draw_marks(&chart, &legend, &self.marks, row)
    }
}
