//! The conditional barrier against the recorded run of the public demo: 900 rows of five scores,
//! candidate 3 protected.
//!
//! The scores enter the operator as key priors: with q = k = 0 the energy of a key is minus its
//! prior. Values are the candidates' class rows `[5, 4]`.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};
use gd_kernels::reference::{Lift, Params, Problem, barrier, logsumexp, scan, select};
use gd_kernels::{Barrier, Estimator, Mask, Scan, Select};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::naive;

const ROWS: usize = 900;
const CANDIDATES: usize = 5;
const CLASSES: usize = 4;

struct Recording {
    raw: Vec<f64>,
    protected: Vec<f64>,
    boost: Vec<f64>,
    activated: Vec<bool>,
    selected: Vec<i64>,
    label: Vec<i64>,
    rule: Barrier,
    detect_floor: f64,
    minority: usize,
    metrics: BTreeMap<String, f64>,
}

fn recording() -> Recording {
    let bytes = std::fs::read(naive::fixture("beacon/rescue-first.safetensors")).expect("the fixture");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let data = |name: &str, dtype: Dtype| {
        let view = file.tensor(name).expect(name);
        assert_eq!(view.dtype(), dtype, "{name}");
        view.data().to_vec()
    };
    let eight = |name: &str, dtype| -> Vec<[u8; 8]> { data(name, dtype).as_chunks::<8>().0.to_vec() };
    let floats =
        |name: &str| -> Vec<f64> { eight(name, Dtype::F64).into_iter().map(f64::from_le_bytes).collect() };
    let integers =
        |name: &str| -> Vec<i64> { eight(name, Dtype::I64).into_iter().map(i64::from_le_bytes).collect() };
    let text = std::fs::read(naive::fixture("beacon/rescue-first.json")).expect("the fixture");
    let json: Value = serde_json::from_slice(&text).expect("json");
    let preset = |name: &str| json["preset"][name].as_f64().expect(name);
    let metrics = json["metrics"].as_object().expect("metrics").iter();
    Recording {
        raw: floats("raw_logits"),
        protected: floats("protected_logits"),
        boost: floats("boost"),
        activated: data("activated", Dtype::U8).iter().map(|&x| x == 1).collect(),
        selected: integers("selected"),
        label: integers("label"),
        rule: Barrier {
            floor: preset("barrier_floor"),
            margin: preset("rescue_margin"),
            strength: preset("barrier_strength"),
            entropy_trigger: preset("entropy_trigger"),
            slack: preset("trigger_slack"),
        },
        detect_floor: preset("detect_floor"),
        minority: json["minority_index"].as_u64().expect("an index") as usize,
        metrics: metrics.map(|(name, x)| (name.clone(), x.as_f64().expect(name))).collect(),
    }
}

impl Recording {
    fn lifts(&self) -> Vec<Lift> {
        let flags: Vec<bool> = (0..CANDIDATES).map(|j| j == self.minority).collect();
        self.raw.chunks(CANDIDATES).map(|scores| barrier(scores, &flags, &self.rule)).collect()
    }

    /// The class row of a candidate; the fifth stands for all classes alike.
    fn class_row(candidate: usize) -> [f64; CLASSES] {
        std::array::from_fn(|c| match candidate {
            CLASSES => 0.25,
            own => f64::from(u8::from(own == c)),
        })
    }

    /// The recording as a problem of the operator: one batch entry and one query a row.
    fn problem(&self) -> Problem {
        let dim = 8;
        Problem {
            batch: ROWS,
            q_heads: 1,
            kv_heads: 1,
            queries: 1,
            keys: CANDIDATES,
            dim,
            value_dim: CLASSES,
            q: vec![0.0; ROWS * dim],
            k: vec![0.0; ROWS * CANDIDATES * dim],
            v: (0..ROWS * CANDIDATES).flat_map(|j| Self::class_row(j % CANDIDATES)).collect(),
            beta: vec![1.0],
            prior: Some(self.raw.clone()),
            protected: Some(vec![self.minority as i32; ROWS]),
            ..Problem::default()
        }
    }
}

/// The first greatest entry.
fn argmax(row: &[f64]) -> usize {
    (0..row.len()).reduce(|greatest, j| if row[j] > row[greatest] { j } else { greatest }).expect("not empty")
}

fn mean(x: impl Iterator<Item = f64>) -> f64 {
    let x: Vec<f64> = x.collect();
    x.iter().sum::<f64>() / x.len() as f64
}

fn share(x: impl Iterator<Item = bool>) -> f64 {
    mean(x.map(|x| f64::from(u8::from(x))))
}

