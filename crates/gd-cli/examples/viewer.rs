//! The viewer's page for traces whose parts lie in files, however these came about.
//!
//! `cargo run --release -p gd-cli --example viewer -- OUT.html NAME HEADER.json RECORDS.bin [NAME HEADER RECORDS]`

use std::path::Path;

use anyhow::{Context, Result, bail};
use gd_cli::viewer::{Shown, page};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some((out, parts)) =
        args.split_first().filter(|(_, parts)| !parts.is_empty() && parts.len() % 3 == 0)
    else {
        bail!("expected OUT.html NAME HEADER.json RECORDS.bin, the last three once or twice");
    };
    let read = |path: &str| std::fs::read(Path::new(path)).with_context(|| path.to_owned());
    let mut held = Vec::new();
    for part in parts.chunks(3) {
        let header = serde_json::from_slice(&read(&part[1])?).with_context(|| part[1].clone())?;
        held.push((&part[0], header, read(&part[2])?));
    }
    let shown: Vec<_> = held
        .iter()
        .map(|(name, header, records)| Shown { name, header, head: "not chained", records })
        .collect();
    std::fs::write(out, page(&shown)?).with_context(|| out.clone())
}
