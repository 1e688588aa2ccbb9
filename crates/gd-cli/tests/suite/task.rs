//! `gd task`: runs, and continues with those that its folder does not have.

use std::fs;

use anyhow::{Result, ensure};

use crate::program::{error, gd, json, succeeded};

const SMALL: &str = "task induction --mechanisms gd,beacon --steps 2 --longest 64 --set train.context=256";

#[test]
fn a_repeated_command_continues_with_the_runs_that_are_missing() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let first = json(dir.path(), &format!("{SMALL} --out t --json"))?;
    let runs = first.as_array().expect("a list of runs");
    assert_eq!(runs.len(), 2);
    let parameters: Vec<f64> = runs.iter().filter_map(|run| run["parameters"].as_f64()).collect();
    ensure!((parameters[0] / parameters[1] - 1.0).abs() < 1e-3, "{parameters:?}");
    assert_eq!(runs[1]["mechanism"], "beacon");
    assert_eq!(runs[1]["tests"][0]["accuracy"], runs[1]["tests"][0]["accuracy_without_reads"]);
    fs::remove_file(dir.path().join("t/beacon-seed0.json"))?;
    let again = gd(dir.path(), &format!("{SMALL} --out t"))?;
    let (log, table) = (String::from_utf8_lossy(&again.stderr).into_owned(), succeeded(&again)?);
    ensure!(log.contains("beacon on induction") && !log.contains("gd on induction"), "{log}");
    ensure!(table.contains("64 tokens") && table.contains("cut %"), "{table}");
    for file in ["table.md", "task.svg", "task.html", "task.json", "gd-seed0.json"] {
        ensure!(dir.path().join("t").join(file).exists(), "{file}");
    }
    // Another configuration is another run.
    let changed = gd(dir.path(), &format!("{SMALL} --out t --set train.lr.peak=1e-3"))?;
    let log = String::from_utf8_lossy(&changed.stderr).into_owned();
    ensure!(log.contains("a run of another configuration") && log.contains("gd on induction"), "{log}");
    Ok(())
}

#[test]
fn unknown_names_are_usage_errors() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let message = error(dir.path(), "task mqr", 2)?;
    ensure!(message.contains("mqr") && message.contains("mqar-small"), "{message}");
    let message = error(dir.path(), "task copy --mechanisms gdd", 2)?;
    ensure!(message.contains("--mechanisms") && message.contains("gdd"), "{message}");
    let message = error(dir.path(), "task max-retrieval --mechanisms beacon", 1)?;
    ensure!(message.contains("no Beacon"), "{message}");
    Ok(())
}
