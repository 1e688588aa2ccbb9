//! A chart of a report as inline SVG. Colors are classes of the style sheet, so that they follow the color scheme.

use serde_json::{Value, json};

use super::super::numbers::{tick_label, ticks};
use super::chart::{Chart, Mark, Style};

/// The size of a chart, and the edges of its plot area, in pixels of a chart that is not scaled.
const SIZE: [f64; 2] = [360.0, 190.0];
const LEFT: f64 = 48.0;
const RIGHT: f64 = 350.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 162.0;
/// Marks closer than this to the last one of their kind are left out.
const MARK_DISTANCE: f64 = 3.0;
/// Significant digits of the values under the pointer.
const DATA_DIGITS: usize = 6;

impl Chart {
    fn place(&self, x: f64, y: f64) -> (f64, f64) {
        let share = |v: f64, [low, high]: [f64; 2]| (v - low) / (high - low);
        let y = share(y, self.y).clamp(0.0, 1.0);
        (LEFT + share(x, self.x) * (RIGHT - LEFT), BOTTOM - y * (BOTTOM - TOP))
    }

    /// The SVG element. `index` is that of its [`data`](Self::data).
    pub(super) fn svg(&self, index: usize) -> String {
        let label = format!("{} over the steps", self.quantity.title);
        let mut svg = format!(
            "<svg viewBox=\"0 0 {} {}\" data-chart=\"{index}\" tabindex=\"0\" role=\"img\" aria-label=\"{}\">\n",
            SIZE[0],
            SIZE[1],
            super::super::html::escape(&label)
        );
        self.axes(&mut svg);
        self.series.iter().for_each(|series| {
            let class = format!("c{}", series.color % super::COLORS);
            let places: Vec<(f64, f64)> = series.points.iter().map(|p| self.place(p.0, p.1)).collect();
            let line: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            let style = if series.style == Style::Faint { "faint" } else { "line" };
            svg += &format!("<polyline class=\"{style} {class}\" points=\"{}\"/>\n", line.join(" "));
            if series.style == Style::Points || places.len() == 1 {
                for (x, y) in places {
                    svg +=
                        &format!("<circle class=\"point {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>\n");
                }
            }
            self.cut_off(&mut svg, &class, &series.points);
        });
        self.marks(&mut svg);
        svg + "</svg>\n"
    }

    fn axes(&self, svg: &mut String) {
        for tick in ticks(self.y, 4) {
            let (_, y) = self.place(self.x[0], tick);
            *svg += &format!("<path class=\"grid\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>");
            *svg += &format!(
                "<text class=\"y\" x=\"{}\" y=\"{:.1}\">{}</text>\n",
                LEFT - 6.0,
                y + 4.0,
                tick_label(tick)
            );
        }
        for tick in ticks(self.x, 4) {
            let (x, _) = self.place(tick, self.y[0]);
            // A label at the right edge ends there.
            let class = if x > RIGHT - 16.0 { "x end" } else { "x" };
            *svg += &format!("<path class=\"grid\" d=\"M{x:.1} {BOTTOM}v4\"/>");
            *svg += &format!(
                "<text class=\"{class}\" x=\"{x:.1}\" y=\"{}\">{}</text>\n",
                BOTTOM + 17.0,
                tick_label(tick)
            );
        }
        *svg += &format!("<path class=\"axis\" d=\"M{LEFT} {BOTTOM}H{RIGHT}\"/>\n");
    }

    /// Triangles at the edge where values are cut off.
    fn cut_off(&self, svg: &mut String, class: &str, points: &[(f64, f64)]) {
        let mut last = f64::NEG_INFINITY;
        for &(x, y) in points.iter().filter(|p| p.1 < self.y[0] || p.1 > self.y[1]) {
            let (px, py) = self.place(x, y);
            if px - last < MARK_DISTANCE {
                continue;
            }
            last = px;
            let tip = if y > self.y[1] { "l-4 7h8z" } else { "l-4 -7h8z" };
            *svg += &format!("<path class=\"cut {class}\" d=\"M{px:.1} {py:.1}{tip}\"/>\n");
        }
    }

    fn marks(&self, svg: &mut String) {
        for (kind, class, shape) in [
            (Mark::Checkpoint, "checkpoint", "m0 -5l4 5l-4 5l-4 -5z"),
            (Mark::Skipped, "skipped", "m-4 -4l8 8m0 -8l-8 8"),
        ] {
            let mut last = f64::NEG_INFINITY;
            for &(_, x, y) in self.marks.iter().filter(|mark| mark.0 == kind) {
                let (px, py) = self.place(x.min(self.x[1]), y);
                if (px - last).abs() < MARK_DISTANCE {
                    continue;
                }
                last = px;
                *svg += &format!("<path class=\"{class}\" d=\"M{px:.1} {py:.1}{shape}\"/>\n");
            }
        }
    }

    /// What the script of the page needs to show the values under the pointer.
    pub(super) fn data(&self) -> Value {
        let rounded = |x: f64| format!("{x:.*e}", DATA_DIGITS - 1).parse::<f64>().unwrap_or(x);
        let series: Vec<Value> = self
            .series
            .iter()
            .map(|s| {
                let points: Vec<_> = s.points.iter().map(|p| [p.0, rounded(p.1)]).collect();
                json!({ "label": s.label, "points": points })
            })
            .collect();
        json!({
            "x": self.x, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM,
            "unit": self.quantity.unit, "series": series,
        })
    }
}
