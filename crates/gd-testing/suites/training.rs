//! The operators of a training step besides attention: normalisation, rotary embedding, gated activation and cross
//! entropy, forward and backward, and AdamW with clipping by a norm that stays on the device. Against naive f64
//! versions, with strides and offsets.

use crate::target::{Buffer, TestGpu};
use candle_core::{DType, Device, Tensor};
use gd_kernels::gpu::{Gpu, RowSizes, Slice, adamw, cross_entropy, norm, rotary, swiglu};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::beacon::{DTYPES, check_close, fail, upload};
use crate::tensors::{DeviceTensor, numbers};
use gd_testing::ensure;
use gd_testing::problems::{pick, rng, roundoff, uniform, values};
use gd_testing::suite::Verdict;

/// Random numbers `[B, H, N, C]` as a part of wider rows of NaN, in memory with heads before rows or rows before heads:
/// the tensor on the device, and its values in the order of the shape.
fn view(gpu: &TestGpu, rng: &mut ChaCha8Rng, s: &RowSizes) -> (DeviceTensor, Vec<f64>) {
    view_of(gpu, rng, s, |rng| uniform(rng, s.dim))
}

/// The same with rows made by `fill`.
fn view_of(
    gpu: &TestGpu,
    rng: &mut ChaCha8Rng,
    s: &RowSizes,
    mut fill: impl FnMut(&mut ChaCha8Rng) -> Vec<f64>,
) -> (DeviceTensor, Vec<f64>) {
    let (front, width) = (rng.random_range(0..4), s.dim + 5);
    let turned = rng.random_bool(0.5);
    let (outer, inner) = if turned { (s.rows, s.heads) } else { (s.heads, s.rows) };
    let mut wide = vec![f64::NAN; s.batch * outer * inner * width];
    for row in wide.chunks_mut(width) {
        row[front..front + s.dim].copy_from_slice(&fill(rng));
    }
    let t = Tensor::from_vec(wide, (s.batch, outer, inner, width), &Device::Cpu).unwrap();
    let t = t.to_dtype(s.dtype).unwrap().narrow(3, front, s.dim).unwrap();
    let t = if turned { t.transpose(1, 2).unwrap() } else { t };
    (DeviceTensor::new(gpu, &t), values(&t))
}

fn sizes(rng: &mut ChaCha8Rng, seed: u64, dims: &[usize]) -> RowSizes {
    let dtype = DTYPES[(seed % 3) as usize];
    let (batch, heads) = (rng.random_range(1..=2), rng.random_range(1..=3));
    RowSizes { batch, heads, rows: pick(rng, &[1, 2, 7, 40, 131]), dim: pick(rng, dims), dtype }
}

/// Memory for `count` numbers of a dtype.
fn allocate(gpu: &TestGpu, count: usize, dtype: DType) -> Result<Buffer, String> {
    gpu.allocate(count * dtype.size_in_bytes()).map_err(fail)
}

