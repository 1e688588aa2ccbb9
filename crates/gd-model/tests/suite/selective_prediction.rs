//! Prediction with rejection, against reference values and finite differences.

use std::path::Path;

use candle_core::{DType, Device, Tensor, Var};
use gd_model::eval::selective_prediction::{
    Ranking, SelectiveNet, aurc, chow, least_aurc, selectivenet_loss,
};
use gd_model::io::safetensors::{self, Tensors};
use gd_testing::tensors::{check_gradients, noise, values};
use gd_testing::{log_cases, properties};
use proptest::prelude::*;

fn reference() -> Tensors {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mechanisms/reject.safetensors");
    safetensors::load(&path, &Device::Cpu).unwrap()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.elem_count(), b.elem_count());
    values(a).iter().zip(values(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn decisions_losses_and_areas_have_their_reference_values() {
    let tensors = reference();
    let mut cases = 0;
    for (dtype, bound) in [(DType::F64, 1e-10), (DType::F32, 1e-5)] {
        let get = |name: &str| tensors[name].to_dtype(dtype).unwrap();
        let decisions = chow(&get("chow.p"), 0.35).unwrap();
        assert_eq!(
            decisions.reject.to_vec1::<u8>().unwrap(),
            tensors["chow.reject"].to_vec1::<u8>().unwrap()
        );
        assert_eq!(
            decisions.predicted.to_vec1::<i64>().unwrap(),
            tensors["chow.pred"].to_vec1::<i64>().unwrap()
        );
        for (case, coverage) in [("under", 0.7), ("over", 0.3)] {
            let input = |name: &str| Var::from_tensor(&get(&format!("selectivenet.{case}.{name}"))).unwrap();
            let [loss, aux, g] = ["loss", "aux", "g"].map(input);
            let result =
                selectivenet_loss(&loss, &aux, &g, SelectiveNet { coverage, ..Default::default() }).unwrap();
            let gradients = result.loss.backward().unwrap();
            let d = |var: &Var| gradients.get(var).unwrap().clone();
            for (name, actual) in [
                ("L", result.loss),
                ("phi", result.coverage),
                ("risk", result.risk),
                ("dloss", d(&loss)),
                ("daux", d(&aux)),
                ("dg", d(&g)),
            ] {
                let expected = get(&format!("selectivenet.{case}.{name}"));
                let scale = values(&expected).iter().fold(1f64, |most, x| most.max(x.abs()));
                let difference = largest_difference(&actual, &expected);
                assert!(difference <= bound * scale, "{case} {name} in {dtype:?}: {difference}");
            }
            cases += 1;
        }
        cases += 1;
    }
    for case in ["gold", "distinct", "ties", "all_tied"] {
        let get = |name: &str| &tensors[&format!("aurc.{case}.{name}")];
        let error: Vec<bool> = get("err").to_vec1::<u8>().unwrap().iter().map(|&e| e == 1).collect();
        let area = aurc(&values(get("conf")), &error).unwrap();
        assert!((area - values(get("aurc"))[0]).abs() < 1e-14, "{case}: {area}");
        cases += 1;
    }
    log_cases("selective-prediction", cases);
}

#[test]
fn the_gradient_of_selectivenet_matches_finite_differences() {
    let positive = |seed| (noise(seed, &[7], 0.4) + 0.5).unwrap();
    check_gradients(&[positive(1), positive(2), positive(3)], |t| {
        Ok(selectivenet_loss(&t[0], &t[1], &t[2], SelectiveNet { coverage: 0.9, ..Default::default() })
            .unwrap()
            .loss)
    });
}

proptest! {
    #![proptest_config(properties(256))]

    /// Against the definitions: pairs for AUROC, and for AURC the mean over orders of ties, by a repetition of every prediction.
    #[test]
    fn areas_follow_their_definitions(
        predictions in prop::collection::vec((0u8..6, any::<bool>(), 1u32..4), 2..14),
    ) {
        let confidence: Vec<f64> = predictions.iter().map(|p| f64::from(p.0)).collect();
        let error: Vec<bool> = predictions.iter().map(|p| p.1).collect();
        let count: Vec<u32> = predictions.iter().map(|p| p.2).collect();
        // Counts are repetitions.
        let repeated = |i: usize| std::iter::repeat_n(i, count[i] as usize);
        let all: Vec<usize> = (0..predictions.len()).flat_map(repeated).collect();
        let (confidences, errors): (Vec<f64>, Vec<bool>) = all.iter().map(|&i| (confidence[i], error[i])).unzip();
        let ranking = Ranking::new(&confidence);
        let area = aurc(&confidences, &errors).unwrap();
        prop_assert!((ranking.aurc(&error, &count) - area).abs() < 1e-12);
        let wrong = errors.iter().filter(|e| **e).count() as u64;
        prop_assert!(area >= least_aurc(wrong, errors.len() as u64) - 1e-12);
        let ones = vec![1; predictions.len()];
        let auroc = ranking.auroc(|i| !error[i], |i| error[i], &ones);
        let mut pairs = (0.0, 0.0);
        for a in (0..error.len()).filter(|&i| !error[i]) {
            for b in (0..error.len()).filter(|&i| error[i]) {
                let wins = if confidence[a] > confidence[b] { 1.0 } else if confidence[a] == confidence[b] { 0.5 } else { 0.0 };
                pairs = (pairs.0 + wins, pairs.1 + 1.0);
            }
        }
        prop_assert!(pairs.1 == 0.0 || (auroc - pairs.0 / pairs.1).abs() < 1e-12, "{auroc}");
    }
}

#[test]
fn a_perfect_order_has_the_least_area_and_invalid_input_is_named() {
    let error = [false, false, true, true, true];
    let area = aurc(&[0.9, 0.8, 0.3, 0.2, 0.1], &error).unwrap();
    assert!((area - least_aurc(3, 5)).abs() < 1e-15);
    assert!(aurc(&[0.1, 0.2, 0.3, 0.8, 0.9], &error).unwrap() > area);
    let text = |result: gd_model::Result<f64>| result.unwrap_err().to_string();
    assert!(text(aurc(&[0.5], &[true, false])).contains("1 confidences and 2 errors"));
    assert!(text(aurc(&[f64::NAN], &[true])).contains("NaN"));
    let p = Tensor::new(&[[0.5, 0.5]], &Device::Cpu).unwrap();
    let e = chow(&p, 1.5).unwrap_err().to_string();
    assert!(e.contains("cost") && e.contains("1.5"), "{e}");
}
