//! Sections of a report as Markdown and HTML.

use anyhow::Result;

use super::super::plot::{self, Panel};
use super::Section;

/// Renders the sections as Markdown. `save_plot` writes a plot and returns its file name.
pub(super) fn markdown(
    name: &str,
    sections: &[Section],
    mut save_plot: impl FnMut(&[Panel]) -> Result<String>,
) -> Result<String> {
    let mut text = format!("# {name}\n");
    for section in sections {
        text.push('\n');
        match section {
            Section::Heading(title) => text += &format!("## {title}\n"),
            Section::Table(header, rows) => text += &markdown_table(header, rows),
            Section::Paragraph(line) => text += &format!("{line}\n"),
            Section::Verbatim(block) => text += &format!("~~~~\n{}\n~~~~\n", block.trim_end()),
            Section::Curves(panels) => text += &format!("![curves]({})\n", save_plot(panels)?),
        }
    }
    Ok(text)
}

fn markdown_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let escape = |cell: &String| cell.replace('|', "\\|").replace('\n', " ");
    let mut text = line(header.iter().map(ToString::to_string).collect());
    text += &line(vec!["---".into(); header.len()]);
    rows.iter().for_each(|row| text += &line(row.iter().map(escape).collect()));
    text
}

/// Renders the sections as one HTML page with inline plots.
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
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<title>{name}</title>\n\
         <style>\nbody {{ font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}\n\
         table {{ border-collapse: collapse; }}\nth, td {{ border: 1px solid #ccc; padding: 0.25rem 0.75rem; \
         text-align: left; }}\npre {{ background: #f5f5f5; padding: 0.75rem; white-space: pre-wrap; }}\n\
         svg {{ max-width: 100%; height: auto; }}\n</style>\n</head>\n<body>\n<h1>{name}</h1>\n{body}</body>\n</html>\n"
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
