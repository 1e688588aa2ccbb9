//! A grid of values, such as one for each layer and head, as colored cells.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::colors::colormaps::ViridisRGB;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::style::{AXIS_PX, FONT, INK, LABEL_PX, Layout, draw_title, text};
use super::{DrawResult, Picture};
use crate::render::numbers::short;

/// Space for the labels above, to the left, and below, and for the color scale to the right.
const TOP_PX: u32 = 32;
const LEFT_PX: u32 = 76;
const BOTTOM_PX: u32 = 56;
const SCALE_PX: u32 = 150;
/// The greatest width and the height of a cell.
const CELL_PX: (u32, u32) = (72, 34);
/// Cells of at least this width show their values.
const WRITTEN_CELL_PX: u32 = 44;
/// Colors of the scale.
const COLOR_STEPS: i32 = 40;
/// Height of the color scale.
const SCALE_HEIGHT_PX: i32 = 160;
/// From this share of the scale on, the colors are so light that text on them is dark.
const LIGHT_FROM: f64 = 0.55;

/// A grid of values that are not negative.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// Title.
    pub title: String,
    /// Label of the columns.
    pub x: String,
    /// Label of the rows.
    pub y: String,
    /// Title of the color scale.
    pub value: String,
    /// The rows, top to bottom, with their labels. A row may have fewer cells than others.
    pub rows: Vec<(String, Vec<f64>)>,
}

impl Grid {
    fn columns(&self) -> u32 {
        self.rows.iter().map(|row| row.1.len()).max().unwrap_or(0).max(1) as u32
    }

    fn cell_width(&self, layout: Layout) -> u32 {
        ((layout.width() - LEFT_PX - SCALE_PX) / self.columns()).clamp(1, CELL_PX.0)
    }

    fn greatest(&self) -> f64 {
        self.rows.iter().flat_map(|row| &row.1).copied().fold(0.0, f64::max)
    }
}

impl Picture for Grid {
    fn size(&self, layout: Layout) -> (u32, u32) {
        let cells = self.rows.len().max(1) as u32 * CELL_PX.1;
        let height = TOP_PX + BOTTOM_PX + cells.max(SCALE_HEIGHT_PX as u32 + 40);
        (layout.width(), layout.title_height(&self.title) + height)
    }

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>, layout: Layout) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let root = &draw_title(root, &self.title, layout)?;
        let (width, height, greatest) = (self.cell_width(layout) as i32, CELL_PX.1 as i32, self.greatest());
        let (left, top) = (LEFT_PX as i32, TOP_PX as i32);
        let write = |x: i32, y: i32, text: String, size: i32, anchor: Pos, color: &RGBColor| -> DrawResult {
            let style = TextStyle::from((FONT, size).into_font()).pos(anchor).color(color);
            Ok(root.draw(&Text::new(text, (x, y), style))?)
        };
        let (middle, end) = (Pos::new(HPos::Center, VPos::Center), Pos::new(HPos::Right, VPos::Center));
        let label_every = (24 / width).max(1) as usize;
        for (at, (label, values)) in self.rows.iter().enumerate() {
            let y = top + at as i32 * height;
            write(left - 10, y + height / 2, label.clone(), LABEL_PX, end, &INK)?;
            for (column, &value) in values.iter().enumerate() {
                let (x, share) =
                    (left + column as i32 * width, if greatest > 0.0 { value / greatest } else { 0.0 });
                let fill = ViridisRGB.get_color(share);
                root.draw(&Rectangle::new([(x + 1, y + 1), (x + width - 1, y + height - 1)], fill.filled()))?;
                if width as u32 >= WRITTEN_CELL_PX {
                    let ink = if share > LIGHT_FROM { &BLACK } else { &WHITE };
                    write(x + width / 2, y + height / 2, cell_text(value), 14, middle, ink)?;
                }
            }
        }
        let below = top + self.rows.len() as i32 * height;
        for column in (0..self.columns() as usize).step_by(label_every) {
            let x = left + column as i32 * width + width / 2;
            write(x, below + 14, column.to_string(), LABEL_PX, middle, &INK)?;
        }
        let center = left + self.columns() as i32 * width / 2;
        write(center, below + 38, self.x.clone(), AXIS_PX, middle, &INK)?;
        write(left - 10, top - 14, self.y.clone(), AXIS_PX, end, &INK)?;
        self.draw_scale(root, layout, greatest)
    }
}

impl Grid {
    fn draw_scale<B: DrawingBackend>(
        &self,
        root: &DrawingArea<B, Shift>,
        layout: Layout,
        greatest: f64,
    ) -> DrawResult
    where
        B::ErrorType: 'static,
    {
        let left = (LEFT_PX + self.columns() * self.cell_width(layout)) as i32 + 32;
        let (top, bottom) = (TOP_PX as i32 + 30, TOP_PX as i32 + 30 + SCALE_HEIGHT_PX);
        root.draw(&text(self.value.as_str(), (left, TOP_PX as i32 - 2), LABEL_PX))?;
        for step in 0..COLOR_STEPS {
            let y = |step: i32| bottom - step * SCALE_HEIGHT_PX / COLOR_STEPS;
            let color = ViridisRGB.get_color(f64::from(step) / f64::from(COLOR_STEPS - 1));
            root.draw(&Rectangle::new([(left, y(step + 1)), (left + 20, y(step))], color.filled()))?;
        }
        for (value, y) in [(greatest, top), (greatest / 2.0, (top + bottom) / 2), (0.0, bottom)] {
            root.draw(&text(short(value), (left + 28, y - 8), LABEL_PX))?;
        }
        Ok(())
    }
}

/// A value in few characters.
fn cell_text(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        ..1e-4 => "<.0001".into(),
        ..1.0 => format!("{value:.4}").trim_start_matches('0').to_owned(),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::svg;
    use super::*;

    #[test]
    fn every_cell_has_a_color_and_a_wide_one_its_value() {
        let grid = |heads: usize| Grid {
            title: "title".into(),
            x: "head".into(),
            y: "layer".into(),
            value: "KL".into(),
            rows: (0..2)
                .map(|l| (l.to_string(), (0..heads).map(|h| (l * heads + h) as f64).collect()))
                .collect(),
        };
        let text = svg(&grid(4)).unwrap();
        for part in ["title", "head", "layer", "KL", "7.00"] {
            assert!(text.contains(&format!("\n{part}\n")), "{part} in {text}");
        }
        // The white background, eight cells and the scale.
        assert_eq!(text.matches("<rect").count(), 1 + 8 + COLOR_STEPS as usize);
        assert!(!svg(&grid(40)).unwrap().contains("\n79.00\n"));
        let zero = Grid { rows: vec![("0".into(), vec![0.0])], ..grid(1) };
        assert!(!svg(&zero).unwrap().contains("NaN"));
    }

    #[test]
    fn small_values_are_short() {
        let texts = [0.0, 1e-5, 0.0123, 0.5, 12.345].map(cell_text);
        assert_eq!(texts, ["0", "<.0001", ".0123", ".5000", "12.35"]);
    }
}
