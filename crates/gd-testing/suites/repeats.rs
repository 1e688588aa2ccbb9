//! Repeated calls with the same inputs give the same bits.

use candle_core::{DType, Device, Result, Tensor, Var};
use gd_kernels::{
    Gate, Mask, Precision, Scan, Select, causal_conv, running_average, scan, scan_select, select,
};

use crate::{Target, sanitized, targets};
use gd_testing::problems::{rng, uniform};

const REPEATS: usize = 200;

fn noise(seed: u64, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    let values = uniform(&mut rng(seed), shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

fn bits(t: &Tensor) -> Result<Vec<u64>> {
    let flat = t.to_device(&Device::Cpu)?.flatten_all()?;
    match t.dtype() {
        DType::I32 => Ok(flat.to_vec1::<i32>()?.into_iter().map(|x| x as u64).collect()),
        _ => Ok(flat.to_dtype(DType::F64)?.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect()),
    }
}

/// Bits of results and gradients of all operators that sum: 8 candidates of `n` keys, most of them read by many
/// queries.
fn pass(dtype: DType, n: usize, target: &Target) -> Result<Vec<u64>> {
    let device = target.device();
    let var = |seed, shape: &[usize]| Var::from_tensor(&noise(seed, shape, dtype, device)?);
    let (q, k, v) = (var(1, &[2, 4, n, 64])?, var(2, &[2, 2, n, 64])?, var(3, &[2, 2, n, 64])?);
    let beta = Var::from_tensor(&Tensor::full(0.125f32, 4, device)?)?;
    let threshold = Var::from_tensor(&Tensor::full(6f32, 4, device)?)?;
    let mask = Mask::causal(0);
    let candidates = scan(&q, &k, &Scan::new(&beta, &mask, 8))?;
    let how = Select {
        threshold: Some(&threshold),
        gate: Gate::Energy { temperature: 1.0 },
        value_floor: 0.1,
        ..Select::new(&beta)
    };
    let selected = select(&q, &k, &v, &candidates, &how)?;
    let (decay, write) = (var(4, &[2, 4, n])?, var(5, &[2, 4, n])?);
    let (mean, _) = running_average(&decay, &write, &v, None)?;
    let rows = selected.y.transpose(1, 2)?.reshape((2, n, 256))?;
    let taps = var(6, &[256, 4])?;
    let (mixed, _) = causal_conv(&rows, &taps, None)?;
    let loss = (mixed.sqr()?.sum_all()? + mean.sqr()?.sum_all()?)?;
    let grads = loss.backward()?;
    let mut all = bits(&selected.index)?;
    for t in [&candidates.energy, &selected.y, &selected.gate, &mean, &mixed] {
        all.extend(bits(t)?);
    }
    for var in [&q, &k, &v, &beta, &threshold, &decay, &write, &taps] {
        all.extend(bits(grads.get(var).expect("a gradient"))?);
    }
    let fused = scan_select(&q, &k, &v, &Scan::new(&beta, &mask, 1), None)?;
    let last = scan_select(&q.narrow(2, n - 1, 1)?, &k, &v, &Scan::new(&beta, &Mask::none(), 1), None)?;
    for t in [&fused.index, &fused.y, &last.index, &last.y] {
        all.extend(bits(t)?);
    }
    // Metal has no 8-bit keys.
    if target.name() != "metal" {
        let certified = Scan { precision: Precision::Certified, ..Scan::new(&beta, &mask, 8) };
        let candidates = scan(&q, &k, &certified)?;
        for t in [&candidates.index, &candidates.energy] {
            all.extend(bits(t)?);
        }
        // The number of keys that are scored exactly does not change either.
        all.push(candidates.rescored.share()?.to_bits());
    }
    Ok(all)
}

#[test]
fn repetitions_are_equal_to_the_bit() -> Result<()> {
    let (repeats, rows) = if sanitized() { (2, 67) } else { (REPEATS, 260) };
    for target in targets() {
        for dtype in [DType::F32, DType::BF16] {
            let pass = || target.run(|| pass(dtype, rows, &target));
            let first = pass()?;
            assert!(first.iter().any(|x| *x != first[0]));
            for n in 1..repeats {
                assert_eq!(pass()?, first, "repetition {n} in {dtype:?}");
            }
            target.count();
        }
    }
    println!("{repeats} repetitions, equal to the bit");
    Ok(())
}
