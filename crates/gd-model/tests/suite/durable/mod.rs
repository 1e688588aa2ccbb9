//! Checkpoints with failing disks, power failures and damage: a save that was reported as successful is intact, and damage
//! is detected.

mod memory;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use gd_model::Result;
use gd_model::io::checkpoint::{Disk, FolderWriter, MANIFEST, Store, verify};
use gd_testing::log_cases;
use memory::{Fault, Loss, Memory};

const ROOT: &str = "/";
/// Error numbers of the system and their texts.
const ERRORS: [(i32, &str); 3] =
    [(28, "No space left on device"), (5, "Input/output error"), (30, "Read-only file system")];

fn fill(step: u64) -> impl FnOnce(&mut FolderWriter) -> Result<()> {
    move |folder| {
        folder.file("a.txt", format!("step {step}").as_bytes())?;
        let tensor = Tensor::full(step as f32, (3, 5), &Device::Cpu)?;
        folder.tensors("t.safetensors", &BTreeMap::from([("t".to_owned(), tensor)]))
    }
}

fn read(disk: &Memory, path: PathBuf) -> Vec<u8> {
    let mut content = Vec::new();
    disk.open(&path).unwrap().read_to_end(&mut content).unwrap();
    content
}

fn store(disk: &Memory) -> Store {
    Store::new(Path::new(ROOT), disk.clone())
}

/// The operations of a run on its store: saves with `keep` 2 and `lowest` 2, and two models. Adds the steps that were saved
/// without an error to `reported`, and the errors to `failures`.
fn run(disk: &Memory, reported: &mut Vec<u64>, failures: &mut Vec<String>) {
    let store = store(disk);
    let mut note = |result: Result<()>| failures.extend(result.err().map(|e| e.to_string()));
    note(store.clean());
    for step in [2, 3, 4, 5] {
        let result = store.save(step, 2, Some(2), fill(step));
        if result.is_ok() {
            reported.push(step);
        }
        note(result.map(drop));
    }
    note(store.install(9, fill(9)));
    note(store.install(10, fill(10)));
    note(store.steps().map(drop));
}

/// Checks that the newest checkpoints and that of step 2 are intact if they were reported as saved, and that the run can
/// continue.
fn check(disk: &Memory, reported: &[u64], case: &str) {
    let store = store(disk);
    let newest = store.newest().unwrap_or_else(|e| panic!("{case}: {e}"));
    if let Some(&last) = reported.last() {
        let newest = newest.as_ref().unwrap_or_else(|| panic!("{case}: nothing is left of {reported:?}"));
        assert!(newest.step >= last, "{case}: {newest:?} of {reported:?}");
    }
    let lowest = reported.iter().filter(|step| **step == 2);
    for step in reported.iter().rev().take(2).chain(lowest) {
        verify(disk, &store.path(*step)).unwrap_or_else(|e| panic!("{case}: {step} was reported saved: {e}"));
    }
    // Every checkpoint that verifies has the content that was written.
    for step in store.steps().unwrap() {
        if verify(disk, &store.path(step)).is_ok() {
            assert_eq!(
                read(disk, store.path(step).join("a.txt")),
                format!("step {step}").as_bytes(),
                "{case}"
            );
        }
    }
    // A model in the folder that verifies is one of the two models.
    if verify(disk, Path::new(ROOT)).is_ok() {
        let content = read(disk, Path::new(ROOT).join("a.txt"));
        assert!([&b"step 9"[..], b"step 10"].contains(&content.as_slice()), "{case}");
    }
    // The run can continue after a restart.
    store.clean().unwrap_or_else(|e| panic!("{case}: {e}"));
    assert!(!disk.list(Path::new(ROOT)).unwrap().iter().any(|name| name.starts_with('.')), "{case}");
    for (step, _) in newest.map(|n| n.damaged).unwrap_or_default() {
        store.set_aside(step).unwrap();
    }
    store.save(7, 1, None, fill(7)).unwrap_or_else(|e| panic!("{case}: {e}"));
    assert_eq!(store.steps().unwrap(), [7], "{case}");
}

/// A disk on which step 1 has been saved.
fn begun() -> (Memory, Vec<u64>) {
    let disk = Memory::new();
    store(&disk).save(1, 2, None, fill(1)).unwrap();
    (disk, vec![1])
}

