//! The checkpoints of a run: folders `checkpoint-STEP` with a manifest each, in the folder of the run.
//!
//! A checkpoint is written to a temporary folder. Every file is synced, the manifest is written last, then the folder is
//! synced and renamed, and its parent is synced. Then everything is read back, and only after that an older checkpoint
//! is removed. So there is always a checkpoint that can be loaded, and a folder `checkpoint-STEP` is always complete.

use std::path::{Path, PathBuf};

use super::WEIGHTS;
use super::disk::{Disk, System};
use super::manifest::{FolderWriter, MANIFEST, digest_of, verify};
use super::tensors::load_json;
use crate::error::{Error, Result};

const PREFIX: &str = "checkpoint-";
/// The suffix of folders that are being written or removed. At the start of a run they are left from an interruption.
const TEMPORARY: &str = ".tmp";
/// The folder in which a model is written before its files are moved into the folder of the run.
const FINAL: &str = ".model.tmp";
/// The file beside a model in the folder of a run with the number of its steps.
const STEP: &str = "training_step.json";
/// How often a reader tries again if checkpoints disappear while it reads them.
const MAX_ATTEMPTS: usize = 20;

/// The checkpoints in the folder of a run.
pub struct Store {
    folder: PathBuf,
    disk: Box<dyn Disk>,
}

/// The newest valid checkpoint of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredCheckpoint {
    /// The folder of the checkpoint.
    pub folder: PathBuf,
    /// The number of steps done.
    pub step: u64,
    /// The steps of newer checkpoints, and why they cannot be used.
    pub damaged: Vec<(u64, String)>,
}

impl Store {
    /// The checkpoints in `folder`, which exists.
    pub fn new(folder: &Path, disk: impl Disk + 'static) -> Self {
        Self { folder: folder.into(), disk: Box::new(disk) }
    }

    /// The folder of the checkpoint after `step` steps.
    pub fn path(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{PREFIX}{step}"))
    }

    /// The steps of all checkpoints, whole or damaged, newest first.
    ///
    /// # Errors
    /// Names the folder that cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let names = self.disk.list(&self.folder).map_err(|e| Error::read(&self.folder, "folder", e))?;
        let mut steps: Vec<u64> = names.iter().filter_map(|name| step_of(name)).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    /// The newest checkpoint whose files match its manifest; `None` if there is no checkpoint. A run may replace its
    /// checkpoints meanwhile: if one disappears while it is read, this looks again.
    ///
    /// # Errors
    /// The error of the newest checkpoint if all of them are damaged.
    pub fn newest(&self) -> Result<Option<StoredCheckpoint>> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let (mut damaged, mut first) = (Vec::new(), None);
            for step in self.steps()? {
                match verify(&*self.disk, &self.path(step)) {
                    Ok(()) => return Ok(Some(StoredCheckpoint { folder: self.path(step), step, damaged })),
                    Err(e) => {
                        damaged.push((step, e.to_string()));
                        first.get_or_insert(e);
                    }
                }
            }
            let left = self.steps()?;
            if attempts == MAX_ATTEMPTS || damaged.iter().all(|(step, _)| left.contains(step)) {
                return first.map_or(Ok(None), Err);
            }
        }
    }

    /// Removes the temporary folders of interrupted saves. Called by the one process that writes to the run.
    ///
    /// # Errors
    /// Names the folder that cannot be read or removed.
    pub fn clean(&self) -> Result<()> {
        let names = self.disk.list(&self.folder).map_err(|e| Error::read(&self.folder, "folder", e))?;
        for name in names {
            let step = name.strip_prefix('.').and_then(|n| n.strip_suffix(TEMPORARY)).and_then(step_of);
            if step.is_some() || name == FINAL {
                let path = self.folder.join(name);
                tracing::info!("{}: left by an interrupted save; removed", path.display());
                self.remove(&path)?;
            }
        }
        Ok(())
    }

    /// Renames a damaged checkpoint, so that the run can save one of the same step.
    ///
    /// # Errors
    /// Names the folder that cannot be renamed.
    pub fn set_aside(&self, step: u64) -> Result<PathBuf> {
        let aside = self.folder.join(format!("{PREFIX}{step}.damaged"));
        if self.exists(&aside)? {
            self.remove(&aside)?;
        }
        self.rename(&self.path(step), &aside)?;
        self.sync()?;
        Ok(aside)
    }

    /// Writes the checkpoint after `step` steps with the files that `fill` writes, and reads it back. Then removes all
    /// checkpoints except the newest `keep` and the one of step `lowest`. After an error, or a crash at any point, every
    /// earlier checkpoint is still there.
    ///
    /// # Errors
    /// Names the file or folder and the system's reason, or the file that does not read back as written.
    pub fn save(
        &self,
        step: u64,
        keep: usize,
        lowest: Option<u64>,
        fill: impl FnOnce(&mut FolderWriter) -> Result<()>,
    ) -> Result<PathBuf> {
        let (new, path) = (self.temporary(step), self.path(step));
        self.fill(&new, fill)?;
        let placed = self.rename(&new, &path).and_then(|()| self.sync());
        if let Err(e) = placed.and_then(|()| verify(&*self.disk, &path)) {
            // A checkpoint that cannot be read must not count as one of the newest.
            if self.rename(&path, &new).is_ok() || self.exists(&new).unwrap_or(false) {
                self.give_up(&new);
            }
            return Err(e);
        }
        // The save has succeeded by now.
        if let Err(e) = self.prune(step, keep, lowest) {
            tracing::warn!("an old checkpoint could not be removed: {e}");
        }
        Ok(path)
    }

    /// Writes the model after `step` steps, with the files that `fill` writes, into the folder of the run itself. The
    /// manifest is removed first and written last, so that a mixture of two models is never taken for a model.
    ///
    /// # Errors
    /// As [`Store::save`].
    pub fn install(&self, step: u64, fill: impl FnOnce(&mut FolderWriter) -> Result<()>) -> Result<()> {
        let new = self.folder.join(FINAL);
        self.fill(&new, |folder| {
            fill(folder)?;
            folder.json(STEP, &serde_json::json!({ "step": step }))
        })?;
        let manifest = self.folder.join(MANIFEST);
        if self.exists(&manifest)? {
            self.remove(&manifest)?;
            self.sync()?;
        }
        let names = self.disk.list(&new).map_err(|e| Error::read(&new, "folder", e))?;
        for name in names.iter().filter(|name| *name != MANIFEST) {
            self.rename(&new.join(name), &self.folder.join(name))?;
        }
        self.sync()?;
        self.rename(&new.join(MANIFEST), &manifest)?;
        self.sync()?;
        verify(&*self.disk, &self.folder)?;
        self.give_up(&new);
        Ok(())
    }

    /// Creates a folder, writes and syncs its files, the manifest last. Removes it after an error.
    fn fill(&self, new: &Path, fill: impl FnOnce(&mut FolderWriter) -> Result<()>) -> Result<()> {
        if self.exists(new)? {
            self.remove(new)?;
        }
        self.disk.create_dir(new).map_err(|e| Error::write(new, e))?;
        let mut writer = FolderWriter::new(&*self.disk, new);
        let result = fill(&mut writer).and_then(|()| writer.finish());
        if result.is_err() {
            self.give_up(new);
        }
        result
    }

    /// Removes a temporary folder. A failure is ignored, because the next start removes it too.
    fn give_up(&self, new: &Path) {
        if let Err(e) = self.remove(new) {
            tracing::debug!("{e}");
        }
    }

    /// Removes the checkpoints before `step` except the newest ones and that of `lowest`. Each is renamed first, so that a
    /// crash leaves no incomplete checkpoint under its name.
    fn prune(&self, step: u64, keep: usize, lowest: Option<u64>) -> Result<()> {
        let old = self.steps()?.into_iter().filter(|s| *s < step).skip(keep.saturating_sub(1));
        for old in old.filter(|s| Some(*s) != lowest) {
            let aside = self.temporary(old);
            self.rename(&self.path(old), &aside)?;
            self.remove(&aside)?;
        }
        Ok(())
    }

    fn temporary(&self, step: u64) -> PathBuf {
        self.folder.join(format!(".{PREFIX}{step}{TEMPORARY}"))
    }

    fn exists(&self, path: &Path) -> Result<bool> {
        let names = self.disk.list(&self.folder).map_err(|e| Error::read(&self.folder, "folder", e))?;
        Ok(path.file_name().is_some_and(|name| names.iter().any(|n| name == n.as_str())))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.disk.rename(from, to).map_err(|e| Error::write(to, e))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        self.disk.remove(path).map_err(|e| Error::write(path, e))
    }

    fn sync(&self) -> Result<()> {
        self.disk.sync_dir(&self.folder).map_err(|e| Error::write(&self.folder, e))
    }
}

