//! Stands in until the viewer is merged.
use crate::error::Result;

/// A trace as the viewer gets it.
pub struct Shown<'a> {
    /// Name.
    pub name: &'a str,
    /// Header.
    pub header: &'a serde_json::Value,
    /// Head.
    pub head: &'a str,
    /// Records.
    pub records: &'a [u8],
}

/// A page.
///
/// # Errors
/// None.
pub fn page(traces: &[Shown]) -> Result<String> {
    Ok(traces
        .iter()
        .map(|t| format!("{} {} {} {}</html>", t.name, t.head, t.header, t.records.len()))
        .collect())
}
