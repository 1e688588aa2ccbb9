//! The libraries do not depend on the packages that only the program or an optional feature needs.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use gd_tests::repository::root;

/// Packages of the command line: argument parser, tables, plots, progress and log output.
const COMMAND_LINE: [&str; 7] =
    ["clap", "comfy-table", "indicatif", "plotters", "png", "signal-hook", "tracing-subscriber"];

/// The names of the packages that `package` depends on with its default features: the direct dependencies for a
/// `depth` of 1, all of them without a limit.
fn dependencies(package: &str, depth: Option<u32>) -> Result<BTreeSet<String>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["tree", "--offline", "--edges", "normal", "--prefix", "none", "--format", "{p}"]);
    command.args(["--package", package]).current_dir(root());
    if let Some(depth) = depth {
        command.args(["--depth", &depth.to_string()]);
    }
    let output = command.output().context("cargo tree")?;
    ensure!(output.status.success(), "cargo tree: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
}

#[test]
fn libraries_do_not_depend_on_packages_of_the_command_line() -> Result<()> {
    for package in ["gd-kernels", "gd-layer", "gd-model"] {
        let dependencies = dependencies(package, None)?;
        ensure!(dependencies.contains("candle-core"), "{package}: {dependencies:?}");
        for name in COMMAND_LINE.iter().chain(&["ed25519-dalek"]) {
            assert!(!dependencies.contains(*name), "{package} depends on {name}");
        }
    }
    let program = dependencies("gd-cli", None)?;
    for name in COMMAND_LINE {
        assert!(program.contains(name), "gd-cli does not depend on {name}");
    }
    Ok(())
}

/// candle-core depends on tokenizers itself, so this concerns the direct dependencies.
#[test]
fn only_the_model_uses_tokenizers() -> Result<()> {
    for package in ["gd-kernels", "gd-layer", "gd-cli"] {
        assert!(!dependencies(package, Some(1))?.contains("tokenizers"), "{package} depends on tokenizers");
    }
    assert!(dependencies("gd-model", Some(1))?.contains("tokenizers"));
    Ok(())
}
