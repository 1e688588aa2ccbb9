//! Creates a page of the trace viewer from headers and records in files.
//!
//! `cargo run --release -p gd-cli --example viewer -- OUT.html NAME HEADER.json RECORDS.bin [NAME HEADER RECORDS]`

use std::path::Path;

use anyhow::{Context, Result, bail};
use gd_cli::render::viewer::{TraceView, page};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some((out, parts)) =
        args.split_first().filter(|(_, parts)| !parts.is_empty() && parts.len() % 3 == 0)
    else {
        bail!("expected OUT.html and, for one or two traces, NAME HEADER.json RECORDS.bin");
    };
    let read = |path: &str| std::fs::read(Path::new(path)).with_context(|| path.to_owned());
    let mut traces = Vec::new();
    for part in parts.chunks(3) {
        let header = serde_json::from_slice(&read(&part[1])?).with_context(|| part[1].clone())?;
        traces.push((&part[0], header, read(&part[2])?));
    }
    let views: Vec<_> = traces
        .iter()
        .map(|(name, header, records)| TraceView { name, header, head: "not chained", records })
        .collect();
    std::fs::write(out, page(&views)?).with_context(|| out.clone())
}
