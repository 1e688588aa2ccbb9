//! The licences of all dependencies are among those of `deny.toml`, and `paste`, which is unmaintained, is no direct one.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use gd_tests::repository::root;

/// The licences that `deny.toml` allows.
fn allowed() -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(root().join("deny.toml"))?;
    let (_, rest) = text.split_once("allow = [").context("no list of licences")?;
    let (list, _) = rest.split_once(']').context("the list does not end")?;
    Ok(list.split('"').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Whether a licence expression can be fulfilled with the allowed licences. Each part that is connected by AND must be, and one
/// of those that are connected by OR. Older expressions have a slash for OR.
fn fulfilled(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let any = |part: &str| {
        part.replace('/', " OR ")
            .split(" OR ")
            .any(|name| allowed.contains(name.trim().trim_matches(['(', ')'])))
    };
    expression.split(" AND ").all(any)
}

#[test]
fn dependencies_have_allowed_licences() -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["tree", "--offline", "--workspace", "--edges", "normal,build", "--prefix", "none"]);
    let output = command.args(["--format", "{p}|{l}"]).current_dir(root()).output().context("cargo tree")?;
    ensure!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let (text, allowed) = (String::from_utf8(output.stdout)?, allowed()?);
    let lines: BTreeSet<&str> = text
        .lines()
        .filter_map(|line| line.trim_end_matches(" (*)").split_once('|'))
        .map(|(_, l)| l)
        .collect();
    ensure!(lines.len() > 10, "{lines:?}");
    for licence in lines.iter().filter(|licence| !licence.is_empty()) {
        ensure!(fulfilled(licence, &allowed), "the licence {licence:?} is not in deny.toml");
    }
    ensure!(!fulfilled("GPL-3.0", &allowed) && !fulfilled("MIT AND GPL-3.0", &allowed));
    ensure!(
        fulfilled("GPL-3.0 OR MIT", &allowed) && fulfilled("(MIT OR Apache-2.0) AND Unicode-3.0", &allowed)
    );
    Ok(())
}

#[test]
fn paste_is_no_direct_dependency() -> Result<()> {
    for crate_name in ["gd-kernels", "gd-layer", "gd-model", "gd-cli"] {
        let text = std::fs::read_to_string(root().join("crates").join(crate_name).join("Cargo.toml"))?;
        ensure!(!text.lines().any(|line| line.starts_with("paste")), "{crate_name} depends on paste");
    }
    Ok(())
}