/// Checks the normalisation of a seed.
pub(crate) fn check_norm(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut rng = rng(seed ^ 0x40);
    let s = sizes(&mut rng, seed, &[1, 8, 31, 32, 64, 65, 200, 300]);
    let (eps, name) = (pick(&mut rng, &[1e-5, 1e-2]), format!("norm {s:?}"));
    let (rows, dim) = (s.batch * s.heads * s.rows, s.dim);
    let ((x, xs), (dy, dys)) = (view(gpu, &mut rng, &s), view(gpu, &mut rng, &s));
    let (w, ws) = upload(gpu, &uniform(&mut rng, dim), &[dim], s.dtype);
    let (mut want, mut want_dx, mut want_dw) = (vec![], vec![], vec![0.0; dim]);
    // The greatest 1 / rms of a row, by which rounding errors are scaled.
    let mut top = 1.0f64;
    for (x, dy) in xs.chunks(dim).zip(dys.chunks(dim)) {
        let r = (x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + eps).sqrt().recip();
        let along: f64 = (0..dim).map(|c| ws[c] * dy[c] * x[c]).sum();
        top = top.max(r);
        for c in 0..dim {
            want.push(x[c] * r * ws[c]);
            want_dx.push(r * (ws[c] * dy[c] - x[c] * r * r * along / dim as f64));
            want_dw[c] += dy[c] * x[c] * r;
        }
    }
    let plan = norm::NormPlan::new(&s, eps, &gpu.arch()).map_err(fail)?;
    let (y, dx) = (allocate(gpu, want.len(), s.dtype)?, allocate(gpu, want.len(), s.dtype)?);
    let dw = allocate(gpu, dim, s.dtype)?;
    norm::forward(gpu, &plan, &x.tensor4(), w.slice(), (&y).into()).map_err(fail)?;
    let out = [(&dx).into(), (&dw).into()];
    norm::backward(gpu, &plan, &x.tensor4(), w.slice(), &dy.tensor4(), out).map_err(fail)?;
    let got = |b: &Buffer, count: usize| numbers(gpu, b, count, s.dtype);
    check_close(&format!("y of {name}"), &got(&y, want.len()), &want, s.dtype, 2e-6)?;
    check_close(&format!("dx of {name}"), &got(&dx, want.len()), &want_dx, s.dtype, 3e-6 * top)?;
    check_close(&format!("dweight of {name}"), &got(&dw, dim), &want_dw, s.dtype, 1e-6 * (rows as f64).sqrt())
}

/// Checks the rotation of a seed, and the rotation by the negative angle.
pub(crate) fn check_rotary(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut rng = rng(seed ^ 0x41);
    let s = sizes(&mut rng, seed, &[2, 16, 62, 64, 66, 128]);
    let (half, positions) = (s.dim / 2, s.rows + 9);
    let offsets: Vec<usize> = match rng.random_bool(0.5) {
        true => vec![rng.random_range(0..=9)],
        false => (0..s.batch).map(|_| rng.random_range(0..=9)).collect(),
    };
    let angle = |at: usize| (at / half) as f64 * 100f64.powf(-((at % half) as f64) / half as f64);
    let table = |f: fn(f64) -> f64| -> Vec<f64> { (0..positions * half).map(|at| f(angle(at))).collect() };
    let (cos, cos_values) = upload(gpu, &table(f64::cos), &[positions, half], DType::F32);
    let (sin, sin_values) = upload(gpu, &table(f64::sin), &[positions, half], DType::F32);
    let (x, xs) = view(gpu, &mut rng, &s);
    let plan = rotary::RotaryPlan::new(&s, &offsets, &gpu.arch()).map_err(fail)?;
    let angles = rotary::Angles { cos: cos.slice(), sin: sin.slice(), positions };
    for back in [false, true] {
        let mut want = vec![0.0; xs.len()];
        for (row, (x, y)) in xs.chunks(s.dim).zip(want.chunks_mut(s.dim)).enumerate() {
            let offset = offsets[if offsets.len() == 1 { 0 } else { row / (s.heads * s.rows) }];
            let at = (offset + row % s.rows) * half;
            for i in 0..half {
                let (c, s) =
                    (cos_values[at + i], if back { -sin_values[at + i] } else { sin_values[at + i] });
                y[i] = x[i] * c - x[half + i] * s;
                y[half + i] = x[half + i] * c + x[i] * s;
            }
        }
        let y = allocate(gpu, want.len(), s.dtype)?;
        rotary::rotate(gpu, &plan, &x.tensor4(), &angles, back, (&y).into()).map_err(fail)?;
        let name = format!("rotary {s:?} at {offsets:?}, back {back}");
        check_close(&name, &numbers(gpu, &y, want.len(), s.dtype), &want, s.dtype, 3e-7)?;
    }
    Ok(())
}

