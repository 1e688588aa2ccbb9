//! A figure: a line chart with marks, and an optional heat map below it.

use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::heat_map::{CELL_PX, HEAT_MAP_CELLS, HeatMap};
use super::mark::{Axes, Chart, Mark, draw_marks, legend_text};
use super::{COLORS, DrawResult, FONT, Picture, WIDTH_PX, axis_label};

/// Width of the labels to the left of a chart, and height of those below it.
pub(super) const LABEL_AREA_PX: (u32, u32) = (84, 48);
pub(super) const MARGIN_PX: u32 = 16;
const TITLE_HEIGHT_PX: u32 = 40;
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
    area.draw(&Text::new(title.to_owned(), (MARGIN_PX as i32, 12), (FONT, 20)))?;
    let (_, below) = area.split_vertically(TITLE_HEIGHT_PX);
    let (plot, legend) =
        below.split_horizontally(MARGIN_PX + LABEL_AREA_PX.0 + HEAT_MAP_CELLS.0 as u32 * CELL_PX);
    Ok([plot, legend])
}

/// Draws labelled axes.
pub(super) fn draw_axes<'a, B: DrawingBackend>(
    plot: &'a DrawingArea<B, Shift>,
    (x_label, y_label): (&str, &str),
    axes: &Axes,
) -> DrawResult<Chart<'a, B>>
where
    B::ErrorType: 'static,
{
    let [x, y] = axes.clone();
    let (width, height) = (x.end - x.start, y.end - y.start);
    let mut chart = ChartBuilder::on(plot)
        .margin_left(MARGIN_PX)
        .margin_bottom(MARGIN_PX)
        .x_label_area_size(LABEL_AREA_PX.1)
        .y_label_area_size(LABEL_AREA_PX.0)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc(x_label)
        .y_desc(y_label)
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .light_line_style(WHITE)
        .x_label_formatter(&|x| axis_label(*x, width))
        .y_label_formatter(&|y| axis_label(*y, height))
        .draw()?;
    Ok(chart)
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
