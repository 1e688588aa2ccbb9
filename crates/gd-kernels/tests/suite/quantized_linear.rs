//! quantized_linear against products in f64 with weights that are read from the blocks bit by bit.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor, Var};
use gd_kernels::{QuantizedMatrix, quantized_linear, quantized_linears};
use gd_testing::log_cases;
use gd_testing::tensors::*;
use half::f16;

const TYPES: [GgmlDType; 8] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// Weight `i` of a block, by the description of the format: `scale q + offset`.
fn weight(dtype: GgmlDType, block: &[u8], i: usize) -> f64 {
    let half = |at: usize| f64::from(f16::from_le_bytes([block[at], block[at + 1]]));
    let bits = |at: usize, shift: usize, count: usize| f64::from(block[at] >> shift & ((1 << count) - 1));
    // Bit `i` of 32.
    let fifth = |at: usize| 16.0 * bits(at + i / 8, i % 8, 1);
    // 4 bits of 32 values in 16 bytes.
    let nibble = |at: usize| bits(at + i % 16, i / 16 * 4, 4);
    // The types with a K: value i is in group i / 32, and 64 values share 32 bytes.
    let (group, within) = (i / 32, i % 32);
    let nibble_k = |at: usize| bits(at + group / 2 * 32 + within, group % 2 * 4, 4);
    let factor = |which: usize| match group {
        0..4 => bits(4 + which * 4 + group, 0, 6),
        _ => bits(8 + group, which * 4, 4) + 16.0 * bits(which * 4 + group, 6, 2),
    };
    match dtype {
        GgmlDType::Q4_0 => half(0) * (nibble(2) - 8.0),
        GgmlDType::Q4_1 => half(0) * nibble(4) + half(2),
        GgmlDType::Q5_0 => half(0) * (nibble(6) + fifth(2) - 16.0),
        GgmlDType::Q5_1 => half(0) * (nibble(8) + fifth(4)) + half(2),
        GgmlDType::Q8_0 => half(0) * f64::from(block[2 + i] as i8),
        GgmlDType::Q4K => half(0) * factor(0) * nibble_k(16) - half(2) * factor(1),
        GgmlDType::Q5K => {
            let high = 16.0 * bits(16 + within, group, 1);
            half(0) * factor(0) * (nibble_k(48) + high) - half(2) * factor(1)
        }
        GgmlDType::Q6K => {
            // Each half of 128 values has 64 bytes of low and 32 bytes of high bits.
            let (part, of_part) = (i / 128, i % 128);
            let low = bits(part * 64 + of_part % 64, of_part / 64 * 4, 4);
            let high = bits(128 + part * 32 + of_part % 32, of_part / 32 * 2, 2);
            half(208) * f64::from(block[192 + i / 16] as i8) * (low + 16.0 * high - 32.0)
        }
        other => panic!("{other:?}"),
    }
}

/// Blocks with random bits in which every scale is a small number, and their weights in f64.
fn random_blocks(dtype: GgmlDType, [rows, columns]: [usize; 2]) -> (Vec<u8>, Vec<f64>) {
    let (size, bytes) = (dtype.block_size(), dtype.type_size());
    let count = rows * columns / size;
    let bits = values(&noise(columns as u64 + 1, &[count * bytes], 128.0));
    let mut blocks: Vec<u8> = bits.iter().map(|x| (x + 128.0) as u8).collect();
    let scales = values(&noise(2, &[2 * count], 0.1));
    for (block, scales) in blocks.chunks_exact_mut(bytes).zip(scales.chunks_exact(2)) {
        let halves: &[usize] = match dtype {
            GgmlDType::Q6K => &[208],
            GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
            _ => &[0, 2],
        };
        for (at, scale) in halves.iter().zip(scales) {
            block[*at..at + 2].copy_from_slice(&f16::from_f64(*scale).to_le_bytes());
        }
    }
    let all = blocks.chunks_exact(bytes).flat_map(|block| (0..size).map(move |i| weight(dtype, block, i)));
    let weights = all.collect();
    (blocks, weights)
}

