//! running_average against its defining sums, finite differences, chunks of the sequence, extreme
//! exponents, dtypes and thread counts.

use candle_core::{DType, Device, Result, Tensor};
use gd_kernels::{AverageState, running_average};

use gd_testing::tensors::*;

/// decay, write, v of given sizes.
fn inputs([b, h, hk, n, d]: [usize; 5]) -> [Tensor; 3] {
    [noise(1, &[b, h, n], 4.0), noise(2, &[b, h, n], 3.0), noise(3, &[b, hk, n, d], 2.0)]
}

const SIZES: [[usize; 5]; 7] = [
    [1, 1, 1, 1, 1],
    [2, 2, 2, 63, 3],
    [1, 4, 2, 64, 2],
    [2, 3, 1, 65, 4],
    [1, 6, 2, 130, 3],
    [1, 2, 1, 7, 33],
    [1, 1, 1, 200, 2],
];

fn mean(t: &[Tensor], state: Option<&AverageState>) -> Result<Tensor> {
    Ok(running_average(&t[0], &t[1], &t[2], state)?.0)
}

fn state(b: usize, h: usize, d: usize) -> AverageState {
    AverageState { mean: noise(8, &[b, h, d], 2.0), log_weight: noise(9, &[b, h], 1.0) }
}

/// n_t / d_t, from the defining recurrences with plain exponentials.
fn naive([decay, write, v]: &[Tensor; 3], state: Option<&AverageState>) -> Tensor {
    let (b, h, n) = decay.dims3().unwrap();
    let (_, hk, _, d) = v.dims4().unwrap();
    let (a, w, vs) = (values(decay), values(write), values(v));
    let mut out = Vec::new();
    for s in 0..b * h {
        let vh = s / h * hk + s % h / (h / hk);
        let mut weight = state.map_or(0.0, |st| values(&st.log_weight)[s].exp());
        let mut sum: Vec<f64> = match state {
            Some(st) => values(&st.mean)[s * d..(s + 1) * d].iter().map(|m| m * weight).collect(),
            None => vec![0.0; d],
        };
        for t in 0..n {
            let (a, e) = (1.0 / (1.0 + (-a[s * n + t]).exp()), w[s * n + t].exp());
            weight = a * weight + e;
            for (j, sum) in sum.iter_mut().enumerate() {
                *sum = a * *sum + e * vs[(vh * n + t) * d + j];
                out.push(*sum / weight);
            }
        }
    }
    Tensor::from_vec(out, (b, h, n, d), &Device::Cpu).unwrap()
}

#[test]
fn equals_the_defining_quotient() {
    for sizes in SIZES {
        let (t, st) = (inputs(sizes), state(sizes[0], sizes[1], sizes[4]));
        assert_close("average", &mean(&t, None).unwrap(), &naive(&t, None), 1e-12);
        assert_close("with state", &mean(&t, Some(&st)).unwrap(), &naive(&t, Some(&st)), 1e-12);
    }
}

#[test]
fn gradients_match_finite_differences() {
    for sizes in SIZES {
        let st = state(sizes[0], sizes[1], sizes[4]);
        check_gradients(&inputs(sizes), |t| mean(t, None));
        check_gradients(&inputs(sizes), |t| mean(t, Some(&st)));
    }
}

#[test]
fn gradients_span_many_blocks_at_slow_decay() {
    let [decay, write, v] = inputs([1, 2, 1, 330, 2]);
    check_gradients(&[(decay + 8.0).unwrap(), write, v], |t| mean(t, None));
}

/// A decay logit of minus infinity is the start of a sequence: values and gradients on both sides are
/// those of the two sequences alone, also across blocks.
#[test]
fn sequences_after_a_reset_stand_alone() {
    for (n, starts) in [(9, vec![1, 2, 6]), (200, vec![63, 64, 130, 131, 192])] {
        let [decay, write, v] = inputs([2, 4, 2, n, 3]);
        let mut resets = vec![0.0; n];
        starts.iter().for_each(|&s: &usize| resets[s] = f64::NEG_INFINITY);
        let resets = Tensor::from_vec(resets, (1, 1, n), &Device::Cpu).unwrap();
        let packed = |t: &[Tensor]| mean(&[t[0].broadcast_add(&resets)?, t[1].clone(), t[2].clone()], None);
        let alone = |t: &[Tensor]| {
            let cuts = [&[0], &starts[..], &[n]].concat();
            let part = |c: &[usize]| {
                let cut = |t: &Tensor| t.narrow(2, c[0], c[1] - c[0]);
                mean(&[cut(&t[0])?, cut(&t[1])?, cut(&t[2])?], None)
            };
            Tensor::cat(&cuts.windows(2).map(part).collect::<Result<Vec<_>>>()?, 2)
        };
        let inputs = [decay, write, v];
        for (packed, alone) in with_gradients(&inputs, packed).iter().zip(with_gradients(&inputs, alone)) {
            assert_close("reset", packed, &alone, 1e-12);
        }
    }
}

