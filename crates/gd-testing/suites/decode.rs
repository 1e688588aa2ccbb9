//! Decoding over contiguous and paged caches, at native precision and with 8-bit keys, against the scan of the same
//! keys: key, bits of the energy and value row are the same. On Metal, which sums in another order, against the
//! reference.

use crate::target::{Buffer, TestGpu};
use candle_core::DType;
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::decode::{DecodePlan, Inputs, KeyData, Outputs, Pages, decode};
use gd_kernels::gpu::quantize::{Int8Slices, bounds_bytes, capacity, quantize, values_bytes};
use gd_kernels::gpu::scan::{BiasInputs, key_bias};
use gd_kernels::gpu::{Slice, Tensor4};
use gd_kernels::{KeyShape, Precision, Problem};
use rand::RngExt;

use crate::scan::{DIFFERENCE_SLACK, SCORE_SLACK, ScanResult, Uploaded, check_result, problem, run};
use crate::tensors::{DeviceTensor, integers, numbers};
use gd_testing::ensure;
use gd_testing::problems::{Case, Spec, rng};
use gd_testing::suite::Verdict;

const DIMS: [usize; 7] = [8, 32, 40, 64, 96, 128, 256];
const LIMIT: usize = 600_000;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const PAGE: usize = 64;

/// A problem with at most 16 queries.
fn case(seed: u64) -> Case {
    spec(seed).build(DTYPES[(seed % 3) as usize])
}

fn spec(seed: u64) -> Spec {
    let mut spec = Spec::with_dims(seed + 10_000, LIMIT, &DIMS);
    let raw = &mut spec.raw;
    let n = raw.queries.min(1 + seed as usize % 16);
    let mut q = Vec::new();
    for row in raw.q.chunks(raw.queries * raw.dim) {
        q.extend_from_slice(&row[..n * raw.dim]);
    }
    (raw.q, raw.queries) = (q, n);
    (spec.candidates, spec.protected) = (1, None);
    spec
}

/// The rows of a paged cache with this block table; rows without a key are NaN.
fn paged(case: &Case, values: &[f64], dim: usize, table: &[i32]) -> candle_core::Tensor {
    let p = &case.problem;
    let row = p.keys.div_ceil(PAGE);
    let count = table.iter().max().map_or(1, |&m| m as usize + 1);
    let mut all = vec![f64::NAN; count * p.kv_heads * PAGE * dim];
    for b in 0..p.batch {
        for h in 0..p.kv_heads {
            for j in 0..p.keys {
                let page = table[b * row + j / PAGE] as usize;
                let to = ((page * p.kv_heads + h) * PAGE + j % PAGE) * dim;
                let from = ((b * p.kv_heads + h) * p.keys + j) * dim;
                all[to..to + dim].copy_from_slice(&values[from..from + dim]);
            }
        }
    }
    let shape = [count, p.kv_heads, PAGE, dim];
    candle_core::Tensor::from_vec(all, &shape, &candle_core::Device::Cpu)
        .unwrap()
        .to_dtype(case.dtype)
        .unwrap()
}

/// A problem with at most 16 queries in which some keys are zero or too large to be quantised.
fn case_with_extreme_keys(seed: u64) -> Case {
    let mut spec = spec(seed);
    spec.views = [gd_testing::problems::View::Plain; 3];
    let mut case = spec.build(DTYPES[(seed % 3) as usize]);
    let (p, dim) = (&mut case.problem, case.spec.raw.dim);
    for (row, key) in p.k.chunks_mut(dim).enumerate().filter(|(row, _)| row % 7 == 1) {
        match row % 3 {
            0 => key.fill(0.0),
            1 => key[row % dim] = f64::INFINITY,
            _ if case.dtype == DType::F16 => key.fill(65504.0),
            _ => key[row % dim] = 1e17,
        }
    }
    let dims = [p.batch, p.kv_heads, p.keys, dim];
    let k = candle_core::Tensor::from_vec(p.k.clone(), &dims, &candle_core::Device::Cpu).unwrap();
    case.k.base = k.to_dtype(case.dtype).unwrap();
    // The reference gets the rounded values.
    p.k = case.k.base.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    case
}

/// A cache of 8-bit keys on the device.
pub(crate) struct Int8Cache {
    values: Buffer,
    bounds: Buffer,
    capacity: usize,
}

impl Int8Cache {
    /// Quantises k `[sequences, Hk, keys, D]` in two steps, with more capacity than needed: the unused rows stay NaN.
    pub(crate) fn new(
        gpu: &TestGpu,
        p: &Problem,
        k: &Tensor4<'_, Buffer>,
        [sequences, keys]: [usize; 2],
    ) -> gd_kernels::Result<Self> {
        let shape = KeyShape {
            sequences,
            kv_heads: p.kv_heads,
            head_dim: p.head_dim,
            dtype: p.dtype,
            score: p.score,
        };
        let capacity = capacity(keys) + 64 * (keys % 2);
        let values = gpu.allocate(values_bytes(&shape, capacity))?;
        let bounds = gpu.allocate(bounds_bytes(&shape, capacity))?;
        let cache = Self { values, bounds, capacity };
        let half = keys / 2;
        if half > 0 {
            quantize(gpu, &shape, k, half, 0, &cache.slices())?;
        }
        let offset = k.data.offset + half * k.strides[2] * p.dtype.size_in_bytes();
        let rest = Tensor4 { data: Slice { buffer: k.data.buffer, offset }, strides: k.strides };
        quantize(gpu, &shape, &rest, keys - half, half, &cache.slices())?;
        Ok(cache)
    }

