//! softmax_attention against its defining sums in f64, finite differences, dtypes, strides and thread counts.

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{Mask, softmax_attention};
use gd_testing::log_cases;
use gd_testing::tensors::*;

const SCALE: f64 = 0.3;

/// q, k, v, prior and sink for [B, Hq, Hk, N, M, D, Dv].
fn inputs([b, hq, hk, n, m, d, dv]: [usize; 7]) -> [Tensor; 5] {
    [
        noise(1, &[b, hq, n, d], 3.0),
        noise(2, &[b, hk, m, d], 3.0),
        noise(3, &[b, hk, m, dv], 2.0),
        noise(4, &[b, hk, m], 2.0),
        noise(5, &[hq], 2.0),
    ]
}

/// The same with a sink for every query.
fn with_sinks_of_queries(t: &[Tensor; 5]) -> [Tensor; 5] {
    let [q, k, v, prior, _] = t.clone();
    let sink = noise(6, &q.dims()[..3], 2.0);
    [q, k, v, prior, sink]
}

fn attend(t: &[Tensor], mask: &Mask) -> Result<Tensor> {
    Ok(softmax_attention(&t[0], &t[1], &t[2], t.get(3), t.get(4), mask, SCALE)?)
}

/// Every sum of the definition, with plain exponentials.
pub(crate) fn naive(t: &[Tensor], mask: &Mask, scale: f64) -> Tensor {
    let (b, hq, n, d) = t[0].dims4().unwrap();
    let (_, hk, m, dv) = t[2].dims4().unwrap();
    let all: Vec<Vec<f64>> = t.iter().map(values).collect();
    let mut out = Vec::new();
    for row in 0..b * hq * n {
        let (batch, head, query) = (row / (hq * n), row / n % hq, row % n);
        let kv = batch * hk + head / (hq / hk);
        // A sink of every head, or of every query of every head.
        let mut total = all.get(4).map_or(0.0, |sink| sink[if sink.len() == hq { head } else { row }].exp());
        let mut sums = vec![0.0; dv];
        for j in (0..m).filter(|&j| mask.visible(batch, query, m).contains(&j)) {
            let dot: f64 = (0..d).map(|x| all[0][row * d + x] * all[1][(kv * m + j) * d + x]).sum();
            let weight = (scale * dot + all.get(3).map_or(0.0, |prior| prior[kv * m + j])).exp();
            total += weight;
            sums.iter_mut().enumerate().for_each(|(x, sum)| *sum += weight * all[2][(kv * m + j) * dv + x]);
        }
        out.extend(sums.iter().map(|sum| if total > 0.0 { sum / total } else { 0.0 }));
    }
    Tensor::from_vec(out, (b, hq, n, dv), &Device::Cpu).unwrap()
}

/// Sizes of one and of several blocks, and the masks of each.
fn problems() -> Vec<([usize; 7], Vec<Mask>)> {
    let small = [2, 4, 2, 7, 9, 5, 3];
    let masks = vec![
        Mask::none(),
        Mask::causal(0),
        Mask::causal(-3),
        Mask::causal(2),
        Mask::window(3, 1),
        Mask::causal(0).kv_len(vec![0, 7]),
        Mask::causal(2).packed(vec![vec![0, 4, 9]]),
    ];
    vec![
        (small, masks),
        ([1, 1, 1, 1, 1, 1, 1], vec![Mask::none(), Mask::causal(-1)]),
        ([1, 3, 1, 70, 270, 3, 2], vec![Mask::causal(200), Mask::window(33, 200)]),
        ([1, 2, 1, 300, 300, 2, 1], vec![Mask::causal(0).packed(vec![vec![0, 100, 257, 300]])]),
        ([1, 6, 2, 1, 700, 4, 3], vec![Mask::none()]),
    ]
}