#[test]
fn gradients_reach_views() {
    let t = [noise(1, &[2, 70, 4], 3.0), noise(2, &[2, 5, 70], 3.0), noise(3, &[2, 70, 2, 7], 2.0)];
    check_gradients(&t, |t| {
        let v = t[2].transpose(1, 2)?.narrow(3, 2, 3)?;
        Ok(running_average(&t[0].transpose(1, 2)?, &t[1].narrow(1, 1, 4)?, &v, None)?.0)
    });
    check_gradients(&[t[0].clone(), t[0].affine(0.5, 0.1).unwrap(), noise(4, &[2, 1, 3, 70], 2.0)], |t| {
        let turned = t[2].transpose(2, 3)?;
        Ok(running_average(&t[0].transpose(1, 2)?, &t[1].transpose(1, 2)?, &turned, None)?.0)
    });
}

#[test]
fn chunks_and_single_steps_equal_the_whole() {
    let t = inputs([2, 4, 2, 130, 5]);
    let (whole, last) = running_average(&t[0], &t[1], &t[2], None).unwrap();
    let chunk = |from: usize, len: usize, state: Option<&AverageState>| {
        let cut = |i: usize| t[i].narrow(2, from, len).unwrap();
        running_average(&cut(0), &cut(1), &cut(2), state).unwrap()
    };
    for cut in [1, 63, 64, 100, 129] {
        let (a, st) = chunk(0, cut, None);
        let (b, end) = chunk(cut, 130 - cut, Some(&st));
        assert_close("halves", &Tensor::cat(&[a, b], 2).unwrap(), &whole, 1e-13);
        assert_close("mean", &end.mean, &last.mean, 1e-13);
        assert_close("log weight", &end.log_weight, &last.log_weight, 1e-13);
    }
    let mut st = None;
    for i in 0..130 {
        let (m, next) = chunk(i, 1, st.as_ref());
        assert_close("step", &m, &whole.narrow(2, i, 1).unwrap(), 1e-13);
        st = Some(next);
    }
}

#[test]
fn extreme_exponents_never_give_nan() {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        for (decay_scale, write_scale, shift) in
            [(1e4, 1e4, 0.0), (1e4, 1.0, -3e4), (1.0, 1e4, 3e4), (1e4, 1e4, -5e4), (6e4, 6e4, 0.0)]
        {
            let t = [
                noise(1, &[1, 2, 130], decay_scale)
                    .affine(1.0, shift / 10.0)
                    .unwrap()
                    .clamp(-6e4, 6e4)
                    .unwrap(),
                noise(2, &[1, 2, 130], write_scale).affine(1.0, shift).unwrap().clamp(-6e4, 6e4).unwrap(),
                noise(3, &[1, 1, 130, 3], 2.0),
            ]
            .map(|t| t.to_dtype(dtype).unwrap());
            for t in with_gradients(&t, |t| mean(t, None)) {
                assert!(values(&t).iter().all(|x| x.is_finite()), "{dtype:?} {decay_scale} {write_scale}");
            }
            let m = mean(&t, None).unwrap();
            assert!(values(&m).iter().all(|m| m.abs() <= 2.0 + 1e-2), "an average leaves the values' range");
        }
    }
}

#[test]
fn infinite_decay_resets_and_infinite_write_keeps() {
    let (low, n) = (f64::NEG_INFINITY, 100);
    let [decay, write, v] = inputs([1, 1, 1, n, 2]);
    let at = |t: &Tensor, i: usize, x: f64| {
        let mut all = values(t);
        all[i] = x;
        Tensor::from_vec(all, t.shape(), &Device::Cpu).unwrap()
    };
    let huge = (v.narrow(2, 0, 70).unwrap() * 1e12).unwrap();
    let v = Tensor::cat(&[huge, v.narrow(2, 70, 30).unwrap()], 2).unwrap();
    let cut = |t: &Tensor| t.narrow(2, 70, 30).unwrap();
    let alone = mean(&[cut(&decay), cut(&write), cut(&v)], None).unwrap();
    for reset in [low, -1e300] {
        let m = mean(&[at(&decay, 70, reset), write.clone(), v.clone()], None).unwrap();
        assert_close("after a reset", &cut(&m), &alone, 1e-12);
    }
    let m = mean(&[decay.clone(), at(&write, 5, low), v.clone()], None).unwrap();
    assert_eq!(values(&m.narrow(2, 5, 1).unwrap()), values(&m.narrow(2, 4, 1).unwrap()));
    let t = [at(&decay, 0, low), at(&write, 0, low), v.clone()];
    let all = with_gradients(&t, |t| mean(t, None));
    assert!(all.iter().all(|t| values(t).iter().all(|x| x.is_finite())));
    assert_eq!(values(&all[0].narrow(2, 0, 1).unwrap()), [0.0, 0.0]);
}

