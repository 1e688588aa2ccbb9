//! A figure of lines with marks over a field: values over a plane as a heat map with a colour bar.

use std::ops::Range;
use std::path::Path;

use gd_model::error::Result;
use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::element::DashedPathElement;
use plotters::prelude::*;
use plotters::style::colors::colormaps::ViridisRGB;

use super::{COLOURS, Drawn, FONT, Picture, WIDTH, number, picture_svg, save_picture};

/// Columns and rows of a field's values. A value is a square on the page, so the plane that they cover is to have
/// this ratio of its sides.
pub const FIELD: (usize, usize) = (320, 240);
/// Pixels a value, pixels of the labels beside and below the axes, of a title, and of the lines' height.
const CELL: u32 = 2;
const LABELS: (u32, u32) = (84, 48);
const TITLE: u32 = 40;
const LINES: u32 = 300;
const MARGIN: u32 = 16;
/// Steps of colour in a field.
const BANDS: usize = 32;
/// Points of a dashed line that are drawn, of how many.
const DASH: (usize, usize) = (6, 10);
/// Ticks of the colour bar.
const TICKS: usize = 6;

/// How a mark looks, so that marks are told apart without their colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Symbol {
    /// A filled square.
    Square,
    /// A filled circle.
    Circle,
    /// A filled triangle.
    Triangle,
    /// A ring, around what else is there.
    Ring,
    /// A filled diamond.
    Diamond,
    /// Two crossed strokes.
    Cross,
}

/// A marked point.
#[derive(Debug, Clone, PartialEq)]
pub struct Mark {
    /// Where it is.
    pub at: (f64, f64),
    /// How it looks.
    pub symbol: Symbol,
    /// Which colour; black without one.
    pub colour: Option<usize>,
    /// What the legend says.
    pub label: String,
}

/// A line.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Its name in the legend.
    pub label: String,
    /// Which colour.
    pub colour: usize,
    /// Whether it is dashed.
    pub dashed: bool,
    /// Its points, x rising.
    pub points: Vec<(f64, f64)>,
}

/// Lines between a pair of axes.
#[derive(Debug, Clone, PartialEq)]
pub struct Lines {
    /// Title.
    pub title: String,
    /// What the x axis shows.
    pub x: String,
    /// What the y axis shows.
    pub y: String,
    /// What the axes span: x, then y. What lies outside is not drawn.
    pub span: [Range<f64>; 2],
    /// The lines.
    pub lines: Vec<Line>,
    /// What is marked.
    pub marks: Vec<Mark>,
}

/// Values over a plane.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// Title.
    pub title: String,
    /// What the x axis shows.
    pub x: String,
    /// What the y axis shows.
    pub y: String,
    /// What the values are, above the colour bar.
    pub value: String,
    /// What the axes span: x, then y.
    pub span: [Range<f64>; 2],
    /// The values at the middles of the cells `[rows, columns]` of [`FIELD`], the row of the least y first.
    pub values: Vec<f64>,
    /// What is marked.
    pub marks: Vec<Mark>,
}

impl Field {
    /// The middles of the cells of a field over a plane, in the order of its values.
    pub fn places(span: &[Range<f64>; 2]) -> impl Iterator<Item = (f64, f64)> + use<> {
        let [x, y] = span.clone();
        let at = |span: &Range<f64>, n: usize, of: usize| {
            span.start + (span.end - span.start) * (n as f64 + 0.5) / of as f64
        };
        (0..FIELD.0 * FIELD.1).map(move |n| (at(&x, n % FIELD.0, FIELD.0), at(&y, n / FIELD.0, FIELD.1)))
    }

    /// The least and the greatest value.
    fn bounds(&self) -> (f64, f64) {
        self.values.iter().fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)))
    }
}

/// Lines over a field, where there is one.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// The lines.
    pub lines: Lines,
    /// The field.
    pub field: Option<Field>,
}

impl Figure {
    /// The figure as the text of an SVG file.
    ///
    /// # Errors
    /// What the plotting library reports.
    pub fn svg(&self) -> Result<String> {
        picture_svg(self)
    }

