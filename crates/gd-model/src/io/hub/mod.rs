//! Models by name: in the cache of the Hugging Face Hub, as `huggingface_hub` lays it out, and with the feature `hub` from the
//! Hub itself (`fetch`).
//!
//! ```text
//! models--ORG--NAME/refs/main            the revision, a name of a folder
//! models--ORG--NAME/snapshots/REVISION/  the files of the model
//! ```

#[cfg(feature = "hub")]
mod fetch;

use std::ffi::OsString;
use std::fmt;
use std::path::{Component, Path, PathBuf};

#[cfg(feature = "hub")]
pub use fetch::fetch;

/// The revision that is read.
const REVISION: &str = "main";

/// The cache: `HF_HUB_CACHE`, else the folder `hub` in `HF_HOME`, else that in `~/.cache/huggingface`.
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| variable(name).map(PathBuf::from);
    let home = || {
        let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
        Some(cache.join("huggingface"))
    };
    set("HF_HUB_CACHE").or_else(|| Some(set("HF_HOME").or_else(home)?.join("hub")))
}

/// The value of a variable of the environment, if it is set and not empty.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// The name of a model of the Hub, or of one of its files: `ORG/NAME` or `ORG/NAME:FILE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a> {
    organisation: &'a str,
    model: &'a str,
    file: Option<&'a str>,
}

impl<'a> Name<'a> {
    /// The name that a text stands for; `None` for a text of another form.
    pub fn parse(text: &'a Path) -> Option<Self> {
        let text = text.to_str()?;
        let (repository, file) = match text.split_once(':') {
            Some((repository, file)) => (repository, Some(file)),
            None => (text, None),
        };
        let (organisation, model) = repository.split_once('/')?;
        let is_below = |file: &str| {
            let mut components = Path::new(file).components();
            !file.is_empty() && components.all(|part| matches!(part, Component::Normal(_)))
        };
        let fits = [organisation, model].into_iter().all(is_name) && file.is_none_or(is_below);
        fits.then_some(Self { organisation, model, file })
    }

    /// `ORG/NAME`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.organisation, self.model)
    }
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.repository())?;
        self.file.map_or(Ok(()), |file| write!(f, ":{file}"))
    }
}

/// The folder or file of a model in the cache `cache`. `None` for a model or file that the cache does not have.
///
/// ```
/// use std::path::Path;
/// use gd_model::io::hub::{Name, find};
///
/// let cache = tempfile::tempdir().unwrap();
/// let model = cache.path().join("models--org--name");
/// std::fs::create_dir_all(model.join("snapshots/1f2e")).unwrap();
/// std::fs::create_dir_all(model.join("refs")).unwrap();
/// std::fs::write(model.join("refs/main"), "1f2e").unwrap();
/// let named = |text| Name::parse(Path::new(text)).unwrap();
/// assert_eq!(find(cache.path(), &named("org/name")), Some(model.join("snapshots/1f2e")));
/// assert_eq!(find(cache.path(), &named("org/other")), None);
/// ```
pub fn find(cache: &Path, name: &Name<'_>) -> Option<PathBuf> {
    let folder = cache.join(format!("models--{}--{}", name.organisation, name.model));
    let revision = std::fs::read_to_string(folder.join("refs").join(REVISION)).ok()?;
    let revision = Some(revision.trim()).filter(|revision| is_name(revision))?;
    let snapshot = folder.join("snapshots").join(revision);
    let path = name.file.map_or(snapshot.clone(), |file| snapshot.join(file));
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
        let find = |name: &str| super::find(cache.path(), &Name::parse(Path::new(name))?);
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
