//! Tables for terminals and Markdown files.

use comfy_table::{CellAlignment, Table, TableStyle};

/// The style of tables in a terminal.
pub const TERMINAL: TableStyle = comfy_table::presets::UTF8_FULL_CONDENSED;
/// The style of tables in Markdown files.
pub const MARKDOWN: TableStyle = comfy_table::presets::ASCII_MARKDOWN;

/// Creates a table without rows. The first column is left-aligned, the others are right-aligned. Rows are never
/// wrapped to the width of the terminal.
pub fn plain_table(style: TableStyle, header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(style).set_header(header.to_vec());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