/// Numbers of rows and columns: parts of tiles, one block, many blocks.
fn sizes(dtype: GgmlDType) -> [[usize; 2]; 5] {
    let block = dtype.block_size();
    [[1, block], [3, 5 * block], [16, block], [37, 3 * block], [200, 9 * block]]
}

#[test]
fn products_are_those_of_the_weights() -> Result<()> {
    let mut cases = 0;
    for dtype in TYPES {
        for [outputs, inputs] in sizes(dtype) {
            let (blocks, weights) = random_blocks(dtype, [outputs, inputs]);
            let matrix = QuantizedMatrix::new(dtype, [outputs, inputs], &blocks)?;
            for lead in [&[1][..], &[2], &[3], &[1, 5], &[2, 4], &[41], &[3, 23], &[101]] {
                // The scales of groups of activations differ by orders of magnitude.
                let x = noise(3, &[lead, &[inputs]].concat(), 2.0);
                let sizes = noise(4, &[inputs / 32, 1], 5.0).exp()?.broadcast_as((inputs / 32, 32))?;
                let x = x.broadcast_mul(&sizes.reshape(inputs)?)?.to_dtype(DType::F32)?;
                let bias = noise(5, &[outputs], 1.0);
                let y = quantized_linear(&x, &matrix, Some(&bias))?;
                assert_eq!((y.dims(), y.dtype()), (&[lead, &[outputs]].concat()[..], DType::F32));
                let (x, y, bias) = (values(&x), values(&y), values(&bias));
                for (row, y) in x.chunks_exact(inputs).zip(y.chunks_exact(outputs)) {
                    for (o, y) in y.iter().enumerate() {
                        let w = &weights[o * inputs..][..inputs];
                        let dot: f64 = w.iter().zip(row).map(|(w, x)| w * x).sum();
                        // Half a unit of every rounded activation, and the rounding of the sums in f32.
                        let mut bound = 1e-6 * (bias[o].abs() + 1.0);
                        for (w, x) in w.chunks_exact(32).zip(row.chunks_exact(32)) {
                            let most = x.iter().fold(0f64, |most, x| most.max(x.abs()));
                            let size: f64 = w.iter().map(|w| w.abs()).sum();
                            bound += most * size * (0.51 / 32767.0 + 4e-7);
                        }
                        let expected = dot + bias[o];
                        assert!(
                            (y - expected).abs() <= bound,
                            "{dtype:?} {outputs} x {inputs}, {lead:?}, output {o}: {y}, {expected} within {bound}"
                        );
                        cases += 1;
                    }
                }
            }
        }
    }
    log_cases("quantized-linear", cases);
    Ok(())
}

#[test]
fn dequantised_weights_are_those_of_the_blocks() -> Result<()> {
    for dtype in TYPES {
        for dims in sizes(dtype) {
            let (blocks, weights) = random_blocks(dtype, dims);
            let matrix = QuantizedMatrix::new(dtype, dims, &blocks)?;
            assert_eq!((matrix.dims(), matrix.dtype()), (dims, dtype));
            let expected = Tensor::from_vec(weights, (dims[0], dims[1]), &Device::Cpu)?;
            assert_close(&format!("{dtype:?} {dims:?}"), &matrix.dequantize()?, &expected, 2e-6);
            let ids: Vec<u32> = [dims[0] - 1, 0, dims[0] / 2].map(|id| id as u32).to_vec();
            let ids = Tensor::new(ids, &Device::Cpu)?;
            let rows = matrix.embedding(&ids)?;
            assert_close("rows", &rows, &expected.index_select(&ids, 0)?, 2e-6);
        }
    }
    Ok(())
}