    pub(crate) fn slices(&self) -> Int8Slices<'_, Buffer> {
        Int8Slices { values: (&self.values).into(), bounds: (&self.bounds).into(), capacity: self.capacity }
    }
}

/// Checks one problem at native precision.
pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = case(seed);
    let scanned = run(&gpu.twin(seed), &case)?;
    check_result(&case, &scanned)?;
    check_case(gpu, seed, &case, &scanned, (Precision::Native, None))
}

/// Checks one problem with 8-bit keys, some of which have no bound.
pub(crate) fn check_certified(gpu: &TestGpu, seed: u64) -> Verdict {
    if gpu.arch().is_metal() {
        let certified = Problem { precision: Precision::Certified, ..problem(&case(seed)) };
        let refused = DecodePlan::new(&certified, false, &gpu.arch()).is_err();
        ensure!(refused, "a plan for 8-bit keys on Metal, which has none");
        return Ok(());
    }
    // The reference cannot check infinite keys; the native scan can.
    let case = if seed % 4 == 3 { case_with_extreme_keys(seed) } else { case(seed) };
    let scanned = run(&gpu.twin(seed), &case)?;
    if seed % 4 != 3 {
        check_result(&case, &scanned)?;
    }
    check_case(gpu, seed, &case, &scanned, (Precision::Certified, None))
}

