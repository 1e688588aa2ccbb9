//! Fetching models from the Hugging Face Hub into its cache.
//!
//! Files are downloaded into a folder beside the models, where an interrupted download continues. Only when all files of a
//! model are there and have the hashes that the Hub names, they become a model of the cache.

use std::env;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::{Name, REVISION, cache_folder, is_name, variable};
use crate::error::{Error, Result};
use crate::io::checkpoint::{CHAT_TEMPLATE, CONFIG, GENERATION, INDEX, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS};
use crate::io::files::read_file;

/// The server, unless `HF_ENDPOINT` names another.
const ENDPOINT: &str = "https://huggingface.co";
/// The folder in the cache for downloads that are not complete.
const DOWNLOADS: &str = ".gd-downloads";
/// How often a download whose connection breaks is continued.
const RETRIES: usize = 5;
/// Files of a model besides its weights.
const COMPANIONS: [&str; 8] = [
    CONFIG,
    GENERATION,
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "adapter_config.json",
];
/// Why something could not be fetched.
type Reason = String;

/// The weights of an adapter.
const ADAPTER: &str = "adapter_model.safetensors";

/// Fetches a model, or one of its files, into the cache. A bar shows the progress on a terminal.
///
/// `HF_ENDPOINT` names another server, `HF_TOKEN` or the file `token` in the folder of Hugging Face an access token. With
/// `HF_HUB_OFFLINE` nothing is fetched.
///
/// # Errors
/// [`Error::Hub`] with the name and what prevented it.
pub fn fetch(name: &Name<'_>) -> Result<()> {
    let failed = |reason: String| Error::Hub { name: name.to_string(), reason };
    let cache = cache_folder()
        .ok_or_else(|| failed("there is no folder for the cache; HF_HOME can name one".into()))?;
    if variable("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value.to_string_lossy())) {
        let at = cache.display();
        return Err(failed(format!("it is not in the cache {at}, and HF_HUB_OFFLINE is set")));
    }
    let endpoint = env::var("HF_ENDPOINT").ok().filter(|text| !text.is_empty());
    let endpoint = endpoint.unwrap_or_else(|| ENDPOINT.into()).trim_end_matches('/').to_owned();
    let has_token = token(&cache).is_some();
    let refused = |e: ApiError| message(&e, &endpoint, has_token);
    let downloads = cache.join(DOWNLOADS);
    let api = ApiBuilder::from_cache(Cache::new(downloads.clone()))
        .with_endpoint(endpoint.clone())
        .with_token(token(&cache))
        .with_retries(RETRIES)
        .build()
        .map_err(|e| failed(refused(e)))?;
    let repo = Repo::with_revision(name.repository(), RepoType::Model, REVISION.into());
    let remote = api.repo(repo.clone());
    let info = remote.info().map_err(|e| failed(refused(e)))?;
    if !is_name(&info.sha) {
        return Err(failed(format!("the server names the revision {:?}", info.sha)));
    }
    let all: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let files = match name.file {
        Some(file) if all.iter().any(|other| other == file) => vec![file.to_owned()],
        Some(file) => return Err(failed(format!("it has no file {file:?}, only {}", list(&all)))),
        None => chosen(&remote, &all, &refused).map_err(failed)?,
    };
    let folder = cache.join(repo.folder_name());
    let snapshot = folder.join("snapshots").join(&info.sha);
    for file in &files {
        if snapshot.join(file).exists() {
            continue;
        }
        let unfinished = downloads.join(repo.folder_name());
        let (blob, etag) = download(&api, &remote, &unfinished, file, &refused).map_err(failed)?;
        place(&blob, &etag, &folder, &snapshot.join(file), file)?;
    }
    let reference = folder.join("refs").join(REVISION);
    make_folder(reference.parent().unwrap_or(&folder))?;
    fs::write(&reference, &info.sha).map_err(|e| Error::write(&reference, e))?;
    // What is left are links and locks.
    if let Err(e) =
        fs::remove_dir_all(downloads.join(repo.folder_name())).and_then(|()| fs::remove_dir(&downloads))
    {
        tracing::debug!("{}: {e}", downloads.display());
    }
    Ok(())
}

/// The access token: `HF_TOKEN`, else the file that logging in writes.
fn token(cache: &Path) -> Option<String> {
    let trimmed = |text: String| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
    let stored = || trimmed(fs::read_to_string(cache.parent()?.join("token")).ok()?);
    env::var("HF_TOKEN").ok().and_then(trimmed).or_else(stored)
}

/// Whether the value of a variable is one that `huggingface_hub` takes for true.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].iter().any(|word| value.eq_ignore_ascii_case(word))
}

fn list(files: &[String]) -> String {
    crate::error::shorten(files)
}