/// The step in the name of a checkpoint folder.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(PREFIX)?;
    // `checkpoint-007` and `checkpoint-+7` are not names of checkpoints.
    digits.parse().ok().filter(|step: &u64| step.to_string() == digits)
}

/// Whether the model in the folder of a run, which is valid, is that of `newest`, or of a later step.
fn is_current(folder: &Path, newest: &StoredCheckpoint) -> bool {
    let step = load_json(&folder.join(STEP)).ok().and_then(|json| json.get("step")?.as_u64());
    match step {
        Some(step) => step >= newest.step,
        // A model of an older version of this program is that of the checkpoint with the same weights.
        None => digest_of(folder, WEIGHTS) == digest_of(&newest.folder, WEIGHTS),
    }
}

/// The folder from which to load the model at `path`: `path` itself, or the newest valid checkpoint in the folder of a run
/// without a valid model, or with one of an earlier step. Also returns why anything newer, or the model, was not used.
///
/// # Errors
/// [`Error::Damaged`] if the only model is damaged.
pub fn locate(path: &Path) -> Result<(PathBuf, Vec<String>)> {
    if !path.is_dir() {
        return Ok((path.into(), Vec::new()));
    }
    let store = Store::new(path, System);
    let checkpoints = !store.steps()?.is_empty();
    if !checkpoints && !path.join(MANIFEST).exists() {
        // A model from elsewhere.
        return Ok((path.into(), Vec::new()));
    }
    let reason = match verify(&System, path) {
        Ok(()) => match store.newest() {
            Ok(Some(newest)) if !is_current(path, &newest) => {
                format!("{}: the model there is of an earlier step of the run", path.display())
            }
            _ => return Ok((path.into(), Vec::new())),
        },
        Err(e) if !checkpoints => return Err(e),
        Err(Error::Missing { path: missing, .. }) if missing == path.join(MANIFEST) => {
            format!("{}: the run has not ended", path.display())
        }
        Err(e) => e.to_string(),
    };
    match store.newest()? {
        Some(checkpoint) => {
            let damaged = checkpoint.damaged.into_iter().map(|(_, reason)| reason);
            Ok((checkpoint.folder, [reason].into_iter().chain(damaged).collect()))
        }
        None => Ok((path.into(), vec![reason])),
    }
}
