//! Curves as SVG or PNG: panels one below the other, each with axes and a legend.

mod field;

use std::path::Path;
use std::sync::OnceLock;

use gd_model::error::{Error, Result};
use gd_model::io::checkpoint::write_file;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

pub use field::{FIELD, Field, Figure, Line, Lines, Mark, Symbol};

const WIDTH: u32 = 960;
/// Height of a lone panel, and of one among several.
const HEIGHT: [u32; 2] = [600, 300];
const FONT: &str = "sans-serif";
/// Colours that stay apart for colour-blind eyes too.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// How a curve is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A thin line.
    Line,
    /// A thick line through points.
    Points,
}

/// A curve.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Its name in the legend; curves without one are not in it.
    pub label: Option<String>,
    /// Which colour: curves that belong together share it.
    pub colour: usize,
    /// How it is drawn.
    pub style: Style,
    /// Its points (x, y), finite, x rising.
    pub points: Vec<(f64, f64)>,
}

/// A pair of axes and what is drawn between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Panel {
    /// Title; may be empty.
    pub title: String,
    /// What the x axis shows, and in which unit.
    pub x: String,
    /// What the y axis shows, and in which unit.
    pub y: String,
    /// The curves.
    pub curves: Vec<Curve>,
}

/// A running mean over about a thirtieth of the points, unbiased at its start.
pub fn smooth(raw: &[f64]) -> Vec<f64> {
    let keep = 1.0 - 1.0 / (raw.len() as f64 / 30.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let next = |&x: &f64| {
        sum = keep * sum + x;
        weight = keep * weight + 1.0;
        sum / weight
    };
    raw.iter().map(next).collect()
}

/// At most about 2000 points that look the same: of every stretch the least and the greatest.
pub fn thin(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let stretch = points.len().div_ceil(1000);
    if stretch <= 2 {
        return points;
    }
    let ends = |stretch: &[(f64, f64)]| {
        let by_y = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let mut ends: Vec<_> =
            stretch.iter().min_by(by_y).into_iter().chain(stretch.iter().max_by(by_y)).copied().collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        ends
    };
    points.chunks(stretch).flat_map(ends).collect()
}

/// What drawing ends with; each library's error in its own words.
type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

/// What can be drawn on any kind of canvas.
pub(crate) trait Picture {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);

    /// Draws on a white canvas of that size.
    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn
    where
        B::ErrorType: 'static;
}

impl Picture for [Panel] {
    fn size(&self) -> (u32, u32) {
        let height = HEIGHT[usize::from(self.len() > 1)];
        (WIDTH, height * self.len().max(1) as u32)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Drawn
    where
        B::ErrorType: 'static,
    {
        for (area, panel) in root.split_evenly((self.len().max(1), 1)).iter().zip(self) {
            draw_panel(area, panel)?;
        }
        Ok(())
    }
}

/// The panels as the text of an SVG file.
///
/// # Errors
/// What the plotting library reports.
pub fn svg(panels: &[Panel]) -> Result<String> {
    picture_svg(panels)
}

/// Writes the panels to a file: PNG where its name ends so, else SVG.
///
/// # Errors
/// Names the file that cannot be written.
pub fn save(path: &Path, panels: &[Panel]) -> Result<()> {
    save_picture(path, panels)
}

/// [`svg`] of any picture.
pub(crate) fn picture_svg<P: Picture + ?Sized>(picture: &P) -> Result<String> {
    let mut text = String::new();
    paint(&SVGBackend::with_string(&mut text, picture.size()).into_drawing_area(), picture)?;
    Ok(text)
}

/// [`save`] of any picture.
pub(crate) fn save_picture<P: Picture + ?Sized>(path: &Path, picture: &P) -> Result<()> {
    if path.extension().is_none_or(|e| e != "png") {
        return write_file(path, picture_svg(picture)?.as_bytes());
    }
    let (width, height) = picture.size();
    let mut pixels = vec![0; 3 * width as usize * height as usize];
    paint(&BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area(), picture)?;
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let written = encoder.write_header().and_then(|mut image| image.write_image_data(&pixels));
    written.map_err(|e| Error::Invalid(format!("{}: {e}", path.display())))?;
    write_file(path, &file)
}

fn paint<B: DrawingBackend, P: Picture + ?Sized>(root: &DrawingArea<B, Shift>, picture: &P) -> Result<()>
where
    B::ErrorType: 'static,
{
    // Systems need not have fonts, so the program brings one.
    static FONT_READY: OnceLock<bool> = OnceLock::new();
    let ready = *FONT_READY
        .get_or_init(|| register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT).is_ok());
    if !ready {
        return Err(Error::Invalid("the font for curves cannot be read".into()));
    }
    let drawn = || -> Drawn {
        root.fill(&WHITE)?;
        picture.draw(root)?;
        Ok(root.present()?)
    };
    drawn().map_err(|e| Error::Invalid(format!("the curves cannot be drawn: {e}")))
}

