//! `gd train` by several ranks under a real `mpirun`: equal to one process, refused where it must be, and
//! stopped as a whole when one rank stops.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use gd_model::io::checkpoint::WEIGHTS;
use serde_json::Value;

const GD: &str = env!("CARGO_BIN_EXE_gd");
const SMALL: &str = include_str!("../../gd-model/tests/fixtures/small.json");
const SAMPLE: &str = include_str!("../../../models/sample.txt");

/// The small configuration with two micro-batches a step, and two texts.
fn folder() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let mut config: Value = serde_json::from_str(SMALL)?;
    config["train"]["accumulation"] = 2.into();
    fs::write(dir.path().join("small.json"), config.to_string())?;
    for (file, batch) in [("two.json", 2), ("six.json", 6)] {
        config["train"]["batch"] = batch.into();
        fs::write(dir.path().join(file), config.to_string())?;
    }
    for (file, skip) in [("text.txt", 0), ("other.txt", 1)] {
        fs::write(dir.path().join(file), SAMPLE.chars().skip(skip).take(20_000).collect::<String>())?;
    }
    Ok(dir)
}

const TRAIN: &str = "train --data text.txt --config small.json --seed 3 --json";

/// `gd` in `dir`, by `world` ranks, or without `mpirun` by one.
fn gd(dir: &Path, world: usize, args: &str) -> Command {
    let mut command = match world {
        1 => Command::new(GD),
        _ => mpirun(dir, &[(world, args)]),
    };
    if world == 1 {
        command.args(args.split_whitespace()).env("RAYON_NUM_THREADS", "1").current_dir(dir);
    }
    command
}

/// `gd` in `dir`, by as many ranks with these arguments, then as many with those.
fn mpirun(dir: &Path, ranks: &[(usize, &str)]) -> Command {
    let mut command = Command::new("mpirun");
    command
        .arg("--oversubscribe")
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        .env("RAYON_NUM_THREADS", "1")
        .current_dir(dir);
    for (count, args) in ranks {
        command.args(["-n", &count.to_string(), GD]).args(args.split_whitespace()).arg(":");
    }
    command
}

/// The result on stdout.
fn trained(dir: &Path, world: usize, args: &str) -> Result<Value> {
    let output = gd(dir, world, args).output().context("mpirun does not start; OpenMPI is needed")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{world} ranks: {:?}\n{stderr}", output.status);
    // One result and one line of progress, not one of each rank.
    ensure!(stderr.matches("parameters, ").count() == 1, "{stderr}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Losses of the steps and norms of their gradients.
fn log(folder: &Path) -> Result<Vec<[f64; 2]>> {
    let log = fs::read_to_string(folder.join("train.jsonl"))?;
    let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    // The other lines are events.
    Ok(lines.iter().filter_map(|line| Some([line["loss"].as_f64()?, line["grad_norm"].as_f64()?])).collect())
}

fn weights(folder: &Path) -> Result<Vec<(String, Tensor)>> {
    let tensors = candle_core::safetensors::load(folder.join(WEIGHTS), &Device::Cpu)?;
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(tensors)
}

/// Fails unless two runs of 20 steps are the same but for rounding.
fn require_close(one: &Path, other: &Path) -> Result<()> {
    let (a, b) = (log(one)?, log(other)?);
    ensure!((a.len(), b.len()) == (20, 20), "{} and {} steps", a.len(), b.len());
    let mut far = [0f64; 3];
    for (a, b) in a.iter().zip(b) {
        for i in 0..2 {
            far[i] = far[i].max((a[i] - b[i]).abs() / a[i].abs());
        }
    }
    // Adam makes steps of one size out of gradients of any: where one is near 0, rounding shows. The
    // learning rates of these steps add up to 0.06.
    for ((_, a), (_, b)) in weights(one)?.iter().zip(weights(other)?) {
        far[2] = far[2].max((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?.into());
    }
    println!("{}: losses, norms, weights differ by {far:?}", other.display());
    ensure!(far[0] <= 1e-6 && far[1] <= 1e-5 && far[2] <= 1e-4, "{}: {far:?}", other.display());
    gd_support::log_cases("parallel", 1);
    Ok(())
}

#[test]
fn ranks_train_as_one_process_does() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    // Six rows have no equal parts for four ranks.
    for (config, worlds) in [("small", vec![2, 4]), ("six", vec![4])] {
        let train = TRAIN.replace("small", config);
        trained(dir, 1, &format!("{train} --out {config}1"))?;
        for world in worlds {
            trained(dir, world, &format!("{train} --out {config}{world}"))?;
            require_close(&dir.join(format!("{config}1")), &dir.join(format!("{config}{world}")))?;
        }
    }
    Ok(())
}

#[test]
fn another_number_of_ranks_goes_on() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    trained(dir, 1, &format!("{TRAIN} --out whole"))?;
    let stopped = trained(dir, 4, &format!("{TRAIN} --stop-after 9 --out split"))?;
    ensure!(stopped["step"] == 9 && stopped["finished"] == false, "{stopped}");
    let stopped = trained(dir, 1, "train --resume split --stop-after 4 --json")?;
    ensure!(stopped["step"] == 13 && stopped["finished"] == false, "{stopped}");
    let finished = trained(dir, 2, "train --resume split --json")?;
    ensure!(finished["finished"] == true, "{finished}");
    require_close(&dir.join("whole"), &dir.join("split"))
}

#[test]
fn the_same_ranks_give_the_same_bits() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    for out in ["a", "b"] {
        trained(dir, 4, &format!("{TRAIN} --steps 5 --out {out}"))?;
    }
    let [a, b] = ["a", "b"].map(|out| fs::read(dir.join(out).join(WEIGHTS)));
    ensure!(a? == b?, "two runs by 4 ranks differ");
    gd_support::log_cases("parallel", 1);
    Ok(())
}

