//! Reading: the header of a file, and its tensors, each straight from the file into its place, on all threads.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{Device, Tensor};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo, TensorView};

use super::{Tensors, diagnose, duplicate, foreign};
use crate::error::{Error, Result};
use crate::io::files::open_file;

/// What is read, for messages.
const KIND: &str = "safetensors file";
/// The greatest header that the library accepts, in bytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes that a task reads.
const TASK_BYTES: usize = 1 << 22;

/// The header of a file whose length is what it announces.
pub(super) struct Header<'a> {
    path: &'a Path,
    /// The file, open: it may be replaced by another one meanwhile.
    file: File,
    metadata: Metadata,
    /// Bytes of the file before the first tensor.
    data_start: u64,
}

impl<'a> Header<'a> {
    /// Reads the header of the file at `path`.
    pub(super) fn read(path: &'a Path) -> Result<Self> {
        let unreadable = |e| Error::read(path, KIND, e);
        let mut file = open_file(path, KIND)?;
        let file_bytes = file.metadata().map_err(unreadable)?.len();
        let mut head = Vec::new();
        file.by_ref().take(size_of::<u64>() as u64).read_to_end(&mut head).map_err(unreadable)?;
        let announced = head.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
        file.by_ref().take(announced.min(MAX_HEADER_BYTES)).read_to_end(&mut head).map_err(unreadable)?;
        let refused = |error| diagnose(path, &head, file_bytes, &error);
        // The library compares the length of the header and the tensors with that of its argument, last of all.
        let metadata = match SafeTensors::read_metadata(&head) {
            Ok((_, metadata)) => metadata,
            Err(SafeTensorError::MetadataIncompleteBuffer) => {
                serde_json::from_slice(&head[size_of::<u64>()..])
                    .map_err(|e| refused(SafeTensorError::InvalidHeaderDeserialization(e)))?
            }
            Err(error) => return Err(refused(error)),
        };
        let data_start = head.len() as u64;
        if data_start + metadata.data_len() as u64 != file_bytes {
            return Err(refused(SafeTensorError::MetadataIncompleteBuffer));
        }
        // The library takes the last of several tensors with the same name.
        match duplicate(&head) {
            Some(name) => Err(foreign(path, "safetensors", format!("it has several tensors {name:?}"))),
            None => Ok(Self { path, file, metadata, data_start }),
        }
    }

    /// The tensors by name.
    pub(super) fn tensors(&self) -> HashMap<String, &TensorInfo> {
        self.metadata.tensors()
    }

    /// Reads the tensors of some dtypes onto `device`.
    pub(super) fn load(&self, device: &Device, is_read: impl Fn(Dtype) -> bool) -> Result<Tensors> {
        let chosen: Vec<_> = self.tensors().into_iter().filter(|(_, info)| is_read(info.dtype)).collect();
        let read = |(name, info): (String, &TensorInfo)| Ok((name.clone(), self.tensor(&name, info)?));
        let tensors = chosen.into_par_iter().map(read).collect::<Result<Vec<_>>>()?;
        let moved = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_device(device)?));
        tensors.into_iter().map(moved).collect()
    }

    /// Reads a tensor.
    fn tensor(&self, name: &str, info: &TensorInfo) -> Result<Tensor> {
        let (shape, cpu) = (&info.shape[..], &Device::Cpu);
        let count: usize = shape.iter().product();
        Ok(match info.dtype {
            Dtype::F64 => Tensor::from_vec(self.values::<f64>(info, count)?, shape, cpu)?,
            Dtype::F32 => Tensor::from_vec(self.values::<f32>(info, count)?, shape, cpu)?,
            Dtype::F16 => {
                Tensor::from_vec(self.values::<u16>(info, count)?.reinterpret_into::<f16>(), shape, cpu)?
            }
            Dtype::BF16 => {
                Tensor::from_vec(self.values::<u16>(info, count)?.reinterpret_into::<bf16>(), shape, cpu)?
            }
            dtype => {
                let bytes = self.values::<u8>(info, info.data_offsets.1 - info.data_offsets.0)?;
                let view = TensorView::new(dtype, info.shape.clone(), &bytes);
                let reason =
                    |e: &dyn std::fmt::Display| foreign(self.path, "safetensors", format!("{name}: {e}"));
                view.map_err(|e| reason(&e))?.load(cpu).map_err(|e| reason(&e))?
            }
        })
    }

    /// The `count` values of a tensor.
    fn values<T: bytemuck::Pod + Send>(&self, info: &TensorInfo, count: usize) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); count];
        let start = self.data_start + info.data_offsets.0 as u64;
        let parts = bytemuck::cast_slice_mut(&mut values).par_chunks_mut(TASK_BYTES).enumerate();
        let read = |(i, part): (usize, &mut [u8])| read_at(&self.file, start + (i * TASK_BYTES) as u64, part);
        parts.try_for_each(read).map_err(|e| Error::read(self.path, KIND, e))?;
        Ok(values)
    }
}

/// Fills `out` with the bytes of a file from `at` on.
#[cfg(not(windows))]
fn read_at(file: &File, at: u64, out: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

/// The same on Windows, where a read may end early.
#[cfg(windows)]
fn read_at(file: &File, mut at: u64, mut out: &mut [u8]) -> io::Result<()> {
    while !out.is_empty() {
        let count = std::os::windows::fs::FileExt::seek_read(file, out, at)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        (at, out) = (at + count as u64, &mut out[count..]);
    }
    Ok(())
}
