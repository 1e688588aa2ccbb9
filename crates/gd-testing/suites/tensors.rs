//! Tensors on the emulated GPU.

use crate::target::{Buffer, TestGpu};
use candle_core::{DType, Tensor};
use gd_kernels::gpu::{Gpu, Slice, Tensor4};
use half::{bf16, f16};

/// A tensor on the device: the whole storage behind a CPU tensor, with its offset and strides.
pub(crate) struct DeviceTensor {
    buffer: Buffer,
    offset: usize,
    strides: Vec<usize>,
}

impl DeviceTensor {
    /// Uploads the whole storage of `t`, so that its strides stay valid. A strided last dimension is made contiguous
    /// first.
    pub(crate) fn new(gpu: &TestGpu, t: &Tensor) -> Self {
        let t = if t.stride().last().is_none_or(|&s| s == 1) { t.clone() } else { t.contiguous().unwrap() };
        let (storage, layout) = t.storage_and_layout();
        let candle_core::Storage::Cpu(storage) = &*storage else { unreachable!("tests run on the CPU") };
        let bytes: &[u8] = match t.dtype() {
            DType::F32 => bytemuck::cast_slice(storage.as_slice::<f32>().unwrap()),
            DType::F16 => bytemuck::cast_slice(storage.as_slice::<f16>().unwrap()),
            DType::BF16 => bytemuck::cast_slice(storage.as_slice::<bf16>().unwrap()),
            DType::I32 => bytemuck::cast_slice(storage.as_slice::<i32>().unwrap()),
            DType::U8 => storage.as_slice::<u8>().unwrap(),
            other => unreachable!("{other:?}"),
        };
        let buffer = gpu.upload(bytes).unwrap();
        Self {
            buffer,
            offset: layout.start_offset() * t.dtype().size_in_bytes(),
            strides: layout.stride().to_vec(),
        }
    }

    /// As `[batch, heads, rows, dim]`.
    pub(crate) fn tensor4(&self) -> Tensor4<'_, Buffer> {
        Tensor4 { data: self.slice(), strides: [self.strides[0], self.strides[1], self.strides[2]] }
    }

    /// Its first element.
    pub(crate) fn slice(&self) -> Slice<'_, Buffer> {
        Slice { buffer: &self.buffer, offset: self.offset }
    }
}

/// The first `count` numbers of a buffer, as f64.
pub(crate) fn numbers(gpu: &TestGpu, buffer: &Buffer, count: usize, dtype: DType) -> Vec<f64> {
    let bytes = gpu.download(buffer.into(), count * dtype.size_in_bytes()).unwrap();
    let word = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    match dtype {
        DType::F32 => bytes.chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect(),
        DType::F16 => bytes.chunks(2).map(|b| f16::from_bits(word(b)).to_f64()).collect(),
        DType::BF16 => bytes.chunks(2).map(|b| bf16::from_bits(word(b)).to_f64()).collect(),
        DType::I32 => bytes.chunks(4).map(|b| f64::from(i32::from_le_bytes(b.try_into().unwrap()))).collect(),
        DType::U8 => bytes.into_iter().map(f64::from).collect(),
        other => unreachable!("{other:?}"),
    }
}

/// The first `count` i32 of a buffer.
pub(crate) fn integers(gpu: &TestGpu, buffer: &Buffer, count: usize) -> Vec<i32> {
    numbers(gpu, buffer, count, DType::I32).into_iter().map(|x| x as i32).collect()
}
