//! Training and test of small models on tasks.

use candle_core::Device;
use gd_kernels::cross_entropy::IGNORE;
use gd_model::config::Setting;
use gd_model::tasks::{Contender, ENCODER_DECODERS, Inputs, Progress, TASKS, Task, TaskRun, named, run};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// A run of a few steps with batches that are smaller than those of the task.
fn short(task: &dyn Task, steps: u64, more: &[&str], longest: usize) -> (TaskRun, Vec<f64>) {
    short_of("gd", task, steps, more, longest)
}

fn short_of(name: &str, task: &dyn Task, steps: u64, more: &[&str], longest: usize) -> (TaskRun, Vec<f64>) {
    let mut preset = task.preset();
    (preset.steps, preset.tokens) = (steps, 256);
    let settings: Vec<Setting> = more.iter().map(|text| text.parse().unwrap()).collect();
    let recipe = preset.recipe(&settings).unwrap();
    let mut losses = Vec::new();
    let run = run(task, Contender { name, recipe: &recipe }, 3, longest, &Device::Cpu, |progress| {
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

#[test]
fn attention_over_encoder_states_learns_to_write_a_string_backwards() {
    let task = named("reverse").unwrap();
    for name in ENCODER_DECODERS {
        let (run, losses) = short_of(name, task, 60, &["train.lr.warmup=2", "train.lr.peak=1e-2"], 32);
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        let (first, last) = (mean(&losses[..5]), mean(&losses[55..]));
        assert!(last < first, "{name}: {losses:?}");
        let [test] = &run.tests[..] else { panic!("{run:?}") };
        assert_eq!(test.answers, 4096);
        // By chance one of 26 letters is right, and without the states of the encoder about as many.
        let (accuracy, cut) = (test.accuracy, test.accuracy_without_reads);
        assert!(accuracy > cut && cut < 0.08, "{name}: {accuracy}, {cut}");
        assert!(*name != "pointer" || accuracy > 0.15, "{name}: {accuracy}");
        assert_eq!((run.mechanism.as_str(), test.gate), (*name, None));
    }
}

#[test]
fn an_encoder_decoder_needs_a_string_to_read() {
    let task = named("induction").unwrap();
    let recipe = task.preset().recipe(&[]).unwrap();
    let contender = Contender { name: "pointer", recipe: &recipe };
    let error = run(task, contender, 0, 64, &Device::Cpu, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("copy, reverse, sort"), "{error}");
}
