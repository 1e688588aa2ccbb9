//! Keys as 8-bit integers: the format, its error bounds checked in f64, and the same bytes however many rows a call
//! appends.

use crate::target::{Buffer, TestGpu};
use candle_core::{DType, Device, Tensor};
use gd_kernels::KeyShape;
use gd_kernels::Score;
use gd_kernels::gpu::quantize::{
    Int8Slices, bounds_bytes, capacity, quantize, quantize_at, row_bytes, values_bytes,
};
use gd_kernels::gpu::{Gpu, Slice, Tensor4};
use rand::RngExt;

use crate::tensors::{DeviceTensor, numbers};
use gd_testing::ensure;
use gd_testing::problems::rng;
use gd_testing::suite::Verdict;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Bytes of values and bounds after calls that append `parts` rows each of k `[sequences, heads, keys, dim]`.
fn quantize_in_parts(
    gpu: &TestGpu,
    shape: &KeyShape,
    k: &Tensor4<'_, Buffer>,
    keys: usize,
    parts: &[usize],
) -> gd_kernels::Result<[Vec<u8>; 2]> {
    let capacity = capacity(keys);
    let (values, bounds) =
        (gpu.allocate(values_bytes(shape, capacity))?, gpu.allocate(bounds_bytes(shape, capacity))?);
    let to = Int8Slices { values: (&values).into(), bounds: (&bounds).into(), capacity };
    let mut first = 0;
    for &part in parts {
        let offset = k.data.offset + first * k.strides[2] * shape.dtype.size_in_bytes();
        let rows = Tensor4 { data: Slice { buffer: k.data.buffer, offset }, strides: k.strides };
        quantize(gpu, shape, &rows, part, first, &to)?;
        first += part;
    }
    Ok([
        gpu.download((&values).into(), values_bytes(shape, capacity))?,
        gpu.download((&bounds).into(), bounds_bytes(shape, capacity))?,
    ])
}

/// The same by calls of `quantize_at`, in which every sequence has its own first row.
fn quantize_at_positions(
    gpu: &TestGpu,
    shape: &KeyShape,
    k: &Tensor4<'_, Buffer>,
    keys: usize,
) -> gd_kernels::Result<[Vec<u8>; 2]> {
    let (capacity, sequences) = (capacity(keys), shape.sequences);
    let (values, bounds) =
        (gpu.allocate(values_bytes(shape, capacity))?, gpu.allocate(bounds_bytes(shape, capacity))?);
    let to = Int8Slices { values: (&values).into(), bounds: (&bounds).into(), capacity };
    // Appends `count` rows to the sequences from `sequence` on; the first row of each is `step` after that of the one
    // before.
    let append = |sequence: usize, first: usize, step: usize, count: usize| {
        let [by_sequence, by_head, by_row] = k.strides;
        let offset = k.data.offset + (sequence * by_sequence + first * by_row) * shape.dtype.size_in_bytes();
        let data = Slice { buffer: k.data.buffer, offset };
        let rows = Tensor4 { data, strides: [by_sequence + step * by_row, by_head, by_row] };
        let at: Vec<[usize; 2]> = (sequence..sequences).map(|p| [p, first + step * (p - sequence)]).collect();
        quantize_at(gpu, shape, &rows, count, &at, &to)
    };
    // The first and the last rows of all sequences at the same position, and the others at positions that increase.
    let ends = sequences.min(keys);
    append(0, 0, 0, ends)?;
    append(0, keys - ends, 0, ends)?;
    if keys > sequences {
        append(0, 0, 1, keys + 1 - sequences)?;
    }
    if sequences > 1 {
        // The first entry is not of the first sequence.
        append(1, keys / 2, 0, keys - keys / 2)?;
    }
    Ok([
        gpu.download((&values).into(), values_bytes(shape, capacity))?,
        gpu.download((&bounds).into(), bounds_bytes(shape, capacity))?,
    ])
}

fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut rng = rng(seed);
    let dtype = DTYPES[(seed % 3) as usize];
    let [sequences, heads, keys] = [3, 3, 90].map(|max| rng.random_range(1..=max));
    let dim = 8 * rng.random_range(1..=32usize);
    let score = if seed.is_multiple_of(2) { Score::Energy } else { Score::Dot };
    let count = sequences * heads * keys;
    let mut values: Vec<f64> = (0..count * dim).map(|_| rng.random_range(-3.0..3.0f64)).collect();
    for (row, key) in values.chunks_mut(dim).enumerate() {
        let size = match (row % 9, dtype) {
            (1, _) => 0.0,
            (2, DType::F16) => 1e-3,
            (2, _) => 1e-9,
            (3, DType::F16) => 1e4,
            (3, _) => 1e12,
            // Magnitudes that are not quantised.
            (4, DType::F32 | DType::BF16) => 1e-14,
            (5, DType::F32 | DType::BF16) => 1e16,
            _ => 1.0,
        };
        key.iter_mut().for_each(|x| *x *= size);
        if row % 9 == 6 {
            key[row % dim] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][row % 3];
        }
    }
    // Strided: heads after rows.
    let k = Tensor::from_vec(values, (sequences, keys, heads, dim), &Device::Cpu)
        .unwrap()
        .to_dtype(dtype)
        .unwrap();
    let k = k.transpose(1, 2).unwrap();
    let keys_on_device = DeviceTensor::new(gpu, &k);
    let shape = KeyShape { sequences, kv_heads: heads, head_dim: dim, dtype, score };
    let fail = |e: gd_kernels::Error| e.to_string();
    let whole = quantize_in_parts(gpu, &shape, &keys_on_device.tensor4(), keys, &[keys]).map_err(fail)?;
    let ones =
        quantize_in_parts(gpu, &shape, &keys_on_device.tensor4(), keys, &vec![1; keys]).map_err(fail)?;
    ensure!(whole == ones, "appended rows differ from those of one call");
    let positioned = quantize_at_positions(gpu, &shape, &keys_on_device.tensor4(), keys).map_err(fail)?;
    ensure!(whole == positioned, "rows at positions of their own differ from those of one call");

    let [codes, bounds] = whole;
    let bounds_at = gpu.upload(&bounds).map_err(fail)?;
    let bounds = numbers(gpu, &bounds_at, bounds.len() / 4, DType::F32);
    let (capacity, width) = (capacity(keys), row_bytes(dim));
    let rows: Vec<f32> = k.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    for (at, x) in rows.chunks(dim).enumerate() {
        let to = at / keys * capacity + at % keys;
        let got = &codes[to * width..(to + 1) * width];
        let got: Vec<i8> = got.iter().map(|q| q.cast_signed()).collect();
        let [scale, error, norm, bias] = [0, 1, 2, 3].map(|i| bounds[4 * to + i]);
        let name = format!("row {at} of {dtype:?} D {dim}: {scale} {error} {norm} {bias}");
        ensure!(got[dim..].iter().all(|q| *q == 0), "padding of {name}");
        let largest = x.iter().fold(0f32, |m, x| if x.is_nan() { f32::NAN } else { m.max(x.abs()) });
        let finite = x.iter().all(|x| x.is_finite());
        if !finite || (largest > 0.0 && !(1e-12..1e15).contains(&largest)) {
            ensure!(got.iter().all(|q| *q == 0) && scale == 0.0, "{name} is not quantised");
            ensure!(error == f64::INFINITY && norm == f64::INFINITY, "{name} has no bound");
            continue;
        }
        // Bitwise the format of the CPU.
        let want: Vec<i8> = x
            .iter()
            .map(|x| if largest > 0.0 { (x * (127.0 / largest)).round_ties_even() as i8 } else { 0 })
            .collect();
        ensure!(got[..dim] == want, "integers of {name}");
        ensure!(scale == f64::from(largest / 127.0), "scale of {name}");
        // Bounds in f64: at least the true value, and not much above it.
        let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let rest = length(&mut x.iter().zip(&got).map(|(x, q)| f64::from(*x) - scale * f64::from(*q)));
        let norm_of_row = length(&mut x.iter().map(|x| f64::from(*x)));
        let coarse = length(&mut got.iter().map(|q| scale * f64::from(*q)));
        ensure!(rest <= error && error <= rest * 1.001 + norm_of_row * 1e-6, "error {rest} of {name}");
        ensure!(
            norm_of_row.max(coarse) <= norm && norm <= (norm_of_row + rest) * 1.001,
            "norm {norm_of_row} {coarse} of {name}"
        );
        let half = if score == Score::Energy { -0.5 * norm_of_row * norm_of_row } else { 0.0 };
        ensure!((bias - half).abs() <= 1e-4 * half.abs(), "bias {half} of {name}");
    }
    Ok(())
}

#[test]
fn integers_and_bounds_hold() {
    crate::suite("quantise", 60, |seed| check(&TestGpu::new(seed), seed));
}

#[test]
fn caches_without_capacity_are_refused() {
    let gpu = TestGpu::new(1);
    let k = Tensor::zeros((1, 2, 70, 32), DType::F32, &Device::Cpu).unwrap();
    let keys_on_device = DeviceTensor::new(&gpu, &k);
    let shape = KeyShape { sequences: 1, kv_heads: 2, head_dim: 32, dtype: DType::F32, score: Score::Energy };
    let memory = gpu.zeros(values_bytes(&shape, 128)).unwrap();
    let refused = |capacity: usize, first: usize, shape: &KeyShape, value: &str| {
        let to = Int8Slices { values: (&memory).into(), bounds: (&memory).into(), capacity };
        let e = quantize(&gpu, shape, &keys_on_device.tensor4(), 70, first, &to).unwrap_err().to_string();
        assert!(e.contains(value), "{e} does not name {value}");
    };
    refused(128, 59, &shape, "59..129 of sequences of 128");
    refused(100, 0, &shape, "sequences of 100 keys");
    refused(128, 0, &KeyShape { head_dim: 33, ..shape }, "head_dim 33");
    refused(128, 0, &KeyShape { dtype: DType::F64, ..shape }, "f64");
    let to = Int8Slices { values: (&memory).into(), bounds: (&memory).into(), capacity: 128 };
    let e = quantize_at(&gpu, &shape, &keys_on_device.tensor4(), 70, &[[1, 0]], &to).unwrap_err().to_string();
    assert!(e.contains("sequence 1 of 1"), "{e}");
}
