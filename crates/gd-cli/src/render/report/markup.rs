//! Sections of a report as Markdown and HTML.

use anyhow::Result;

use super::super::html::{escape, policy};
use super::super::plot::Panel;
use super::chart::{Chart, Mark, Style};
use super::summary::Figure;
use super::{COLORS, Section};

/// The style sheet and the script of a page.
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// The characters that have a meaning in Markdown, or in the HTML that it may contain.
const MARKDOWN: &str = "\\`*_{}[]()<>#+-.!|~&\"'=:";

/// Renders the sections as Markdown. `save_plot` writes a plot and returns its file name.
pub(super) fn markdown(
    title: &str,
    sections: &[Section],
    mut save_plot: impl FnMut(&[Panel]) -> Result<String>,
) -> Result<String> {
    let mut text = format!("# {}\n", markdown_text(title));
    for section in sections {
        text.push('\n');
        match section {
            Section::Heading(title) => text += &format!("## {title}\n"),
            Section::Figures(figures) => {
                let rows: Vec<_> = figures.iter().map(|f| vec![f.name.to_owned(), cell(f)]).collect();
                text += &markdown_table(&[String::new(), String::new()], &rows);
            }
            Section::Table(header, rows) => text += &markdown_table(header, rows),
            Section::Paragraph(line) => text += &format!("{}\n", markdown_text(line)),
            Section::Sample { prompt, text: sample } => {
                text += &fenced(format!("{prompt}{sample}").trim_end())
            }
            Section::Details(summary, block) => {
                text += &format!("{}\n\n{}", markdown_text(summary), fenced(block.trim_end()));
            }
            Section::Charts { charts, .. } => {
                let panels: Vec<Panel> = charts.iter().map(Chart::panel).collect();
                text += &format!("![curves]({})\n\n", save_plot(&panels)?);
                for chart in charts {
                    let notes = [&[chart.quantity.explanation.to_owned()], chart.notes.as_slice()].concat();
                    let line = format!("{}: {}", chart.quantity.title, notes.join(" ").trim());
                    text += &format!("- {}\n", markdown_text(&line));
                }
            }
        }
    }
    Ok(text)
}

/// The value of a figure with its unit, in one cell of a table.
pub(super) fn cell(figure: &Figure) -> String {
    format!("{} {}", figure.value, figure.unit).trim_end().to_owned()
}

fn markdown_table(header: &[String], rows: &[Vec<String>]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let escape = |cell: &String| markdown_text(cell);
    let mut text = line(header.iter().map(escape).collect());
    text += &line(vec!["---".into(); header.len()]);
    rows.iter().for_each(|row| text += &line(row.iter().map(escape).collect()));
    text
}

/// A text on one line that Markdown shows as it is.
fn markdown_text(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            c if MARKDOWN.contains(c) => escaped.extend(['\\', c]),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

/// A block that Markdown shows as it is: its fence is longer than any in it.
fn fenced(block: &str) -> String {
    let longest = block.split(|c| c != '~').map(str::len).max().unwrap_or(0);
    let fence = "~".repeat(4.max(longest + 1));
    format!("{fence}\n{block}\n{fence}\n")
}

/// Renders the sections as one HTML page with inline charts. Its Content-Security-Policy allows its style sheet and its
/// script alone.
pub(super) fn html(title: &str, sections: &[Section]) -> Result<String> {
    let (mut body, mut data) = (String::new(), Vec::new());
    for section in sections {
        match section {
            Section::Heading(title) => body += &format!("<h2>{}</h2>\n", escape(title)),
            Section::Figures(figures) => body += &tiles(figures),
            Section::Table(header, rows) => body += &html_table(header, rows),
            Section::Paragraph(line) => body += &format!("<p>{}</p>\n", escape(line)),
            Section::Sample { prompt, text } => {
                body += &format!("<div class=\"sample\"><b>{}</b>{}</div>\n", escape(prompt), escape(text));
            }
            Section::Details(summary, block) => {
                let (summary, block) = (escape(summary), escape(block));
                body += &format!("<details><summary>{summary}</summary><pre>{block}</pre></details>\n");
            }
            Section::Charts { charts, runs } => {
                body += &legend(charts, runs);
                body += "<div class=\"charts\">\n";
                for chart in charts {
                    body += &figure(chart, data.len());
                    data.push(chart.data());
                }
                body += "</div>\n";
            }
        }
    }
    // A text without `<` cannot end the element.
    let data = serde_json::to_string(&data)?.replace('<', "\\u003c");
    let (title, policy) = (escape(title), policy(Some(SCRIPT), STYLE));
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n{policy}\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}</main>\n\
         <script type=\"application/json\" id=\"charts\">{data}</script>\n\
         <script type=\"module\">{SCRIPT}</script>\n</body>\n</html>\n"
    ))
}