#[test]
fn scores_flags_and_choices() {
    let recording = recording();
    let lifts = recording.lifts();
    assert_eq!(lifts.len(), ROWS);
    for (row, lift) in lifts.iter().enumerate() {
        let expected = &recording.protected[row * CANDIDATES..][..CANDIDATES];
        naive::assert_close(&format!("row {row}"), &lift.scores, expected, 1e-9);
        assert_eq!(lift.activated, recording.activated[row], "row {row}");
        assert_eq!(lift.selected as i64, recording.selected[row], "row {row}");
        let boost = lift.scores[recording.minority] - recording.raw[row * CANDIDATES + recording.minority];
        assert!((boost - recording.boost[row]).abs() <= 1e-9, "row {row}: boost {boost}");
    }
    assert!(lifts.iter().any(|l| l.activated) && lifts.iter().any(|l| !l.activated));
}

/// An operator's choice and output `[ROWS, CLASSES]` on the recording.
#[track_caller]
fn assert_operator(run: impl Fn(&Problem, &Params) -> (Vec<i32>, Vec<f64>)) {
    let recording = recording();
    let params = Params { barrier: Some(recording.rule), ..Params::default() };
    let (index, y) = run(&recording.problem(), &params);
    for row in 0..ROWS {
        let selected = recording.selected[row];
        assert_eq!(i64::from(index[row]), selected, "row {row}");
        assert_eq!(y[row * CLASSES..][..CLASSES], Recording::class_row(selected as usize), "row {row}");
    }
}

#[test]
fn reference_operator() {
    assert_operator(|problem, params| {
        let out = select(problem, &scan(problem, CANDIDATES), params);
        (out.index, out.y)
    });
    // A single free candidate and the appended protected one hold the choice, too.
    let recording = recording();
    let scanned = scan(&recording.problem(), 1);
    assert!(scanned.width == 2 && scanned.protected.iter().filter(|p| **p).count() == ROWS);
}

/// The choice of the operators: indices and outputs `[ROWS, Dv]`, values v `[ROWS, 1, 5, Dv]`. The
/// protected candidate is given to the scan; `candidates` are free.
fn operators(
    recording: &Recording,
    candidates: usize,
    estimator: Estimator,
    v: &Tensor,
) -> (Vec<i32>, Vec<f64>) {
    let run = || -> candle_core::Result<(Vec<i32>, Vec<f64>)> {
        let device = Device::Cpu;
        let prior = Tensor::from_slice(&recording.raw, (ROWS, 1, CANDIDATES), &device)?;
        let (q, k) =
            (Tensor::zeros((ROWS, 1, 1, 1), prior.dtype(), &device)?, prior.zeros_like()?.unsqueeze(3)?);
        let (beta, mask) = (Tensor::new(&[1.0], &device)?, Mask::none());
        let protected = Tensor::new(&[recording.minority as i32], &device)?.reshape((1, 1, 1, 1))?;
        let options =
            Scan { prior: Some(&prior), protected: Some(&protected), ..Scan::new(&beta, &mask, candidates) };
        let scanned = gd_kernels::scan(&q, &k, &options)?;
        let options =
            Select { prior: Some(&prior), barrier: Some(recording.rule), estimator, ..Select::new(&beta) };
        let out = gd_kernels::select(&q, &k, v, &scanned, &options)?;
        Ok((out.index.flatten_all()?.to_vec1()?, out.y.flatten_all()?.to_vec1()?))
    };
    run().expect("the operators run")
}

#[test]
fn fast_operators() {
    assert_operator(|problem, _| {
        let v = Tensor::from_slice(&problem.v, (ROWS, 1, CANDIDATES, CLASSES), &Device::Cpu).expect("v");
        operators(&recording(), 8, Estimator::Candidates, &v)
    });
}

#[test]
fn fast_scores_and_flags() {
    // With one-hot values the blend is the softmax of the lifted scores, so its logarithms give them
    // back, up to a constant; it follows from any candidate but the protected one, whose score does not change.
    let recording = recording();
    let one_hot: Vec<f64> = (0..ROWS * CANDIDATES * CANDIDATES)
        .map(|x| f64::from(u8::from(x % CANDIDATES == x / CANDIDATES % CANDIDATES)))
        .collect();
    let v = Tensor::from_vec(one_hot, (ROWS, 1, CANDIDATES, CANDIDATES), &Device::Cpu).expect("v");
    let (index, weights) = operators(&recording, 8, Estimator::Blend, &v);
    let m = recording.minority;
    for (row, weights) in weights.chunks(CANDIDATES).enumerate() {
        let raw = &recording.raw[row * CANDIDATES..][..CANDIDATES];
        let other = (0..CANDIDATES).filter(|&j| j != m);
        let anchor = other
            .reduce(|greatest, j| if raw[j] > raw[greatest] { j } else { greatest })
            .expect("four others");
        let scores: Vec<f64> = weights.iter().map(|w| raw[anchor] + (w / weights[anchor]).ln()).collect();
        let expected = &recording.protected[row * CANDIDATES..][..CANDIDATES];
        naive::assert_close(&format!("row {row}"), &scores, expected, 1e-9);
        assert!((scores[m] - raw[m] - recording.boost[row]).abs() <= 1e-9, "row {row}");
        assert_eq!(scores[m] - raw[m] > 1e-9, recording.activated[row], "row {row}: active without a lift");
        assert_eq!(i64::from(index[row]), recording.selected[row], "row {row}");
    }
}