#[test]
fn equals_the_defining_quotient() {
    let mut cases = 0;
    for (sizes, masks) in problems() {
        let t = inputs(sizes);
        for mask in &masks {
            for inputs in [&t[..3], &t[..4], &t, &with_sinks_of_queries(&t)] {
                let got = attend(inputs, mask).unwrap();
                assert_close("softmax attention", &got, &naive(inputs, mask, SCALE), 1e-12);
                cases += 1;
            }
        }
    }
    log_cases("softmax-attention", cases);
}

#[test]
fn gradients_match_finite_differences() {
    for (sizes, masks) in problems() {
        for mask in &masks {
            check_gradients(&inputs(sizes), |t| attend(t, mask));
            check_gradients(&with_sinks_of_queries(&inputs(sizes)), |t| attend(t, mask));
        }
        check_gradients(&inputs(sizes)[..3], |t| attend(t, &masks[0]));
    }
}

#[test]
fn every_dtype_is_within_its_bound() {
    check_dtypes(&inputs([2, 4, 2, 7, 9, 5, 3]), |t| attend(t, &Mask::causal(0)));
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let t = inputs([1, 4, 2, 600, 600, 3, 2]).map(|t| t.to_dtype(DType::F32).unwrap());
    same_bits(|| with_gradients(&t, |t| attend(t, &Mask::causal(0))));
}

#[test]
fn views_are_read_in_place() {
    let t = [noise(1, &[1, 40, 2, 3], 3.0), noise(2, &[1, 90, 2, 8], 3.0)];
    check_gradients(&t, |t| {
        let q = t[0].transpose(1, 2)?;
        let k = t[1].transpose(1, 2)?.narrow(3, 1, 3)?.narrow(2, 5, 70)?;
        let v = t[1].narrow(1, 20, 70)?.transpose(1, 2)?.narrow(3, 4, 2)?;
        Ok(softmax_attention(&q, &k, &v, None, None, &Mask::causal(9), SCALE)?)
    });
}

#[test]
fn large_scores_and_excluded_keys_stay_finite() {
    let mut t = inputs([1, 2, 1, 66, 66, 3, 2]);
    t[0] = (&t[0] * 1e3).unwrap();
    let mut prior = vec![0.0; 66];
    prior[..40].fill(f64::NEG_INFINITY);
    t[3] = Tensor::from_vec(prior, (1, 1, 66), &Device::Cpu).unwrap();
    for dtype in [DType::F64, DType::F32] {
        let low = t.clone().map(|t| t.to_dtype(dtype).unwrap());
        let all = with_gradients(&low[..4], |t| attend(t, &Mask::causal(0)));
        assert!(all.iter().all(|t| values(t).iter().all(|x| x.is_finite())), "{dtype:?}");
        // The first 40 queries see excluded keys only.
        assert!(values(&all[0].narrow(2, 0, 40).unwrap()).iter().all(|&y| y == 0.0));
        assert!(values(&all[0].narrow(2, 40, 26).unwrap()).iter().all(|&y| y != 0.0));
    }
}

#[test]
fn invalid_tensors_are_refused() {
    let t = inputs([1, 4, 2, 3, 5, 2, 2]);
    let error = |t: &[Tensor]| attend(t, &Mask::none()).unwrap_err().to_string();
    let [q, k, v, prior, sink] = t.clone();
    let three = noise(1, &[1, 3, 3, 2], 1.0);
    assert!(error(&[three, k.clone(), v.clone()]).contains("[1, 3, 3, 2]"));
    assert!(error(&[q.clone(), k.to_dtype(DType::F32).unwrap(), v.clone()]).contains("F32"));
    assert!(error(&[q.clone(), k.clone(), v.clone(), prior.narrow(2, 0, 4).unwrap()]).contains("[1, 2, 4]"));
    assert!(
        error(&[q, k, v, prior, sink.narrow(0, 0, 2).unwrap()])
            .contains("the sink is [2], not [4] or [1, 4, 3]")
    );
}
