//! causal_conv against its sum, finite differences, chunks of the sequence, dtypes and thread counts.

use candle_core::{DType, Device, Tensor};
use gd_kernels::{causal_conv, packed_causal_conv};

use gd_testing::tensors::*;

/// The defining sum.
fn naive(x: &Tensor, weight: &Tensor, state: Option<&Tensor>) -> Tensor {
    let (b, n, c) = x.dims3().unwrap();
    let w = weight.dim(1).unwrap();
    let (xs, ws) = (values(x), values(weight));
    let before = state.map(values).unwrap_or(vec![0.0; b * (w - 1) * c]);
    let mut y = vec![0.0; b * n * c];
    for (i, y) in y.iter_mut().enumerate() {
        let (b, t, ch) = (i / (n * c), i / c % n, i % c);
        for k in 0..w {
            let at = t as isize - w as isize + 1 + k as isize;
            *y += ws[ch * w + k]
                * match usize::try_from(at) {
                    Ok(at) => xs[(b * n + at) * c + ch],
                    Err(_) => before[(b * (w - 1) + t + k) * c + ch],
                };
        }
    }
    Tensor::from_vec(y, (b, n, c), &Device::Cpu).unwrap()
}

#[test]
fn equals_the_defining_sum() {
    for (b, n, c, w) in [(1, 1, 1, 1), (2, 5, 3, 4), (1, 2, 7, 4), (3, 130, 5, 2), (2, 65, 33, 8)] {
        let (x, weight) = (noise(1, &[b, n, c], 2.0), noise(2, &[c, w], 2.0));
        let state = noise(3, &[b, w - 1, c], 2.0);
        for state in [None, Some(&state)] {
            let (y, _) = causal_conv(&x, &weight, state).unwrap();
            assert_close("conv", &y, &naive(&x, &weight, state), 1e-13);
        }
    }
}

