//! Sections of a report as Markdown and HTML.

use anyhow::Result;

use super::super::plot::{self, Panel};
use super::super::policy;
use super::Section;

/// The style sheet of a page.
const STYLE: &str = "
body { font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { border: 1px solid #ccc; padding: 0.25rem 0.75rem; text-align: left; }
pre { background: #f5f5f5; padding: 0.75rem; white-space: pre-wrap; }
svg { max-width: 100%; height: auto; }
";
/// The characters that have a meaning in Markdown, or in the HTML that it may contain.
const MARKDOWN: &str = "\\`*_{}[]()<>#+-.!|~&\"'=:";

/// Renders the sections as Markdown. `save_plot` writes a plot and returns its file name.
pub(super) fn markdown(
    name: &str,
    sections: &[Section],
    mut save_plot: impl FnMut(&[Panel]) -> Result<String>,
) -> Result<String> {
    let mut text = format!("# {}\n", markdown_text(name));
    for section in sections {
        text.push('\n');
        match section {
            Section::Heading(title) => text += &format!("## {title}\n"),
            Section::Table(header, rows) => text += &markdown_table(header, rows),
            Section::Paragraph(line) => text += &format!("{}\n", markdown_text(line)),
            Section::Verbatim(block) => text += &fenced(block.trim_end()),
            Section::Curves(panels) => text += &format!("![curves]({})\n", save_plot(panels)?),
        }
    }
    Ok(text)
}

fn markdown_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let escape = |cell: &String| markdown_text(cell);
    let mut text = line(header.iter().map(ToString::to_string).collect());
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

/// Renders the sections as one HTML page with inline plots. Its Content-Security-Policy allows its style sheet alone.
pub(super) fn html(name: &str, sections: &[Section]) -> Result<String> {
    let mut body = String::new();
    for section in sections {
        match section {
            Section::Heading(title) => body += &format!("<h2>{}</h2>\n", escape(title)),
            Section::Table(header, rows) => body += &html_table(header, rows),
            Section::Paragraph(line) => body += &format!("<p>{}</p>\n", escape(line)),
            Section::Verbatim(block) => body += &format!("<pre>{}</pre>\n", escape(block)),
            Section::Curves(panels) => body += &format!("{}\n", plot::svg(&panels[..])?),
        }
    }
    let name = escape(name);
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n{}\n<title>{name}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n{body}</body>\n</html>\n",
        policy::element(None, STYLE)
    ))
}

fn html_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let line = |tag: &str, cells: &mut dyn Iterator<Item = String>| {
        let cells: String = cells.map(|c| format!("<{tag}>{}</{tag}>", escape(&c))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let mut text = String::from("<table>\n");
    if header.iter().any(|h| !h.is_empty()) {
        text += &line("th", &mut header.iter().map(ToString::to_string));
    }
    rows.iter().for_each(|row| text += &line("td", &mut row.iter().cloned()));
    text + "</table>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVIL: &str = "a](javascript:x) ![i](http://x/y) <script>alert(1)</script> `c` | ~~~~ \n# h";

    #[test]
    fn the_page_allows_its_style_sheet_alone_and_text_is_no_markup() {
        let sections = [Section::Paragraph(EVIL.into()), Section::Verbatim(EVIL.into())];
        let page = html(EVIL, &sections).unwrap();
        assert!(
            page.contains(&policy::element(None, STYLE)) && page.contains(&format!("<style>{STYLE}</style>"))
        );
        assert!(!page.contains("<script"), "{page}");
    }

    #[test]
    fn markdown_shows_text_as_it_is() {
        let table = Section::Table(vec!["a"], vec![vec![EVIL.into()]]);
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
