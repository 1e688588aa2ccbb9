//! The measured map against exact cases and reference measurements.

use std::fs;
use std::path::Path;

use gd_model::analysis::mechanism_map::{
    ENTRIES, Graded, Interval, Measurement, Settings, consistency, measure, selectivity_of_row,
};
use gd_testing::log_cases;
use serde_json::Value;

/// How far X and C may be from the reference measurement with other random numbers.
const SELECTIVITY_TOLERANCE: f64 = 0.01;

fn reference() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mechanisms/map.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn one_row_has_its_exact_selectivity() {
    let exact = &reference()["x_exact"];
    let (z, second) = (numbers(&exact["z"]), numbers(&exact["z2"]));
    let values = exact["values"].as_object().unwrap();
    for (name, expected) in values {
        let entry = ENTRIES.iter().find(|entry| entry.name == name).unwrap();
        let actual = selectivity_of_row(entry, &z, &second).unwrap();
        for (a, b) in actual.iter().zip(numbers(expected)) {
            assert!((a - b).abs() <= 1e-12, "{name}: {a}, not {b}");
        }
    }
    log_cases("map-exact", values.len());
}

#[test]
fn a_small_task_has_its_exact_consistency() {
    let exact = &reference()["y_exact"];
    let confidence = |name: &str| -> Vec<f64> {
        let answered = |c: f64| if c >= 0.3 { c } else { f64::NEG_INFINITY };
        numbers(&exact[name]).into_iter().map(answered).collect()
    };
    let error: Vec<bool> = numbers(&exact["error_in"]).iter().map(|e| *e == 1.0).collect();
    let actual =
        consistency(&confidence("conf_in"), &error, &confidence("conf_far"), &confidence("conf_mix"));
    let actual = serde_json::to_value(actual).unwrap();
    for name in ["auroc_far", "auroc_mix", "G", "J", "R", "Y"] {
        let (a, b) = (actual[name].as_f64().unwrap(), exact[name].as_f64().unwrap());
        assert!((a - b).abs() <= 1e-12, "{name}: {a}, not {b}");
    }
}

fn measured(names: &[&str], seeds: usize, seed: u64) -> Vec<Measurement> {
    let mechanisms = names.iter().map(|name| (*name).to_owned()).collect();
    measure(&Settings { mechanisms, seeds, seed }, |_| ()).unwrap()
}

/// Compares a measurement over five banks with the mean and the standard deviation over 40 others.
fn check_consistency(name: &str, graded: &Graded, reference: &Value) {
    let long = &reference["y_long"][name];
    let actual = serde_json::to_value(graded).unwrap();
    for (figure, limits) in long.as_object().unwrap() {
        let limits = numbers(limits);
        let value = actual[figure].as_f64().unwrap_or_else(|| actual[figure][0].as_f64().unwrap());
        let tolerance = 3.0 * limits[1] / 5f64.sqrt();
        // The reference has four digits.
        assert!((value - limits[0]).abs() <= tolerance + 1e-4, "{name} {figure}: {value}, not {limits:?}");
    }
}

#[test]
fn measurements_agree_with_those_of_the_reference() {
    let reference = reference();
    let mut cases = 0;
    for m in measured(&["softmax", "hard+margin", "window8"], 5, 0) {
        let name = m.name;
        if let Some(expected) = reference["x"].get(name) {
            for (which, interval) in [("X", m.selectivity.x), ("C", m.selectivity.c)] {
                let expected = numbers(&expected[which])[0];
                assert!(
                    (interval.mean - expected).abs() <= SELECTIVITY_TOLERANCE,
                    "{name} {which}: {interval:?}"
                );
                assert!(
                    interval.low <= interval.mean && interval.mean <= interval.high,
                    "{name} {which}: {interval:?}"
                );
            }
            cases += 1;
        }
        let graded = m.consistency.as_ref().unwrap();
        match &m.gate {
            Some(gate) => {
                check_consistency(&format!("{name}/graded"), graded, &reference);
                check_consistency(&format!("{name}/gate"), gate, &reference);
                // A decision orders no better than the figure that it is taken by.
                assert!(gate.y.mean < graded.y.mean && gate.j == graded.j, "{name}");
                cases += 2;
            }
            None if reference["y_long"].get(name).is_some() => {
                check_consistency(name, graded, &reference);
                cases += 1;
            }
            None => {}
        }
    }
    log_cases("map", cases);
}

#[test]
fn selection_with_a_threshold_is_hard_attention_that_rejects_low_scores() {
    let all = measured(&["hard+reject_energy", "hard+margin", "gd+threshold", "gd+margin"], 1, 5);
    let y = |i: usize| all[i].consistency.clone().unwrap();
    let near = |a: Interval, b: Interval| (a.mean - b.mean).abs() < 1e-9;
    for (hard, selection) in [(0, 2), (1, 3)] {
        let (a, b) = (y(hard), y(selection));
        let same = near(a.g, b.g) && near(a.j, b.j) && near(a.r, b.r) && (a.mse_in - b.mse_in).abs() < 1e-9;
        assert!(same, "{a:?} {b:?}");
        assert_eq!(all[selection].selectivity.x.mean, 1.0);
        assert!((all[selection].selectivity.c.mean - 1.0).abs() < 1e-12);
    }
}

#[test]
fn the_same_seed_gives_the_same_numbers() {
    let run = |seed| measured(&["gd+margin"], 1, seed);
    assert_eq!(run(1), run(1));
    assert_ne!(run(1)[0].consistency, run(2)[0].consistency);
}

#[test]
fn invalid_settings_are_named() {
    let refused = |mechanisms: &[&str], seeds: usize, word: &str| {
        let mechanisms = mechanisms.iter().map(|name| (*name).to_owned()).collect();
        let text = measure(&Settings { mechanisms, seeds, seed: 0 }, |_| ()).unwrap_err().to_string();
        assert!(text.contains(word), "{word}: {text}");
    };
    refused(&["hard", "harder"], 1, "harder");
    refused(&["hard"], 0, "seeds");
}