/// Checks the gated activation of a seed.
pub(crate) fn check_swiglu(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut rng = rng(seed ^ 0x42);
    let s = sizes(&mut rng, seed, &[1, 31, 32, 64, 100, 257]);
    let [(gate, gates), (up, ups), (dy, dys)] = [(); 3].map(|()| view(gpu, &mut rng, &s));
    let (mut want, mut want_gate, mut want_up) = (vec![], vec![], vec![]);
    for ((&g, &u), &d) in gates.iter().zip(&ups).zip(&dys) {
        let t = 1.0 / (1.0 + (-g).exp());
        want.push(g * t * u);
        want_gate.push(d * u * t * (1.0 + g * (1.0 - t)));
        want_up.push(d * g * t);
    }
    let plan = swiglu::SwigluPlan::new(&s, &gpu.arch()).map_err(fail)?;
    let [y, dgate, dup] = [(); 3].map(|()| allocate(gpu, want.len(), s.dtype));
    let (y, dgate, dup) = (y?, dgate?, dup?);
    let inputs = [&gate.tensor4(), &up.tensor4()];
    swiglu::forward(gpu, &plan, inputs, (&y).into()).map_err(fail)?;
    swiglu::backward(gpu, &plan, inputs, &dy.tensor4(), [(&dgate).into(), (&dup).into()]).map_err(fail)?;
    for (what, buffer, want) in [("y", y, want), ("dgate", dgate, want_gate), ("dup", dup, want_up)] {
        let got = numbers(gpu, &buffer, want.len(), s.dtype);
        check_close(&format!("{what} of swiglu {s:?}"), &got, &want, s.dtype, 1e-6)?;
    }
    Ok(())
}

/// Checks the cross entropy of a seed: with ignored rows, logits of -inf, and in some problems a target beyond the
/// vocabulary or a row with a number that is not finite.
pub(crate) fn check_cross_entropy(gpu: &TestGpu, seed: u64) -> Verdict {
    const IGNORED: u32 = u32::MAX;
    let mut rng = rng(seed ^ 0x44);
    let s = sizes(&mut rng, seed, &[1, 2, 31, 256, 257, 1100, 2100]);
    let (s, size) = (RowSizes { rows: s.rows.min(9), ..s }, pick(&mut rng, &[1.0, 30.0]));
    let (rows, vocab) = (s.batch * s.heads * s.rows, s.dim);
    let masked = rng.random_bool(0.3);
    let (bad, kind) = (rng.random_range(0..8 * rows), pick(&mut rng, &[f64::NAN, f64::INFINITY]));
    let mut row = 0;
    let (logits, xs) = view_of(gpu, &mut rng, &s, |rng| {
        let mut x: Vec<f64> = uniform(rng, vocab).into_iter().map(|x| x * size).collect();
        // Not in the first column, which replaces masked targets.
        for x in x.iter_mut().skip(1).filter(|_| masked) {
            *x = if rng.random_bool(0.4) { f64::NEG_INFINITY } else { *x };
        }
        if row == bad {
            x[rng.random_range(0..vocab)] = kind;
        }
        row += 1;
        x
    });
    let none = rng.random_bool(0.2);
    let mut targets = Vec::new();
    for row in xs.chunks(vocab) {
        let at = rng.random_range(0..vocab);
        targets.push(match rng.random_range(0..4) {
            0 => IGNORED,
            1 if none => vocab as u32 + rng.random_range(0..3),
            _ if row[at].is_finite() => at as u32,
            _ => 0,
        });
    }
    let (weights, ds) = upload(gpu, &uniform(&mut rng, rows), &[rows], DType::F32);
    let (mut want, mut want_dx) = (vec![], vec![]);
    for ((row, &target), d) in xs.chunks(vocab).zip(&targets).zip(&ds) {
        let top = row.iter().fold(f64::MIN, |top, x| top.max(*x));
        let sum = row.iter().map(|x| (x - top).exp()).sum::<f64>().ln() + top;
        let sum = if row.contains(&f64::INFINITY) { f64::NAN } else { sum };
        want.push(match row.get(target as usize) {
            Some(x) => sum - x,
            None if target == IGNORED => 0.0,
            None => f64::INFINITY,
        });
        want_dx.extend(row.iter().enumerate().map(|(c, x)| match target {
            IGNORED => 0.0,
            _ => ((x - sum).exp() - f64::from(c as u32 == target)) * d,
        }));
    }
    // At an offset.
    let listed: Vec<u32> = [7, 7].into_iter().chain(targets.iter().copied()).collect();
    let listed = gpu.upload(bytemuck::cast_slice(&listed)).map_err(fail)?;
    let at = Slice { buffer: &listed, offset: 8 };
    let plan = cross_entropy::CrossEntropyPlan::new(&s, &gpu.arch()).map_err(fail)?;
    let [losses, sums] = [(); 2].map(|()| allocate(gpu, rows, DType::F32));
    let (losses, sums, dx) = (losses?, sums?, allocate(gpu, xs.len(), s.dtype)?);
    let out = [(&losses).into(), (&sums).into()];
    cross_entropy::forward(gpu, &plan, &logits.tensor4(), at, out).map_err(fail)?;
    let operands = [at, (&sums).into(), weights.slice()];
    cross_entropy::backward(gpu, &plan, &logits.tensor4(), operands, (&dx).into()).map_err(fail)?;
    let name = format!("cross entropy {s:?}, {targets:?}");
    let (mut got, mut got_dx) =
        (numbers(gpu, &losses, rows, DType::F32), numbers(gpu, &dx, xs.len(), s.dtype));
    // Where the reference is not finite, the device must not be either; such elements are not compared further.
    let drop_not_finite = |what: &str, got: &mut [f64], want: &mut [f64]| -> Verdict {
        for (at, (got, want)) in got.iter_mut().zip(want).enumerate().filter(|(_, (_, w))| !w.is_finite()) {
            ensure!(!got.is_finite(), "{what} of {name}: {got} at {at}, not {want}");
            (*got, *want) = (0.0, 0.0);
        }
        Ok(())
    };
    drop_not_finite("loss", &mut got, &mut want)?;
    drop_not_finite("gradient", &mut got_dx, &mut want_dx)?;
    // Rounding errors of the logarithm and of the exponents.
    let floor = 1e-6 + 3e-7 * size;
    check_close(&format!("loss of {name}"), &got, &want, DType::F32, floor)?;
    check_close(&format!("gradient of {name}"), &got_dx, &want_dx, s.dtype, floor)
}

