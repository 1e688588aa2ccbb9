//! `gd train` with several ranks under `mpirun`: the results of one process, errors for inconsistent ranks, and the end
//! of all ranks when one fails.

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
const SAMPLE: &str = include_str!("../text/sample.txt");

/// A folder with the small configuration, two micro-batches per step, and two texts.
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

/// Runs `gd` in `dir` with `world` ranks, or without `mpirun` for one rank.
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

/// Runs `gd` in `dir` with groups of ranks that have different arguments.
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

/// The JSON result on stdout.
fn trained(dir: &Path, world: usize, args: &str) -> Result<Value> {
    let output = gd(dir, world, args).output().context("mpirun does not start; OpenMPI is needed")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{world} ranks: {:?}\n{stderr}", output.status);
    // Only one rank prints the result and the progress.
    ensure!(stderr.matches("parameters, ").count() == 1, "{stderr}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The losses and gradient norms of the steps.
fn log(folder: &Path) -> Result<Vec<[f64; 2]>> {
    let log = fs::read_to_string(folder.join("train.jsonl"))?;
    let lines: Vec<Value> = log.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    // The other lines of the log are events.
    Ok(lines.iter().filter_map(|line| Some([line["loss"].as_f64()?, line["grad_norm"].as_f64()?])).collect())
}

fn weights(folder: &Path) -> Result<Vec<(String, Tensor)>> {
    let tensors = candle_core::safetensors::load(folder.join(WEIGHTS), &Device::Cpu)?;
    let mut tensors: Vec<_> = tensors.into_iter().collect();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(tensors)
}

/// Fails unless two runs of 20 steps are equal except for rounding.
fn require_close(one: &Path, other: &Path) -> Result<()> {
    let (a, b) = (log(one)?, log(other)?);
    ensure!((a.len(), b.len()) == (20, 20), "{} and {} steps", a.len(), b.len());
    let mut differences = [0f64; 3];
    for (a, b) in a.iter().zip(b) {
        for i in 0..2 {
            differences[i] = differences[i].max((a[i] - b[i]).abs() / a[i].abs());
        }
    }
    // The size of an Adam step does not depend on the size of the gradient, so that rounding is visible where the
    // gradient is near 0. The learning rates of these steps add up to 0.06.
    for ((_, a), (_, b)) in weights(one)?.iter().zip(weights(other)?) {
        differences[2] =
            differences[2].max((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?.into());
    }
    println!("{}: losses, norms, weights differ by {differences:?}", other.display());
    ensure!(
        differences[0] <= 1e-6 && differences[1] <= 1e-5 && differences[2] <= 1e-4,
        "{}: {differences:?}",
        other.display()
    );
    gd_testing::log_cases("parallel", 1);
    Ok(())
}

#[test]
fn ranks_train_like_one_process() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    // Six rows cannot be divided equally among four ranks.
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
fn a_run_resumes_with_another_number_of_ranks() -> Result<()> {
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
    gd_testing::log_cases("parallel", 1);
    Ok(())
}

#[test]
fn inconsistent_ranks_are_an_error() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    // The arguments of ranks 0 to 2, those of rank 3, and the error.
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
        ensure!(!dir.join("out").exists(), "{args}: wrote files");
    }
    gd_testing::log_cases("parallel", cases.len());
    Ok(())
}

/// The child processes of `parent`.
fn children(parent: u32) -> Result<Vec<u32>> {
    let list = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    Ok(list.split_whitespace().map(str::parse).collect::<Result<_, _>>()?)
}

#[test]
fn a_killed_rank_ends_the_job_and_the_last_checkpoint_resumes() -> Result<()> {
    let folder = folder()?;
    let dir = folder.path();
    let mut job =
        gd(dir, 3, "train --data text.txt --config six.json --steps 1000000 --save-every 10 --out killed");
    let mut job = job.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let mut stderr = BufReader::new(job.stderr.take().context("no stderr")?);
    // The checkpoint of step 20 is complete.
    let mut line = String::new();
    while !line.contains("30/1000000 steps") {
        line.clear();
        ensure!(stderr.read_line(&mut line)? > 0, "the job ended too early: {:?}", job.wait()?);
    }
    let ranks = children(job.id())?;
    ensure!(ranks.len() == 3, "{} ranks", ranks.len());
    ensure!(Command::new("kill").args(["-9", &ranks[1].to_string()]).status()?.success());
    // The job must end without further signals.
    let mut rest = String::new();
    stderr.read_to_string(&mut rest)?;
    let status = job.wait()?;
    ensure!(!status.success(), "{status:?}");
    ensure!(rest.contains("rank 1") && rest.contains("Killed"), "{rest}");
    // The ranks can end shortly after `mpirun`.
    let runs = |rank: &u32| fs::read(format!("/proc/{rank}/cmdline")).is_ok_and(|line| !line.is_empty());
    while ranks.iter().any(runs) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let resumed = trained(dir, 2, "train --resume killed --stop-after 5 --json")?;
    let step = resumed["step"].as_u64().context("no step")?;
    ensure!(step >= 25 && step % 10 == 5, "{resumed}");
    ensure!(
        log(&dir.join("killed"))?.len() as u64 == step,
        "the log and the checkpoint have different numbers of steps"
    );
    gd_testing::log_cases("parallel", 1);
    Ok(())
}