/// The weights are those that candle computes, to the bit, so that a model has the same embedding in both forms.
#[test]
fn dequantised_weights_have_the_bits_of_candle() -> Result<()> {
    for dtype in TYPES {
        let dims = [19, 3 * 256];
        let stored = QTensor::quantize(&noise(1, &dims, 1.0).to_dtype(DType::F32)?, dtype)?;
        let matrix = QuantizedMatrix::new(dtype, dims, &stored.data()?)?;
        let (ours, theirs) = (values(&matrix.dequantize()?), values(&stored.dequantize(&Device::Cpu)?));
        assert_eq!(ours, theirs, "{dtype:?}");
        // Not more memory than 16 rows, which are a tile, and the unpacked scales need.
        let bytes = stored.data()?.len() * 32 / 19;
        assert!(matrix.size_in_bytes() <= bytes * 104 / 100, "{dtype:?}: {}", matrix.size_in_bytes());
    }
    Ok(())
}

#[test]
fn results_do_not_depend_on_threads_or_on_the_batch() -> Result<()> {
    for dtype in TYPES {
        let dims = [530, 2 * 256];
        let (blocks, _) = random_blocks(dtype, dims);
        let matrix = QuantizedMatrix::new(dtype, dims, &blocks)?;
        let x = noise(3, &[7, dims[1]], 2.0).to_dtype(DType::F32)?;
        let prompt = noise(4, &[70, dims[1]], 2.0).to_dtype(DType::F32)?;
        same_bits(|| [&x, &prompt].map(|x| quantized_linear(x, &matrix, None).unwrap()).to_vec());
        let together = quantized_linear(&x, &matrix, None)?;
        for r in 0..7 {
            let alone = quantized_linear(&x.narrow(0, r, 1)?, &matrix, None)?;
            assert_eq!(values(&alone), values(&together.narrow(0, r, 1)?), "{dtype:?}, row {r}");
        }
        let together = quantized_linear(&prompt, &matrix, None)?;
        for (first, rows) in [(0, 40), (29, 41)] {
            let fewer = quantized_linear(&prompt.narrow(0, first, rows)?, &matrix, None)?;
            let expected = together.narrow(0, first, rows)?;
            assert_eq!(values(&fewer), values(&expected), "{dtype:?}, {rows} rows from {first} on");
        }
        for x in [x, prompt] {
            let strided = x.t()?.contiguous()?.t()?;
            let [a, b] = [quantized_linear(&x, &matrix, None)?, quantized_linear(&strided, &matrix, None)?];
            assert_eq!(values(&a), values(&b), "{dtype:?}");
        }
    }
    Ok(())
}

/// Together with matrices of other types and sizes.
#[test]
fn several_projections_have_the_bits_of_each_alone() -> Result<()> {
    let matrix =
        |dtype, outputs| QuantizedMatrix::new(dtype, [outputs, 512], &random_blocks(dtype, [outputs, 512]).0);
    let (a, b, c) =
        (matrix(GgmlDType::Q4_1, 530)?, matrix(GgmlDType::Q6K, 7)?, matrix(GgmlDType::Q8_0, 200)?);
    let bias = noise(5, &[200], 1.0).to_dtype(DType::F32)?;
    for rows in [0, 1, 3, 50] {
        let x = noise(3, &[rows, 512], 2.0).to_dtype(DType::F32)?;
        let together = quantized_linears(&x, [(&a, None), (&b, None), (&c, Some(&bias))])?;
        let alone = [(&a, None), (&b, None), (&c, Some(&bias))];
        for ((matrix, bias), together) in alone.into_iter().zip(&together) {
            let alone = quantized_linear(&x, matrix, bias)?;
            assert_eq!(alone.dims(), together.dims());
            assert_eq!(values(&alone), values(together), "{matrix:?}, {rows} rows");
        }
    }
    let other = QuantizedMatrix::new(GgmlDType::Q8_0, [1, 32], &[0; 34])?;
    let x = Tensor::zeros((1, 512), DType::F32, &Device::Cpu)?;
    let error = quantized_linears(&x, [(&a, None), (&other, None)]).unwrap_err().to_string();
    assert!(error.contains("x [1, 512] is not that of the weight [1, 32]"), "{error}");
    Ok(())
}

