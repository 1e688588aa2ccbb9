//! The checkpoints of a run: `checkpoint-STEP` folders, each complete and with a manifest, in the run's folder.
//!
//! A save goes to a temporary folder, every file is synced, the manifest comes last, the folder is synced and
//! renamed, its parent is synced; then everything is read back, and only then an older checkpoint goes. So
//! there is always one that can be loaded, and a name `checkpoint-STEP` never stands for half of one.

use std::path::{Path, PathBuf};

use super::disk::{Disk, System};
use super::manifest::{Filling, MANIFEST, verify};
use crate::error::{Error, Result};

const PREFIX: &str = "checkpoint-";
/// What is being written or removed; found at the start of a run, it is from one that was interrupted.
const TEMPORARY: &str = ".tmp";
/// Where a model is put together before its files move to the run's folder.
const FINAL: &str = ".model.tmp";

/// The checkpoints in the folder of a run.
pub struct Store {
    folder: PathBuf,
    disk: Box<dyn Disk>,
}

/// The newest checkpoint that is what it was when it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The folder.
    pub folder: PathBuf,
    /// Steps done.
    pub step: u64,
    /// Newer ones, and why they cannot be used.
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

    /// The newest checkpoint whose files fit its manifest; `None` where there is no checkpoint at all.
    ///
    /// # Errors
    /// All checkpoints are damaged; names the newest and what is wrong with it.
    pub fn newest(&self) -> Result<Option<Found>> {
        let (mut damaged, mut first) = (Vec::new(), None);
        for step in self.steps()? {
            match verify(&*self.disk, &self.path(step)) {
                Ok(()) => return Ok(Some(Found { folder: self.path(step), step, damaged })),
                Err(e) => {
                    damaged.push((step, e.to_string()));
                    first.get_or_insert(e);
                }
            }
        }
        first.map_or(Ok(None), Err)
    }

    /// Removes what interrupted saves left behind. Only for the one process that writes to the run.
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

    /// Gives a damaged checkpoint a name under which nothing looks for it, so that it is neither counted nor
    /// in the way when the run comes to its step again.
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

    /// Writes the checkpoint after `step` steps with what `fill` puts into it, and reads it back. After
    /// success all but the newest `keep` and the one of step `best` are removed. After an error, or a crash
    /// at any point, every checkpoint from before is still there.
    ///
    /// # Errors
    /// Names the file or folder and the system's reason, or the file that does not read back as written.
    pub fn save(
        &self,
        step: u64,
        keep: usize,
        best: Option<u64>,
        fill: impl FnOnce(&mut Filling) -> Result<()>,
    ) -> Result<PathBuf> {
        let (new, path) = (self.temporary(step), self.path(step));
        self.fill(&new, fill)?;
        let placed = self.rename(&new, &path).and_then(|()| self.sync());
        if let Err(e) = placed.and_then(|()| verify(&*self.disk, &path)) {
            // What cannot be relied on must not count among those that are kept.
            if self.rename(&path, &new).is_ok() || self.exists(&new).unwrap_or(false) {
                self.give_up(&new);
            }
            return Err(e);
        }
        // The save itself is done, so this is no failure of it.
        if let Err(e) = self.prune(step, keep, best) {
            tracing::warn!("an old checkpoint could not be removed: {e}");
        }
        Ok(path)
    }

    /// Puts a model with what `fill` writes into the run's folder itself. Its manifest is the last to come
    /// and the first to go, so that a mixture of two models is never taken for one.
    ///
    /// # Errors
    /// As [`Store::save`].
    pub fn install(&self, fill: impl FnOnce(&mut Filling) -> Result<()>) -> Result<()> {
        let new = self.folder.join(FINAL);
        self.fill(&new, fill)?;
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

    /// Makes a folder, fills it and syncs it, manifest last. After an error it is gone again.
    fn fill(&self, new: &Path, fill: impl FnOnce(&mut Filling) -> Result<()>) -> Result<()> {
        if self.exists(new)? {
            self.remove(new)?;
        }
        self.disk.create_dir(new).map_err(|e| Error::write(new, e))?;
        let mut filling = Filling::new(&*self.disk, new);
        let result = fill(&mut filling).and_then(|()| filling.finish());
        if result.is_err() {
            self.give_up(new);
        }
        result
    }

    /// Removes a temporary folder. What matters is done or has failed by then, and the next start tries again.
    fn give_up(&self, new: &Path) {
        if let Err(e) = self.remove(new) {
            tracing::debug!("{e}");
        }
    }

    /// Removes what is older than the checkpoint of `step`, but for the newest and the best. Each loses its name
    /// first, so that a crash leaves no half of one under it.
    fn prune(&self, step: u64, keep: usize, best: Option<u64>) -> Result<()> {
        let old = self.steps()?.into_iter().filter(|s| *s < step).skip(keep.saturating_sub(1));
        for old in old.filter(|s| Some(*s) != best) {
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
    // `checkpoint-007` and `checkpoint-+7` are nobody's.
    digits.parse().ok().filter(|step: &u64| step.to_string() == digits)
}

/// The folder from which to load the model that `path` names: `path` itself, or in the folder of a run
/// without a whole model its newest whole checkpoint, with the reasons for not taking something newer.
///
/// # Errors
/// The only model there is is damaged; names the file and how that shows.
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
        Ok(()) => return Ok((path.into(), Vec::new())),
        Err(e) if !checkpoints => return Err(e),
        Err(Error::Missing { path: missing, .. }) if missing == path.join(MANIFEST) => {
            format!("{}: the run has not ended", path.display())
        }
        Err(e) => e.to_string(),
    };
    match store.newest()? {
        Some(found) => {
            let damaged = found.damaged.into_iter().map(|(_, reason)| reason);
            Ok((found.folder, [reason].into_iter().chain(damaged).collect()))
        }
        None => Ok((path.into(), vec![reason])),
    }
}
