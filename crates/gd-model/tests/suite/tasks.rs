//! Training and test of small models on tasks.

use candle_core::Device;
use gd_kernels::cross_entropy::IGNORE;
use gd_model::config::Setting;
use gd_model::tasks::{Inputs, Progress, TASKS, Task, TaskRun, named, run};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A run of a few steps of a model that is smaller than that of the task.
fn short(task: &dyn Task, steps: u64, more: &[&str], longest: usize) -> (TaskRun, Vec<f64>) {
    let mut preset = task.preset();
    (preset.steps, preset.tokens) = (steps, 256);
    let settings: Vec<Setting> = more.iter().map(|text| text.parse().unwrap()).collect();
    let recipe = preset.recipe(&settings).unwrap();
    let mut losses = Vec::new();
    let run = run(task, ("gd", &recipe), 3, longest, &Device::Cpu, |progress| {
        if let Progress::Step(_, loss) = progress {
            losses.push(loss);
        }
        Ok(())
    });
    (run.unwrap(), losses)
}

#[test]
fn every_task_makes_examples_that_fit_its_vocabulary_and_its_tests() {
    for task in TASKS {
        assert_eq!(named(task.name()).unwrap().name(), task.name());
        let (preset, mut rng) = (task.preset(), ChaCha8Rng::seed_from_u64(1));
        let recipe = preset.recipe(&[]).unwrap();
        let check = |examples: gd_model::tasks::Examples, length: Option<usize>| {
            let n = examples.rows * examples.length;
            assert_eq!(examples.answers.len(), n, "{}", task.name());
            assert!(length.is_none_or(|length| length == examples.length), "{}", task.name());
            let fits = |id: &u32| (*id as usize) < preset.vocabulary;
            let asked: Vec<&u32> = examples.answers.iter().filter(|a| **a != IGNORE).collect();
            assert!(asked.len() >= examples.rows && asked.into_iter().all(fits), "{}", task.name());
            match examples.inputs {
                Inputs::Tokens(ids) => assert!(ids.len() == n && ids.iter().all(fits), "{}", task.name()),
                Inputs::Features(x) => assert_eq!(x.len(), n * task.features().unwrap()),
            }
        };
        for _ in 0..5 {
            check(task.train(512, &mut rng), None);
        }
        for test in task.tests().iter().filter(|test| test.length <= 4097) {
            assert!(test.length <= recipe.model.max_position_embeddings, "{}", task.name());
            check(task.test(test, 1, &mut rng), Some(test.length));
        }
    }
    let error = named("mqr").err().unwrap().to_string();
    assert!(error.contains("mqar-small") && error.contains("max-retrieval"), "{error}");
}

#[test]
fn a_run_depends_on_its_seed_alone_and_reports_every_test() {
    let task = named("max-retrieval").unwrap();
    let gate = [
        r#"model.gd.select.gate={"energy":{"temperature":1.0}}"#,
        "model.gd.select.threshold=-3",
        "model.gd.select.exclude_below=0",
        "train.select.calibrate_thresholds=true",
    ];
    let (a, losses) = short(task, 3, &gate, 17);
    let (b, again) = short(task, 3, &gate, 17);
    assert_eq!((losses.len(), &losses), (3, &again));
    assert_eq!(a.tests, b.tests);
    let [test] = &a.tests[..] else { panic!("{a:?}") };
    assert_eq!((test.name.as_str(), test.answers), ("16 items", 1024));
    assert!((test.accuracy - (1.0 - test.errors as f64 / 1024.0)).abs() < 1e-9 && test.loss.is_finite());
    // The threshold was far below all energies, and starts where the mean gate is 1/2 instead.
    assert!(test.gate.is_some_and(|gate| gate > 0.2 && gate < 0.8), "{:?}", test.gate);
    let (without, _) = short(task, 3, &gate[..3], 17);
    assert!(without.tests[0].gate.is_some_and(|gate| gate < 0.05), "{:?}", without.tests[0].gate);
}

#[test]
fn training_reduces_the_loss_of_the_answers() {
    let task = named("flip-flop").unwrap();
    let (run, losses) = short(task, 30, &["train.lr.warmup=2"], 0);
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    assert!(mean(&losses[25..]) < mean(&losses[..3]) - 0.01, "{losses:?}");
    assert!(run.tests.is_empty(), "tests beyond the longest are left out");
}