#[test]
fn ranks_that_do_not_fit_together_are_refused() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    // What rank 0 to 2 are given, what rank 3 is given, and the error.
    let cases = [
        (
            TRAIN.replace("small", "two"),
            TRAIN.replace("small", "two"),
            "train.batch must be at least the number of processes, 4, not 2",
        ),
        (
            TRAIN.into(),
            TRAIN.replace("text.txt", "other.txt"),
            "the training text: different on rank 0 and on rank 3",
        ),
        (
            format!("{TRAIN} --steps 8"),
            format!("{TRAIN} --steps 7"),
            "the configuration: different on rank 0 and on rank 3",
        ),
        (
            TRAIN.replace("--seed 3", ""),
            TRAIN.into(),
            "the parameters at step 0: different on rank 0 and on rank 3",
        ),
    ];
    for (args, last, message) in &cases {
        let output = mpirun(dir, &[(3, args), (1, last)]).output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{args}: {:?}\n{stderr}", output.status);
        ensure!(stderr.contains(message), "{args}: no {message:?} in\n{stderr}");
        ensure!(!dir.join("out").exists(), "{args}: left something behind");
    }
    gd_support::log_cases("parallel", cases.len());
    Ok(())
}

/// The processes that `parent` has started.
fn children(parent: u32) -> Result<Vec<u32>> {
    let list = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    Ok(list.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
}

#[test]
fn a_killed_rank_stops_the_job_and_the_last_checkpoint_goes_on() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let mut job =
        gd(dir, 3, "train --data text.txt --config six.json --steps 1000000 --save-every 10 --out killed");
    let mut job = job.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut stderr = BufReader::new(job.stderr.take().context("no stderr")?);
    // There are checkpoints; that of step 20 at least is whole.
    let mut line = String::new();
    while !line.contains("30/1000000 steps") {
        line.clear();
        ensure!(stderr.read_line(&mut line)? > 0, "the job ended too early: {:?}", job.wait()?);
    }
    let ranks = children(job.id())?;
    ensure!(ranks.len() == 3, "{} ranks", ranks.len());
    ensure!(Command::new("kill").args(["-9", &ranks[1].to_string()]).status()?.success());
    // It ends by itself, or this test does not.
    let mut rest = String::new();
    stderr.read_to_string(&mut rest)?;
    let status = job.wait()?;
    ensure!(!status.success(), "{status:?}");
    ensure!(rest.contains("rank 1") && rest.contains("Killed"), "{rest}");
    // The ranks may outlive `mpirun` for a moment.
    let runs = |rank: &u32| fs::read(format!("/proc/{rank}/cmdline")).is_ok_and(|line| !line.is_empty());
    while ranks.iter().any(runs) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let resumed = trained(dir, 2, "train --resume killed --stop-after 5 --json")?;
    let step = resumed["step"].as_u64().context("no step")?;
    ensure!(step >= 25 && step % 10 == 5, "{resumed}");
    ensure!(log(&dir.join("killed"))?.len() as u64 == step, "a log of other steps than the checkpoint's");
    gd_support::log_cases("parallel", 1);
    Ok(())
}
