//! Scans of many queries with 8-bit keys through tensors, against native scans on the same device.

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{Int8Keys, Mask, Precision, Scan, Score, scan, scan_select};

use crate::{Target, sanitized, targets};
use gd_testing::problems::{rng, uniform};

fn noise(seed: u64, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    let values = uniform(&mut rng(seed), shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
}

/// Fails unless energies agree within the rounding of two orders of summation.
fn assert_close(a: &Tensor, b: &Tensor, name: &str) -> Result<()> {
    let host = |t: &Tensor| t.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>();
    for (at, (a, b)) in host(a)?.into_iter().zip(host(b)?).enumerate() {
        assert!(a == b || (a - b).abs() <= 1e-4 * (1.0 + b.abs()), "{name}: {a} not {b} at {at}");
    }
    Ok(())
}

#[test]
fn prefill_with_8_bit_keys_is_the_plain_scan() -> Result<()> {
    // Metal has no 8-bit keys.
    for target in targets().into_iter().filter(|target| target.name() != "metal") {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (score, candidates, d) in
                [(Score::Energy, 1, 128), (Score::Dot, 8, 64), (Score::Energy, 32, 40)]
            {
                target.run(|| prefill(&target, dtype, score, candidates, d))?;
            }
        }
    }
    Ok(())
}

fn prefill(target: &Target, dtype: DType, score: Score, candidates: usize, d: usize) -> Result<()> {
    let gpu = target.device();
    let (hq, hk, dv) = (4, 2, 48);
    let (b, n, m) = if sanitized() { (1, 37, 170) } else { (2, 700, 900) };
    let (q, k, v) = (
        noise(1, &[b, hq, n, d], dtype, gpu)?,
        noise(2, &[b, hk, m, d], dtype, gpu)?,
        noise(3, &[b, hk, m, dv], dtype, gpu)?,
    );
    let beta = Tensor::full(0.3f32, hq, gpu)?;
    let mask = Mask::causal((m - n) as i64);
    let plain = Scan { score, ..Scan::new(&beta, &mask, candidates) };
    let int8_keys = Int8Keys::new(&k, score).unwrap();
    for cached in [Some((&int8_keys).into()), None] {
        let certified = Scan { precision: Precision::Certified, cached, ..plain.clone() };
        let name = format!("{dtype:?} {score:?} K {candidates} D {d}, cached {}", cached.is_some());
        let (want, got) = (scan(&q, &k, &plain).unwrap(), scan(&q, &k, &certified).unwrap());
        assert_close(&got.energy, &want.energy, &name)?;
        assert_eq!(want.rescored.share().unwrap(), 1.0);
        let share = got.rescored.share().unwrap();
        assert!(share > 0.0 && share < 1.0, "{name}: {share} of the pairs scored");
        let select = |how: &Scan| scan_select(&q, &k, &v, how, None).unwrap();
        assert_close(&select(&certified).energy, &select(&plain).energy, &name)?;
        target.count();
    }
    let other = Int8Keys::new(&k.narrow(2, 0, m - 1)?, score).unwrap();
    let short = Scan { precision: Precision::Certified, cached: Some((&other).into()), ..plain.clone() };
    let refusal = scan(&q, &k, &short).unwrap_err().to_string();
    assert!(refusal.contains(&format!("[{b}, {hk}, {}, ", m - 1)), "{refusal}");
    Ok(())
}
