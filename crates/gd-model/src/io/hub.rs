//! Models by name in the cache of the Hugging Face Hub, as `huggingface_hub` lays it out. Nothing is fetched.
//!
//! ```text
//! models--ORG--NAME/refs/main            the revision, a name of a folder
//! models--ORG--NAME/snapshots/REVISION/  the files of the model
//! ```

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

/// The revision that is read.
const REVISION: &str = "main";

/// The cache: `HF_HUB_CACHE`, else the folder `hub` in `HF_HOME`, else that in `~/.cache/huggingface`.
pub fn cache_folder() -> Option<PathBuf> {
    let set =
        |name: &str| std::env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
    let home = || {
        let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
        Some(cache.join("huggingface"))
    };
    set("HF_HUB_CACHE").or_else(|| Some(set("HF_HOME").or_else(home)?.join("hub")))
}

/// The folder or file of a model in the cache `cache` that `name` names: `ORG/NAME`, or `ORG/NAME:FILE` for one of its
/// files. `None` for a text of another form, and for a model or file that the cache does not have.
///
/// ```
/// use std::path::Path;
/// use gd_model::io::hub;
///
/// let cache = tempfile::tempdir().unwrap();
/// let model = cache.path().join("models--org--name");
/// std::fs::create_dir_all(model.join("snapshots/1f2e")).unwrap();
/// std::fs::create_dir_all(model.join("refs")).unwrap();
/// std::fs::write(model.join("refs/main"), "1f2e").unwrap();
/// assert_eq!(hub::find(cache.path(), Path::new("org/name")), Some(model.join("snapshots/1f2e")));
/// assert_eq!(hub::find(cache.path(), Path::new("org/other")), None);
/// ```
pub fn find(cache: &Path, name: &Path) -> Option<PathBuf> {
    let (repository, file) = match name.to_str()?.split_once(':') {
        Some((repository, file)) => (repository, Some(file)),
        None => (name.to_str()?, None),
    };
    let (organisation, model) = repository.split_once('/')?;
    if ![organisation, model].into_iter().all(is_name) {
        return None;
    }
    let folder = cache.join(format!("models--{organisation}--{model}"));
    let revision = std::fs::read_to_string(folder.join("refs").join(REVISION)).ok()?;
    let revision = Some(revision.trim()).filter(|revision| is_name(revision))?;
    let snapshot = folder.join("snapshots").join(revision);
    let path = match file {
        Some(file) => {
            let is_below = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
            snapshot.join(Some(file).filter(|file| is_below && !file.is_empty())?)
        }
        None => snapshot,
    };
    path.exists().then_some(path)
}

/// Whether a text is a name that the Hub allows, and no path.
fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !text.is_empty() && !text.starts_with('.') && text.chars().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_outside_of_the_cache_are_not_followed() {
        let cache = tempfile::tempdir().unwrap();
        let model = cache.path().join("models--a--b-1.5");
        std::fs::create_dir_all(model.join("snapshots/main-1/sub")).unwrap();
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::write(model.join("refs/main"), "main-1\n").unwrap();
        std::fs::write(model.join("snapshots/main-1/sub/m.gguf"), "").unwrap();
        std::fs::write(cache.path().join("secret"), "").unwrap();
        let find = |name: &str| super::find(cache.path(), Path::new(name));
        let snapshot = model.join("snapshots/main-1");
        assert_eq!(find("a/b-1.5"), Some(snapshot.clone()));
        assert_eq!(find("a/b-1.5:sub/m.gguf"), Some(snapshot.join("sub/m.gguf")));
        for name in [
            "a/b",
            "a",
            "a/b-1.5/c",
            "../a/b-1.5",
            "/a/b-1.5",
            "a/..",
            "a/b-1.5:",
            "a/b-1.5:none",
            "a/b-1.5:../../../../secret",
            "a/b-1.5:/etc/passwd",
            "./b-1.5",
        ] {
            assert_eq!(find(name), None, "{name}");
        }
        // A revision that is a path.
        std::fs::write(model.join("refs/main"), "../../..").unwrap();
        assert_eq!(find("a/b-1.5"), None);
    }
}
