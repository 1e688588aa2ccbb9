//! The color schemes of SVG files, and the page that shows a picture in the form that fits the window.

use plotters::style::RGBColor;

use super::style::{DARK_COLORS, DARK_PAPER};
use crate::render::html::{escape, policy};

/// The style sheet of a page without the dark colors of its pictures. The wide form is scaled down to 700 pixels at most.
const STYLE: &str = "
:root { color-scheme: light dark; }
body { margin: 0; background: #ffffff; }
@media (prefers-color-scheme: dark) { body { background: #14171c; } }
svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.narrow { display: none; }
@media (max-width: 700px) { .wide { display: none; } .narrow { display: block; } }
";

/// The rules that give SVG files of plotters the dark colors where the dark scheme is preferred. They override the attributes
/// of those colors that the files have.
fn dark(files: &[&str]) -> String {
    let hex = |color: RGBColor| format!("#{:02X}{:02X}{:02X}", color.0, color.1, color.2);
    let rule = |element: &str, (light, dark): (RGBColor, RGBColor)| {
        let (light, dark) = (hex(light), hex(dark));
        let rules = ["fill", "stroke"].map(|property| {
            let attribute = format!("{property}=\"{light}\"");
            let occurs = files.iter().any(|file| file.contains(&attribute));
            if occurs { format!("{element}[{attribute}] {{ {property}: {dark}; }}\n") } else { String::new() }
        });
        rules.concat()
    };
    let paper = DARK_PAPER.map(|pair| rule(":not(text)", pair)).concat();
    let colors = DARK_COLORS.map(|pair| rule("", pair)).concat();
    format!("@media (prefers-color-scheme: dark) {{\n{paper}{colors}}}\n")
}

/// Adds the dark color scheme to the text of an SVG file in light colors.
pub(super) fn with_schemes(svg: &str) -> String {
    svg.replacen('>', &format!(">\n<style>\n{}</style>", dark(&[svg])), 1)
}

/// A page that shows the wide form of a picture, or the narrow one in a narrow window; both are SVG in light colors.
pub(super) fn html(title: &str, wide: &str, narrow: &str) -> String {
    let style = format!("{STYLE}{}", dark(&[wide, narrow]));
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n{}\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{}</title>\n\
         <style>{style}</style>\n</head>\n<body>\n<div class=\"wide\">\n{wide}</div>\n\
         <div class=\"narrow\">\n{narrow}</div>\n</body>\n</html>\n",
        policy(None, &style),
        escape(title)
    )
}

#[cfg(test)]
mod tests {
    use super::super::{Curve, CurveStyle, Layout, Panel, light, save, svg};
    use super::*;

    /// A panel whose title is wider than the narrow form.
    fn panel() -> Panel {
        let curve = |color: usize| Curve {
            label: Some(format!("run {color}")),
            color,
            style: CurveStyle::Points,
            points: vec![(0.0, 1.0), (1.0, 2.0)],
        };
        Panel {
            title: "loss: line = training (smoothed), points = validation, of all runs".into(),
            x: "step".into(),
            y: "nats per token".into(),
            curves: (0..6).map(curve).collect(),
        }
    }

    /// The colors of the attributes of an SVG file.
    fn colors(svg: &str) -> std::collections::BTreeSet<&str> {
        svg.split('"').filter(|part| part.len() == 7 && part.starts_with('#')).collect()
    }

    #[test]
    fn the_dark_scheme_replaces_colors_that_are_too_close_to_its_paper() {
        let (light, text) = (light(&[panel()][..], Layout::Wide).unwrap(), svg(&[panel()][..]).unwrap());
        let (style, rest) = text.split_once("</style>").unwrap();
        assert!(light.ends_with(rest) && style.contains("prefers-color-scheme: dark"));
        // The brightness of a color, from 0 to 255.
        let brightness = |hex: &str| {
            let part = |at: usize| u32::from_str_radix(&hex[at..at + 2], 16).unwrap();
            (299 * part(1) + 587 * part(3) + 114 * part(5)) / 1000
        };
        for color in colors(&light) {
            let rule = ["fill", "stroke"]
                .iter()
                .find_map(|name| style.split_once(&format!("[{name}=\"{color}\"] {{ {name}: ")));
            let dark = rule.map_or(color, |(_, rest)| &rest[..7]);
            // The paper and the lines of the grid are dark, everything else is light.
            let expected = if ["#FFFFFF", "#DFE2E8"].contains(&color) { 0..75 } else { 130..256 };
            assert!(expected.contains(&brightness(dark)), "{color} is {dark}");
        }
    }

    #[test]
    fn a_page_has_both_forms_and_a_policy_that_allows_its_style() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a<b.html");
        save(&path, &[panel()][..]).unwrap();
        let page = std::fs::read_to_string(&path).unwrap();
        let (_, style) = page.split_once("<style>").unwrap();
        let (style, rest) = style.split_once("</style>").unwrap();
        assert!(page.contains(&policy(None, style)) && page.contains("<title>a&lt;b</title>"), "{page}");
        assert!(!rest.contains("<style"), "the policy would not allow a second style sheet");
        for width in [960, 400] {
            assert!(rest.contains(&format!("<svg width=\"{width}\"")), "{width}");
        }
    }

    /// The x positions and widths of texts that are not turned, as far as their letters tell.
    #[test]
    fn nothing_leaves_the_narrow_form() {
        let text = light(&[panel(), panel()][..], Layout::Narrow).unwrap();
        let height: f64 = text.split("height=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap();
        let mut titles = 0;
        for element in text.split("<text ").skip(1) {
            let number = |name: &str| -> f64 {
                element
                    .split(&format!("{name}=\""))
                    .nth(1)
                    .unwrap()
                    .split('"')
                    .next()
                    .unwrap()
                    .parse()
                    .unwrap()
            };
            let words = element.split(">\n").nth(1).unwrap().split("\n<").next().unwrap();
            let width = 0.58 * number("font-size") * words.chars().count() as f64;
            if element.contains("\"start\"") && !element.contains("rotate") {
                assert!(number("x") + width < 400.0, "{words:?} ends at {}", number("x") + width);
                titles += usize::from(words.starts_with("loss: "));
            }
            assert!(number("y") < height, "{words:?} lies at {} of {height}", number("y"));
        }
        assert_eq!(titles, 2);
    }
}