#[test]
fn rows_that_are_not_finite_or_tiny_do_not_affect_others() -> Result<()> {
    let (blocks, _) = random_blocks(GgmlDType::Q4_1, [20, 64]);
    let matrix = QuantizedMatrix::new(GgmlDType::Q4_1, [20, 64], &blocks)?;
    let mut x = vec![0.5f32; 5 * 64];
    (x[3], x[64 + 40], x[2 * 64]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    x[3 * 64..4 * 64].fill(1e-37);
    let y = quantized_linear(&Tensor::from_vec(x, (5, 64), &Device::Cpu)?, &matrix, None)?;
    let y = y.to_vec2::<f32>()?;
    assert!(y[..3].iter().flatten().all(|y| y.is_nan()), "{y:?}");
    assert!(y[3].iter().all(|y| *y == 0.0), "{:?}", y[3]);
    assert!(y[4].iter().all(|y| y.is_finite() && *y != 0.0), "{:?}", y[4]);
    Ok(())
}

#[test]
fn the_result_has_the_dtype_of_x() -> Result<()> {
    let (blocks, _) = random_blocks(GgmlDType::Q8_0, [20, 64]);
    let matrix = QuantizedMatrix::new(GgmlDType::Q8_0, [20, 64], &blocks)?;
    for (dtype, bound) in DTYPES.into_iter().skip(1) {
        let x = noise(3, &[2, 64], 2.0).to_dtype(dtype)?;
        let y = quantized_linear(&x, &matrix, None)?;
        assert_eq!(y.dtype(), dtype);
        let wide = quantized_linear(&x.to_dtype(DType::F32)?, &matrix, None)?;
        assert_close(&format!("{dtype:?}"), &y, &wide, bound);
    }
    assert_eq!(
        quantized_linear(&Tensor::zeros((0, 64), DType::F32, &Device::Cpu)?, &matrix, None)?.dims(),
        [0, 20]
    );
    Ok(())
}

#[test]
fn wrong_arguments_are_named() -> Result<()> {
    let new = |dtype, dims, blocks: &[u8]| QuantizedMatrix::new(dtype, dims, blocks).unwrap_err().to_string();
    let (mut blocks, _) = random_blocks(GgmlDType::Q5_0, [20, 64]);
    let matrix = QuantizedMatrix::new(GgmlDType::Q5_0, [20, 64], &blocks)?;
    let f32s = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let product =
        |x: &Tensor, bias: Option<&Tensor>| quantized_linear(x, &matrix, bias).unwrap_err().to_string();
    let var = Var::zeros((2, 64), DType::F32, &Device::Cpu)?;
    let cases = [
        (new(GgmlDType::Q2K, [1, 256], &[0; 84]), "type Q2K; Q4_0"),
        (new(GgmlDType::Q4K, [2, 288], &[0; 288]), "288 columns are no multiple of the 256 values"),
        (new(GgmlDType::Q8_0, [2, 0], &[]), "0 columns"),
        (new(GgmlDType::Q8_0, [2, 64], &[0; 68]), "2 rows of 68 bytes, not 68 bytes"),
        (product(&f32s(&[2, 32])?, None), "x [2, 32] is not that of the weight [20, 64]"),
        (product(&Tensor::new(1f32, &Device::Cpu)?, None), "x [] is not that"),
        (product(&f32s(&[2, 64])?.to_dtype(DType::F64)?, None), "x in F64"),
        (product(var.as_tensor(), None), "gradients"),
        (
            matrix.dequantize_rows(&[3, 20]).unwrap_err().to_string(),
            "row 20 of a quantized matrix of 20 rows",
        ),
        (matrix.embedding(&f32s(&[2])?).unwrap_err().to_string(), "ids in F32"),
    ];
    for (error, expected) in cases {
        assert!(error.contains(expected), "{error} does not contain {expected}");
    }
    // The scale of block 1 becomes NaN, and that of block 3 infinite.
    blocks[22..24].copy_from_slice(&f16::NAN.to_le_bytes());
    blocks[66..68].copy_from_slice(&f16::INFINITY.to_le_bytes());
    let error = new(GgmlDType::Q5_0, [20, 64], &blocks);
    assert!(error.contains("[20, 64]") && error.contains("2 of its scales are NaN or infinite"), "{error}");
    Ok(())
}
