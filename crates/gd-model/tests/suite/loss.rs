//! The cross-entropy losses: formula, finite differences, dtypes, thread counts and invalid targets.

use candle_core::{DType, Device, Tensor};
use gd_kernels::cross_entropy::{
    IGNORE, count_targets, cross_entropy, linear_cross_entropy, linear_token_losses, token_losses,
};

use gd_testing::tensors::*;

fn targets(rows: usize, vocab: usize) -> Tensor {
    let ids: Vec<u32> = (0..rows).map(|i| (i * 7919 % vocab) as u32).collect();
    Tensor::new(&ids[..], &Device::Cpu).unwrap()
}

#[test]
fn the_loss_follows_its_formula_for_shifted_logits() {
    for shift in [0.0, 1e4, -1e4] {
        let logits = Tensor::new(&[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], &Device::Cpu).unwrap();
        let logits = (logits + shift).unwrap();
        let ids = Tensor::new(&[0u32, 2], &Device::Cpu).unwrap();
        let first = (1f64.exp() + 2f64.exp() + 3f64.exp()).ln() - 1.0;
        let loss = cross_entropy(&logits, &ids).unwrap();
        assert!((values(&loss)[0] - (first + 3f64.ln()) / 2.0).abs() < 1e-11);
        let each = token_losses(&logits, &ids).unwrap();
        assert!((f64::from(each[0]) - first).abs() < 1e-6 && (f64::from(each[1]) - 3f64.ln()).abs() < 1e-6);
    }
}

#[test]
fn gradients_match_finite_differences() {
    for (rows, vocab) in [(1, 1), (1, 5), (7, 33), (65, 64), (300, 3)] {
        let ids = targets(rows, vocab);
        check_gradients(&[noise(1, &[rows, vocab], 4.0)], |t| Ok(cross_entropy(&t[0], &ids)?));
    }
}

#[test]
fn ignored_rows_do_not_count() {
    let logits = noise(1, &[5, 9], 4.0);
    let ids = Tensor::new(&[3u32, IGNORE, 8, IGNORE, 0], &Device::Cpu).unwrap();
    assert_eq!(count_targets(&ids).unwrap(), 3);
    let counted = Tensor::new(&[0u32, 2, 4], &Device::Cpu).unwrap();
    let run = |rows: &Tensor, ids: &Tensor| -> Vec<Vec<f64>> {
        let got = with_gradients(std::slice::from_ref(rows), |t| Ok(cross_entropy(&t[0], ids)?));
        got.iter().map(values).collect()
    };
    let (all, subset) = (run(&logits, &ids), {
        let rows = logits.index_select(&counted, 0).unwrap();
        run(&rows, &ids.index_select(&counted, 0).unwrap())
    });
    assert_eq!(all[0], subset[0]);
    for (i, row) in all[1].chunks(9).enumerate() {
        match [0, 2, 4].iter().position(|&k| k == i) {
            Some(k) => assert_eq!(row, &subset[1][9 * k..9 * (k + 1)], "row {i}"),
            None => assert!(row.iter().all(|&g| g == 0.0), "row {i}: {row:?}"),
        }
    }
    let each = token_losses(&logits, &ids).unwrap();
    assert!(each[1] == 0.0 && each[3] == 0.0 && each.iter().filter(|&&l| l > 0.0).count() == 3, "{each:?}");
    check_gradients(&[logits], |t| Ok(cross_entropy(&t[0], &ids)?));
}

#[test]
fn the_loss_without_targets_is_zero() {
    let ids = Tensor::new(&[IGNORE, IGNORE], &Device::Cpu).unwrap();
    for got in with_gradients(&[noise(1, &[2, 9], 4.0)], |t| Ok(cross_entropy(&t[0], &ids)?)) {
        assert!(values(&got).iter().all(|&x| x == 0.0), "{got}");
    }
}

#[test]
fn gradients_reach_views() {
    let ids = targets(6, 9);
    check_gradients(&[noise(1, &[9, 6], 4.0)], |t| Ok(cross_entropy(&t[0].t()?, &ids)?));
    check_gradients(&[noise(1, &[8, 12], 4.0)], |t| {
        Ok(cross_entropy(&t[0].narrow(1, 2, 9)?.narrow(0, 1, 6)?, &ids)?)
    });
}

#[test]
fn low_precision_stays_near_f64() {
    let ids = targets(9, 300);
    for (dtype, bound) in DTYPES {
        let low = noise(1, &[9, 300], 4.0).to_dtype(dtype).unwrap();
        let got = with_gradients(std::slice::from_ref(&low), |t| Ok(cross_entropy(&t[0], &ids)?));
        let want = with_gradients(&[low.to_dtype(DType::F64).unwrap()], |t| Ok(cross_entropy(&t[0], &ids)?));
        // The loss is never in half precision.
        assert_eq!(got[0].dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });
        assert_close("loss", &got[0], &want[0], 2e-6);
        let (got, want) = (values(&got[1]), values(&want[1]));
        assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= bound * w.abs() + 1e-7), "{dtype:?}");
    }
}

