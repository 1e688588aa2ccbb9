//! The header of a GGUF file, versions 2 and 3: the metadata, and the position of each tensor.
//!
//! The file is untrusted. Every length is compared with the rest of the file before memory is allocated for it, and tensors
//! must lie within the file and must not overlap, so that the memory needed is at most a small multiple of the size of the
//! file. Errors are reasons without the name of the file, which the caller adds.
//!
//! Layout, little-endian: `GGUF`, the version (u32), the numbers of tensors and of keys (u64 each); the keys; the tensors;
//! padding; the data. A key is a string, a type (u32) and a value. A tensor is a name, its rank (u32), its dimensions (u64,
//! innermost first), a type (u32) and an offset (u64) in the data. A string is a length (u64) and its bytes, an array a type
//! (u32), a length (u64) and its values.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};

use candle_core::quantized::GgmlDType;

type Result<T> = std::result::Result<T, String>;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSIONS: [u32; 2] = [2, 3];
const ALIGNMENT: &str = "general.alignment";
/// The maximal rank of a tensor, as in ggml.
const MAX_RANK: u32 = 4;
/// The maximal length of the name of a key or tensor, as in ggml.
const MAX_NAME_BYTES: u64 = 1 << 16;
/// The maximal number of keys, and of tensors; models have at most a few thousand.
const MAX_COUNT: u64 = 1 << 16;
/// The minimal size of a key: empty name, type, one byte.
const MIN_KEY_BYTES: u64 = 13;
/// The minimal size of a tensor: empty name, rank, one dimension, type, offset.
const MIN_TENSOR_BYTES: u64 = 32;

/// The supported tensor types by their number in the file. Types of less than four bits are not supported, because the
/// tensors would need more than eight times the size of the file in f32.
const TENSOR_TYPES: [(u32, GgmlDType); 11] = [
    (0, GgmlDType::F32),
    (1, GgmlDType::F16),
    (2, GgmlDType::Q4_0),
    (3, GgmlDType::Q4_1),
    (6, GgmlDType::Q5_0),
    (7, GgmlDType::Q5_1),
    (8, GgmlDType::Q8_0),
    (12, GgmlDType::Q4K),
    (13, GgmlDType::Q5K),
    (14, GgmlDType::Q6K),
    (30, GgmlDType::BF16),
];

/// The types of metadata values, in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [Self; 13] = {
        use Kind::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, Text, Array, U64, I64, F64]
    };

    fn new(number: u32) -> Result<Self> {
        let kind = Self::ALL.get(number as usize).copied();
        kind.ok_or_else(|| {
            format!("value type {number} is unknown (supported: 0 to {})", Self::ALL.len() - 1)
        })
    }

    /// The size of a value in bytes; for texts and arrays, the minimal size.
    fn bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::Text => 8,
            Self::Array => 12,
        }
    }

    /// Decodes a number or boolean of [`Kind::bytes`] bytes.
    fn number(self, bytes: &[u8]) -> Value {
        fn fixed<const N: usize>(bytes: &[u8]) -> [u8; N] {
            bytes.first_chunk().copied().unwrap_or([0; N])
        }
        match self {
            Self::U8 => Value::Integer(u8::from_le_bytes(fixed(bytes)).into()),
            Self::I8 => Value::Integer(i8::from_le_bytes(fixed(bytes)).into()),
            Self::U16 => Value::Integer(u16::from_le_bytes(fixed(bytes)).into()),
            Self::I16 => Value::Integer(i16::from_le_bytes(fixed(bytes)).into()),
            Self::U32 => Value::Integer(u32::from_le_bytes(fixed(bytes)).into()),
            Self::I32 => Value::Integer(i32::from_le_bytes(fixed(bytes)).into()),
            Self::U64 => Value::Integer(u64::from_le_bytes(fixed(bytes)).into()),
            Self::I64 => Value::Integer(i64::from_le_bytes(fixed(bytes)).into()),
            Self::F32 => Value::Float(decimal(f32::from_le_bytes(fixed(bytes)))),
            Self::F64 => Value::Float(f64::from_le_bytes(fixed(bytes))),
            Self::Bool | Self::Text | Self::Array => Value::Bool(bytes.first() != Some(&0)),
        }
    }
}

