//! Causal convolution and gated running average, forward and backward, against naive f64 versions: in chunks, packed,
//! with states, with strided tensors.

use crate::target::{Buffer, TestGpu};
use candle_core::{DType, Device, Tensor};
use gd_kernels::gpu::conv::Rows;
use gd_kernels::gpu::{Gpu, Slice, average, conv};
use gd_kernels::reference::average as reference;
use rand::RngExt;

use crate::tensors::{DeviceTensor, numbers};
use gd_testing::ensure;
use gd_testing::problems::{pick, rng, roundoff, uniform, values};
use gd_testing::suite::Verdict;

pub(crate) const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

pub(crate) fn fail(e: gd_kernels::Error) -> String {
    e.to_string()
}

/// A tensor of these values on the device, and the values after rounding.
pub(crate) fn upload(gpu: &TestGpu, x: &[f64], dims: &[usize], dtype: DType) -> (DeviceTensor, Vec<f64>) {
    let t = Tensor::from_vec(x.to_vec(), dims, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    (DeviceTensor::new(gpu, &t), values(&t))
}

/// The same as a part of a tensor with wider rows, whose other elements are NaN.
fn strided(gpu: &TestGpu, x: &[f64], dims: &[usize], dtype: DType) -> (DeviceTensor, Vec<f64>) {
    let (last, rows) = (dims[dims.len() - 1], x.len() / dims[dims.len() - 1]);
    let mut wide = vec![f64::NAN; rows * (last + 3)];
    for (to, from) in wide.chunks_mut(last + 3).zip(x.chunks(last)) {
        to[2..2 + last].copy_from_slice(from);
    }
    let mut shape = dims.to_vec();
    shape[dims.len() - 1] += 3;
    let t = Tensor::from_vec(wide, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let t = t.narrow(dims.len() - 1, 2, last).unwrap();
    (DeviceTensor::new(gpu, &t), values(&t))
}

/// Fails unless every element is within 1.5 roundings of the dtype and `floor`.
pub(crate) fn check_close(what: &str, got: &[f64], want: &[f64], dtype: DType, floor: f64) -> Verdict {
    ensure!(got.len() == want.len(), "{what}: {} elements instead of {}", got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let bound = 1.5 * roundoff(dtype) * w.abs() + floor;
        ensure!((g - w).abs() <= bound, "{what} {i}: {g} instead of {w} (bound {bound})");
    }
    Ok(())
}

/// A tensor `[B, N, C]` as rows of channels.
fn rows(t: &DeviceTensor) -> Rows<'_, Buffer> {
    let [batch, row, _] = t.tensor4().strides;
    Rows { data: t.slice(), strides: [batch, row] }
}

/// Checks the convolution of a seed.
pub(crate) fn check_conv(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut rng = rng(seed ^ 0xc0);
    let dtype = DTYPES[(seed % 3) as usize];
    let (batch, n) = (rng.random_range(1..=3), pick(&mut rng, &[1, 2, 5, 63, 64, 65, 130]));
    let (channels, width) = (pick(&mut rng, &[1, 7, 32, 129]), pick(&mut rng, &[1, 2, 4, 7]));
    let packed = rng.random_bool(0.4);
    let lists: Vec<Vec<usize>> = (0..pick(&mut rng, &[1, batch]))
        .map(|_| {
            let mut ends: Vec<usize> = (0..rng.random_range(0..4)).map(|_| rng.random_range(0..=n)).collect();
            ends.extend([0, n]);
            ends.sort_unstable();
            ends
        })
        .collect();
    let sizes = conv::Sizes { batch, rows: n, channels, width, dtype };
    let plan = conv::ConvPlan::new(&sizes, packed.then_some(&lists[..]), &gpu.arch()).map_err(fail)?;
    let dims = [batch, n, channels];
    let (x, xs) = strided(gpu, &uniform(&mut rng, batch * n * channels), &dims, dtype);
    let (dy, dys) = strided(gpu, &uniform(&mut rng, batch * n * channels), &dims, dtype);
    let (w, ws) = upload(gpu, &uniform(&mut rng, channels * width), &[channels, width], dtype);
    let with_past = !packed && width > 1 && rng.random_bool(0.6);
    let past = with_past.then(|| {
        upload(gpu, &uniform(&mut rng, batch * (width - 1) * channels), &[batch, width - 1, channels], dtype)
    });

    let start = |b: usize, t: usize| {
        let ends = &lists[if lists.len() == 1 { 0 } else { b }];
        if packed { ends.iter().copied().filter(|&e| e <= t).max().unwrap_or(0) } else { 0 }
    };
    let input = |b: usize, t: usize, tap: usize, c: usize| -> f64 {
        let at = (t + tap) as i64 - (width as i64 - 1);
        match (at >= start(b, t) as i64, &past) {
            (true, _) => xs[(b * n + at as usize) * channels + c],
            (false, Some((_, past))) => past[(b * (width - 1) + t + tap) * channels + c],
            (false, None) => 0.0,
        }
    };
    let (mut want, mut want_dx, mut want_dw) =
        (vec![0.0; xs.len()], vec![0.0; xs.len()], vec![0.0; ws.len()]);
    for b in 0..batch {
        for t in 0..n {
            for c in 0..channels {
                let at = (b * n + t) * channels + c;
                for tap in 0..width {
                    want[at] += ws[c * width + tap] * input(b, t, tap, c);
                    want_dw[c * width + tap] += dys[at] * input(b, t, tap, c);
                    let from = (t + tap) as i64 - (width as i64 - 1);
                    if from >= start(b, t) as i64 {
                        want_dx[(b * n + from as usize) * channels + c] += ws[c * width + tap] * dys[at];
                    }
                }
            }
        }
    }
    let bytes = dtype.size_in_bytes();
    let (y, dx) =
        (gpu.allocate(xs.len() * bytes).map_err(fail)?, gpu.allocate(xs.len() * bytes).map_err(fail)?);
    let dw = gpu.allocate(ws.len() * bytes).map_err(fail)?;
    let (x, dy) = (rows(&x), rows(&dy));
    let past = past.as_ref().map(|p| p.0.slice());
    conv::forward(gpu, &plan, &x, w.slice(), past, (&y).into()).map_err(fail)?;
    conv::backward(gpu, &plan, &x, w.slice(), past, &dy, [(&dx).into(), (&dw).into()]).map_err(fail)?;
    let name = format!(
        "B{batch} N{n} C{channels} W{width} {dtype:?} packed {packed} {lists:?} past {}",
        past.is_some()
    );
    let floor = 1e-6 * width as f64;
    check_close(&format!("y of {name}"), &numbers(gpu, &y, xs.len(), dtype), &want, dtype, floor)?;
    check_close(&format!("dx of {name}"), &numbers(gpu, &dx, xs.len(), dtype), &want_dx, dtype, floor)?;
    let floor = 2e-6 * (batch * n) as f64;
    check_close(&format!("dweight of {name}"), &numbers(gpu, &dw, ws.len(), dtype), &want_dw, dtype, floor)
}

/// Greatest N for which the closed form of the gradients is compared with the sequential one.
const MAX_CLOSED_FORM_ROWS: usize = 65;

/// Gradients of decay, write and v in f64, one step after the other from the end: with p_t the gradient of m_t,
/// q_t that of log d_t.
fn sequential_backward(
    decay: &[f64],
    write: &[f64],
    v: &[f64],
    dim: usize,
    dm: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let n = decay.len();
    let (m, _) = reference::average(decay, write, v, dim, None);
    // take_t = e^write_t / d_t.
    let mut d = 0.0;
    let take: Vec<f64> = (0..n)
        .map(|t| {
            d = d / (1.0 + (-decay[t]).exp()) + write[t].exp();
            write[t].exp() / d
        })
        .collect();
    let (mut p, mut q) = (vec![0.0; dim], 0.0);
    let (mut dd, mut dw, mut dv) = (vec![0.0; n], vec![0.0; n], vec![0.0; n * dim]);
    for t in (0..n).rev() {
        let mut dtake = 0.0;
        for e in 0..dim {
            p[e] += dm[t * dim + e];
            let before = if t > 0 { m[(t - 1) * dim + e] } else { 0.0 };
            dtake += p[e] * (v[t * dim + e] - before);
            dv[t * dim + e] = take[t] * p[e];
            p[e] *= 1.0 - take[t];
        }
        let dz = dtake * take[t] * (1.0 - take[t]);
        dw[t] = dz + take[t] * q;
        q = (1.0 - take[t]) * q - dz;
        dd[t] = q / (1.0 + decay[t].exp());
    }
    (dd, dw, dv)
}

/// Checks the running average of a seed: as one call, and as two calls with a state between them.
pub(crate) fn check_average(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut rng = rng(seed ^ 0xa0);
    let dtype = DTYPES[(seed % 3) as usize];
    let (batch, value_heads) = (rng.random_range(1..=2), rng.random_range(1..=2));
    let heads = value_heads * pick(&mut rng, &[1, 2, 3]);
    let n = pick(&mut rng, &[1, 2, 33, 64, 65, 129, 200, 300]);
    let dim = pick(&mut rng, &[1, 8, 33, 64]);
    let sizes = average::Sizes { batch, heads, value_heads, rows: n, dim, dtype };
    let plan = average::AveragePlan::new(&sizes, &gpu.arch()).map_err(fail)?;
    let (s, bytes) = (batch * heads, dtype.size_in_bytes());
    let strong = pick(&mut rng, &[1.0, 4.0]);
    let mut decays: Vec<f64> = uniform(&mut rng, s * n).into_iter().map(|x| strong * x + 2.0).collect();
    // Some decays are so small that the past is forgotten, as at a sequence boundary.
    decays.iter_mut().step_by(37).skip(1).for_each(|x| *x = -60.0);
    let writes: Vec<f64> = uniform(&mut rng, s * n).into_iter().map(|x| strong * x).collect();
    let scalars = [batch, heads, n];
    let (decay, decays) = upload(gpu, &decays, &scalars, dtype);
    let (write, writes) = upload(gpu, &writes, &scalars, dtype);
    let v_dims = [batch, value_heads, n, dim];
    let (v, vs) = strided(gpu, &uniform(&mut rng, v_dims.iter().product()), &v_dims, dtype);
    let (dm, dms) = strided(gpu, &uniform(&mut rng, s * n * dim), &[batch, heads, n, dim], dtype);

    let (mut want, mut want_ddecay, mut want_dwrite) = (vec![], vec![], vec![]);
    let mut want_dv = vec![0.0; vs.len()];
    let mut finals = vec![];
    for at in 0..s {
        let sv = at / heads * value_heads + at % heads / (heads / value_heads);
        let (d, w) = (&decays[at * n..(at + 1) * n], &writes[at * n..(at + 1) * n]);
        let v = &vs[sv * n * dim..(sv + 1) * n * dim];
        let (m, last) = reference::average(d, w, v, dim, None);
        want.extend(m);
        finals.extend(last.numerator.iter().map(|x| x / last.denominator));
        let dm = &dms[at * n * dim..(at + 1) * n * dim];
        let (dd, dw, dv) = sequential_backward(d, w, v, dim, dm);
        if n <= MAX_CLOSED_FORM_ROWS {
            // The closed form, cubic in N, has the same gradients.
            let closed = reference::average_backward(d, w, v, dim, dm);
            check_close("closed ddecay", &dd, &closed.0, DType::F32, 1e-6)?;
            check_close("closed dwrite", &dw, &closed.1, DType::F32, 1e-6)?;
            check_close("closed dv", &dv, &closed.2, DType::F32, 1e-6)?;
        }
        want_ddecay.extend(dd);
        want_dwrite.extend(dw);
        want_dv[sv * n * dim..(sv + 1) * n * dim].iter_mut().zip(dv).for_each(|(x, y)| *x += y);
    }
    let buffer = |count: usize, size: usize| gpu.allocate(count * size).map_err(fail);
    let (m, mean, log) = (buffer(s * n * dim, bytes)?, buffer(s * dim, 4)?, buffer(s, 4)?);
    let x = average::Inputs { decay: decay.slice(), write: write.slice(), v: v.tensor4(), start: None };
    let last = average::State { mean: (&mean).into(), log_weight: (&log).into() };
    let weights = average::forward(gpu, &plan, &x, (&m).into(), &last).map_err(fail)?;
    let name = format!("B{batch} H{heads}/{value_heads} N{n} D{dim} {dtype:?}");
    check_close(&format!("m of {name}"), &numbers(gpu, &m, s * n * dim, dtype), &want, dtype, 4e-6)?;
    check_close(
        &format!("last mean of {name}"),
        &numbers(gpu, &mean, s * dim, DType::F32),
        &finals,
        DType::F32,
        4e-6,
    )?;
    let (dd, dw, dv) = (buffer(s * n, bytes)?, buffer(s * n, bytes)?, buffer(vs.len(), bytes)?);
    let out = [&dd, &dw, &dv].map(Slice::<'_, Buffer>::from);
    average::backward(gpu, &plan, &x, &weights, (&m).into(), &dm.tensor4(), out).map_err(fail)?;
    // The backward pass reads m as it is stored.
    let stored = 4.0 * roundoff(dtype) * (dim as f64).sqrt() + 1e-5 * dim as f64;
    let group = (heads / value_heads) as f64;
    check_close(
        &format!("dv of {name}"),
        &numbers(gpu, &dv, vs.len(), dtype),
        &want_dv,
        dtype,
        1e-5 * group,
    )?;
    check_close(
        &format!("dwrite of {name}"),
        &numbers(gpu, &dw, s * n, dtype),
        &want_dwrite,
        dtype,
        4.0 * stored,
    )?;
    check_close(
        &format!("ddecay of {name}"),
        &numbers(gpu, &dd, s * n, dtype),
        &want_ddecay,
        dtype,
        8.0 * stored,
    )?;
    if n < 2 || batch > 1 || heads > 1 {
        return Ok(());
    }
    // In two chunks: a single sequence can be split by offsets.
    let cut = n / 2;
    let chunk_plan =
        |rows: usize| average::AveragePlan::new(&average::Sizes { rows, ..sizes }, &gpu.arch()).map_err(fail);
    let at = |s: Slice<'_, Buffer>, rows: usize, wide: usize| s.offset + rows * wide * bytes;
    let again = buffer(n * dim, bytes)?;
    let (mean, log, mean2, log2) = (buffer(dim, 4)?, buffer(1, 4)?, buffer(dim, 4)?, buffer(1, 4)?);
    let state = average::State { mean: (&mean).into(), log_weight: (&log).into() };
    average::forward(gpu, &chunk_plan(cut)?, &x, (&again).into(), &state).map_err(fail)?;
    let moved = |s: Slice<'_, Buffer>, wide: usize| at(s, cut, wide);
    let (d2, w2) = (moved(x.decay, 1), moved(x.write, 1));
    let row = x.v.strides[2];
    let v2 = gd_kernels::gpu::Tensor4 {
        data: Slice { buffer: x.v.data.buffer, offset: moved(x.v.data, row) },
        strides: x.v.strides,
    };
    let x2 = average::Inputs {
        decay: Slice { buffer: x.decay.buffer, offset: d2 },
        write: Slice { buffer: x.write.buffer, offset: w2 },
        v: v2,
        start: Some(average::State { mean: (&mean).into(), log_weight: (&log).into() }),
    };
    let end = average::State { mean: (&mean2).into(), log_weight: (&log2).into() };
    let rest = Slice { buffer: &again, offset: cut * dim * bytes };
    average::forward(gpu, &chunk_plan(n - cut)?, &x2, rest, &end).map_err(fail)?;
    check_close(&format!("chunks of {name}"), &numbers(gpu, &again, n * dim, dtype), &want, dtype, 4e-6)
}

#[test]
fn convolutions_match_the_definition() {
    crate::suites("conv", [40, 40], 0, check_conv);
}

#[test]
fn averages_match_the_reference() {
    crate::suites("average", [40, 40], 0, check_average);
}