    /// Writes the figure to a file: PNG where its name ends so, else SVG.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        save_picture(path, self)
    }
}

/// The colour of a share in [0, 1] of the way from the least to the greatest value: viridis, whose steps look even
/// to colour-blind eyes too.
fn colour(share: f64) -> RGBColor {
    ViridisRGB.get_color(share.clamp(0.0, 1.0))
}

/// Which band a value is in. The steps are fine near the least value and coarse far above it: they are even in
/// ln(1 + v - least).
fn band(value: f64, (low, high): (f64, f64)) -> usize {
    let share = (value - low).ln_1p() / (high - low).ln_1p().max(1e-300);
    ((share * BANDS as f64) as usize).min(BANDS - 1)
}

/// The value at a share of the colour bar.
fn value_at(share: f64, (low, high): (f64, f64)) -> f64 {
    low + (share * (high - low).ln_1p()).exp_m1()
}

/// What a step of drawing gives.
type Made<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Chart<'a, B> = ChartContext<'a, B, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

impl Picture for Figure {
    fn size(&self) -> (u32, u32) {
        let field = if self.field.is_some() { TITLE + FIELD.1 as u32 * CELL + LABELS.1 + MARGIN } else { 0 };
        (WIDTH, TITLE + LINES + LABELS.1 + MARGIN + field)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn
    where
        B::ErrorType: 'static,
    {
        let (lines, field) = root.split_vertically(TITLE + LINES + LABELS.1 + MARGIN);
        self.lines.draw(&lines)?;
        self.field.as_ref().map_or(Ok(()), |f| f.draw(&field))
    }
}

/// Writes a title, and splits what is below it into a chart's part, whose size is fixed, and a strip on its right.
fn split<B: DrawingBackend>(area: &DrawingArea<B, Shift>, title: &str) -> Made<[DrawingArea<B, Shift>; 2]>
where
    B::ErrorType: 'static,
{
    area.draw(&Text::new(title.to_owned(), (MARGIN as i32, 12), (FONT, 20)))?;
    let (_, below) = area.split_vertically(TITLE);
    let (plot, side) = below.split_horizontally(MARGIN + LABELS.0 + FIELD.0 as u32 * CELL);
    Ok([plot, side])
}

fn chart<'a, B: DrawingBackend>(
    plot: &'a DrawingArea<B, Shift>,
    (x, y): (&str, &str),
    span: &[Range<f64>; 2],
) -> Made<Chart<'a, B>>
where
    B::ErrorType: 'static,
{
    let [across, up] = span.clone();
    let (width, height) = (across.end - across.start, up.end - up.start);
    let mut chart = ChartBuilder::on(plot)
        .margin_left(MARGIN)
        .margin_bottom(MARGIN)
        .x_label_area_size(LABELS.1)
        .y_label_area_size(LABELS.0)
        .build_cartesian_2d(across, up)?;
    chart
        .configure_mesh()
        .x_desc(x)
        .y_desc(y)
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .light_line_style(WHITE)
        .x_label_formatter(&|x| number(*x, width))
        .y_label_formatter(&|y| number(*y, height))
        .draw()?;
    Ok(chart)
}

/// A mark at a place in pixels, outlined in white so that it shows on any ground.
fn mark<B: DrawingBackend>(area: &DrawingArea<B, Shift>, (x, y): (i32, i32), mark: &Mark) -> Drawn
where
    B::ErrorType: 'static,
{
    let ink = mark.colour.map_or(BLACK, |c| COLOURS[c % COLOURS.len()]);
    let polygon = |corners: &[(i32, i32)]| -> Drawn {
        let place = |scale: f64| {
            let at = |&(dx, dy): &(i32, i32)| {
                (x + (f64::from(dx) * scale) as i32, y + (f64::from(dy) * scale) as i32)
            };
            corners.iter().map(at).collect::<Vec<_>>()
        };
        area.draw(&Polygon::new(place(1.4), WHITE.filled()))?;
        Ok(area.draw(&Polygon::new(place(1.0), ink.filled()))?)
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
            for (colour, width) in [(WHITE, 5), (ink, 2)] {
                for [from, to] in [[(-6, -6), (6, 6)], [(-6, 6), (6, -6)]] {
                    let ends = vec![(x + from.0, y + from.1), (x + to.0, y + to.1)];
                    area.draw(&PathElement::new(ends, colour.stroke_width(width)))?;
                }
            }
            Ok(())
        }
    }
}