#[test]
fn every_metric() {
    let recording = recording();
    let lifts = recording.lifts();
    let (label, m) = (&recording.label, recording.minority);
    let minority: Vec<usize> = (0..ROWS).filter(|&row| label[row] == m as i64).collect();
    let others = |row: &[f64]| (0..CANDIDATES).filter(|&j| j != m).map(|j| row[j]).fold(f64::MIN, f64::max);
    let raw = |row: usize| &recording.raw[row * CANDIDATES..][..CANDIDATES];
    let lifted = |row: usize| &lifts[row].scores[..];
    let weight = |row: &[f64]| (row[m] - logsumexp(row.iter().copied())).exp();
    let gamma = |row: &[f64]| row[m] - others(row);

    // Baseline: the softmax mix of the class rows. Proposed: the selected candidate's class row.
    let baseline = |row: usize| {
        let total = logsumexp(raw(row).iter().copied());
        let mut mix = [0.0; CLASSES];
        for (j, score) in raw(row).iter().enumerate() {
            let class_row = Recording::class_row(j);
            (0..CLASSES).for_each(|c| mix[c] += (score - total).exp() * class_row[c]);
        }
        argmax(&mix) as i64
    };
    let proposed = |row: usize| argmax(&Recording::class_row(lifts[row].selected)) as i64;
    let predictions: [Vec<i64>; 2] = [(0..ROWS).map(baseline).collect(), (0..ROWS).map(proposed).collect()];

    let mut computed = BTreeMap::new();
    let mut put = |name: &str, x: f64| computed.insert(name.to_string(), x);
    let mut pair = |name: &str, of: &dyn Fn(usize) -> f64| {
        let (before, after) = (of(0), of(1));
        put(&format!("baseline_{name}"), before);
        put(&format!("proposed_{name}"), after);
        put(&format!("delta_{name}"), after - before);
    };
    pair("acc", &|s| share((0..ROWS).map(|row| predictions[s][row] == label[row])));
    pair("bal_acc", &|s| {
        mean((0..CLASSES as i64).map(|class| {
            let own = (0..ROWS).filter(|&row| label[row] == class);
            share(own.map(|row| predictions[s][row] == class))
        }))
    });
    let scores = |s: usize, row: usize| if s == 0 { raw(row) } else { lifted(row) };
    pair("minority_survival", &|s| {
        share(minority.iter().map(|&row| weight(scores(s, row)) >= recording.detect_floor))
    });
    pair("minority_top2", &|s| {
        let above = |row: &[f64]| row.iter().filter(|x| **x > row[m]).count();
        share(minority.iter().map(|&row| above(scores(s, row)) < 2))
    });
    let recall = |s: usize| share(minority.iter().map(|&row| predictions[s][row] == m as i64));
    pair("minority_acc", &recall);
    pair("collapse", &|s| share(minority.iter().map(|&row| predictions[s][row] != m as i64)));

    let right = |s: usize, row: usize| predictions[s][row] == label[row];
    put("rescue_rate", share(minority.iter().map(|&row| !right(0, row) && right(1, row))));
    put("false_rescue_rate", share(minority.iter().map(|&row| right(0, row) && !right(1, row))));
    put("barrier_activation_rate", share(lifts.iter().map(|l| l.activated)));
    put("barrier_activation_on_minority", share(minority.iter().map(|&row| lifts[row].activated)));
    put("gamma_before_mean", mean((0..ROWS).map(|row| gamma(raw(row)))));
    put("gamma_after_mean", mean((0..ROWS).map(|row| gamma(lifted(row)))));
    let gain = |row: usize| gamma(lifted(row)) - gamma(raw(row));
    put("gamma_delta_mean", mean((0..ROWS).map(gain)));
    put("gamma_delta_minority", mean(minority.iter().map(|&row| gain(row))));

    assert_eq!(computed.keys().collect::<Vec<_>>(), recording.metrics.keys().collect::<Vec<_>>());
    for (name, expected) in &recording.metrics {
        let x = computed[name];
        assert!((x - expected).abs() <= 1e-12 * (1.0 + expected.abs()), "{name}: {x}, recorded {expected}");
    }
}
