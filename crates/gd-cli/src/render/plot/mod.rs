//! Plots as SVG or PNG files.
//!
//! A slice of [`Panel`]s is drawn as charts of curves, one below the other, and a slice of [`Scatter`]s as plots of
//! points. A [`Figure`] is a line chart with an optional heat map below it. A [`Grid`] shows one value in each cell.

mod figure;
mod grid;
mod heat_map;
mod mark;
mod panel;
mod scatter;

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Result, anyhow, bail};
use gd_model::io::files::write_file;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;

pub use figure::{Figure, Line, LineChart};
pub use grid::Grid;
pub use heat_map::{HEAT_MAP_CELLS, HeatMap};
pub use mark::{Mark, Symbol};
pub use panel::{Curve, CurveStyle, Panel, reduce_points, smooth};
pub use scatter::{Scatter, ScatterPoint};

/// Width of every plot in pixels.
const WIDTH_PX: u32 = 960;
const FONT: &str = "sans-serif";
/// Colors that are distinguishable with color vision deficiencies (Okabe and Ito, 2008).
const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// The result of a drawing operation. The error type of plotters depends on the backend.
type DrawResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A picture that can be drawn with any backend.
pub trait Picture {
    /// Width and height in pixels.
    fn size(&self) -> (u32, u32);

    /// Draws the picture on a white canvas of that size.
    ///
    /// # Errors
    /// Reports the error of the drawing backend.
    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> DrawResult
    where
        B::ErrorType: 'static;
}

/// Renders a picture as the text of an SVG file.
///
/// # Errors
/// Reports the error of the plotting library.
pub fn svg<P: Picture + ?Sized>(picture: &P) -> Result<String> {
    let mut text = String::new();
    draw_on(&SVGBackend::with_string(&mut text, picture.size()).into_drawing_area(), picture)?;
    Ok(text)
}

/// Writes a picture to a file: PNG if the file name ends in `.png`, else SVG.
///
/// # Errors
/// Names the file that cannot be written, or reports the error of the plotting library.
pub fn save<P: Picture + ?Sized>(path: &Path, picture: &P) -> Result<()> {
    if path.extension().is_none_or(|e| e != "png") {
        return Ok(write_file(path, svg(picture)?.as_bytes())?);
    }
    let (width, height) = picture.size();
    let mut pixels = vec![0; 3 * width as usize * height as usize];
    draw_on(&BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area(), picture)?;
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    let encoded = encoder.write_header().and_then(|mut image| image.write_image_data(&pixels));
    encoded.map_err(|e| anyhow!("{}: {e}", path.display()))?;
    Ok(write_file(path, &file)?)
}

fn draw_on<B: DrawingBackend, P: Picture + ?Sized>(root: &DrawingArea<B, Shift>, picture: &P) -> Result<()>
where
    B::ErrorType: 'static,
{
    // The program carries a font because a system may have none.
    static FONT_REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = *FONT_REGISTERED
        .get_or_init(|| register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT).is_ok());
    if !registered {
        bail!("the font for plots cannot be read");
    }
    let draw = || -> DrawResult {
        root.fill(&WHITE)?;
        picture.draw(root)?;
        Ok(root.present()?)
    };
    draw().map_err(|e| anyhow!("the plot cannot be drawn: {e}"))
}

/// Formats the label of an axis with as many digits as its span requires.
fn axis_label(x: f64, span: f64) -> String {
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
