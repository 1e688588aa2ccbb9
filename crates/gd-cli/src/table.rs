//! Tables for a terminal.

use comfy_table::{CellAlignment, Table, TableStyle};

/// An empty table: names on the left, numbers on the right. Never wrapped, whatever the terminal.
pub fn plain_table(style: TableStyle, header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(style).set_header(header.to_vec());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
