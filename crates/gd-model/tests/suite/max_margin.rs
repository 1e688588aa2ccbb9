//! The direction of greatest margin, against reference values and its optimality conditions.

use std::path::Path;

use candle_core::{Device, Tensor};
use gd_kernels::reference::dot;
use gd_model::analysis::max_margin::{Choices, max_margin};
use gd_model::io::safetensors;
use gd_testing::tensors::{noise, values};
use gd_testing::{log_cases, properties};
use proptest::prelude::*;

fn choices(keys: &Tensor, chosen: &[usize]) -> Choices {
    Choices { keys: keys.to_vec3().unwrap(), chosen: chosen.to_vec() }
}

#[test]
fn directions_have_their_reference_values() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mechanisms/max_margin.safetensors");
    let tensors = safetensors::load(&path, &Device::Cpu).unwrap();
    let cases = ["joint", "single", "tight"];
    for case in cases {
        let get = |name: &str| &tensors[&format!("{case}.{name}")];
        let chosen: Vec<usize> = get("opt").to_vec1::<i64>().unwrap().iter().map(|&t| t as usize).collect();
        let found = max_margin(&choices(get("keys"), &chosen)).unwrap().expect("a direction");
        let near = |a: f64, b: f64| assert!((a - b).abs() <= 1e-10, "{case}: {a}, not {b}");
        found.direction.iter().zip(values(get("p_star"))).for_each(|(a, b)| near(*a, b));
        near(found.margin, values(get("margin"))[0]);
        near(found.cosine(&values(get("p"))), values(get("cos"))[0]);
        let active: Vec<Vec<u8>> = get("active").to_vec2().unwrap();
        let expected: Vec<Vec<bool>> =
            active.iter().map(|row| row.iter().map(|&a| a == 1).collect()).collect();
        assert_eq!(found.active, expected, "{case}");
    }
    let chosen = tensors["infeasible.opt"].to_vec1::<i64>().unwrap()[0] as usize;
    assert_eq!(max_margin(&choices(&tensors["infeasible.keys"], &[chosen])).unwrap(), None);
    log_cases("max-margin", cases.len() + 1);
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// Every constraint holds, and p* is a combination of the active ones: no other feasible direction of the sample is shorter.
fn check_direction([s, t, d]: [usize; 3], scale: i32, seed: u64) -> Result<(), TestCaseError> {
    let scale = 10f64.powi(scale);
    let keys = (noise(seed, &[s, t, d], 1.0) * scale).unwrap();
    let chosen: Vec<usize> = (0..s).map(|i| (seed as usize + i) % t).collect();
    let problem = choices(&keys, &chosen);
    let found = max_margin(&problem).unwrap();
    let others = |c: usize| (0..t).filter(move |&i| i != c);
    let rows = problem.keys.iter().zip(&chosen);
    let rows: Vec<Vec<f64>> =
        rows.flat_map(|(keys, &c)| others(c).map(move |i| difference(&keys[c], &keys[i]))).collect();
    let feasible = |p: &[f64]| rows.iter().map(|a| dot(a, p)).fold(f64::INFINITY, f64::min);
    // Random directions that separate, scaled until the closest constraint holds.
    let trials = noise(seed + 1, &[300, d], 1.0).to_vec2::<f64>().unwrap();
    let separating = trials.iter().filter(|p| feasible(p) > 0.0);
    let shortest = separating.map(|p| dot(p, p).sqrt() / feasible(p)).fold(f64::INFINITY, f64::min);
    match found {
        Some(found) => {
            let length = dot(&found.direction, &found.direction).sqrt();
            prop_assert!((feasible(&found.direction) - 1.0).abs() < 1e-7, "{}", feasible(&found.direction));
            prop_assert!((length * found.margin - 1.0).abs() < 1e-9);
            prop_assert!(length <= shortest * (1.0 + 1e-9), "{length} {shortest}");
            prop_assert!(found.active.iter().flatten().any(|a| *a));
        }
        None => prop_assert!(shortest == f64::INFINITY, "{shortest}"),
    }
    Ok(())
}

/// The margin is small beside the keys.
#[test]
fn constraints_hold_where_the_margin_is_small() {
    check_direction([2, 3, 2], 0, 671_761_640_471).unwrap();
}

proptest! {
    #![proptest_config(properties(200))]

    #[test]
    fn directions_are_feasible_and_shortest(
        s in 1usize..4, t in 2usize..6, d in 1usize..6, scale in -3i32..4, seed in 0u64..1 << 40,
    ) {
        check_direction([s, t, d], scale, seed)?;
    }
}

#[test]
fn a_token_among_the_others_has_no_direction_and_invalid_input_is_named() {
    let none = |keys: &[[f64; 2]], chosen: usize| {
        let keys =
            Tensor::new(vec![keys.iter().map(|k| k.to_vec()).collect::<Vec<_>>()], &Device::Cpu).unwrap();
        max_margin(&choices(&keys, &[chosen])).unwrap().is_none()
    };
    let triangle = [[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [1.0, 1.0]];
    assert!(none(&triangle, 3) && !none(&triangle, 0));
    // On the edge, and equal to another token.
    assert!(none(&[[0.0, 0.0], [2.0, 2.0], [1.0, 1.0]], 2));
    assert!(none(&[[1.0, 1.0], [1.0, 1.0]], 0));
    let refused = |keys: Vec<Vec<Vec<f64>>>, chosen: Vec<usize>, word: &str| {
        let text = max_margin(&Choices { keys, chosen }).unwrap_err().to_string();
        assert!(text.contains(word), "{word}: {text}");
    };
    refused(vec![vec![vec![1.0], vec![2.0]]], vec![2], "token 2");
    refused(vec![vec![vec![1.0], vec![2.0]]], vec![], "0 chosen");
    refused(vec![vec![vec![1.0], vec![2.0, 3.0]]], vec![0], "key 1 of sequence 0");
    refused(vec![vec![vec![1.0], vec![f64::NAN]]], vec![0], "key 1 of sequence 0");
    refused(vec![vec![vec![1.0]]], vec![0], "nothing to separate");
}