fn draw_panel<B: DrawingBackend>(area: &DrawingArea<B, Shift>, panel: &Panel) -> Drawn
where
    B::ErrorType: 'static,
{
    let ([left, right], [low, high]) = (panel.width(), panel.height());
    let mut chart = ChartBuilder::on(area);
    chart.margin(16).x_label_area_size(48).y_label_area_size(84);
    if !panel.title.is_empty() {
        chart.caption(&panel.title, (FONT, 20));
    }
    let mut chart = chart.build_cartesian_2d(left..right, low..high)?;
    chart
        .configure_mesh()
        .x_desc(&panel.x)
        .y_desc(&panel.y)
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .light_line_style(WHITE)
        .x_label_formatter(&|x| number(*x, right - left))
        .y_label_formatter(&|y| number(*y, high - low))
        .draw()?;
    for curve in &panel.curves {
        let colour = COLOURS[curve.colour % COLOURS.len()];
        let inside: Vec<_> = curve.points.iter().filter(|p| p.1 <= high).copied().collect();
        let line = match curve.style {
            Style::Line => colour.mix(0.6).stroke_width(1),
            Style::Points => colour.stroke_width(2),
        };
        let drawn = chart.draw_series(LineSeries::new(inside.iter().copied(), line))?;
        if let Some(label) = &curve.label {
            drawn
                .label(label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], colour.stroke_width(3)));
        }
        if curve.style == Style::Points {
            chart.draw_series(inside.iter().map(|&p| Circle::new(p, 4, colour.filled())))?;
        }
    }
    if panel.curves.iter().any(|c| c.label.is_some()) {
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

impl Panel {
    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        self.curves.iter().flat_map(|c| c.points.iter().copied())
    }

    fn width(&self) -> [f64; 2] {
        let (low, high) = self.points().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(p.0), h.max(p.0)));
        // Runs begin at 0, but for a moment in time or a lone point.
        if low > high { [0.0, 1.0] } else { [low.min(0.0), high.max(low.min(0.0) + 1e-3)] }
    }

    /// The steep start is cut off, so that the ends can be told apart.
    fn height(&self) -> [f64; 2] {
        let [left, right] = self.width();
        let from = left + (right - left) / 8.0;
        let low = self.points().map(|p| p.1).fold(f64::MAX, f64::min);
        let late = self.points().filter(|p| p.0 >= from).map(|p| p.1).fold(f64::MIN, f64::max);
        if low > late {
            return [0.0, 1.0];
        }
        // A flat line has an axis of its own size, or up to 1 at 0.
        let spread = match late > low {
            true => late - low,
            false if late == 0.0 => 20.0,
            false => late.abs(),
        };
        let pad = 0.05 * spread.max(0.02 * late.abs());
        [low - pad, late + pad]
    }
}

/// A label with as many digits as the span of its axis needs.
fn number(x: f64, span: f64) -> String {
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

    fn curve(label: &str, colour: usize, style: Style) -> Curve {
        let points = (0..40).map(|i| (f64::from(i), 3.0 - 0.05 * f64::from(i))).collect();
        Curve { label: Some(label.to_owned()), colour, style, points }
    }

    fn panel(curves: Vec<Curve>) -> Panel {
        Panel { title: "title".into(), x: "step".into(), y: "loss".into(), curves }
    }

    #[test]
    fn a_picture_has_axes_a_legend_and_a_colour_a_curve() {
        let panels = [panel(vec![curve("one", 0, Style::Line), curve("two", 1, Style::Points)])];
        let text = svg(&panels).unwrap();
        for part in ["<svg", "title", "step", "loss", "one", "two", "#0072B2", "#009E73", "<circle"] {
            assert!(text.contains(part), "{part} is missing");
        }
        assert!(!text.contains("#D55E00") && !text.contains("NaN"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        save(&path, &[panels[0].clone(), panel(Vec::new())]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[..8], *b"\x89PNG\r\n\x1a\n");
        assert_eq!(bytes[16..24], [960u32.to_be_bytes(), 600u32.to_be_bytes()].concat());
    }

    #[test]
    fn lone_points_and_empty_panels_have_axes() {
        let mut lone = curve("one", 0, Style::Points);
        lone.points.truncate(1);
        for panel in [panel(vec![lone]), panel(Vec::new())] {
            let ([left, right], [low, high]) = (panel.width(), panel.height());
            assert!(left < right && low < high, "{panel:?}");
            assert!(svg(&[panel]).unwrap().contains("</svg>"));
        }
    }

    #[test]
    fn long_curves_keep_their_spikes() {
        let mut points: Vec<(f64, f64)> = (0..50_000).map(|i| (f64::from(i), 1.0)).collect();
        points[33_333].1 = 7.0;
        let thinned = thin(points.clone());
        assert!(thinned.len() <= 2000 && thinned.contains(&(33_333.0, 7.0)), "{}", thinned.len());
        assert!(thinned.windows(2).all(|w| w[0].0 <= w[1].0));
        assert_eq!(thin(points[..1500].to_vec()), points[..1500]);
    }

    #[test]
    fn labels_have_the_digits_that_tell_them_apart() {
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
            assert_eq!(number(x, span), expected, "{x} of {span}");
        }
    }

    #[test]
    fn smoothing_keeps_a_constant_and_halves_a_jump_in_its_window() {
        assert!(smooth(&[2.0; 90]).iter().all(|x| (x - 2.0).abs() < 1e-12));
        let step: Vec<f64> = (0..90).map(|i| f64::from(i / 60)).collect();
        let smoothed = smooth(&step);
        assert!(smoothed[59] == 0.0 && (smoothed[60] - 1.0 / 3.0).abs() < 1e-6 && smoothed[89] > 0.99);
    }
}
