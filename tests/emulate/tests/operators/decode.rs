//! Decoding, in one piece and in pages, against the scan of the same keys: the same key, bits and value row; on
//! Metal, which adds in another order, against the reference.

use candle_core::DType;
use gd_emulate::{Buffer, Emulator};
use gd_kernels::gpu::Gpu;
use gd_kernels::gpu::decode::{Inputs, Outputs, Pages, Plan, decode};
use gd_kernels::gpu::scan::key_bias;
use gd_kernels::gpu::{Slice, Tensor4};
use rand::RngExt;

use crate::device::{Held, integers, numbers};
use crate::problems::{Case, Spec, rng};
use crate::scan::{Found, Uploaded, judge, problem, run};
use crate::{Verdict, ensure};

const DIMS: [usize; 7] = [8, 32, 40, 64, 96, 128, 256];
const LIMIT: usize = 600_000;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const PAGE: usize = 64;

/// A problem with at most 16 queries.
fn case(seed: u64) -> Case {
    let mut spec = Spec::with_dims(seed + 10_000, LIMIT, &DIMS);
    let raw = &mut spec.raw;
    let n = raw.queries.min(1 + seed as usize % 16);
    let mut q = Vec::new();
    for row in raw.q.chunks(raw.queries * raw.dim) {
        q.extend_from_slice(&row[..n * raw.dim]);
    }
    (raw.q, raw.queries) = (q, n);
    (spec.candidates, spec.protected) = (1, None);
    spec.build(DTYPES[(seed % 3) as usize])
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

/// One problem: decoding gives what the scan gives, three times with one workspace.
pub(crate) fn check(gpu: &Emulator, seed: u64) -> Verdict {
    let case = case(seed);
    let found = run(&gpu.twin(seed), &case)?;
    judge(&case, &found)?;
    let (p, plain) = (problem(&case), &case.problem);
    let fail = |e: gd_kernels::Error| e.to_string();
    let held = Uploaded::new(gpu, &case);
    let x = held.inputs(&case);
    let plan = Plan::new(&p, x.prior.is_some(), &gpu.arch()).map_err(fail)?;
    let mut rng = rng(seed);
    let row = plain.keys.div_ceil(PAGE);
    // One page more than needed, in a random order.
    let mut table: Vec<i32> = (0..(plain.batch * row) as i32 + 1).collect();
    for at in (1..table.len()).rev() {
        table.swap(at, rng.random_range(0..=at));
    }
    table.truncate(plain.batch * row);
    let pages = seed.is_multiple_of(2);
    let (k, v, held_table);
    let (k, v, bias, page): (Tensor4<'_, Buffer>, Tensor4<'_, Buffer>, Buffer, Option<Pages<'_, Buffer>>) =
        if pages {
            k = Held::new(gpu, &paged(&case, &plain.k, plain.dim, &table));
            v = Held::new(gpu, &paged(&case, &plain.v, plain.value_dim, &table));
            held_table = gpu.upload(bytemuck::cast_slice(&table)).map_err(fail)?;
            let count = table.iter().max().map_or(1, |&m| m as usize + 1);
            let page = gd_kernels::Problem { batch: count, keys: PAGE, ..p.clone() };
            let inputs = gd_kernels::gpu::scan::Inputs { k: k.tensor4(), prior: None, ..held.inputs(&case) };
            let bias = key_bias(gpu, &page, &inputs).map_err(fail)?;
            let pages = Pages { table: (&held_table).into(), row, keys: PAGE, count };
            (k.tensor4(), v.tensor4(), bias, Some(pages))
        } else {
            let inputs = gd_kernels::gpu::scan::Inputs { prior: None, ..held.inputs(&case) };
            (held.k.tensor4(), held.v.tensor4(), key_bias(gpu, &p, &inputs).map_err(fail)?, None)
        };
    let rows = p.batch * p.q_heads * p.queries;
    let workspace = gpu.zeros(plan.workspace_bytes(&p)).map_err(fail)?;
    let mut inputs = Inputs {
        q: x.q,
        k,
        v,
        value_dim: plain.value_dim,
        bias: (&bias).into(),
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
        judge(&case, &own)?;
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
fn decoding_is_the_scan_to_the_bit() {
    crate::suites("decode", [60, 60], 77, check);
}