#[test]
fn constant_values_stay_constant() {
    let n = 5000;
    let decay = Tensor::full(12f32, (1, 1, n), &Device::Cpu).unwrap();
    let write = noise(2, &[1, 1, n], 1.0).affine(1.0, -3.0).unwrap().to_dtype(DType::F32).unwrap();
    let v = Tensor::full(0.7f32, (1, 1, n, 3), &Device::Cpu).unwrap();
    let m = mean(&[decay, write, v], None).unwrap();
    assert!(values(&m).iter().all(|m| (m - f64::from(0.7f32)).abs() < 5e-7));
}

#[test]
fn state_is_a_constant() {
    let vars = inputs([1, 1, 1, 3, 2]).map(|t| candle_core::Var::from_tensor(&t).unwrap());
    let st = state(1, 1, 2);
    let mean = candle_core::Var::from_tensor(&st.mean).unwrap();
    let st = AverageState { mean: mean.as_tensor().clone(), ..st };
    let (m, next) = running_average(&vars[0], &vars[1], &vars[2], Some(&st)).unwrap();
    let grads = m.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&mean).is_none() && vars.iter().all(|v| grads.get(v).is_some()));
    assert!(!next.mean.track_op() && !next.log_weight.track_op());
}

#[test]
fn low_precision_stays_near_f64() {
    check_dtypes(&inputs([2, 4, 2, 130, 9]), |t| mean(t, None));
    let half = inputs([1, 2, 1, 9, 3]).map(|t| t.to_dtype(DType::BF16).unwrap());
    let (_, st) = running_average(&half[0], &half[1], &half[2], None).unwrap();
    assert_eq!((st.mean.dtype(), st.log_weight.dtype()), (DType::F32, DType::F32));
    assert_eq!(mean(&half, Some(&st)).unwrap().dtype(), DType::BF16);
}

#[test]
fn bits_do_not_depend_on_the_thread_count_or_the_batch() {
    for sizes in [[1, 1, 1, 2000, 32], [4, 4, 2, 130, 48]] {
        let t = inputs(sizes).map(|t| t.to_dtype(DType::F32).unwrap());
        same_bits(|| with_gradients(&t, |t| mean(t, None)));
    }
    let t = inputs([4, 4, 2, 130, 48]).map(|t| t.to_dtype(DType::F32).unwrap());
    let whole = mean(&t, None).unwrap();
    let second = t.map(|t| t.narrow(0, 1, 1).unwrap());
    assert_eq!(values(&mean(&second, None).unwrap()), values(&whole.narrow(0, 1, 1).unwrap()));
}

#[test]
fn errors_name_the_values() {
    let [decay, write, v] = inputs([2, 4, 2, 6, 3]);
    let error = |t: [&Tensor; 3], st: Option<&AverageState>| {
        running_average(t[0], t[1], t[2], st).unwrap_err().to_string()
    };
    assert!(error([&decay.get(0).unwrap(), &write, &v], None).contains("[4, 6]"));
    let short = write.narrow(2, 0, 5).unwrap();
    assert!(error([&decay, &short, &v], None).contains("[2, 4, 5]"));
    let three = noise(1, &[2, 3, 6, 3], 1.0);
    assert!(error([&decay, &write, &three], None).contains("4 heads over 3 value heads"));
    let none = v.narrow(3, 0, 0).unwrap();
    assert!(error([&decay, &write, &none], None).contains("[2, 2, 6, 0]"));
    assert!(error([&decay, &write, &v.to_dtype(DType::F32).unwrap()], None).contains("F32"));
    assert!(error([&decay, &write, &v], Some(&state(2, 2, 3))).contains("[2, 4, 3]"));
    let narrow = state(2, 4, 3);
    let narrow = AverageState { mean: narrow.mean.to_dtype(DType::F32).unwrap(), ..narrow };
    assert!(error([&decay, &write, &v], Some(&narrow)).contains("F32"));
}