/// The f64 with the shortest decimal representation of `x`, so that 1e-5 in f32 becomes 1e-5 in f64.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(x.into())
}

/// A metadata value.
#[derive(Debug)]
enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    /// An array of numbers or booleans with the bytes of the file.
    Numbers(Kind, Vec<u8>),
}

impl Value {
    /// A description for error messages.
    fn describe(&self) -> String {
        match self {
            Self::Integer(x) => x.to_string(),
            Self::Float(x) => x.to_string(),
            Self::Bool(x) => x.to_string(),
            Self::Text(x) => format!("the text {:?}", x.chars().take(40).collect::<String>()),
            Self::Texts(x) => format!("a list of {} texts", x.len()),
            Self::Numbers(kind, x) => format!("a list of {} numbers", x.len() as u64 / kind.bytes()),
        }
    }
}

/// The type, shape and position of a tensor in the file.
#[derive(Debug)]
pub(super) struct TensorInfo {
    /// The index of the file among the parts of a split model.
    pub(super) part: usize,
    pub(super) dtype: GgmlDType,
    /// The dimensions, outermost first.
    pub(super) shape: Vec<usize>,
    /// The offset of the data in the file, in bytes.
    pub(super) start: u64,
    /// The size of the data in bytes.
    pub(super) bytes: u64,
}

