//! The tests of one crate are built with the same features of dependencies as those of the whole workspace.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use gd_tests::repository::root;

/// Packages and their features, as `cargo tree` resolves them for the packages that the arguments select.
fn features(selection: &[&str]) -> Result<BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--edges", "normal,build,dev", "--format", "{p} [{f}]", "--prefix", "none"])
        .args(selection)
        .current_dir(root())
        .output()
        .context("cargo tree")?;
    ensure!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).collect())
}

#[test]
fn one_crate_has_the_features_of_the_workspace() -> Result<()> {
    let workspace = features(&["--workspace"])?;
    for package in ["gd-kernels", "gd-layer", "gd-model", "gd-cli"] {
        // gd-testing comes without the emulator, which takes a minute to compile.
        let features = features(&["-p", package])?;
        let others = features.difference(&workspace).filter(|package| !package.starts_with("gd-testing "));
        let others: Vec<&str> = others.map(String::as_str).collect();
        assert!(others.is_empty(), "-p {package}: {}; add the features to tests/features", others.join(", "));
    }
    Ok(())
}