/// The marks, each in its place and in the legend from line `row` on; equal labels stand there once.
fn marks<B: DrawingBackend>(
    chart: &Chart<B>,
    side: &DrawingArea<B, Shift>,
    marks: &[Mark],
    mut row: i32,
) -> Drawn
where
    B::ErrorType: 'static,
{
    let (plot, screen) = (chart.plotting_area(), chart.plotting_area().use_screen_coord());
    let mut said: Vec<&str> = Vec::new();
    for one in marks {
        mark(&screen, plot.map_coordinate(&one.at), one)?;
        if !one.label.is_empty() && !said.contains(&one.label.as_str()) {
            said.push(&one.label);
            mark(side, (28, row + 10), one)?;
            row = legend_text(side, row, &one.label)?;
        }
    }
    Ok(())
}

/// Writes a text of the legend, one line a `\n`, and returns where the next begins.
fn legend_text<B: DrawingBackend>(side: &DrawingArea<B, Shift>, mut row: i32, text: &str) -> Made<i32>
where
    B::ErrorType: 'static,
{
    for line in text.split('\n') {
        side.draw(&Text::new(line.to_owned(), (48, row + 2), (FONT, 16)))?;
        row += 19;
    }
    Ok(row + 7)
}

impl Lines {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Drawn
    where
        B::ErrorType: 'static,
    {
        let [plot, side] = split(area, &self.title)?;
        let mut chart = chart(&plot, (&self.x, &self.y), &self.span)?;
        let mut row = 0;
        for line in &self.lines {
            let style = COLOURS[line.colour % COLOURS.len()].stroke_width(2);
            let within = |p: &&(f64, f64)| self.span[0].contains(&p.0) && self.span[1].contains(&p.1);
            // What leaves the axes and comes back is drawn in pieces.
            for piece in line.points.split(|p| !within(&p)).filter(|piece| piece.len() > 1) {
                let (dash, step) = if line.dashed { DASH } else { (piece.len(), piece.len()) };
                for part in piece.chunks(step) {
                    let part = part.iter().take(dash).copied();
                    chart.draw_series(LineSeries::new(part, style))?;
                }
            }
            let (length, gap) = if line.dashed { (8, 5) } else { (1000, 0) };
            side.draw(&DashedPathElement::new([(14, row + 10), (42, row + 10)], length, gap, style))?;
            row = legend_text(&side, row, &line.label)?;
        }
        marks(&chart, &side, &self.marks, row)
    }
}