/// The files of a model among all files of its repository: those beside the weights, and the weights as safetensors, whole or
/// in shards, or the only GGUF file, or an adapter.
fn chosen(
    remote: &ApiRepo,
    all: &[String],
    refused: &dyn Fn(ApiError) -> Reason,
) -> std::result::Result<Vec<String>, Reason> {
    let has = |name: &str| all.iter().any(|file| file == name);
    let mut files: Vec<String> =
        COMPANIONS.iter().filter(|name| has(name)).map(|name| (*name).to_owned()).collect();
    if has(WEIGHTS) {
        files.push(WEIGHTS.into());
    } else if has(INDEX) {
        let index = remote.download(INDEX).map_err(refused)?;
        files.extend(shards(&read_file(&index, "shard index").map_err(|e| e.to_string())?));
        files.push(INDEX.into());
    } else if has(ADAPTER) {
        files.push(ADAPTER.into());
    } else {
        let gguf: Vec<String> = all.iter().filter(|file| file.ends_with(".gguf")).cloned().collect();
        match gguf.as_slice() {
            [only] => files = vec![only.clone()],
            [] => {
                return Err(format!("it has no weights as safetensors or GGUF, only {}", list(all)));
            }
            _ => {
                return Err(format!("it has several GGUF files, name one as in NAME:FILE: {}", list(&gguf)));
            }
        }
    }
    Ok(files)
}

/// The names of the files that an index of shards lists.
fn shards(index: &[u8]) -> Vec<String> {
    let index: serde_json::Value = serde_json::from_slice(index).unwrap_or_default();
    let map = index.get("weight_map").and_then(|map| map.as_object());
    let names = map.into_iter().flat_map(|map| map.values()).filter_map(|name| name.as_str());
    let names: std::collections::BTreeSet<&str> = names.filter(|name| is_name(name)).collect();
    names.into_iter().map(str::to_owned).collect()
}

/// Downloads a file and checks its hash. Returns its path in the folder of downloads and its name among the blobs of a cache.
fn download(
    api: &Api,
    remote: &ApiRepo,
    downloads: &Path,
    file: &str,
    refused: &dyn Fn(ApiError) -> Reason,
) -> std::result::Result<(PathBuf, String), Reason> {
    let unwritable = |path: &Path, e| Error::write(path, e).to_string();
    let metadata = api.metadata(&remote.url(file)).map_err(refused)?;
    let etag = metadata.etag().to_owned();
    // It is a name of a file here.
    if !is_name(&etag) {
        return Err(format!("{file}: the server names the hash {etag:?}"));
    }
    let blob = downloads.join("blobs").join(&etag);
    let part = blob.with_extension("part");
    // A part that is as long as the file was not renamed, or is of another file.
    if fs::metadata(&part).is_ok_and(|part| part.len() >= metadata.size() as u64) {
        fs::remove_file(&part).map_err(|e| unwritable(&part, e))?;
    }
    remote.download(file).map_err(refused)?;
    if let Some(reason) = differs(&blob, &etag).map_err(|e| e.to_string())? {
        fs::remove_file(&blob).map_err(|e| unwritable(&blob, e))?;
        return Err(format!("{file}: {reason}; it was removed, and fetching again may help"));
    }
    Ok((blob, etag))
}

/// How the content of a file differs from the hash that the Hub names: SHA-256 for large files, else the SHA-1 of Git.
fn differs(path: &Path, expected: &str) -> Result<Option<String>> {
    let unreadable = |e| Error::read(path, "downloaded file", e);
    let mut file = fs::File::open(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    let actual = match expected.len() {
        64 => hashed(&mut file, Sha256::new()),
        40 => hashed(&mut file, Sha1::new_with_prefix(format!("blob {size}\0"))),
        _ => return Ok(Some(format!("the server names the hash {expected:?}, neither SHA-256 nor SHA-1"))),
    };
    let actual = actual.map_err(unreadable)?;
    Ok((actual != expected).then(|| format!("its {size} bytes have the hash {actual}, not {expected}")))
}

fn hashed<H: Digest>(file: &mut impl Read, mut hasher: H) -> io::Result<String> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Moves a blob into the folder of its model, where `link` stands for it.
fn place(blob: &Path, etag: &str, folder: &Path, link: &Path, file: &str) -> Result<()> {
    let blobs = folder.join("blobs");
    let target = blobs.join(etag);
    make_folder(&blobs)?;
    fs::rename(blob, &target).map_err(|e| Error::write(&target, e))?;
    make_folder(link.parent().unwrap_or(link))?;
    #[cfg(unix)]
    let linked = {
        // From snapshots/REVISION, and from the folders in it.
        let up = "../".repeat(2 + file.matches('/').count());
        std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), link)
    };
    #[cfg(not(unix))]
    let linked = fs::rename(&target, link);
    linked.map_err(|e| Error::write(link, e))
}

fn make_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| Error::write(path, e))
}

/// What a failed request means. It contains no token.
fn message(error: &ApiError, endpoint: &str, has_token: bool) -> String {
    let mut error = error;
    while let ApiError::TooManyRetries(inner) = error {
        error = inner;
    }
    let ApiError::RequestError(request) = error else { return format!("{endpoint}: {error}") };
    match (&**request, has_token) {
        (ureq::Error::StatusCode(status @ (401 | 403)), true) => {
            format!(
                "{endpoint} answers {status}: the token (HF_TOKEN) gives no access to it, or it does not exist"
            )
        }
        (ureq::Error::StatusCode(status @ (401 | 403)), false) => format!(
            "{endpoint} answers {status}: it does not exist, or needs an access token, which HF_TOKEN can hold"
        ),
        (ureq::Error::StatusCode(404), _) => format!("{endpoint} has no such model"),
        (ureq::Error::StatusCode(status), _) => format!("{endpoint} answers {status}"),
        (other, _) => format!("{endpoint} cannot be reached: {other}"),
    }
}