/// A tensor with poison before and after it, which kernels must not overwrite.
struct Padded {
    buffer: Buffer,
    front: usize,
    count: usize,
    dtype: DType,
}

impl Padded {
    const BACK: usize = 3;
    const POISON: f64 = -77.0;

    fn new(gpu: &TestGpu, x: &[f64], dtype: DType, front: usize) -> (Self, Vec<f64>) {
        let pad = |n: usize| std::iter::repeat_n(Self::POISON, n);
        let all: Vec<f64> = pad(front).chain(x.iter().copied()).chain(pad(Self::BACK)).collect();
        let t = Tensor::new(&all[..], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let bytes: Vec<u8> = match dtype {
            DType::F32 => bytemuck::cast_slice(&t.to_vec1::<f32>().unwrap()).to_vec(),
            DType::F16 => bytemuck::cast_slice(&t.to_vec1::<half::f16>().unwrap()).to_vec(),
            _ => bytemuck::cast_slice(&t.to_vec1::<half::bf16>().unwrap()).to_vec(),
        };
        let rounded = values(&t)[front..front + x.len()].to_vec();
        (Self { buffer: gpu.upload(&bytes).unwrap(), front, count: x.len(), dtype }, rounded)
    }

    fn slice(&self) -> Slice<'_, Buffer> {
        Slice { buffer: &self.buffer, offset: self.front * self.dtype.size_in_bytes() }
    }

    /// The current values. An error if the poison was overwritten.
    fn read(&self, gpu: &TestGpu) -> Result<Vec<f64>, String> {
        let all = numbers(gpu, &self.buffer, self.front + self.count + Self::BACK, self.dtype);
        let (front, rest) = all.split_at(self.front);
        let (inside, back) = rest.split_at(self.count);
        ensure!(front.iter().chain(back).all(|x| *x == Self::POISON), "wrote beside a tensor");
        Ok(inside.to_vec())
    }
}

/// A parameter with its moments, in the f64 reference and on the device.
struct Parameter {
    w: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    /// Parameter and both moments.
    on_device: [Padded; 3],
    master: Option<Padded>,
    dtype: DType,
}

/// Why the reference skips an update.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    None,
    NotFinite,
    Loss,
    Norm,
}

