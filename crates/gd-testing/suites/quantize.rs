//! Keys as 8-bit integers: the format, its bounds in f64, and the same bytes whether rows come at once or one by one.

use crate::target::{Buffer, TestGpu};
use candle_core::{DType, Device, Tensor};
use gd_kernels::Score;
use gd_kernels::gpu::quantize::{Quantized, Shape, quantize, quantize_at, room, width};
use gd_kernels::gpu::{Gpu, Slice, Tensor4};
use rand::RngExt;

use crate::tensors::{Held, numbers};
use gd_testing::ensure;
use gd_testing::problems::rng;
use gd_testing::suite::Verdict;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Bytes of codes and known after entering `parts` rows of k `[pieces, heads, keys, dim]` one after the other.
fn entered(
    gpu: &TestGpu,
    shape: &Shape,
    k: &Tensor4<'_, Buffer>,
    keys: usize,
    parts: &[usize],
) -> gd_kernels::Result<[Vec<u8>; 2]> {
    let room = room(keys);
    let (codes, known) = (gpu.allocate(shape.codes_bytes(room))?, gpu.allocate(shape.known_bytes(room))?);
    let to = Quantized { codes: (&codes).into(), known: (&known).into(), room };
    let mut first = 0;
    for &part in parts {
        let offset = k.data.offset + first * k.strides[2] * shape.dtype.size_in_bytes();
        let rows = Tensor4 { data: Slice { buffer: k.data.buffer, offset }, strides: k.strides };
        quantize(gpu, shape, &rows, part, first, &to)?;
        first += part;
    }
    Ok([
        gpu.download((&codes).into(), shape.codes_bytes(room))?,
        gpu.download((&known).into(), shape.known_bytes(room))?,
    ])
}

/// The same by calls in which pieces take rows from places of their own on.
fn placed(
    gpu: &TestGpu,
    shape: &Shape,
    k: &Tensor4<'_, Buffer>,
    keys: usize,
) -> gd_kernels::Result<[Vec<u8>; 2]> {
    let (room, pieces) = (room(keys), shape.pieces);
    let (codes, known) = (gpu.allocate(shape.codes_bytes(room))?, gpu.allocate(shape.known_bytes(room))?);
    let to = Quantized { codes: (&codes).into(), known: (&known).into(), room };
    // `count` rows of the pieces from `piece` on: of each from a row that is `step` behind that of the one before.
    let enter = |piece: usize, first: usize, step: usize, count: usize| {
        let [by_piece, by_head, by_row] = k.strides;
        let offset = k.data.offset + (piece * by_piece + first * by_row) * shape.dtype.size_in_bytes();
        let data = Slice { buffer: k.data.buffer, offset };
        let rows = Tensor4 { data, strides: [by_piece + step * by_row, by_head, by_row] };
        let at: Vec<[usize; 2]> = (piece..pieces).map(|p| [p, first + step * (p - piece)]).collect();
        quantize_at(gpu, shape, &rows, count, &at, &to)
    };
    // The first and the last rows of all pieces alike, and what lies between in steps.
    let ends = pieces.min(keys);
    enter(0, 0, 0, ends)?;
    enter(0, keys - ends, 0, ends)?;
    if keys > pieces {
        enter(0, 0, 1, keys + 1 - pieces)?;
    }
    if pieces > 1 {
        // The first entry is not of the first piece.
        enter(1, keys / 2, 0, keys - keys / 2)?;
    }
    Ok([
        gpu.download((&codes).into(), shape.codes_bytes(room))?,
        gpu.download((&known).into(), shape.known_bytes(room))?,
    ])
}

fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut rng = rng(seed);
    let dtype = DTYPES[(seed % 3) as usize];
    let [pieces, heads, keys] = [3, 3, 90].map(|most| rng.random_range(1..=most));
    let dim = 8 * rng.random_range(1..=32usize);
    let score = if seed.is_multiple_of(2) { Score::Energy } else { Score::Dot };
    let count = pieces * heads * keys;
    let mut values: Vec<f64> = (0..count * dim).map(|_| rng.random_range(-3.0..3.0f64)).collect();
    for (row, key) in values.chunks_mut(dim).enumerate() {
        let size = match (row % 9, dtype) {
            (1, _) => 0.0,
            (2, DType::F16) => 1e-3,
            (2, _) => 1e-9,
            (3, DType::F16) => 1e4,
            (3, _) => 1e12,
            // Beyond what is quantised.
            (4, DType::F32 | DType::BF16) => 1e-14,
            (5, DType::F32 | DType::BF16) => 1e16,
            _ => 1.0,
        };
        key.iter_mut().for_each(|x| *x *= size);
        if row % 9 == 6 {
            key[row % dim] = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][row % 3];
        }
    }
    // Heads behind rows, so that strides count.
    let k =
        Tensor::from_vec(values, (pieces, keys, heads, dim), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let k = k.transpose(1, 2).unwrap();
    let held = Held::new(gpu, &k);
    let shape = Shape { pieces, kv_heads: heads, head_dim: dim, dtype, score };
    let fail = |e: gd_kernels::Error| e.to_string();
    let whole = entered(gpu, &shape, &held.tensor4(), keys, &[keys]).map_err(fail)?;
    let ones = entered(gpu, &shape, &held.tensor4(), keys, &vec![1; keys]).map_err(fail)?;
    ensure!(whole == ones, "appended rows differ from those of one call");
    let placed = placed(gpu, &shape, &held.tensor4(), keys).map_err(fail)?;
    ensure!(whole == placed, "rows entered at places of their own differ from those of one call");

    let [codes, known] = whole;
    let known_at = gpu.upload(&known).map_err(fail)?;
    let known = numbers(gpu, &known_at, known.len() / 4, DType::F32);
    let (room, width) = (room(keys), width(dim));
    let rows: Vec<f32> = k.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    for (at, x) in rows.chunks(dim).enumerate() {
        let to = at / keys * room + at % keys;
        let got = &codes[to * width..(to + 1) * width];
        let got: Vec<i8> = got.iter().map(|q| q.cast_signed()).collect();
        let [scale, error, norm, bias] = [0, 1, 2, 3].map(|i| known[4 * to + i]);
        let name = format!("row {at} of {dtype:?} D {dim}: {scale} {error} {norm} {bias}");
        ensure!(got[dim..].iter().all(|q| *q == 0), "padding of {name}");
        let most = x.iter().fold(0f32, |m, x| if x.is_nan() { f32::NAN } else { m.max(x.abs()) });
        let finite = x.iter().all(|x| x.is_finite());
        if !finite || (most > 0.0 && !(1e-12..1e15).contains(&most)) {
            ensure!(got.iter().all(|q| *q == 0) && scale == 0.0, "{name} is not quantised");
            ensure!(error == f64::INFINITY && norm == f64::INFINITY, "{name} has no bound");
            continue;
        }
        // The format of the CPU, to the bit.
        let want: Vec<i8> = x
            .iter()
            .map(|x| if most > 0.0 { (x * (127.0 / most)).round_ties_even() as i8 } else { 0 })
            .collect();
        ensure!(got[..dim] == want, "integers of {name}");
        ensure!(scale == f64::from(most / 127.0), "scale of {name}");
        // Bounds in f64: neither too small nor needlessly large.
        let length = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let rest = length(&mut x.iter().zip(&got).map(|(x, q)| f64::from(*x) - scale * f64::from(*q)));
        let own = length(&mut x.iter().map(|x| f64::from(*x)));
        let coarse = length(&mut got.iter().map(|q| scale * f64::from(*q)));
        ensure!(rest <= error && error <= rest * 1.001 + own * 1e-6, "error {rest} of {name}");
        ensure!(own.max(coarse) <= norm && norm <= (own + rest) * 1.001, "norm {own} {coarse} of {name}");
        let half = if score == Score::Energy { -0.5 * own * own } else { 0.0 };
        ensure!((bias - half).abs() <= 1e-4 * half.abs(), "bias {half} of {name}");
    }
    Ok(())
}

#[test]
fn integers_and_bounds_hold() {
    crate::suite("quantise", 60, |seed| check(&TestGpu::new(seed), seed));
}

#[test]
fn caches_without_room_are_refused() {
    let gpu = TestGpu::new(1);
    let k = Tensor::zeros((1, 2, 70, 32), DType::F32, &Device::Cpu).unwrap();
    let held = Held::new(&gpu, &k);
    let shape = Shape { pieces: 1, kv_heads: 2, head_dim: 32, dtype: DType::F32, score: Score::Energy };
    let memory = gpu.zeros(shape.codes_bytes(128)).unwrap();
    let refused = |room: usize, first: usize, shape: &Shape, value: &str| {
        let to = Quantized { codes: (&memory).into(), known: (&memory).into(), room };
        let e = quantize(&gpu, shape, &held.tensor4(), 70, first, &to).unwrap_err().to_string();
        assert!(e.contains(value), "{e} does not name {value}");
    };
    refused(128, 59, &shape, "59..129 of pieces of 128");
    refused(100, 0, &shape, "pieces of 100 keys");
    refused(128, 0, &Shape { head_dim: 33, ..shape }, "head_dim 33");
    refused(128, 0, &Shape { dtype: DType::F64, ..shape }, "f64");
    let to = Quantized { codes: (&memory).into(), known: (&memory).into(), room: 128 };
    let e = quantize_at(&gpu, &shape, &held.tensor4(), 70, &[[1, 0]], &to).unwrap_err().to_string();
    assert!(e.contains("piece 1 of 1"), "{e}");
}