impl Field {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Drawn
    where
        B::ErrorType: 'static,
    {
        let [plot, side] = split(area, &self.title)?;
        let mut chart = chart(&plot, (&self.x, &self.y), &self.span)?;
        let [x, y] = &self.span;
        let cell = [(x.end - x.start) / FIELD.0 as f64, (y.end - y.start) / FIELD.1 as f64];
        let bounds = self.bounds();
        for (r, row) in self.values.chunks(FIELD.0).enumerate() {
            let bottom = y.start + r as f64 * cell[1];
            let mut from = 0;
            // Neighbours of one colour are one rectangle.
            for run in row.chunk_by(|a, b| band(*a, bounds) == band(*b, bounds)) {
                let place = |column: usize| x.start + column as f64 * cell[0];
                let fill = colour((band(run[0], bounds) as f64 + 0.5) / BANDS as f64).filled();
                let corners = [(place(from), bottom), (place(from + run.len()), bottom + cell[1])];
                chart.draw_series(std::iter::once(Rectangle::new(corners, fill)))?;
                from += run.len();
            }
        }
        let bar = 26 + (TICKS as i32 - 1) * 30;
        side.draw(&Text::new(self.value.clone(), (14, 0), (FONT, 16)))?;
        for n in 0..BANDS {
            let y = |n: usize| bar - (n as i32 * (bar - 26)) / BANDS as i32;
            let fill = colour((n as f64 + 0.5) / BANDS as f64).filled();
            side.draw(&Rectangle::new([(14, y(n + 1)), (34, y(n))], fill))?;
        }
        for n in 0..TICKS {
            let at = bar - (n as i32 * (bar - 26)) / (TICKS as i32 - 1);
            let value = value_at(n as f64 / (TICKS as f64 - 1.0), bounds);
            side.draw(&Text::new(number(value, bounds.1 - bounds.0), (42, at - 8), (FONT, 16)))?;
        }
        marks(&chart, &side, &self.marks, bar + 24)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_rise_with_the_value_and_the_bar_says_where() {
        let bounds = (-1.0, 60.0);
        assert_eq!((band(-1.0, bounds), band(60.0, bounds)), (0, BANDS - 1));
        for n in 0..BANDS {
            let middle = value_at((n as f64 + 0.5) / BANDS as f64, bounds);
            assert_eq!(band(middle, bounds), n, "{middle}");
        }
        assert_eq!(band(2.0, (2.0, 2.0)), 0);
        assert_ne!(colour(0.0), colour(1.0));
    }

    #[test]
    fn places_are_the_middles_of_the_cells_from_below() {
        let span = [0.0..320.0, -120.0..120.0];
        let places: Vec<_> = Field::places(&span).collect();
        assert_eq!(places.len(), FIELD.0 * FIELD.1);
        assert_eq!((places[0], places[1], places[FIELD.0]), ((0.5, -119.5), (1.5, -119.5), (0.5, -118.5)));
        assert_eq!(places.last(), Some(&(319.5, 119.5)));
    }
    #[test]
    fn a_field_lies_as_its_axes_say() {
        let span = [0.0..4.0, 0.0..3.0];
        let field = |of: fn((f64, f64)) -> f64| Field {
            title: "title".into(),
            x: "x".into(),
            y: "y".into(),
            value: "value".into(),
            span: span.clone(),
            values: Field::places(&span).map(of).collect(),
            marks: vec![Mark { at: (1.0, 1.0), symbol: Symbol::Cross, colour: None, label: "here".into() }],
        };
        let lines = Lines {
            title: "lines".into(),
            x: "x".into(),
            y: "y".into(),
            span: [0.0..1.0, 0.0..1.0],
            lines: Vec::new(),
            marks: Vec::new(),
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        let drawn = |of: fn((f64, f64)) -> f64| {
            let figure = Figure { lines: lines.clone(), field: Some(field(of)) };
            figure.save(&path).unwrap();
            let mut reader = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&path).unwrap()));
            reader.set_transformations(png::Transformations::IDENTITY);
            let mut reader = reader.read_info().unwrap();
            let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
            reader.next_frame(&mut pixels).unwrap();
            assert_eq!(figure.size().0, WIDTH);
            // The light of the pixel at a place of the field.
            move |x: f64, y: f64| {
                let left = f64::from(MARGIN + LABELS.0);
                let bottom = f64::from(figure.size().1 - MARGIN - LABELS.1);
                let side = f64::from(CELL) * FIELD.0 as f64 / 4.0;
                let at = ((bottom - y * side) as usize * WIDTH as usize + (left + x * side) as usize) * 3;
                pixels[at..at + 3].iter().map(|&c| u32::from(c)).sum::<u32>()
            }
        };
        // Dark is low: on the left of a field that rises with x, below in one that rises with y.
        let light = drawn(|(x, _)| x);
        assert!(light(0.1, 0.1) < light(2.0, 0.1) && light(2.0, 0.1) < light(3.9, 0.1));
        assert_eq!(light(0.1, 0.2), light(0.1, 2.9));
        let light = drawn(|(_, y)| y);
        assert!(light(0.1, 0.1) < light(0.1, 1.5) && light(0.1, 1.5) < light(0.1, 2.9));
        assert_eq!(light(0.2, 0.1), light(3.9, 0.1));
        // The mark is where it says, in black, darker than any colour of a field.
        assert!(light(1.0, 1.0) < 60 && light(1.3, 1.0) > 100, "{} {}", light(1.0, 1.0), light(1.3, 1.0));
    }
}
