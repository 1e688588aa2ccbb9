//! Files with scalars for TensorBoard.
//!
//! A file is a sequence of records: length (u64), masked CRC32C of the length, data, masked CRC32C of the data, all
//! little-endian. The data is a protocol-buffer `Event` with the fields `wall_time` (1, double), `step` (2, int64), and
//! `file_version` (3, string) or `summary` (5). A summary repeats `value` (1), each with `tag` (1, string) and
//! `simple_value` (2, float).
//!
//! Tags are grouped: `loss/`, `selection/`, `optimizer/` and `system/`. A number that is the same in every step has no tag: it
//! is written once it differs from its first value, after its first and last constant ones.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::scalars;
use crate::error::{Error, Result};

/// The prefix of the file names.
const PREFIX: &str = "events.out.tfevents.";

/// A value of a number at a step.
#[derive(Debug, Clone, Copy)]
struct Point {
    step: u64,
    /// In seconds since 1970.
    time: f64,
    value: f32,
}

/// The course of a number over the steps so far.
#[derive(Debug)]
enum Course {
    /// It has been the same; its first point and the last one.
    Constant(Point, Point),
    Varying,
}

/// A file of scalars, open for writing.
#[derive(Debug)]
pub struct TensorBoard {
    file: File,
    path: PathBuf,
    courses: HashMap<String, Course>,
}

/// The tag of a number of the log.
fn tag(name: &str) -> String {
    let tag = match name {
        "loss" => "loss/train",
        "valid_loss" => "loss/valid",
        "valid_loss_ema" => "loss/valid_ema",
        "lr" => "optimizer/learning_rate",
        "grad_norm" => "optimizer/gradient_norm",
        "skipped" => "optimizer/skipped_updates",
        "churn" | "hardness" | "candidates" => return format!("selection/{name}"),
        _ => {
            return match name.strip_prefix("heads/") {
                Some(statistic) => format!("selection/{statistic}"),
                None => format!("system/{name}"),
            };
        }
    };
    tag.into()
}

impl TensorBoard {
    /// Creates a file in `folder` and removes the other files of this kind there. `wall_time` is in seconds since 1970.
    ///
    /// # Errors
    /// Names the file or folder that cannot be written.
    pub fn create(folder: &Path, wall_time: f64) -> Result<Self> {
        let error = |e| Error::write(folder, e);
        fs::create_dir_all(folder).map_err(error)?;
        for entry in fs::read_dir(folder).map_err(error)? {
            let entry = entry.map_err(error)?;
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                fs::remove_file(entry.path()).map_err(error)?;
            }
        }
        let path = folder.join(format!("{PREFIX}{:010}.gd", wall_time as u64));
        let file = File::create(&path).map_err(|e| Error::write(&path, e))?;
        let mut new = Self { file, path, courses: HashMap::new() };
        let mut version = double(1, wall_time);
        version.extend(bytes(3, b"brain.Event:2"));
        new.write(&version)?;
        Ok(new)
    }

    /// Writes the numbers of a line of the log. Events have none.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn line(&mut self, line: &Map<String, Value>) -> Result<()> {
        if line.contains_key("event") {
            return Ok(());
        }
        let time = line.get("time").and_then(Value::as_f64).unwrap_or(0.0);
        let step = line.get("step").and_then(Value::as_u64).unwrap_or(0);
        let mut varying = Vec::new();
        for (name, value) in scalars(line) {
            let (tag, point) = (tag(&name), Point { step, time, value: value as f32 });
            match self.courses.get_mut(&tag) {
                None => {
                    self.courses.insert(tag, Course::Constant(point, point));
                }
                Some(Course::Constant(first, last)) if first.value.to_bits() == point.value.to_bits() => {
                    *last = point
                }
                Some(Course::Constant(first, last)) => {
                    let (first, last) = (*first, *last);
                    self.points(&[(&tag, first)])?;
                    if last.step != first.step {
                        self.points(&[(&tag, last)])?;
                    }
                    self.courses.insert(tag.clone(), Course::Varying);
                    varying.push((tag, point));
                }
                Some(Course::Varying) => varying.push((tag, point)),
            }
        }
        let varying: Vec<(&str, Point)> = varying.iter().map(|(tag, point)| (tag.as_str(), *point)).collect();
        self.points(&varying)
    }

    /// Writes points of one step, with their tags.
    fn points(&mut self, points: &[(&str, Point)]) -> Result<()> {
        let Some((_, Point { step, time, .. })) = points.first() else { return Ok(()) };
        let mut summary = Vec::new();
        for (tag, point) in points {
            let mut entry = bytes(1, tag.as_bytes());
            entry.extend(float(2, point.value));
            summary.extend(bytes(1, &entry));
        }
        let mut event = double(1, *time);
        event.extend(integer(2, *step));
        event.extend(bytes(5, &summary));
        self.write(&event)
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&record(event)).map_err(|e| Error::write(&self.path, e))
    }
}

