//! Power failures at every point of what the program really does: the system calls of a training, its resumption, a second
//! training in the same folder, prepared data and a conversion are recorded by strace, and states of the disk are made from
//! them in which what was not synced is lost, reordered or cut. In each of them, what was reported as saved is whole.
#![cfg(target_os = "linux")]

mod disk;
mod recorder;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::Device;
use gd_model::data::Prepared;
use gd_model::io::checkpoint::{Store, System, load_json, locate, verify};
use gd_model::model::pretrained;
use gd_testing::{case_count, log_cases};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use self::disk::{Disk, Loss};
use self::recorder::{Operation, record};
use crate::program::{SAMPLE, SMALL, gd, succeeded};

/// The number of states; `GD_CRASH_STATES` sets another one.
const STATES: usize = 1000;
const LOSSES: [Loss; 5] = [Loss::Nothing, Loss::Everything, Loss::Contents, Loss::Random, Loss::Random];

const RUN: &str = "deep/er/run";
/// The seeds of the two runs.
const SEEDS: [u64; 2] = [1, 2];

/// What must be on the disk.
#[derive(Debug, Clone, Copy, Default)]
struct Saved {
    /// The last reported steps of the two runs.
    steps: [Option<u64>; 2],
    prepared: bool,
    converted: bool,
}

/// The operations of all commands, each with what is saved when it is done.
fn operations(folder: &Path) -> Result<Vec<(Operation, Saved)>> {
    let train = format!(
        "train --config small.json --data text.txt --save-every 1 --set train.lr.shape=constant \
         --set train.eval_every=3 --out {RUN}"
    );
    let commands = [
        (0, format!("{train} --steps 3 --seed 1 --set train.lr.warmup=1")),
        (0, format!("train --resume {RUN} --steps 5")),
        (1, format!("{train} --steps 2 --seed 2 --set train.lr.warmup=1")),
        (2, "data prepare --data text.txt --tokenizer bytes --out tokens/a".to_owned()),
        (3, format!("convert {RUN}.1 --attention gd --k 4 --out models/b")),
    ];
    let (mut all, mut saved, mut renamed) = (Vec::new(), Saved::default(), None);
    for (kind, command) in commands {
        for operation in record(folder, &command)? {
            match &operation {
                Operation::Rename(_, to) => renamed = step(to).or(renamed),
                // The rename of a checkpoint is on the disk.
                Operation::Sync(path) if path == Path::new(RUN) && kind < 2 => {
                    saved.steps[kind] = renamed.take().or(saved.steps[kind]);
                }
                _ => {}
            }
            all.push((operation, saved));
        }
        saved.prepared |= kind == 2;
        saved.converted |= kind == 3;
        // The last state is that after the command.
        if let Some(last) = all.last_mut() {
            last.1 = saved;
        }
    }
    Ok(all)
}

/// The step of a checkpoint by its path.
fn step(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()
}

/// Checks that everything that was saved is there and whole.
fn check(root: &Path, saved: Saved) -> Result<()> {
    let runs = [RUN.to_owned(), format!("{RUN}.1")].map(|run| root.join(run));
    for (seed, wanted) in SEEDS.into_iter().zip(saved.steps) {
        let Some(wanted) = wanted else { continue };
        let found = runs.iter().filter(|run| run.is_dir()).find_map(|run| newest(run, seed));
        let (run, newest) = found.with_context(|| format!("the run of seed {seed} is lost"))?;
        ensure!(newest >= wanted, "step {wanted} of seed {seed} was saved, {newest} is there");
        // Readers agree with the resumption.
        let (located, _) = locate(&run)?;
        let read = match located == run {
            true => load_json(&run.join("training_step.json"))?["step"].as_u64().context("no step")?,
            false => step(&located).context("no checkpoint")?,
        };
        ensure!(read == newest, "readers take step {read} of seed {seed}, a resumption {newest}");
        pretrained::load(&run, &Device::Cpu)?;
    }
    let (tokens, model) = (root.join("tokens/a"), root.join("models/b"));
    if saved.prepared || tokens.exists() {
        Prepared::open(&tokens)?;
    }
    if saved.converted || model.exists() {
        pretrained::load(&model, &Device::Cpu)?;
    }
    Ok(())
}

