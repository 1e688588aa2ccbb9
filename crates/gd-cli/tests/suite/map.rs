//! `gd map`: its JSON, table and plot, and invalid flags.

use anyhow::{Context, Result, ensure};

use crate::program::{error, gd, json, succeeded};

#[test]
fn the_map_is_printed_drawn_and_reproducible() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let run = "map --mechanisms hard+margin,hard,differential_l0.2 --seeds 2 --seed 4 --out x.svg --json";
    let result = json(dir.path(), run)?;
    assert_eq!((&result["seeds"], &result["seed"], &result["file"]), (&2.into(), &4.into(), &"x.svg".into()));
    let keys = |value: &serde_json::Value| -> Result<Vec<String>> {
        Ok(value.as_object().context("no object")?.keys().cloned().collect())
    };
    assert_eq!(keys(&result["x"])?, ["differential_l0.2", "hard", "hard+margin"]);
    // The recall task does not apply to a mechanism that needs two maps, and a rule has two confidences.
    assert_eq!(keys(&result["y"])?, ["hard", "hard+margin/gate", "hard+margin/graded"]);
    assert_eq!(result["x"]["hard"]["X"], serde_json::json!([1.0, 1.0, 1.0]));
    assert_eq!(result["x"]["differential_l0.2"]["C_cells"][3].as_array().map(Vec::len), Some(4));
    let graded = &result["y"]["hard+margin/graded"];
    let [mean, low, high] = [0, 1, 2].map(|i| graded["Y"][i].as_f64().unwrap_or(f64::NAN));
    ensure!(low < mean && mean < high, "{graded}");
    for key in ["auroc_far", "auroc_mix", "G", "J", "R", "colour_one_value", "mse_in", "abstain_in"] {
        ensure!(!graded[key].is_null(), "{key} is missing");
    }
    let picture = std::fs::read_to_string(dir.path().join("x.svg"))?;
    for part in ["1 hard", "2 differential_l0.2", "3 hard+margin", "consistency control", "concentration"] {
        ensure!(picture.contains(part), "{part} is not in the picture");
    }
    assert_eq!(json(dir.path(), run)?, result);
    let table = succeeded(&gd(dir.path(), "map --mechanisms hard --seeds 1 --out x.png")?)?;
    ensure!(
        table.contains("hard") && table.contains("AUROC far") && table.contains("saved x.png"),
        "{table}"
    );
    ensure!(std::fs::read(dir.path().join("x.png"))?.starts_with(b"\x89PNG"), "no PNG");
    Ok(())
}

#[test]
fn invalid_flags_are_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let message = error(dir.path(), "map --mechanisms softmax,softmix", 2)?;
    ensure!(message.contains("softmix") && message.contains("gd+threshold"), "{message}");
    let message = error(dir.path(), "map --seeds 0", 2)?;
    ensure!(message.contains("--seeds 0"), "{message}");
    Ok(())
}