/// The header of a GGUF file.
#[derive(Debug)]
pub(super) struct Header {
    /// The metadata by key.
    values: BTreeMap<String, Value>,
    /// The tensors by name.
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// Reads the header.
    pub(super) fn read(file: &mut (impl Read + Seek)) -> Result<Self> {
        let mut input = Input::new(file)?;
        if input.bytes(4)? != MAGIC {
            return Err("it does not start with GGUF".into());
        }
        let version = input.u32()?;
        if !VERSIONS.contains(&version) {
            return Err(format!("version {version} is not supported (supported: 2, 3)"));
        }
        let (tensors, keys) = (input.u64()?, input.u64()?);
        if tensors.max(keys) > MAX_COUNT {
            return Err(format!("{tensors} tensors and {keys} keys; {MAX_COUNT} of each are supported"));
        }
        input.fits(tensors, MIN_TENSOR_BYTES, "tensors")?;
        input.fits(keys, MIN_KEY_BYTES, "keys")?;
        let mut values = BTreeMap::new();
        for n in 0..keys {
            let key = input.text(MAX_NAME_BYTES).map_err(|e| format!("key {n}: {e}"))?;
            let value = input.value().map_err(|e| format!("key {key}: {e}"))?;
            if values.insert(key.clone(), value).is_some() {
                return Err(format!("key {key} occurs twice"));
            }
        }
        let mut header = Self { values, tensors: BTreeMap::new() };
        let alignment = header.integer(ALIGNMENT)?.unwrap_or(32);
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(format!("{ALIGNMENT} {alignment} is not a power of two up to 1048576"));
        }
        for n in 0..tensors {
            let name = input.text(MAX_NAME_BYTES).map_err(|e| format!("tensor {n}: {e}"))?;
            let info = input.tensor_info(alignment).map_err(|e| format!("tensor {name}: {e}"))?;
            if header.tensors.insert(name.clone(), info).is_some() {
                return Err(format!("tensor {name} occurs twice"));
            }
        }
        header.resolve_offsets(input.at.next_multiple_of(alignment), input.length)?;
        Ok(header)
    }

    /// This header with the tensors of another file, the one with index `part`.
    pub(super) fn with_part(mut self, other: Self, part: usize) -> Result<Self> {
        for (name, info) in other.tensors {
            if self.tensors.contains_key(&name) {
                return Err(format!("tensor {name} is in two parts"));
            }
            self.tensors.insert(name, TensorInfo { part, ..info });
        }
        Ok(self)
    }

    /// Replaces the offsets in the data, which starts at byte `data`, by offsets in the file of `length` bytes, and checks
    /// that the tensors lie within the file and do not overlap.
    fn resolve_offsets(&mut self, data: u64, length: u64) -> Result<()> {
        for (name, info) in &mut self.tensors {
            let start = info.start.checked_add(data);
            let end = start.and_then(|start| start.checked_add(info.bytes));
            match (start, end) {
                (Some(start), Some(end)) if end <= length => info.start = start,
                _ => {
                    return Err(format!(
                        "tensor {name}: {} bytes at offset {} of the data do not lie in a file of {length} bytes",
                        info.bytes, info.start
                    ));
                }
            }
        }
        // With overlapping tensors, a small file could hold an arbitrarily large model.
        let mut order: Vec<_> = self.tensors.iter().collect();
        order.sort_by_key(|(_, info)| info.start);
        for pair in order.windows(2) {
            let [(a, first), (b, second)] = pair else { continue };
            if first.start + first.bytes > second.start {
                return Err(format!("tensors {a} and {b} overlap"));
            }
        }
        Ok(())
    }

    /// The value of a key, converted by `pick`; `None` if the key is missing. It is an error if `pick` returns `None`.
    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        pick: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let wrong = || format!("key {key} is {}, not {expected}", value.describe());
        pick(value).map(Some).ok_or_else(wrong)
    }

    /// The keys.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<u64>> {
        self.get(key, "a number from 0 on", |value| match value {
            Value::Integer(x) => u64::try_from(*x).ok(),
            _ => None,
        })
    }

    /// An index into a list of `length` items; `None` if the key is missing. An integer that is no such index, as -1 in some
    /// files, is an error that the caller may pass over.
    pub(super) fn index(&self, key: &str, length: usize) -> Result<Option<std::result::Result<usize, i128>>> {
        self.get(key, "a number", |value| match value {
            Value::Integer(x) => Some(usize::try_from(*x).ok().filter(|index| *index < length).ok_or(*x)),
            _ => None,
        })
    }

    /// A size; less than 2^32, so that the product of two of them does not overflow.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a number from 0 to 4294967295", |value| match value {
            Value::Integer(x) => u32::try_from(*x).ok().map(|x| x as usize),
            _ => None,
        })
    }

    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        self.get(key, "a finite number", |value| match value {
            Value::Float(x) => Some(*x).filter(|x| x.is_finite()),
            Value::Integer(x) => Some(*x as f64),
            _ => None,
        })
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |value| match value {
            Value::Bool(x) => Some(*x),
            _ => None,
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a text", |value| match value {
            Value::Text(x) => Some(x.as_str()),
            _ => None,
        })
    }

    pub(super) fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.get(key, "a list of texts", |value| match value {
            Value::Texts(x) => Some(x.as_slice()),
            _ => None,
        })
    }

    pub(super) fn floats(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.numbers(key, "a list of numbers", |value| match value {
            Value::Float(x) => Some(x),
            Value::Integer(x) => Some(x as f64),
            _ => None,
        })
    }

    pub(super) fn integers(&self, key: &str) -> Result<Option<Vec<i128>>> {
        self.numbers(key, "a list of integers", |value| match value {
            Value::Integer(x) => Some(x),
            _ => None,
        })
    }

    fn numbers<T>(
        &self,
        key: &str,
        expected: &str,
        pick: impl Fn(Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        self.get(key, expected, |value| match value {
            Value::Numbers(kind, bytes) => {
                bytes.chunks_exact(kind.bytes() as usize).map(|b| pick(kind.number(b))).collect()
            }
            _ => None,
        })
    }
}

/// A reader that knows its position and the length of the file.
struct Input<'a, R> {
    file: &'a mut R,
    at: u64,
    length: u64,
}

