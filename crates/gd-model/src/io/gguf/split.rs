//! The files of a model that llama.cpp split: `NAME-00001-of-00002.gguf` and so on.
//!
//! Each part is a GGUF file with the keys `split.count` (number of parts), `split.no` (index of the part, from 0) and
//! `split.tensors.count` (tensors of all parts). The first part has the metadata of the model, and each part its tensors.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use super::header::Header;
use crate::error::{Error, Result};
use crate::io::files::open_file;

/// The name of a part.
#[derive(Debug, PartialEq, Eq)]
pub struct SplitName {
    prefix: String,
    /// The number of the part, from 1.
    number: u64,
    /// The number of all parts.
    count: u64,
}

impl SplitName {
    /// The name of a part in the form `PREFIX-00001-of-00002.gguf`; `None` for another name.
    pub fn parse(name: &str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (prefix, number) = rest.rsplit_once('-')?;
        let parse = |digits: &str| digits.parse().ok().filter(|_| digits.len() == 5);
        Some(Self { prefix: prefix.into(), number: parse(number)?, count: parse(count)? })
    }

    /// Whether both are names of parts of the same model.
    pub fn is_of(&self, other: &Self) -> bool {
        self.prefix == other.prefix && self.count == other.count
    }

    /// The name of another part.
    fn with_number(&self, number: u64) -> String {
        format!("{}-{number:05}-of-{:05}.gguf", self.prefix, self.count)
    }
}

/// The place of a file among the parts of a model.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    /// The number of the part, from 1.
    number: u64,
    count: u64,
}

impl Place {
    /// The place of a file; `None` for a model in one file.
    fn read(header: &Header) -> std::result::Result<Option<Self>, String> {
        let count = header.integer("split.count")?.unwrap_or(1);
        let number = header.integer("split.no")?.unwrap_or(0).saturating_add(1);
        if count <= 1 {
            return Ok(None);
        }
        if number > count {
            return Err(format!("key split.no is {}, and key split.count {count}", number - 1));
        }
        Ok(Some(Self { number, count }))
    }
}

/// The open files of a model, with the header of all of them.
pub(super) struct Files {
    /// The metadata, and the tensors of all files.
    pub(super) header: Header,
    pub(super) files: Vec<BufReader<File>>,
}

/// Opens the GGUF file at `path`, and the other parts if it is part of a split model.
///
/// # Errors
/// [`Error::Missing`], [`Error::Unreadable`] or [`Error::Foreign`] for a file, and a part that is missing.
pub(super) fn open(path: &Path) -> Result<Files> {
    let (header, file) = open_one(path)?;
    let Some(place) = Place::read(&header).map_err(|reason| foreign(path, reason))? else {
        return Ok(Files { header, files: vec![file] });
    };
    let announced = header.integer("split.tensors.count").map_err(|reason| foreign(path, reason))?;
    let others = siblings(path, &place)?;
    let mut parts = Vec::new();
    for (other, number) in others.into_iter().zip((1..=place.count).filter(|number| *number != place.number))
    {
        let (header, file) = open_one(&other)?;
        let expected = Place { number, count: place.count };
        let actual = Place::read(&header).map_err(|reason| foreign(&other, reason))?;
        if actual.as_ref() != Some(&expected) {
            let reason = format!(
                "its keys split.no and split.count are not those of part {number} of {}",
                place.count
            );
            return Err(foreign(&other, reason));
        }
        parts.push((number, header, file));
    }
    parts.push((place.number, header, file));
    parts.sort_by_key(|(number, ..)| *number);
    join(path, parts, announced)
}

/// Joins the parts, which are in order.
fn join(path: &Path, parts: Vec<(u64, Header, BufReader<File>)>, announced: Option<u64>) -> Result<Files> {
    let mut files = Vec::new();
    let mut joined: Option<Header> = None;
    for (_, header, file) in parts {
        joined = Some(match joined {
            None => header,
            Some(first) => first.with_part(header, files.len()).map_err(|reason| foreign(path, reason))?,
        });
        files.push(file);
    }
    let header = joined.ok_or_else(|| foreign(path, "a split model without parts".into()))?;
    match announced {
        Some(count) if count != header.tensors.len() as u64 => {
            let actual = header.tensors.len();
            Err(foreign(path, format!("the parts have {actual} tensors, key split.tensors.count is {count}")))
        }
        _ => Ok(Files { header, files }),
    }
}

/// The paths of the other parts in their order: by the name of this one, else by the keys of the files in its folder.
fn siblings(path: &Path, place: &Place) -> Result<Vec<PathBuf>> {
    let others = (1..=place.count).filter(|number| *number != place.number);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let missing = |number: u64, reason: String| {
        let Place { number: own, count } = place;
        Error::Invalid(format!(
            "{}: part {own} of {count} of a split model; part {number} is missing: {reason}",
            path.display()
        ))
    };
    let expected = Some((place.number, place.count));
    if let Some(split) = SplitName::parse(&name).filter(|split| Some((split.number, split.count)) == expected)
    {
        let sibling = |number: u64| {
            let name = split.with_number(number);
            let sibling = path.with_file_name(&name);
            if sibling.exists() {
                Ok(sibling)
            } else {
                Err(missing(number, format!("there is no {name} beside it")))
            }
        };
        return others.map(sibling).collect();
    }
    let candidates =
        parts_in(path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new(".")))?;
    others
        .map(|number| {
            let is_part = |(_, at): &&(PathBuf, Place)| *at == Place { number, count: place.count };
            let mut parts = candidates.iter().filter(is_part);
            match (parts.next(), parts.next()) {
                (Some((part, _)), None) => Ok(part.clone()),
                (None, _) => Err(missing(number, "no file beside it has the keys of that part".into())),
                (Some((a, _)), Some((b, _))) => {
                    let text = format!("{} and {} both have the keys of that part", a.display(), b.display());
                    Err(missing(number, text))
                }
            }
        })
        .collect()
}

/// The GGUF files in a folder that are parts, sorted by path. Files that cannot be read are passed over.
fn parts_in(folder: &Path) -> Result<Vec<(PathBuf, Place)>> {
    let unreadable = |e| Error::read(folder, "folder", e);
    let mut parts = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|extension| extension == "gguf")
            && let Ok((header, _)) = open_one(&path)
            && let Ok(Some(place)) = Place::read(&header)
        {
            parts.push((path, place));
        }
    }
    parts.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(parts)
}

fn open_one(path: &Path) -> Result<(Header, BufReader<File>)> {
    let file = open_file(path, "GGUF file")?;
    let mut file = BufReader::new(file);
    let header = Header::read(&mut file).map_err(|reason| foreign(path, reason))?;
    Ok((header, file))
}

fn foreign(path: &Path, reason: String) -> Error {
    Error::Foreign { path: path.into(), kind: "GGUF", reason }
}
