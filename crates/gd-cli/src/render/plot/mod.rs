//! Plots as SVG, PNG or HTML files.
//!
//! An SVG follows the color scheme of whoever looks at it, and a page also the width of the window. A PNG is light.
//!
//! A slice of [`Panel`]s is drawn as charts of curves, one below the other, and a slice of [`Scatter`]s as plots of
//! points. A [`Figure`] is a line chart with an optional heat map below it. A [`Grid`] shows one value in each cell.

mod figure;
mod grid;
mod heat_map;
mod mark;
mod page;
mod panel;
mod scatter;
mod style;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};
use gd_model::io::files::write_file;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};

pub use figure::{Figure, Line, LineChart};
pub use grid::Grid;
pub use heat_map::{HEAT_MAP_CELLS, HeatMap};
pub use mark::{Mark, Symbol};
pub use panel::{Curve, CurveStyle, Panel, reduce_points, smooth};
pub use scatter::{Scatter, ScatterPoint};
pub use style::Layout;

/// The font of plots, a part of DejaVu Sans: Latin and Greek letters, arrows and mathematical signs.
const FONT_FILE: &[u8] = include_bytes!("../../../fonts/DejaVuSans.ttf");
const FONT_FAMILY: &str = "DejaVu Sans";

/// The result of a drawing operation. The error type of plotters depends on the backend.
type DrawResult<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A picture that can be drawn with any backend.
pub trait Picture {
    /// Width and height in pixels.
    fn size(&self, layout: Layout) -> (u32, u32);

    /// Draws the picture on a white canvas of that size.
    ///
    /// # Errors
    /// Reports the error of the drawing backend.
    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, layout: Layout) -> DrawResult
    where
        B::ErrorType: 'static;
}

/// Renders a picture as the text of an SVG file.
///
/// # Errors
/// Reports the error of the plotting library.
pub fn svg<P: Picture + ?Sized>(picture: &P) -> Result<String> {
    Ok(page::with_schemes(&light(picture, Layout::Wide)?))
}

/// Renders a picture as the text of an SVG file in the light color scheme.
fn light<P: Picture + ?Sized>(picture: &P, layout: Layout) -> Result<String> {
    register()?;
    let mut text = String::new();
    let root = SVGBackend::with_string(&mut text, picture.size(layout)).into_drawing_area();
    let draw = || -> DrawResult {
        root.fill(&WHITE)?;
        picture.draw(&root, layout)?;
        Ok(root.present()?)
    };
    draw().map_err(|e| anyhow!("the plot cannot be drawn: {e}"))?;
    drop(root);
    Ok(text)
}

/// Writes a picture to a file: PNG if the file name ends in `.png`, a page if it ends in `.html`, else SVG.
///
/// # Errors
/// Names the file that cannot be written, or reports the error of the plotting library.
pub fn save<P: Picture + ?Sized>(path: &Path, picture: &P) -> Result<()> {
    let content = match path.extension().and_then(OsStr::to_str) {
        Some("png") => png(&light(picture, Layout::Wide)?)
            .map_err(|e| anyhow!("{}: the plot cannot be drawn: {e}", path.display()))?,
        Some("html") => {
            let title = path.file_stem().unwrap_or_default().to_string_lossy();
            let [wide, narrow] = [Layout::Wide, Layout::Narrow].map(|layout| light(picture, layout));
            page::html(&title, &wide?, &narrow?).into_bytes()
        }
        _ => svg(picture)?.into_bytes(),
    };
    Ok(write_file(path, &content)?)
}

/// Draws the text of an SVG file with the font of the program.
fn png(svg: &str) -> Result<Vec<u8>> {
    let mut options = Options::default();
    let fonts = options.fontdb_mut();
    fonts.load_font_data(FONT_FILE.to_vec());
    fonts.set_sans_serif_family(FONT_FAMILY);
    let tree = Tree::from_str(svg, &options)?;
    let size = tree.size().to_int_size();
    let mut pixels = Pixmap::new(size.width(), size.height()).context("the plot has no pixels")?;
    resvg::render(&tree, Transform::identity(), &mut pixels.as_mut());
    Ok(pixels.encode_png()?)
}

/// Registers the font of the program, because a system may have none.
fn register() -> Result<()> {
    static FONT_REGISTERED: OnceLock<bool> = OnceLock::new();
    let register = || register_font(style::FONT, FontStyle::Normal, FONT_FILE).is_ok();
    if !*FONT_REGISTERED.get_or_init(register) {
        bail!("the font for plots cannot be read");
    }
    Ok(())
}