impl<'a, R: Read + Seek> Input<'a, R> {
    fn new(file: &'a mut R) -> Result<Self> {
        let length = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
        file.seek(SeekFrom::Start(0)).map_err(|e| e.to_string())?;
        Ok(Self { file, at: 0, length })
    }

    /// Checks that `count` items of at least `min_bytes` bytes each fit into the rest of the file.
    fn fits(&self, count: u64, min_bytes: u64, what: &str) -> Result<()> {
        let left = self.length - self.at;
        match count.checked_mul(min_bytes) {
            Some(bytes) if bytes <= left => Ok(()),
            _ => Err(format!(
                "truncated: {count} {what} are announced at byte {}, {left} bytes follow",
                self.at
            )),
        }
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        self.fits(count, 1, "bytes")?;
        let mut bytes = vec![0; count as usize];
        self.file.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        self.at += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.fits(N as u64, 1, "bytes")?;
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        self.at += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self, max_bytes: u64) -> Result<String> {
        let length = self.u64()?;
        if length > max_bytes {
            return Err(format!("a name of {length} bytes at byte {}", self.at));
        }
        String::from_utf8(self.bytes(length)?).map_err(|e| format!("text that is not UTF-8: {e}"))
    }

    fn value(&mut self) -> Result<Value> {
        match Kind::new(self.u32()?)? {
            Kind::Text => self.text(u64::MAX).map(Value::Text),
            Kind::Array => self.list(),
            kind => Ok(kind.number(&self.bytes(kind.bytes())?)),
        }
    }

    fn list(&mut self) -> Result<Value> {
        let (kind, count) = (Kind::new(self.u32()?)?, self.u64()?);
        self.fits(count, kind.bytes(), "values")?;
        match kind {
            Kind::Array => Err("a list of lists".into()),
            Kind::Text => {
                let mut texts = Vec::with_capacity(count as usize);
                for n in 0..count {
                    texts.push(self.text(u64::MAX).map_err(|e| format!("value {n}: {e}"))?);
                }
                Ok(Value::Texts(texts))
            }
            _ => Ok(Value::Numbers(kind, self.bytes(count * kind.bytes())?)),
        }
    }

    /// Reads the shape, type and offset of a tensor. Here `start` is the offset in the data, not in the file.
    fn tensor_info(&mut self, alignment: u64) -> Result<TensorInfo> {
        let rank = self.u32()?;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(format!("rank {rank}; 1 to {MAX_RANK} expected"));
        }
        let dims = (0..rank).map(|_| self.u64()).collect::<Result<Vec<_>>>()?;
        let (number, start) = (self.u32()?, self.u64()?);
        let Some((_, dtype)) = TENSOR_TYPES.iter().find(|(supported, _)| *supported == number) else {
            let supported = TENSOR_TYPES.map(|(number, dtype)| format!("{number} {dtype:?}")).join(", ");
            return Err(format!("type {number} is not supported (supported: {supported})"));
        };
        let (block, size) = (dtype.block_size() as u64, dtype.type_size() as u64);
        // The size of the tensor in f32 must not overflow.
        let elements = dims.iter().try_fold(4u64, |n, dim| n.checked_mul(*dim)).map(|bytes| bytes / 4);
        let Some(elements @ 1..) = elements.filter(|_| dims[0].is_multiple_of(block)) else {
            return Err(format!(
                "dimensions {dims:?} are not valid for a tensor in blocks of {block} {dtype:?} values"
            ));
        };
        if !start.is_multiple_of(alignment) {
            return Err(format!("offset {start} is no multiple of the alignment {alignment}"));
        }
        let bytes =
            (elements / block).checked_mul(size).ok_or_else(|| format!("dimensions {dims:?} overflow"))?;
        let shape = dims.iter().rev().map(|&dim| dim as usize).collect();
        Ok(TensorInfo { part: 0, dtype: *dtype, shape, start, bytes })
    }
}
