//! A figure: a line chart with marks, and an optional heat map below it.

use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::heat_map::{CELL_PX, HEAT_MAP_CELLS, HeatMap};
use super::mark::{Mark, draw_marks};
use super::style::{
    Axes, COLORS, LABEL_AREA_PX, MARGIN_PX, TITLE_HEIGHT_PX, WIDTH_PX, draw_axes, draw_title, legend_text,
};
use super::{DrawResult, Picture};

const CHART_HEIGHT_PX: u32 = 300;
/// Total height of the line chart with title, labels and margin.
const LINE_CHART_HEIGHT_PX: u32 = TITLE_HEIGHT_PX + CHART_HEIGHT_PX + LABEL_AREA_PX.1 + MARGIN_PX;
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
    fn size(&self) -> (u32, u32) {
        let heat_map_px = TITLE_HEIGHT_PX + HEAT_MAP_CELLS.1 as u32 * CELL_PX + LABEL_AREA_PX.1 + MARGIN_PX;
        (WIDTH_PX, LINE_CHART_HEIGHT_PX + if self.heat_map.is_some() { heat_map_px } else { 0 })
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let (top, bottom) = root.split_vertically(LINE_CHART_HEIGHT_PX);
        self.line_chart.draw(&top)?;
        self.heat_map.as_ref().map_or(Ok(()), |map| map.draw(&bottom))
    }
}

/// Draws a title and splits the area below it into a chart area of fixed width and a legend area to its right.
pub(super) fn split_area<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
) -> DrawResult<[DrawingArea<B, Shift>; 2]>
where
    B::ErrorType: 'static,
{
    let below = draw_title(area, title)?;
    let chart = 2 * MARGIN_PX + LABEL_AREA_PX.0 + HEAT_MAP_CELLS.0 as u32 * CELL_PX;
    let (plot, legend) = below.split_horizontally(chart);
    Ok([plot, legend])
}

impl LineChart {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let [plot, legend] = split_area(area, &self.title)?;
        let mut chart = draw_axes(&plot, (&self.x, &self.y), &self.axes)?;
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