/// Fails unless decoding gives the results of the scan, also when the workspace is used again. On Metal the results are
/// compared with the reference, by differences with this slack if there is one.
fn check_case(
    gpu: &TestGpu,
    seed: u64,
    case: &Case,
    scanned: &ScanResult,
    (precision, slack): (Precision, Option<f64>),
) -> Verdict {
    let (p, plain) = (Problem { precision, ..problem(case) }, &case.problem);
    let fail = |e: gd_kernels::Error| e.to_string();
    let uploaded = Uploaded::new(gpu, case);
    let x = uploaded.inputs(case);
    let mut plan = DecodePlan::new(&p, x.prior.is_some(), &gpu.arch()).map_err(fail)?;
    if seed % 3 == 1 {
        // A workspace for few candidates, so that the others are scored immediately.
        plan.capacity = plan.capacity.min(seed as usize % 5 + 1);
    }
    let mut rng = rng(seed);
    let row = plain.keys.div_ceil(PAGE);
    // One page more than needed, in a random order.
    let mut table: Vec<i32> = (0..(plain.batch * row) as i32 + 1).collect();
    for at in (1..table.len()).rev() {
        table.swap(at, rng.random_range(0..=at));
    }
    table.truncate(plain.batch * row);
    let pages = seed.is_multiple_of(2);
    let (paged_k, paged_v, table_on_device);
    let mut page = None;
    let (mut k, mut v, mut sequences) = (uploaded.k.tensor4(), uploaded.v.tensor4(), [p.batch, p.keys]);
    if pages {
        paged_k = DeviceTensor::new(gpu, &paged(case, &plain.k, plain.dim, &table));
        paged_v = DeviceTensor::new(gpu, &paged(case, &plain.v, plain.value_dim, &table));
        table_on_device = gpu.upload(bytemuck::cast_slice(&table)).map_err(fail)?;
        let count = table.iter().max().map_or(1, |&m| m as usize + 1);
        page = Some(Pages { table: (&table_on_device).into(), row, keys: PAGE, count });
        (k, v, sequences) = (paged_k.tensor4(), paged_v.tensor4(), [count, PAGE]);
    }
    let (bias, codes);
    let key_data = match precision {
        Precision::Native => {
            let shape = KeyShape {
                sequences: sequences[0],
                kv_heads: p.kv_heads,
                head_dim: p.head_dim,
                dtype: p.dtype,
                score: p.score,
            };
            let beta = uploaded.inputs(case).beta;
            let inputs = BiasInputs { k, q_heads: p.q_heads, beta, prior: None };
            let exact = key_bias(gpu, &shape, sequences[1], &inputs).map_err(fail)?;
            // Capacity for more biases, which must not be read.
            let (row, heads) = (sequences[1].next_multiple_of(PAGE), sequences[0] * p.kv_heads);
            let capacity = row + PAGE * (seed as usize % 3);
            let mut all = vec![f32::NAN; heads * capacity];
            let exact = gpu.download((&exact).into(), heads * row * 4).map_err(fail)?;
            for (to, from) in all.chunks_mut(capacity).zip(exact.chunks(row * 4)) {
                to[..row].copy_from_slice(bytemuck::cast_slice(from));
            }
            bias = gpu.upload(bytemuck::cast_slice(&all)).map_err(fail)?;
            KeyData::Bias((&bias).into(), capacity)
        }
        Precision::Certified => {
            codes = Int8Cache::new(gpu, &p, &k, sequences).map_err(fail)?;
            KeyData::Int8(codes.slices())
        }
    };
    let rows = p.batch * p.q_heads * p.queries;
    let workspace = gpu.zeros(plan.workspace_bytes(&p)).map_err(fail)?;
    let mut inputs = Inputs {
        q: x.q,
        k,
        v,
        value_dim: plain.value_dim,
        key_data,
        pages: page,
        beta: x.beta,
        prior: x.prior,
        threshold: None,
        mask: x.mask,
        workspace: (&workspace).into(),
    };
    let step = |inputs: &Inputs<'_, Buffer>| -> Result<_, String> {
        let index = gpu.allocate(rows * 4).map_err(fail)?;
        let energy = gpu.allocate(rows * 4).map_err(fail)?;
        let y = gpu.allocate(rows * plain.value_dim * case.dtype.size_in_bytes()).map_err(fail)?;
        let [index_at, energy_at, y_at] = [&index, &energy, &y].map(Slice::from);
        decode(gpu, &plan, &p, inputs, &Outputs { index: index_at, energy: energy_at, y: y_at })
            .map_err(fail)?;
        let (index, energy) = (integers(gpu, &index, rows), numbers(gpu, &energy, rows, DType::F32));
        Ok((index, energy, numbers(gpu, &y, rows * plain.value_dim, case.dtype)))
    };
    let (all, energies, _) = step(&inputs)?;
    if gpu.arch().is_metal() {
        // The sums have another order than those of the scan, so rounding may decide for another key.
        match slack {
            Some(slack) => case.check_by_differences(&all, &energies, 1, slack)?,
            None => {
                let (index, energy) = (all.clone(), energies.clone());
                check_result(case, &ScanResult { slots: 1, index, energy, flags: vec![0.0; rows] })?;
            }
        }
    } else {
        let same = (&all, &energies) == (&scanned.index, &scanned.energy);
        ensure!(same, "{plan}: {all:?} instead of {:?}, {}", scanned.index, case.name());
    }
    let tau: Vec<f32> = (0..p.q_heads)
        .map(|h| {
            let head = (0..rows).filter(|r| r / p.queries % p.q_heads == h).map(|r| energies[r]);
            let head: Vec<f64> = head.filter(|e| e.is_finite()).collect();
            head.get(head.len() / 2).map_or(0.0, |e| *e as f32)
        })
        .collect();
    let threshold = gpu.upload(bytemuck::cast_slice(&tau)).map_err(fail)?;
    inputs.threshold = Some((&threshold).into());
    for again in 0..2 {
        let (index, energy, y) = step(&inputs)?;
        for (row, (b, h, i)) in plain.rows() {
            let admitted = all[row] >= 0 && energies[row] <= f64::from(tau[h]);
            let want = if admitted { (all[row], energies[row]) } else { (-1, f64::INFINITY) };
            let got = (index[row], energy[row]);
            ensure!(
                got == want,
                "step {again}, {plan}: {got:?} instead of {want:?}, row {b} {h} {i} of {}",
                case.name()
            );
            let zeros = vec![0.0; plain.value_dim];
            let value = if admitted { &plain.v[plain.v_at(b, h, want.0 as usize)] } else { &zeros[..] };
            let got = &y[row * plain.value_dim..(row + 1) * plain.value_dim];
            ensure!(got == value, "value, row {b} {h} {i} of {}", case.name());
        }
    }
    Ok(())
}

/// Checks one problem whose values have an offset.
fn check_offset(gpu: &TestGpu, seed: u64) -> Verdict {
    let (spec, by_differences) = spec(seed + 500).with_offset_of(seed);
    let case = spec.build(DTYPES[(seed % 3) as usize]);
    let scanned = run(&gpu.twin(seed), &case)?;
    let slack = if by_differences { DIFFERENCE_SLACK } else { SCORE_SLACK };
    case.check_by_differences(&scanned.index, &scanned.energy, 1, slack)?;
    if !gpu.arch().is_metal() {
        check_case(gpu, seed, &case, &scanned, (Precision::Certified, Some(slack)))?;
    }
    check_case(gpu, seed, &case, &scanned, (Precision::Native, Some(slack)))
}

#[test]
fn offsets_do_not_change_the_winners() {
    crate::suites("decode, offsets", [40, 40], 55, check_offset);
}

#[test]
fn certified_decoding_has_the_bits_of_the_scan() {
    crate::suite("decode, 8-bit keys", 100, |seed| check_certified(&TestGpu::new(seed + 78), seed));
}

#[test]
fn decoding_has_the_bits_of_the_scan() {
    crate::suites("decode", [60, 60], 77, check);
}
