//! Decoding, in one piece and in pages, natively and with 8-bit keys, against the scan of the same keys: the same key,
//! bits and value row; on Metal, which adds in another order, against the reference.

use crate::target::{Buffer, TestGpu};
use candle_core::DType;
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::decode::{DecodePlan, Inputs, KeyData, Outputs, Pages, decode};
use gd_kernels::gpu::quantize::{Int8Slices, bounds_bytes, capacity, quantize, values_bytes};
use gd_kernels::gpu::scan::{BiasInputs, key_bias};
use gd_kernels::gpu::{Slice, Tensor4};
use gd_kernels::{KeyShape, Precision, Problem};
use rand::RngExt;

use crate::scan::{Found, Uploaded, judge, problem, run};
use crate::tensors::{Held, integers, numbers};
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

/// Rows of a cache in pages, in a random order, NaN in all that no key fills; and the table.
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

/// A problem with at most 16 queries in which some keys have coordinates that are not quantised, or none at all.
fn wild(seed: u64) -> Case {
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
    // The reference sees what the dtype keeps.
    p.k = case.k.base.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    case
}

/// The memory of a cache of 8-bit keys.
pub(crate) struct Codes {
    values: Buffer,
    bounds: Buffer,
    capacity: usize,
}

impl Codes {
    /// Quantises k `[sequences, Hk, keys, D]` in two steps, with more capacity than needed: rows behind the last stay NaN.
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
        let held = Self { values, bounds, capacity };
        let half = keys / 2;
        if half > 0 {
            quantize(gpu, &shape, k, half, 0, &held.slices())?;
        }
        let offset = k.data.offset + half * k.strides[2] * p.dtype.size_in_bytes();
        let rest = Tensor4 { data: Slice { buffer: k.data.buffer, offset }, strides: k.strides };
        quantize(gpu, &shape, &rest, keys - half, half, &held.slices())?;
        Ok(held)
    }

    pub(crate) fn slices(&self) -> Int8Slices<'_, Buffer> {
        Int8Slices { values: (&self.values).into(), bounds: (&self.bounds).into(), capacity: self.capacity }
    }
}

/// One problem at native precision.
pub(crate) fn check(gpu: &TestGpu, seed: u64) -> Verdict {
    let case = case(seed);
    let found = run(&gpu.twin(seed), &case)?;
    judge(&case, &found)?;
    check_case(gpu, seed, &case, &found, Precision::Native)
}

/// One problem with 8-bit keys; some have no bound.
pub(crate) fn check_certified(gpu: &TestGpu, seed: u64) -> Verdict {
    if gpu.arch().is_metal() {
        let certified = Problem { precision: Precision::Certified, ..problem(&case(seed)) };
        let refused = DecodePlan::new(&certified, false, &gpu.arch()).is_err();
        ensure!(refused, "a plan for 8-bit keys on Metal, which has none");
        return Ok(());
    }
    // The reference has no energies of infinite keys: the native scan has.
    let case = if seed % 4 == 3 { wild(seed) } else { case(seed) };
    let found = run(&gpu.twin(seed), &case)?;
    if seed % 4 != 3 {
        judge(&case, &found)?;
    }
    check_case(gpu, seed, &case, &found, Precision::Certified)
}

/// Decoding gives what the scan gives, twice with one workspace.
fn check_case(gpu: &TestGpu, seed: u64, case: &Case, found: &Found, precision: Precision) -> Verdict {
    let (p, plain) = (Problem { precision, ..problem(case) }, &case.problem);
    let fail = |e: gd_kernels::Error| e.to_string();
    let held = Uploaded::new(gpu, case);
    let x = held.inputs(case);
    let mut plan = DecodePlan::new(&p, x.prior.is_some(), &gpu.arch()).map_err(fail)?;
    if seed % 3 == 1 {
        // Room for hardly any candidate: the others are scored at once.
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
    let (paged_k, paged_v, held_table);
    let mut page = None;
    let (mut k, mut v, mut pieces) = (held.k.tensor4(), held.v.tensor4(), [p.batch, p.keys]);
    if pages {
        paged_k = Held::new(gpu, &paged(case, &plain.k, plain.dim, &table));
        paged_v = Held::new(gpu, &paged(case, &plain.v, plain.value_dim, &table));
        held_table = gpu.upload(bytemuck::cast_slice(&table)).map_err(fail)?;
        let count = table.iter().max().map_or(1, |&m| m as usize + 1);
        page = Some(Pages { table: (&held_table).into(), row, keys: PAGE, count });
        (k, v, pieces) = (paged_k.tensor4(), paged_v.tensor4(), [count, PAGE]);
    }
    let (bias, codes);
    let key_data = match precision {
        Precision::Native => {
            let shape = KeyShape {
                sequences: pieces[0],
                kv_heads: p.kv_heads,
                head_dim: p.head_dim,
                dtype: p.dtype,
                score: p.score,
            };
            let beta = held.inputs(case).beta;
            let inputs = BiasInputs { k, q_heads: p.q_heads, beta, prior: None };
            let exact = key_bias(gpu, &shape, pieces[1], &inputs).map_err(fail)?;
            // A cache that has grown has room for more, of which nothing may be read.
            let (row, heads) = (pieces[1].next_multiple_of(PAGE), pieces[0] * p.kv_heads);
            let room = row + PAGE * (seed as usize % 3);
            let mut all = vec![f32::NAN; heads * room];
            let exact = gpu.download((&exact).into(), heads * row * 4).map_err(fail)?;
            for (to, from) in all.chunks_mut(room).zip(exact.chunks(row * 4)) {
                to[..row].copy_from_slice(bytemuck::cast_slice(from));
            }
            bias = gpu.upload(bytemuck::cast_slice(&all)).map_err(fail)?;
            KeyData::Bias((&bias).into(), room)
        }
        Precision::Certified => {
            codes = Codes::new(gpu, &p, &k, pieces).map_err(fail)?;
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
        // Sums in another order than the scan's: another key where rounding decides.
        let own = Found { slots: 1, index: all.clone(), energy: energies.clone(), flags: vec![0.0; rows] };
        judge(case, &own)?;
    } else {
        let same = (&all, &energies) == (&found.index, &found.energy);
        ensure!(same, "{plan}: {all:?} not {:?}, {}", found.index, case.name());
    }
    let tau: Vec<f32> = (0..p.q_heads)
        .map(|h| {
            let own = (0..rows).filter(|r| r / p.queries % p.q_heads == h).map(|r| energies[r]);
            let own: Vec<f64> = own.filter(|e| e.is_finite()).collect();
            own.get(own.len() / 2).map_or(0.0, |e| *e as f32)
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
                "step {again}, {plan}: {got:?} not {want:?}, row {b} {h} {i} of {}",
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

#[test]
fn certified_decoding_is_the_scan_to_the_bit() {
    crate::suite("decode, 8-bit keys", 100, |seed| check_certified(&TestGpu::new(seed + 78), seed));
}

#[test]
fn decoding_is_the_scan_to_the_bit() {
    crate::suites("decode", [60, 60], 77, check);
}