/// The run and its newest whole checkpoint, if it has this seed.
fn newest(run: &Path, seed: u64) -> Option<(PathBuf, u64)> {
    let newest = Store::new(run, System).newest().ok()??;
    let record = load_json(&newest.folder.join("trainer_state.json")).ok()?;
    (record["about"]["seed"].as_u64() == Some(seed) && verify(&System, &newest.folder).is_ok())
        .then(|| (run.to_path_buf(), newest.step))
}

#[test]
fn no_power_failure_loses_what_was_saved() -> Result<()> {
    if Command::new("strace").arg("-V").output().is_err() {
        println!("strace is not installed: no system call was recorded");
        log_cases("crash-states", 0);
        return Ok(());
    }
    let states = case_count("GD_CRASH_STATES", STATES);
    let files = [
        ("small.json", SMALL.into()),
        ("text.txt", SAMPLE.chars().take(3000).collect::<String>().into_bytes()),
    ];
    let recorded = tempfile::tempdir()?;
    let folder = recorded.path().join("root");
    fs::create_dir(&folder)?;
    files.iter().try_for_each(|(name, content): &(&str, Vec<u8>)| fs::write(folder.join(name), content))?;
    let operations = operations(&folder)?;
    ensure!(operations.len() > 300, "{} operations", operations.len());
    // Without a failure the model of the disk has the same files.
    let mut whole = Disk::new(&files);
    operations.iter().for_each(|(operation, _)| whole.apply(operation));
    let copy = tempfile::tempdir()?;
    whole.crash(Loss::Nothing, &mut ChaCha8Rng::seed_from_u64(0), copy.path())?;
    assert_equal(&folder, copy.path())?;
    let cases: Vec<(usize, Loss)> =
        (0..states).map(|i| (i * operations.len() / states, LOSSES[i % LOSSES.len()])).collect();
    let (all, files) = (&operations, &files);
    let failures: Vec<String> = cases
        .par_chunks(states.div_ceil(8))
        .flat_map_iter(|cases| {
            let (mut disk, mut applied) = (Disk::new(files), 0);
            cases.iter().filter_map(move |&(at, loss)| {
                for (operation, _) in &all[applied.min(at + 1)..=at] {
                    disk.apply(operation);
                }
                applied = at + 1;
                let (operation, saved) = &all[at];
                let result = survives(&disk, loss, at as u64, *saved);
                result.err().map(|e| format!("after {operation:?}, loss {loss:?}: {e:#}"))
            })
        })
        .collect();
    let shown: Vec<String> = failures.iter().take(5).map(|text| text.chars().take(300).collect()).collect();
    ensure!(failures.is_empty(), "{} of {states}: {}", failures.len(), shown.join("\n"));
    log_cases("crash-states", states);
    // After a failure in the middle the run continues.
    let (middle, _) = operations
        .iter()
        .enumerate()
        .find(|(_, (_, saved))| saved.steps[0] == Some(2))
        .context("no second step")?;
    let (root, mut disk) = (tempfile::tempdir()?, Disk::new(files));
    operations[..=middle].iter().for_each(|(operation, _)| disk.apply(operation));
    disk.crash(Loss::Everything, &mut ChaCha8Rng::seed_from_u64(1), root.path())?;
    succeeded(&gd(root.path(), &format!("train --resume {RUN}"))?)?;
    Ok(())
}

/// Makes a state of the disk after a power failure and checks it.
fn survives(disk: &Disk, loss: Loss, seed: u64, saved: Saved) -> Result<()> {
    let root = tempfile::tempdir()?;
    disk.crash(loss, &mut ChaCha8Rng::seed_from_u64(seed), root.path())?;
    check(root.path(), saved)
}

/// Compares the files of two folders.
fn assert_equal(a: &Path, b: &Path) -> Result<()> {
    for entry in fs::read_dir(a)? {
        let path = entry?.path();
        let other = b.join(path.file_name().context("no name")?);
        if path.is_dir() {
            assert_equal(&path, &other)?;
        } else {
            let same = fs::read(&other).is_ok_and(|content| fs::read(&path).is_ok_and(|own| own == content));
            ensure!(same, "{} differs", path.display());
        }
    }
    Ok(())
}