#[test]
fn bits_do_not_depend_on_the_thread_count() {
    let (x, ids) = (noise(1, &[9000, 17], 4.0).to_dtype(DType::F32).unwrap(), targets(9000, 17));
    same_bits(|| with_gradients(std::slice::from_ref(&x), |t| Ok(cross_entropy(&t[0], &ids)?)));
}

#[test]
fn errors_name_the_values() {
    let x = noise(1, &[3, 5], 1.0);
    let error = |x: &Tensor, ids: &Tensor| cross_entropy(x, ids).unwrap_err().to_string();
    let ids = Tensor::new(&[0u32, 5, 1], &Device::Cpu).unwrap();
    let e = error(&x, &ids);
    assert!(e.contains("target 5 of row 1") && e.contains("vocabulary of 5"), "{e}");
    assert!(token_losses(&x, &ids).is_err());
    assert!(error(&x, &targets(4, 5)).contains("[3, 5]"));
    assert!(error(&x, &targets(3, 5).to_dtype(DType::I64).unwrap()).contains("I64"));
    assert!(error(&x.narrow(0, 0, 0).unwrap(), &ids.narrow(0, 0, 0).unwrap()).contains("[0, 5]"));
}

/// Hidden states and weights whose logits need several chunks, and targets, some of which are ignored.
fn projected(dtype: DType) -> ([Tensor; 2], Tensor) {
    let (rows, vocab) = (90, 50_000);
    let ids: Vec<u32> =
        (0..rows as u32).map(|i| if i % 7 == 3 { IGNORE } else { i * 7919 % vocab as u32 }).collect();
    let inputs = [noise(1, &[rows, 6], 1.0), noise(2, &[vocab, 6], 1.0)].map(|t| t.to_dtype(dtype).unwrap());
    (inputs, Tensor::new(&ids[..], &Device::Cpu).unwrap())
}

#[test]
fn the_fused_loss_is_that_of_all_logits() {
    for (dtype, bound) in [(DType::F64, 1e-13), (DType::F32, 2e-6), (DType::BF16, 3e-2)] {
        let (inputs, ids) = projected(dtype);
        let subset = inputs.clone().map(|t| t.narrow(0, 0, 20).unwrap());
        let low = targets(20, 20);
        for (inputs, ids) in [(inputs, ids), (subset, low)] {
            let got = with_gradients(&inputs, |t| Ok(linear_cross_entropy(&t[0], &t[1], &ids)?));
            let want = with_gradients(&inputs, |t| Ok(cross_entropy(&t[0].matmul(&t[1].t()?)?, &ids)?));
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert_close(&format!("{dtype:?}, result {i}"), got, want, bound);
            }
            let each = linear_token_losses(&inputs[0], &inputs[1], &ids).unwrap();
            assert_eq!(
                each,
                token_losses(&inputs[0].matmul(&inputs[1].t().unwrap()).unwrap(), &ids).unwrap()
            );
        }
    }
}

#[test]
fn fused_gradients_match_finite_differences() {
    let ([rows, weight], ids) = projected(DType::F64);
    let (rows, ids) = (rows.narrow(0, 0, 24).unwrap(), ids.narrow(0, 0, 24).unwrap());
    check_gradients(&[rows, weight], |t| linear_cross_entropy(&t[0], &t[1], &ids)? * 3.0);
    // Hidden states that depend on the weights, as with tied embeddings.
    let ids = Tensor::new(&[1u32, 4, IGNORE, 0], &Device::Cpu).unwrap();
    let rows = Tensor::new(&[0u32, 2, 3, 2], &Device::Cpu).unwrap();
    check_gradients(&[noise(3, &[5, 3], 1.0)], |t| {
        Ok(linear_cross_entropy(&t[0].index_select(&rows, 0)?.tanh()?, &t[0], &ids)?)
    });
}

#[test]
fn fused_bits_do_not_depend_on_the_thread_count_and_errors_name_the_values() {
    let (inputs, ids) = projected(DType::F32);
    same_bits(|| with_gradients(&inputs, |t| Ok(linear_cross_entropy(&t[0], &t[1], &ids)?)));
    let error =
        |x: &Tensor, w: &Tensor, ids: &Tensor| linear_cross_entropy(x, w, ids).unwrap_err().to_string();
    let wide = noise(1, &[90, 7], 1.0).to_dtype(DType::F32).unwrap();
    assert!(error(&wide, &inputs[1], &ids).contains("[90, 7]"));
    assert!(error(&inputs[0].to_dtype(DType::F64).unwrap(), &inputs[1], &ids).contains("F64"));
    let narrow = inputs[1].narrow(0, 0, 10).unwrap();
    assert!(error(&inputs[0], &narrow, &ids).contains("vocabulary of 10"));
    // Without targets, loss and gradients are zero.
    let none = Tensor::new(&[IGNORE; 90][..], &Device::Cpu).unwrap();
    for got in with_gradients(&inputs, |t| Ok(linear_cross_entropy(&t[0], &t[1], &none)?)) {
        assert!(values(&got).iter().all(|&x| x == 0.0));
    }
}