#[test]
fn chunks_equal_the_whole() {
    for w in [1, 2, 4] {
        let (x, weight) = (noise(1, &[2, 9, 3], 2.0), noise(2, &[3, w], 2.0));
        let (whole, last) = causal_conv(&x, &weight, None).unwrap();
        for cut in [1, 2, 3, 8] {
            let (a, state) = causal_conv(&x.narrow(1, 0, cut).unwrap(), &weight, None).unwrap();
            assert_eq!(state.dims(), [2, w - 1, 3]);
            let (b, end) = causal_conv(&x.narrow(1, cut, 9 - cut).unwrap(), &weight, Some(&state)).unwrap();
            assert_eq!(values(&Tensor::cat(&[a, b], 1).unwrap()), values(&whole));
            assert_eq!(values(&end), values(&last));
        }
        let mut state = None;
        for t in 0..9 {
            let (y, next) = causal_conv(&x.narrow(1, t, 1).unwrap(), &weight, state.as_ref()).unwrap();
            assert_eq!(values(&y), values(&whole.narrow(1, t, 1).unwrap()));
            state = Some(next);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for (b, n, c, w) in [(1, 1, 1, 1), (2, 5, 3, 4), (1, 2, 7, 4), (1, 130, 2, 3), (2, 300, 33, 2)] {
        let inputs = [noise(1, &[b, n, c], 2.0), noise(2, &[c, w], 2.0)];
        let state = noise(3, &[b, w - 1, c], 2.0);
        check_gradients(&inputs, |t| Ok(causal_conv(&t[0], &t[1], None)?.0));
        check_gradients(&inputs, |t| Ok(causal_conv(&t[0], &t[1], Some(&state))?.0));
    }
}

#[test]
fn gradients_reach_views() {
    let inputs = [noise(1, &[5, 2, 6], 2.0), noise(2, &[4, 4], 2.0)];
    check_gradients(&inputs, |t| {
        Ok(causal_conv(&t[0].transpose(0, 1)?.narrow(2, 1, 4)?, &t[1].t()?, None)?.0)
    });
    check_gradients(&inputs, |t| {
        Ok(causal_conv(&t[0].narrow(2, 2, 4)?.transpose(1, 2)?, &t[1].narrow(0, 1, 2)?, None)?.0)
    });
}

/// Boundaries per batch entry, with empty sequences and some shorter than the weight.
fn boundaries() -> Vec<Vec<usize>> {
    vec![vec![0, 1, 3, 3, 8, 20], vec![0, 0, 7, 19, 20]]
}

#[test]
fn packed_sequences_are_convolved_alone() {
    for w in [1, 2, 4, 9] {
        let (x, weight) = (noise(1, &[2, 20, 3], 2.0), noise(2, &[3, w], 2.0));
        for lists in [boundaries(), vec![boundaries()[0].clone()]] {
            let y = packed_causal_conv(&x, &weight, &lists).unwrap();
            for b in 0..2 {
                for ends in lists[b % lists.len()].windows(2).filter(|e| e[0] < e[1]) {
                    let row = |t: &Tensor| {
                        t.narrow(0, b, 1).unwrap().narrow(1, ends[0], ends[1] - ends[0]).unwrap()
                    };
                    assert_close("packed", &row(&y), &naive(&row(&x), &weight, None), 1e-13);
                }
            }
        }
        check_gradients(&[x, weight], |t| Ok(packed_causal_conv(&t[0], &t[1], &boundaries())?));
    }
}

#[test]
fn nothing_leaks_between_packed_sequences() {
    let mut values = values(&noise(1, &[1, 8, 2], 2.0));
    values[6..8].fill(f64::NAN);
    let x = Tensor::from_vec(values, (1, 8, 2), &Device::Cpu).unwrap();
    let weight = noise(2, &[2, 4], 2.0);
    let y = packed_causal_conv(&x, &weight, &[vec![0, 4, 8]]).unwrap();
    let y = self::values(&y);
    assert!(y[6..8].iter().all(|y| y.is_nan()) && y[8..].iter().all(|y| y.is_finite()), "{y:?}");
}

#[test]
fn packed_boundaries_must_fit() {
    let (x, weight) = (noise(1, &[2, 5, 3], 1.0), noise(2, &[3, 4], 1.0));
    for (lists, word) in [
        (vec![vec![0, 4]], "[0, 4]"),
        (vec![vec![0, 3, 2, 5]], "[0, 3, 2, 5]"),
        (vec![vec![0, 5]; 3], "3 lists"),
        (vec![], "0 lists"),
    ] {
        let error = packed_causal_conv(&x, &weight, &lists).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn state_is_a_constant() {
    let var = |seed, shape: &[usize]| candle_core::Var::from_tensor(&noise(seed, shape, 1.0)).unwrap();
    let (x, weight, state) = (var(1, &[1, 4, 2]), var(2, &[2, 3]), var(3, &[1, 2, 2]));
    let (y, next) = causal_conv(&x, &weight, Some(&state)).unwrap();
    let grads = y.sum_all().unwrap().backward().unwrap();
    assert!(grads.get(&x).is_some() && grads.get(&state).is_none() && !next.track_op());
}

#[test]
fn low_precision_stays_near_f64() {
    let inputs = [noise(1, &[2, 65, 9], 1.0), noise(2, &[9, 4], 1.0)];
    check_dtypes(&inputs, |t| Ok(causal_conv(&t[0], &t[1], None)?.0));
}

#[test]
fn bits_do_not_depend_on_the_thread_count() {
    let inputs =
        [noise(1, &[3, 257, 96], 2.0), noise(2, &[96, 4], 2.0)].map(|t| t.to_dtype(DType::F32).unwrap());
    same_bits(|| with_gradients(&inputs, |t| Ok(causal_conv(&t[0], &t[1], None)?.0)));
}

#[test]
fn errors_name_the_values() {
    let x = noise(1, &[2, 5, 3], 1.0);
    let error = |x: &Tensor, weight: &Tensor, state: Option<&Tensor>| {
        causal_conv(x, weight, state).unwrap_err().to_string()
    };
    let w = noise(2, &[3, 4], 1.0);
    assert!(error(&x.get(0).unwrap(), &w, None).contains("[5, 3]"));
    assert!(error(&x, &noise(2, &[4, 4], 1.0), None).contains("[4, 4]"));
    assert!(error(&x, &w.narrow(1, 0, 0).unwrap(), None).contains("[3, 0]"));
    assert!(error(&x, &w.to_dtype(DType::F32).unwrap(), None).contains("F32"));
    assert!(error(&x, &w, Some(&noise(3, &[2, 4, 3], 1.0))).contains("[2, 3, 3]"));
    let ids = |t: &Tensor| t.to_dtype(DType::U32).unwrap();
    assert!(error(&ids(&x.abs().unwrap()), &ids(&w.abs().unwrap()), None).contains("U32"));
}