fn tiles(figures: &[Figure]) -> String {
    let tile = |f: &Figure| {
        format!(
            "<div class=\"tile\"><dt>{}</dt><dd><b>{}</b><small>{}</small></dd></div>\n",
            escape(f.name),
            escape(&f.value),
            escape(&f.unit)
        )
    };
    let (large, small): (Vec<_>, Vec<_>) = figures.iter().partition(|f| f.headline);
    let rows: Vec<_> = small.into_iter().map(|f| vec![f.name.to_owned(), cell(f)]).collect();
    let large: String = large.into_iter().map(tile).collect();
    format!("<dl class=\"tiles\">\n{large}</dl>\n{}", html_table(&[], &rows))
}

/// A chart with its title, what it says, and a line for the values under the pointer.
fn figure(chart: &Chart, index: usize) -> String {
    let quantity = &chart.quantity;
    let unit =
        if quantity.unit.is_empty() { String::new() } else { format!(" <small>{}</small>", quantity.unit) };
    let paragraph =
        |text: &str| if text.is_empty() { String::new() } else { format!("<p>{}</p>", escape(text)) };
    format!(
        "<figure><h3>{}{unit}</h3>\n{}<p class=\"readout\"></p><figcaption>{}{}</figcaption></figure>\n",
        escape(&quantity.title),
        chart.svg(index),
        paragraph(quantity.explanation),
        paragraph(&chart.notes.join(" "))
    )
}

/// What the colors and marks of charts mean, of those that the charts have.
fn legend(charts: &[Chart], runs: &[String]) -> String {
    let icon = |shape: &str| format!("<svg viewBox=\"0 0 24 12\" aria-hidden=\"true\">{shape}</svg>");
    let mut entries = Vec::new();
    if runs.len() > 1 {
        for (color, run) in runs.iter().enumerate() {
            let line = format!("<path class=\"line c{}\" d=\"M1 6h22\"/>", color % COLORS);
            entries.push(icon(&line) + &escape(run));
        }
    }
    let has_style = |style: Style| charts.iter().flat_map(|c| &c.series).any(|s| s.style == style);
    let has_mark = |mark: Mark| charts.iter().flat_map(|c| &c.marks).any(|m| m.0 == mark);
    let has_cut = charts.iter().any(|c| c.notes.iter().any(|note| note.contains("cut off")));
    for (shown, shape, text) in [
        (has_style(Style::Faint), "<path class=\"faint c0\" d=\"M1 9l7 -6l7 6l8 -6\"/>", "every step"),
        (has_style(Style::Points), "<circle class=\"point c0\" cx=\"12\" cy=\"6\" r=\"4\"/>", "evaluation"),
        (
            has_mark(Mark::Checkpoint),
            "<path class=\"checkpoint\" d=\"M12 1l5 5l-5 5l-5 -5z\"/>",
            "checkpoint",
        ),
        (has_mark(Mark::Skipped), "<path class=\"skipped\" d=\"M8 2l8 8m0 -8l-8 8\"/>", "skipped update"),
        (has_cut, "<path class=\"cut c0\" d=\"M12 2l-5 8h10z\"/>", "value that is cut off"),
    ] {
        if shown {
            entries.push(icon(shape) + text);
        }
    }
    let entries: String = entries.iter().map(|entry| format!("<span>{entry}</span>")).collect();
    format!("<p class=\"legend\">{entries}</p>\n")
}

fn html_table(header: &[String], rows: &[Vec<String>]) -> String {
    let line = |tag: &str, cells: &[String]| {
        let cells: String = cells.iter().map(|c| format!("<{tag}>{}</{tag}>", escape(c))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let mut text = String::from("<div class=\"wide\"><table>\n");
    if !header.is_empty() {
        text += &line("th", header);
    }
    rows.iter().for_each(|row| text += &line("td", row));
    text + "</table></div>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVIL: &str = "a](javascript:x) ![i](http://x/y) <script>alert(1)</script> `c` | ~~~~ \n# h";

    #[test]
    fn the_page_allows_its_style_sheet_and_script_alone_and_text_is_no_markup() {
        let sections = [
            Section::Paragraph(EVIL.into()),
            Section::Sample { prompt: EVIL.into(), text: EVIL.into() },
            Section::Details(EVIL.into(), EVIL.into()),
        ];
        let page = html(EVIL, &sections).unwrap();
        assert!(page.contains(&policy(Some(SCRIPT), STYLE)));
        assert!(page.contains(&format!("<style>{STYLE}</style>")));
        // The data of the charts and the script.
        assert_eq!((page.matches("<script").count(), page.matches("</script").count()), (2, 2), "{page}");
        assert!(!page.contains("style=\""), "the policy forbids inline styles");
    }

    #[test]
    fn markdown_shows_text_as_it_is() {
        let table = Section::Table(vec!["a".into()], vec![vec![EVIL.into()]]);
        let text = markdown(EVIL, &[table, Section::Paragraph(EVIL.into())], |_| Ok(String::new())).unwrap();
        assert!(
            !text.replace("\\<", "").contains("<script") && !text.contains("](") && !text.contains("\n# h"),
            "{text}"
        );
        assert_eq!(text.matches("\\<script\\>").count(), 3);
        let block = fenced("x\n~~~~\n<script>");
        assert_eq!(block, "~~~~~\nx\n~~~~\n<script>\n~~~~~\n");
    }
}
