//! The style that all plots share: sizes, colors, text and axes.

use std::ops::Range;

use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::DrawResult;

/// Width of every plot in pixels.
pub(super) const WIDTH_PX: u32 = 960;
pub(super) const FONT: &str = "sans-serif";
/// Sizes of text in pixels.
pub(super) const TITLE_PX: i32 = 19;
pub(super) const AXIS_PX: i32 = 16;
pub(super) const LABEL_PX: i32 = 15;
/// Space that a title takes, and the margin around a plot.
pub(super) const TITLE_HEIGHT_PX: u32 = 44;
pub(super) const MARGIN_PX: u32 = 16;
/// Width of the labels to the left of a chart, and height of those below it.
pub(super) const LABEL_AREA_PX: (u32, u32) = (84, 52);
/// Width of the legend to the right of a chart.
pub(super) const LEGEND_PX: u32 = 220;
/// Height of a line of a legend.
const LEGEND_LINE_PX: i32 = 19;
/// The ink of text, and that of the lines of a grid.
pub(super) const INK: RGBColor = RGBColor(38, 42, 51);
const GRID: RGBColor = RGBColor(223, 226, 232);
/// Colors that are distinguishable with color vision deficiencies (Okabe and Ito, 2008).
pub(super) const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// A chart with linear axes.
pub(super) type Chart<'a, B> = ChartContext<'a, B, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
/// The ranges of the x and the y axis.
pub(super) type Axes = [Range<f64>; 2];

/// A text of this size at the left top corner `at`.
pub(super) fn text(
    content: impl Into<String>,
    at: (i32, i32),
    size: i32,
) -> Text<'static, (i32, i32), String> {
    Text::new(content.into(), at, (FONT, size).into_font().color(&INK))
}

/// Draws a title and returns the area below it. Without a title, that is all of the area.
pub(super) fn draw_title<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
) -> DrawResult<DrawingArea<B, Shift>>
where
    B::ErrorType: 'static,
{
    if title.is_empty() {
        return Ok(area.clone().margin(MARGIN_PX, 0, 0, 0));
    }
    area.draw(&text(title, (MARGIN_PX as i32, 14), TITLE_PX))?;
    Ok(area.split_vertically(TITLE_HEIGHT_PX).1)
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
        .margin_right(MARGIN_PX)
        .margin_bottom(MARGIN_PX)
        .x_label_area_size(LABEL_AREA_PX.1)
        .y_label_area_size(LABEL_AREA_PX.0)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc(x_label)
        .y_desc(y_label)
        .label_style((FONT, LABEL_PX).into_font().color(&INK))
        .axis_desc_style((FONT, AXIS_PX).into_font().color(&INK))
        .axis_style(INK)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|x| axis_label(*x, width))
        .y_label_formatter(&|y| axis_label(*y, height))
        .draw()?;
    Ok(chart)
}

/// Writes the lines of a legend entry and returns the pixel row of the next entry.
pub(super) fn legend_text<B: DrawingBackend>(
    legend: &DrawingArea<B, Shift>,
    mut row: i32,
    content: &str,
) -> DrawResult<i32>
where
    B::ErrorType: 'static,
{
    for line in content.split('\n') {
        legend.draw(&text(line, (48, row + 2), LABEL_PX))?;
        row += LEGEND_LINE_PX;
    }
    Ok(row + 7)
}

/// Formats the label of an axis with as many digits as its span requires.
pub(super) fn axis_label(x: f64, span: f64) -> String {
    if x.abs() < span * 1e-9 {
        return "0".into();
    }
    if x.abs() >= 1e6 {
        return format!("{:.*}M", usize::from(span < 1e7), x / 1e6);
    }
    if span < 1e-2 && x.abs() < 1e-2 {
        return format!("{x:.1e}");
    }
    let digits = (1.0 - (span / 2.0).log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{x:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axis_labels_have_enough_digits_for_the_span() {
        let cases = [
            (500.0, 500.0, "500"),
            (2.5, 3.0, "2.5"),
            (0.05, 0.3, "0.05"),
            (2_500_000.0, 4e6, "2.5M"),
            (1e-3, 3e-3, "1.0e-3"),
            (0.0, 3e-3, "0"),
            (0.41, 3e-3, "0.4100"),
        ];
        for (x, span, expected) in cases {
            assert_eq!(axis_label(x, span), expected, "{x} of {span}");
        }
    }
}