#[test]
fn checkpoints_are_intact_after_any_failed_operation() {
    let mut cases = 0;
    for (errno, text) in ERRORS {
        for lasting in [false, true] {
            for first in 0.. {
                let (disk, mut reported) = begun();
                let mut failures = Vec::new();
                disk.inject(Some(Fault { first, lasting, errno }));
                run(&disk, &mut reported, &mut failures);
                let failed = disk.failed();
                disk.inject(None);
                let case = format!("{text} from operation {first} on, lasting: {lasting}");
                if !failed {
                    assert!(failures.is_empty(), "{case}: {failures:?}");
                    assert!(first > 80, "{first} operations in all");
                    break;
                }
                // Only a failure to remove old files may be without an error.
                if lasting {
                    assert!(!failures.is_empty(), "{case}");
                }
                for error in &failures {
                    assert!(error.starts_with('/') && !error.contains('\n'), "{case}: {error}");
                    // Later errors may be consequences of the first one.
                    assert!(error.contains(text) || failures.len() > 1, "{case}: {error}");
                }
                check(&disk, &reported, &case);
                cases += 1;
            }
        }
    }
    log_cases("faults", cases);
}

#[test]
fn checkpoints_are_intact_after_a_crash_at_any_operation() {
    let mut cases = 0;
    for loss in [Loss::Nothing, Loss::Everything, Loss::Contents] {
        for first in 0.. {
            let (disk, mut reported) = begun();
            // After a crash nothing else happens, not even cleaning up.
            disk.inject(Some(Fault { first, lasting: true, errno: 5 }));
            run(&disk, &mut reported, &mut Vec::new());
            let crashed = disk.failed();
            disk.restart(loss);
            check(&disk, &reported, &format!("crash at operation {first}, loss: {loss:?}"));
            cases += 1;
            if !crashed {
                break;
            }
        }
    }
    log_cases("faults", cases);
}

#[test]
fn every_changed_byte_and_every_truncation_is_detected() {
    let disk = Memory::new();
    let store = store(&disk);
    store.save(1, 2, None, fill(1)).unwrap();
    // Contains an empty file and several tensors.
    let new = store.save(2, 2, None, |folder| {
        fill(2)(folder)?;
        folder.file("empty", b"")?;
        let tensors = (0..12).map(|i| -> Result<_> {
            let tensor = Tensor::arange(0f32, 64.0, &Device::Cpu).and_then(|t| t + f64::from(i))?;
            Ok((format!("layer.{i}.weight"), tensor))
        });
        folder.tensors("model.safetensors", &tensors.collect::<Result<_>>()?)
    });
    let new = new.unwrap();
    assert_eq!(store.newest().unwrap().unwrap().step, 2);
    let mut cases = 0;
    let mut check_detected = |case: &str, file: &str| {
        let newest = store.newest().unwrap().unwrap();
        assert_eq!(newest.step, 1, "{case}");
        let [(2, reason)] = newest.damaged.as_slice() else { panic!("{case}: {:?}", newest.damaged) };
        assert!(reason.contains(file) || file == MANIFEST, "{case}: {reason}");
        cases += 1;
    };
    for file in disk.list(&new).unwrap() {
        let path = new.join(&file);
        let whole = read(&disk, path.clone());
        for at in 0..whole.len() {
            for change in [1, 0x20, 0xff] {
                disk.damage(&path, |content| content[at] ^= change);
                check_detected(&format!("{file}: byte {at} ^ {change}"), &file);
                disk.damage(&path, |content| content[at] ^= change);
            }
        }
        for length in 0..whole.len() {
            disk.damage(&path, |content| content.truncate(length));
            check_detected(&format!("{file}: cut to {length}"), &file);
            disk.damage(&path, |content| content.clone_from(&whole));
        }
        disk.damage(&path, |content| content.push(0));
        check_detected(&format!("{file}: one byte more"), &file);
        disk.damage(&path, |content| content.clone_from(&whole));
        disk.rename(&path, &new.join("elsewhere")).unwrap();
        check_detected(&format!("{file}: gone"), &file);
        disk.rename(&new.join("elsewhere"), &path).unwrap();
    }
    assert_eq!(store.newest().unwrap().unwrap().step, 2);
    log_cases("damage", cases);
}

#[test]
fn the_newest_checkpoints_and_that_of_lowest_loss_remain() {
    let disk = Memory::new();
    let store = store(&disk);
    for step in 1..=6 {
        store.save(step, 2, Some(step.min(3)), fill(step)).unwrap();
    }
    assert_eq!(store.steps().unwrap(), [6, 5, 3]);
    // A checkpoint that was set aside does not count.
    disk.damage(&store.path(6).join("a.txt"), |content| content.clear());
    assert_eq!(store.newest().unwrap().unwrap().step, 5);
    store.set_aside(6).unwrap();
    store.save(6, 2, Some(3), fill(6)).unwrap();
    assert_eq!(store.steps().unwrap(), [6, 5, 3]);
    // If all checkpoints are damaged, the error is that of the newest.
    for step in store.steps().unwrap() {
        disk.damage(&store.path(step).join("a.txt"), |content| content.clear());
    }
    let error = store.newest().unwrap_err().to_string();
    assert!(error.contains("checkpoint-6/a.txt: damaged: 0 bytes, where the manifest says 6"), "{error}");
    assert_eq!(Store::new(Path::new(ROOT), Memory::new()).newest().unwrap(), None);
}