/// A record with its length and checksums.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked(&length).to_le_bytes());
    out.extend(data);
    out.extend(masked(data).to_le_bytes());
    out
}

/// The masked CRC32C of the format TFRecord: rotated and offset by a constant, because the CRC of data that contains CRCs
/// is weak.
fn masked(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The protocol-buffer varint of a number: groups of 7 bits, the lowest first.
fn varint(mut x: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while x >= 0x80 {
        out.push(x as u8 | 0x80);
        x >>= 7;
    }
    out.push(x as u8);
    out
}

/// The protocol-buffer key of a field: its number and wire type.
fn key(field: u64, wire: u64) -> Vec<u8> {
    varint(field << 3 | wire)
}

fn integer(field: u64, x: u64) -> Vec<u8> {
    [key(field, 0), varint(x)].concat()
}

fn double(field: u64, x: f64) -> Vec<u8> {
    [key(field, 1), x.to_le_bytes().into()].concat()
}

fn float(field: u64, x: f32) -> Vec<u8> {
    [key(field, 5), x.to_le_bytes().into()].concat()
}

fn bytes(field: u64, data: &[u8]) -> Vec<u8> {
    [key(field, 2), varint(data.len() as u64), data.into()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of RFC 3720, B.4.
    #[test]
    fn checksums_are_those_of_the_standard() {
        let rising: Vec<u8> = (0..32).collect();
        let cases: [(&[u8], u32, u32); 4] = [
            (&[0; 32], 0x8a91_36aa, 0x0fd7_fffa),
            (&[0xff; 32], 0x62a8_ab43, 0xf909_b029),
            (&rising, 0x46dd_794e, 0x951f_7892),
            (b"123456789", 0xe306_9283, 0xc78a_b0e5),
        ];
        for (data, crc, stored) in cases {
            assert_eq!(crc32c::crc32c(data), crc, "{data:?}");
            assert_eq!(masked(data), stored, "{data:?}");
        }
    }

    #[test]
    fn a_record_is_framed_by_its_length_and_two_checksums() {
        let data = [double(1, 1.5), bytes(3, b"brain.Event:2")].concat();
        assert_eq!(data, b"\x09\0\0\0\0\0\0\xf8\x3f\x1a\x0dbrain.Event:2");
        let framed = record(&data);
        assert_eq!(framed.len(), 8 + 4 + 24 + 4);
        assert_eq!(framed[..8], 24u64.to_le_bytes());
        assert_eq!(framed[8..12], masked(&24u64.to_le_bytes()).to_le_bytes());
        assert_eq!(framed[12..36], data);
        assert_eq!(framed[36..], masked(&data).to_le_bytes());
    }

    #[test]
    fn numbers_are_encoded_in_groups_of_seven_bits() {
        for (x, expected) in [(0, vec![0]), (127, vec![127]), (128, vec![0x80, 1]), (300, vec![0xac, 2])] {
            assert_eq!(varint(x), expected);
        }
        assert_eq!(varint(u64::MAX).len(), 10);
    }

    #[test]
    fn tags_are_grouped() {
        for (name, expected) in [
            ("valid_loss", "loss/valid"),
            ("heads/margin", "selection/margin"),
            ("churn", "selection/churn"),
            ("lr", "optimizer/learning_rate"),
            ("peak_mib", "system/peak_mib"),
        ] {
            assert_eq!(tag(name), expected);
        }
    }

    #[test]
    fn a_constant_is_written_once_it_changes_with_its_first_and_last_value() {
        let dir = tempfile::tempdir().unwrap();
        let mut new = TensorBoard::create(dir.path(), 2.0).unwrap();
        let header = fs::read(&new.path).unwrap().len();
        let mut length = |step: u64, lr: f64| {
            let line = serde_json::json!({ "step": step, "time": 1.0, "lr": lr, "total": 9 });
            new.line(line.as_object().unwrap()).unwrap();
            fs::read(&new.path).unwrap().len() - header
        };
        assert_eq!([length(1, 0.5), length(2, 0.5), length(3, 0.5)], [0; 3]);
        // Steps 1, 3 and 4 of the learning rate, in records of the same length; `total` stays the same.
        let three = length(4, 0.25);
        assert!(three > 0 && three % 3 == 0);
        assert_eq!(length(5, 0.25), three / 3 * 4);
    }

    #[test]
    fn a_new_file_replaces_the_old_ones_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join(format!("{PREFIX}0000000001.gd"));
        let other = dir.path().join("mine");
        fs::write(&old, "x").unwrap();
        fs::write(&other, "y").unwrap();
        let new = TensorBoard::create(dir.path(), 2.0).unwrap();
        assert!(!old.exists() && other.exists() && new.path.exists());
    }
}
