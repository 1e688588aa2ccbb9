//! Tests of process groups with several ranks: this program starts itself under `mpirun`.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor, Var};
use gd_model::train::Gradients;
use gd_model::train::parallel::Group;

/// The role of the job, its number of ranks, its exit code, and texts in its stderr.
const ROLES: &[(&str, usize, i32, &[&str])] = &[
    ("sums", 2, 0, &[]),
    ("sums", 3, 0, &[]),
    ("sums", 4, 0, &[]),
    ("unequal", 3, 0, &[]),
    ("error", 3, 2, &["error: rank 1 of 3: no such thing"]),
    ("panic", 3, 1, &["thing is gone", "error: rank 1 of 3 panicked"]),
];

fn main() -> ExitCode {
    let role = std::env::args().nth(1).filter(|_| std::env::var_os("OMPI_COMM_WORLD_SIZE").is_some());
    let result = match role {
        Some(role) => play(&role),
        None => ROLES.iter().try_for_each(|role| launch(*role)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:?}");
            ExitCode::FAILURE
        }
    }
}

fn launch((role, world, code, words): (&str, usize, i32, &[&str])) -> Result<()> {
    let output = Command::new("mpirun")
        .args(["--oversubscribe", "-n", &world.to_string()])
        .arg(std::env::current_exe()?)
        .arg(role)
        .envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")])
        .env("RAYON_NUM_THREADS", "1")
        .output()
        .context("mpirun does not start; OpenMPI is needed")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code), "{role} of {world}: {:?}\n{stderr}", output.status);
    for word in words {
        ensure!(stderr.contains(word), "{role} of {world}: no {word:?} in\n{stderr}");
    }
    println!("{role} with {world} ranks: as expected");
    gd_testing::log_cases("group", 1);
    Ok(())
}

fn play(role: &str) -> Result<()> {
    let group = Group::start(&Device::Cpu)?;
    match role {
        "sums" => sums(&group),
        "unequal" => {
            let same = blake3::hash(b"same");
            group.require_equal("a thing", same)?;
            let mine = if group.rank() == 1 { blake3::hash(b"other") } else { same };
            let error = group.require_equal("the thing", mine).err().context("not detected")?;
            ensure!(error.to_string() == "the thing: different on rank 0 and on rank 1", "{error}");
            Ok(())
        }
        // The other ranks wait for rank 1, which fails.
        _ if group.rank() != 1 => group.require_equal("a thing", blake3::hash(b"")).map_err(Into::into),
        "error" => group.abort("no such thing", 2),
        _ => panic!("the thing is gone"),
    }
}

/// Sums gradients of odd sizes, a gradient that two parameters share, one that only the last rank has, and one that no rank
/// has.
fn sums(group: &Group) -> Result<()> {
    let (rank, world) = (group.rank(), group.world());
    // More than one bucket.
    let sizes = [("large", (1 << 22) + 1), ("last", 5), ("none", 3), ("shared1", 7), ("shared2", 7)];
    let vars = sizes
        .map(|(name, n)| Ok((name.to_owned(), Var::zeros(n, candle_core::DType::F32, &Device::Cpu)?)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let value = |rank: usize, i: usize| ((i * 7 + rank * 1009) % 2039) as f32 * 0.37 - 300.0;
    let own = |n: usize| Tensor::from_iter((0..n).map(|i| value(rank, i)), &Device::Cpu);
    let mut store = (vars[0].1.as_tensor() * 0.0)?.sum_all()?.backward()?;
    let shared = own(7)?;
    store.insert(&vars[0].1, own(sizes[0].1)?);
    if rank + 1 == world {
        store.insert(&vars[1].1, own(5)?);
    }
    store.insert(&vars[3].1, shared.clone());
    store.insert(&vars[4].1, shared);
    let mut sums = Gradients { loss: 0.1 * (rank + 1) as f64, weight: 1.0, store };
    group.all_reduce(&vars, &mut sums)?;

    ensure!(sums.weight == world as f64);
    ensure!(sums.loss == (1..=world).map(|r| 0.1 * r as f64).sum::<f64>(), "{}", sums.loss);
    let expect = |i: usize| (0..world).map(|r| f64::from(value(r, i))).sum::<f64>() as f32;
    for (at, (name, var)) in vars.iter().enumerate() {
        let Some(sum) = sums.store.get(var) else {
            ensure!(name == "none", "{name} has no gradient");
            continue;
        };
        ensure!(sum.dims() == var.dims(), "{name}: {:?}", sum.dims());
        for (i, x) in sum.to_vec1::<f32>()?.into_iter().enumerate() {
            let expected = if at == 1 { value(world - 1, i) } else { expect(i) };
            ensure!(x == expected, "{name}[{i}]: {x}, not {expected}");
        }
    }
    ensure!(sums.store.get(&vars[2].1).is_none(), "a gradient that no rank has");
    Ok(())
}