/// Checks consecutive updates of a seed, some of which are skipped. Each is launched before the result of the one
/// before is read.
pub(crate) fn check_adamw(gpu: &TestGpu, seed: u64) -> Verdict {
    let mut rng = rng(seed ^ 0x43);
    let (beta1, beta2, eps) = (0.9, pick(&mut rng, &[0.95, 0.999]), 1e-8);
    let lr = 0.02;
    let mut parameters = Vec::new();
    for at in 0..rng.random_range(1..=3) {
        let dtype = DTYPES[((seed + at) % 3) as usize];
        let count = pick(&mut rng, &[1, 7, 255, 1024, 1025, 17000]);
        let front = rng.random_range(0..5);
        let (parameter, w) = Padded::new(gpu, &uniform(&mut rng, count), dtype, front);
        let zeros = || Padded::new(gpu, &vec![0.0; count], DType::F32, front).0;
        let master = (dtype != DType::F32).then(|| Padded::new(gpu, &w, DType::F32, front + 1).0);
        let on_device = [parameter, zeros(), zeros()];
        parameters.push(Parameter { w, m: vec![0.0; count], v: vec![0.0; count], on_device, master, dtype });
    }
    let (mut applied, mut applied_and_read) = (0u32, 0u32);
    let mut before: Option<Buffer> = None;
    for update in 0..4 {
        // The first update may be skipped, too.
        let event = pick(&mut rng, &[Event::None, Event::None, Event::NotFinite, Event::Loss, Event::Norm]);
        let weight = pick(&mut rng, &[1.0, 0.75]);
        let size = pick(&mut rng, &[1e-3, 1.0, 30.0]);
        let bad = rng.random_range(0..parameters.len());
        let mut gradients = Vec::new();
        for (at, p) in parameters.iter().enumerate() {
            let mut g: Vec<f64> = uniform(&mut rng, p.w.len()).into_iter().map(|x| x * size).collect();
            if event == Event::NotFinite && at == bad {
                let index = rng.random_range(0..g.len());
                g[index] = pick(&mut rng, &[f64::NAN, f64::INFINITY]);
            }
            gradients.push(Padded::new(gpu, &g, p.dtype, at));
        }
        let (losses, loss_values) = upload(gpu, &uniform(&mut rng, 3), &[3], DType::F32);
        let want_loss = loss_values.iter().sum::<f64>() / weight;
        let squares: f64 = gradients.iter().flat_map(|(_, g)| g).map(|g| g * g).sum();
        let want_norm = squares.sqrt() / weight;
        let clip = 1.0;
        let above = |x: f64, exceeded: bool| (if exceeded { x - 0.01 * x.abs() } else { x + 1.0 }) as f32;
        let limits = adamw::Limits {
            weight,
            clip,
            loss: above(want_loss, event == Event::Loss),
            norm: above(want_norm, event == Event::Norm),
        };
        let of = adamw::PartialSums::new(parameters.iter().map(|p| p.w.len()).collect()).map_err(fail)?;
        let parts = allocate(gpu, of.count(), DType::F32)?;
        for (at, ((g, _), p)) in gradients.iter().zip(&parameters).enumerate() {
            adamw::squares(gpu, &of, at, (g.slice(), p.dtype), (&parts).into()).map_err(fail)?;
        }
        let verdict = allocate(gpu, 3, DType::F32)?;
        let (sums, loss) = ((&of, (&parts).into()), (losses.slice(), 3));
        adamw::verdict(gpu, sums, loss, &limits, (&verdict).into()).map_err(fail)?;
        let parts = numbers(gpu, &parts, of.count(), DType::F32);
        let first = of.first_not_finite(&parts.iter().map(|x| *x as f32).collect::<Vec<_>>());
        let name = format!("adamw of seed {seed}, update {update}, {event:?}");
        let result: Vec<f64> = numbers(gpu, &verdict, 3, DType::F32);
        if event == Event::NotFinite {
            ensure!(!result[1].is_finite() && !result[2].is_finite(), "{name}: {result:?}");
            ensure!(first == Some(bad), "{name}: gradient {first:?} is not finite; expected {bad}");
        } else {
            ensure!(first.is_none(), "{name}: gradient {first:?} is not finite");
            ensure!(
                (result[1] - want_norm).abs() <= 1e-6 * want_norm,
                "{name}: norm {result:?} instead of {want_norm}"
            );
            let skipped = event != Event::None;
            ensure!(result[2].is_finite() != skipped, "{name}: {result:?}");
        }
        ensure!((result[0] - want_loss).abs() <= 1e-6, "{name}: loss {result:?} instead of {want_loss}");
        let factor = if want_norm > clip { clip / want_norm } else { 1.0 } / weight;
        // An update whose result is not read yet counts as applied.
        let number = applied_and_read + u32::from(before.is_some()) + 1;
        let applies = event == Event::None;
        for (at, (p, (g, gs))) in parameters.iter_mut().zip(&gradients).enumerate() {
            let decay = if at % 2 == 0 { 0.1 } else { 0.0 };
            let step = adamw::Step { number, lr, beta1, beta2, eps, weight_decay: decay };
            let [parameter, m, v] = &p.on_device;
            let x = adamw::Operands {
                parameter: parameter.slice(),
                gradient: g.slice(),
                m: m.slice(),
                v: v.slice(),
                master: p.master.as_ref().map(Padded::slice),
            };
            let verdicts = ((&verdict).into(), before.as_ref().map(Slice::from));
            adamw::update(gpu, &step, (p.w.len(), p.dtype), verdicts, &x).map_err(fail)?;
            let t = f64::from(applied + 1);
            for (i, g) in gs.iter().enumerate().filter(|_| applies) {
                let g = g * factor;
                p.m[i] = beta1 * p.m[i] + (1.0 - beta1) * g;
                p.v[i] = beta2 * p.v[i] + (1.0 - beta2) * g * g;
                let (m, v) = (p.m[i] / (1.0 - beta1.powf(t)), p.v[i] / (1.0 - beta2.powf(t)));
                p.w[i] -= lr * decay * p.w[i] + lr * m / (v.sqrt() + eps);
            }
            let (ms, vs) = (m.read(gpu)?, v.read(gpu)?);
            // Rounding errors of terms that may cancel.
            let largest = p.m.iter().fold(0.0f64, |top, m| top.max(m.abs()));
            check_close(&format!("m of {name}"), &ms, &p.m, DType::F32, 1e-6 * largest)?;
            let wide: Vec<f64> = p.v.iter().map(|v| v * (1.0 + 3e-6)).collect();
            let narrow: Vec<f64> = p.v.iter().map(|v| v * (1.0 - 3e-6)).collect();
            let inside = |i: usize| (narrow[i]..=wide[i]).contains(&vs[i]);
            ensure!((0..vs.len()).all(inside), "v of {name}");
            let stored = parameter.read(gpu)?;
            let exact = match &p.master {
                Some(master) => master.read(gpu)?,
                None => stored.clone(),
            };
            check_close(&format!("weight of {name}"), &exact, &p.w, DType::F32, 1e-5 * lr + 1e-6)?;
            for (stored, exact) in stored.iter().zip(&exact) {
                let bound = roundoff(p.dtype) * exact.abs() + 1e-7;
                ensure!((stored - exact).abs() <= bound, "{name}: {stored} for {exact}");
            }
        }
        // The host has read the result of the update before.
        applied_and_read = applied;
        applied += u32::from(applies);
        before = Some(verdict);
    }
    Ok(())
}

#[test]
fn normalisations_match_the_definition() {
    crate::suites("norm", [30, 30], 0, check_norm);
}

#[test]
fn rotations_match_the_definition() {
    crate::suites("rotary", [20, 20], 0, check_rotary);
}

#[test]
fn gated_activations_match_the_definition() {
    crate::suites("swiglu", [20, 20], 0, check_swiglu);
}

#[test]
fn cross_entropies_match_the_definition() {
    crate::suites("cross entropy", [24, 24], 0, check_cross_entropy);
}

#[test]
fn updates_match_the_definition_of_adamw() {
    crate::suites("adamw", [30, 30], 0, check_adamw);
}
