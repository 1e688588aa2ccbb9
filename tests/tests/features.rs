//! The tests of one crate are built with the same features of dependencies as those of the whole workspace.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use gd_tests::repository::root;

/// Packages and their features, as `cargo tree` resolves them along these edges for the packages that the arguments
/// select.
fn features(edges: &str, selection: &[&str]) -> Result<BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--edges", edges, "--format", "{p} [{f}]", "--prefix", "none"])
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
    // A package that procedural macros use as well is compiled for the host with features of its own: the second set of
    // edges has packages for the target alone.
    for edges in ["normal,build,dev", "normal,dev,no-proc-macro"] {
        let workspace = features(edges, &["--workspace"])?;
        for package in ["gd-kernels", "gd-layer", "gd-model", "gd-cli"] {
            // gd-testing comes without the emulator, which takes a minute to compile.
            let features = features(edges, &["-p", package])?;
            let others =
                features.difference(&workspace).filter(|package| !package.starts_with("gd-testing "));
            let others: Vec<&str> = others.map(String::as_str).collect();
            assert!(
                others.is_empty(),
                "-p {package}: {}; add the features to tests/features",
                others.join(", ")
            );
        }
    }
    Ok(())
}
