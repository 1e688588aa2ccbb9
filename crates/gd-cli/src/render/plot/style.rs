//! The style that all plots share: sizes, colors, text and axes.

use std::ops::Range;

use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::DrawResult;

pub(super) const FONT: &str = "sans-serif";
/// Sizes of text in pixels.
pub(super) const TITLE_PX: i32 = 19;
pub(super) const AXIS_PX: i32 = 16;
pub(super) const LABEL_PX: i32 = 15;
/// Height of the first line of a title with the space around it, and of each further line.
const TITLE_HEIGHT_PX: u32 = 44;
const TITLE_LINE_PX: u32 = 22;
/// Height of a line of a legend, and the space below an entry.
const LEGEND_LINE_PX: i32 = 19;
const LEGEND_GAP_PX: i32 = 7;
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

/// In the dark scheme: the counterparts of the paper and of black, which do not apply to text, because text in these colors
/// lies on a color of its own.
pub(super) const DARK_PAPER: [(RGBColor, RGBColor); 2] =
    [(WHITE, RGBColor(20, 23, 28)), (BLACK, RGBColor(233, 235, 239))];
/// In the dark scheme: the counterparts of ink, grid, and of those colors of lines that are too dark there.
pub(super) const DARK_COLORS: [(RGBColor, RGBColor); 6] = [
    (INK, RGBColor(233, 235, 239)),
    (GRID, RGBColor(58, 65, 77)),
    (COLORS[0], RGBColor(76, 159, 219)),
    (COLORS[1], RGBColor(29, 191, 147)),
    (COLORS[2], RGBColor(236, 122, 43)),
    (COLORS[3], RGBColor(222, 154, 193)),
];

/// The form of a picture: its width, and the place of its legend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// 960 pixels, the legend to the right of the chart.
    Wide,
    /// 400 pixels, as on a phone, the legend below the chart.
    Narrow,
}

impl Layout {
    /// Width of every picture in pixels.
    pub const fn width(self) -> u32 {
        match self {
            Self::Wide => 960,
            Self::Narrow => 400,
        }
    }

    /// The margin around a chart.
    pub(super) const fn margin(self) -> u32 {
        match self {
            Self::Wide => 16,
            Self::Narrow => 8,
        }
    }

    /// Width of the labels to the left of a chart, and height of those below it.
    pub(super) const fn label_area(self) -> (u32, u32) {
        match self {
            Self::Wide => (84, 52),
            Self::Narrow => (64, 52),
        }
    }

    /// The greatest number of labels of an x axis.
    const fn x_labels(self) -> usize {
        match self {
            Self::Wide => 11,
            Self::Narrow => 5,
        }
    }

    /// The lines of a title, which is broken between words where it is wider than the picture.
    fn title_lines(self, title: &str) -> Vec<String> {
        let font = (FONT, TITLE_PX).into_font();
        let fits = |line: &str| {
            font.box_size(line).is_ok_and(|(width, _)| width + 2 * self.margin() <= self.width())
        };
        let mut lines: Vec<String> = Vec::new();
        for word in title.split_whitespace() {
            match lines.last_mut() {
                Some(line) if fits(&format!("{line} {word}")) => {
                    line.push(' ');
                    line.push_str(word);
                }
                _ => lines.push(word.to_owned()),
            }
        }
        lines
    }

    /// Height of a title with the space around it. Without a title, that is a margin.
    pub(super) fn title_height(self, title: &str) -> u32 {
        match self.title_lines(title).len() as u32 {
            0 => self.margin(),
            lines => TITLE_HEIGHT_PX + (lines - 1) * TITLE_LINE_PX,
        }
    }

    /// Splits an area into a chart of this size, labels and margins included, and its legend.
    pub(super) fn split<B: DrawingBackend>(
        self,
        area: &DrawingArea<B, Shift>,
        (width, height): (u32, u32),
    ) -> [DrawingArea<B, Shift>; 2] {
        let (chart, legend) = match self {
            Self::Wide => area.split_horizontally(width),
            Self::Narrow => area.split_vertically(height),
        };
        [chart, legend]
    }

    /// The height that a legend of this height adds to the picture: none where it lies beside the chart.
    pub(super) const fn below(self, legend: u32) -> u32 {
        match self {
            Self::Wide => 0,
            Self::Narrow => legend,
        }
    }
}

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

/// Draws a title and returns the area below it. Without a title, that is all of the area but a margin.
pub(super) fn draw_title<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    layout: Layout,
) -> DrawResult<DrawingArea<B, Shift>>
where
    B::ErrorType: 'static,
{
    for (at, line) in layout.title_lines(title).into_iter().enumerate() {
        let y = 14 + at as i32 * TITLE_LINE_PX as i32;
        area.draw(&text(line, (layout.margin() as i32, y), TITLE_PX))?;
    }
    Ok(area.split_vertically(layout.title_height(title)).1)
}

/// Draws labelled axes.
pub(super) fn draw_axes<'a, B: DrawingBackend>(
    plot: &'a DrawingArea<B, Shift>,
    (x_label, y_label): (&str, &str),
    axes: &Axes,
    layout: Layout,
) -> DrawResult<Chart<'a, B>>
where
    B::ErrorType: 'static,
{
    let [x, y] = axes.clone();
    let (width, height) = (x.end - x.start, y.end - y.start);
    let mut chart = ChartBuilder::on(plot)
        .margin_left(layout.margin())
        .margin_right(layout.margin())
        .margin_bottom(layout.margin())
        .x_label_area_size(layout.label_area().1)
        .y_label_area_size(layout.label_area().0)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc(x_label)
        .y_desc(y_label)
        .x_labels(layout.x_labels())
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
    Ok(row + LEGEND_GAP_PX)
}

/// The height of a legend of these entries.
pub(super) fn legend_height<'a>(entries: impl IntoIterator<Item = &'a str>) -> u32 {
    let height = |entry: &str| entry.split('\n').count() as i32 * LEGEND_LINE_PX + LEGEND_GAP_PX;
    entries.into_iter().map(height).sum::<i32>() as u32
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
