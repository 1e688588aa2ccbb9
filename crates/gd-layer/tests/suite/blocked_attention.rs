//! Mechanisms that do not build a matrix of queries by keys, against the dense forms that they equal.

use candle_core::{D, DType, Device, Result, Tensor};
use gd_layer::mechanisms::{
    AttentionMechanism, Inputs, LinearAttention, NativeSparse, Outputs, Reformer, Routing, SlidingWindow,
    linear_attention, packed_linear_attention, update_centroids,
};
use gd_testing::properties;
use gd_testing::tensors::*;
use proptest::prelude::*;

fn attend(mechanism: AttentionMechanism, tensors: &[(&str, &Tensor)]) -> Result<Outputs> {
    mechanism.attend(&tensors.iter().fold(Inputs::new(), |inputs, (name, t)| inputs.with(name, t)))
}

fn out(mechanism: AttentionMechanism, tensors: &[(&str, &Tensor)]) -> Result<Tensor> {
    attend(mechanism, tensors)?.get("out").cloned()
}

/// q, k and v of `[1, 2·group, n, 4]`, `[1, 2, n, 4]` and `[1, 2, n, 3]`.
fn qkv(seed: u64, group: usize, n: usize) -> [Tensor; 3] {
    [(2 * group, 4), (2, 4), (2, 3)].map(|(h, d)| noise(seed + (h * d) as u64, &[1, h, n, d], 2.0))
}

/// Causal softmax attention over the last `window` keys, dense. Query head h reads key-value head h / group.
fn dense(q: &Tensor, k: &Tensor, v: &Tensor, window: usize) -> Result<Tensor> {
    let (_, h, n, d) = q.dims4()?;
    let group = h / k.dim(1)?;
    let rows = |x: &Tensor| -> Result<Tensor> {
        Tensor::stack(&(0..h).map(|i| x.narrow(1, i / group, 1)?.squeeze(1)).collect::<Result<Vec<_>>>()?, 1)
    };
    let hidden = |i: usize, j: usize| if j <= i && i < j + window { 0.0 } else { -1e300 };
    let hidden: Vec<f64> = (0..n).flat_map(|i| (0..n).map(move |j| hidden(i, j))).collect();
    let hidden = Tensor::from_vec(hidden, (n, n), &Device::Cpu)?;
    let scores = (q.matmul(&rows(k)?.t()?)? / (d as f64).sqrt())?.broadcast_add(&hidden)?;
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&rows(v)?)
}

fn same(a: &Tensor, b: &Tensor) {
    assert_close("", a, b, 1e-12);
}

proptest! {
    #![proptest_config(properties(48))]

    #[test]
    fn a_sliding_window_equals_a_band_mask(
        group in 1usize..4, n in 1usize..20, window in 1usize..24, seed in 0u64..1 << 40,
    ) {
        let [q, k, v] = qkv(seed, group, n);
        let blocked = AttentionMechanism::SlidingWindow(SlidingWindow { window });
        same(&out(blocked, &[("q", &q), ("k", &k), ("v", &v)]).unwrap(), &dense(&q, &k, &v, window).unwrap());
    }

    #[test]
    fn native_sparse_attention_has_dense_limits(
        group in 1usize..4, n in 1usize..20, block in 1usize..6, stride in 1usize..4, seed in 0u64..1 << 40,
    ) {
        // With all blocks selected and a window over all keys, both branches are causal attention.
        let [q, k, v] = qkv(seed, group, n);
        let nsa = NativeSparse { l: stride + 1, stride, block, nsel: n.max(3) + 1, ninit: 1, nlocal: 2, w: n };
        let gates = noise(seed, &[1, 2 * group, n, 3], 2.0);
        let tensors = [("q", &q), ("k", &k), ("v", &v), ("gates", &gates)];
        let outputs = attend(AttentionMechanism::NativeSparse(nsa), &tensors).unwrap();
        let causal = dense(&q, &k, &v, n).unwrap();
        same(outputs.get("o_slc").unwrap(), &causal);
        same(outputs.get("o_win").unwrap(), &causal);
        let blocks = outputs.get("block_index").unwrap().narrow(2, n - 1, 1).unwrap();
        let blocks = blocks.flatten_all().unwrap().to_vec1::<i64>().unwrap();
        let visible = n.div_ceil(block) as i64;
        prop_assert!(blocks[..visible as usize].iter().copied().eq(0..visible) && blocks[visible as usize] == -1);
    }

    #[test]
    fn linear_attention_equals_its_quadratic_form(
        group in 1usize..4, n in 1usize..150, causal in any::<bool>(), seed in 0u64..1 << 40,
    ) {
        check_linear(group, n, causal, seed).unwrap();
    }

    #[test]
    fn one_chunk_of_reformer_is_dense_attention(n in 2usize..9, seed in 0u64..1 << 40) {
        check_reformer(n, seed).unwrap();
    }

    #[test]
    fn routing_does_not_depend_on_the_order_of_positions(n in 2usize..12, w in 1usize..12, seed in 0u64..1 << 40) {
        check_routing(n, w, seed).unwrap();
    }
}

fn check_linear(group: usize, n: usize, causal: bool, seed: u64) -> Result<()> {
    let [q, k, v] = qkv(seed, group, n);
    let (whole, end) = linear_attention(&q, &k, &v, causal, None)?;
    let features = |x: &Tensor| x.elu(1.0)? + 1.0;
    for h in 0..2 * group {
        let head = |x: &Tensor, h: usize| x.narrow(1, h, 1)?.squeeze(1);
        let weights = features(&head(&q, h)?)?.matmul(&features(&head(&k, h / group)?)?.t()?)?;
        let past = Tensor::tril2(n, DType::F64, &Device::Cpu)?;
        let weights = if causal { weights.broadcast_mul(&past)? } else { weights };
        let quadratic = weights.broadcast_div(&weights.sum_keepdim(2)?)?.matmul(&head(&v, h / group)?)?;
        assert_close("head", &head(&whole, h)?, &quadratic, 1e-11);
    }
    check_packed_linear(&[q.clone(), k.clone(), v.clone()], (seed % n as u64) as usize)?;
    // One position at a time, from the state of the last.
    let (mut state, mut rows) = (None, Vec::new());
    for i in 0..n {
        let at = |x: &Tensor| x.narrow(2, i, 1);
        let (row, next) = linear_attention(&at(&q)?, &at(&k)?, &at(&v)?, true, state.as_ref())?;
        rows.push(row);
        state = Some(next);
    }
    let state = state.expect("at least one position");
    assert_close("state", &state.outer, &end.outer, 1e-11);
    if causal {
        assert_close("decoding", &Tensor::cat(&rows, 2)?, &whole, 1e-11);
    }
    Ok(())
}

/// A row with two sequences, the second from `start`, against each of them alone.
fn check_packed_linear(qkv: &[Tensor; 3], start: usize) -> Result<()> {
    let n = qkv[0].dim(2)?;
    let at: Vec<i64> = (0..start as i64).chain(0..(n - start) as i64).collect();
    let at = Tensor::from_vec(at, (1, n), &Device::Cpu)?;
    let (packed, state) = packed_linear_attention(&qkv[0], &qkv[1], &qkv[2], &at, None)?;
    let (mut rows, mut last) = (Vec::new(), None);
    for (first, len) in [(0, start), (start, n - start)].into_iter().filter(|(_, len)| *len > 0) {
        let [q, k, v] = [0, 1, 2].map(|i| qkv[i].narrow(2, first, len));
        let (row, state) = linear_attention(&q?, &k?, &v?, true, None)?;
        rows.push(row);
        last = Some(state);
    }
    assert_close("packed", &packed, &Tensor::cat(&rows, 2)?, 1e-11);
    assert_close("state", &state.outer, &last.expect("a sequence").outer, 1e-11);
    Ok(())
}

fn check_reformer(n: usize, seed: u64) -> Result<()> {
    let (qk, v) = (noise(seed, &[1, 2, n, 4], 2.0), noise(seed + 1, &[1, 2, n, 3], 2.0));
    let rotations = noise(seed + 2, &[2, 4, 3], 1.0);
    let reformer = AttentionMechanism::Reformer(Reformer { chunk: n, causal: false, wrap: false });
    let hashed = out(reformer, &[("qk", &qk), ("v", &v), ("R", &rotations)])?;
    let keys = qk.broadcast_div(&qk.sqr()?.sum_keepdim(3)?.sqrt()?)?;
    let own = (Tensor::eye(n, DType::F64, &Device::Cpu)? * -1e5)?;
    let scores = (qk.matmul(&keys.t()?)? / 2.0)?.broadcast_add(&own)?;
    assert_close("", &hashed, &candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?, 1e-12);
    Ok(())
}

fn check_routing(n: usize, w: usize, seed: u64) -> Result<()> {
    let [q, k, v] = [0, 1, 2].map(|i| noise(seed + i, &[2, 2, n, 4], 1.0));
    let centroids = noise(seed + 9, &[2, 3, 4], 1.0);
    let routing =
        || AttentionMechanism::Routing(Routing { w, causal: false, ema: 0.9, ..Routing::default() });
    let routed = |q: &Tensor, k: &Tensor, v: &Tensor| {
        attend(routing(), &[("q", q), ("k", k), ("v", v), ("centroids", &centroids)])
    };
    let plain = routed(&q, &k, &v)?;
    let order: Vec<u32> = (0..n as u32).rev().collect();
    let order = Tensor::new(order, &Device::Cpu)?;
    let moved = |x: &Tensor| x.index_select(&order, 2);
    let other = routed(&moved(&q)?, &moved(&k)?, &moved(&v)?)?;
    assert_close("out", &moved(plain.get("out")?)?, other.get("out")?, 1e-12);
    let counts = values(plain.get("count")?);
    // Every cluster has w members, or all.
    assert_eq!(counts.iter().sum::<f64>() as usize, 2 * 2 * 3 * w.min(n));
    Ok(())
}

#[test]
fn the_previous_chunk_and_the_last_one_are_read_as_the_options_say() -> Result<()> {
    // One bucket: the order is that of the positions. A value that stands alone shows who reads it.
    let (qk, rotations) = (noise(3, &[1, 1, 6, 4], 1.0), Tensor::zeros((1, 4, 1), DType::F64, &Device::Cpu)?);
    for (wrap, causal, position, readers) in [
        (false, false, 5, vec![4, 5]),
        (true, false, 5, vec![0, 1, 4, 5]),
        (true, true, 5, vec![5]),
        (false, false, 1, vec![0, 1, 2, 3]),
        (false, true, 1, vec![1, 2, 3]),
    ] {
        let mut value = vec![0.0; 6];
        value[position] = 1.0;
        let v = Tensor::from_vec(value, (1, 1, 6, 1), &Device::Cpu)?;
        let reformer = AttentionMechanism::Reformer(Reformer { chunk: 2, causal, wrap });
        let read = values(&out(reformer, &[("qk", &qk), ("v", &v), ("R", &rotations)])?);
        // A position reads itself only where nothing else is visible.
        let expected: Vec<usize> = readers.into_iter().filter(|&i| i != position).collect();
        let actual: Vec<usize> = (0..6).filter(|&i| read[i] > 0.0 && i != position).collect();
        assert_eq!(actual, expected, "wrap {wrap}, causal {causal}, value {position}");
    }
    Ok(())
}

#[test]
fn a_centroid_without_members_stays() -> Result<()> {
    let centroids = Tensor::new(&[[[1.0, 0.0], [-1.0, 0.0]]], &Device::Cpu)?;
    let q = Tensor::new(&[[[[3.0, 0.0], [0.0, 2.0]]]], &Device::Cpu)?;
    let (moved, assigned) = update_centroids(&q, &q, &centroids, 0.5)?;
    assert_eq!(assigned.to_vec2::<i64>()?, [[0, 0, 0, 0]]);
    let moved = moved.to_vec3::<f64>()?;
    // The mean points to 45 degrees, and the centroid moves half of the way.
    let angle = (std::f64::consts::PI / 8.0).sin_cos();
    assert!(
        (moved[0][0][0] - angle.1).abs() < 1e-12 && (moved[0][0][1] - angle.0).abs() < 1e-12,
        "{moved:?}"
    );
    assert_eq!(moved[0][1], [-1.0, 0.0]);
    Ok(())
}

#[test]
fn gradients_match_finite_differences() {
    let named = |names: &[&str], t: &[Tensor]| {
        names.iter().zip(t).fold(Inputs::new(), |inputs, (name, t)| inputs.with(name, t))
    };
    let names = ["q", "k", "v", "gates"];
    let [q, k, v] = qkv(1, 2, 7);
    let nsa = AttentionMechanism::NativeSparse(NativeSparse {
        l: 2,
        stride: 1,
        block: 2,
        nsel: 3,
        ninit: 1,
        nlocal: 2,
        w: 3,
    });
    let gates = noise(9, &[1, 4, 7, 3], 1.0);
    check_gradients(&[q.clone(), k.clone(), v.clone(), gates], |t| {
        nsa.attend(&named(&names, t))?.get("out").cloned()
    });
    for mechanism in [
        AttentionMechanism::SlidingWindow(SlidingWindow { window: 3 }),
        AttentionMechanism::LinearAttention(LinearAttention { causal: true }),
        AttentionMechanism::LinearAttention(LinearAttention { causal: false }),
    ] {
        check_gradients(&[q.clone(), k.clone(), v.clone()], |t| {
            mechanism.attend(&named(&names, t))?.get("out").cloned()
        });
    }
    let [q, k, v] = [1, 2, 3].map(|seed| noise(seed, &[1, 2, 6, 4], 1.0));
    let centroids = noise(4, &[2, 2, 4], 1.0);
    let routing = AttentionMechanism::Routing(Routing { w: 3, causal: true, scale: Some(1.7), ema: 0.9 });
    check_gradients(&[q, k, v.clone()], |t| {
        routing.attend(&named(&names, t).with("centroids", &centroids))?.get("out").cloned()
    });
    let reformer = AttentionMechanism::Reformer(Reformer { chunk: 2, causal: true, wrap: true });
    let rotations = noise(6, &[2, 4, 2], 1.0);
    check_gradients(&[noise(5, &[1, 2, 6, 4], 1.0), v], |t| {
        reformer.attend(&named(&["qk", "v"], t).with("R", &rotations))?.get("out").cloned()
    });
}

#[test]
fn invalid_sizes_are_named() -> Result<()> {
    let [q, k, v] = qkv(1, 1, 6);
    let refused = |mechanism: AttentionMechanism, tensors: &[(&str, &Tensor)], word: &str| {
        let error = attend(mechanism, tensors).unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    };
    let qkv = [("q", &q), ("k", &k), ("v", &v)];
    refused(AttentionMechanism::SlidingWindow(SlidingWindow { window: 0 }), &qkv, "window 0");
    let short = v.narrow(2, 0, 5)?;
    refused(
        AttentionMechanism::SlidingWindow(SlidingWindow { window: 2 }),
        &[("q", &q), ("k", &k), ("v", &short)],
        "[1, 2, 5, 3]",
    );
    refused(
        AttentionMechanism::LinearAttention(LinearAttention { causal: true }),
        &[("q", &q), ("k", &k), ("v", &short)],
        "[1, 2, 5, 3]",
    );
    let few = q.narrow(2, 0, 5)?;
    refused(
        AttentionMechanism::LinearAttention(LinearAttention { causal: true }),
        &[("q", &few), ("k", &k), ("v", &v)],
        "N = M",
    );
    let sizes = NativeSparse { nsel: 2, ..NativeSparse::default() };
    refused(AttentionMechanism::NativeSparse(sizes), &qkv, "nsel 2");
    let sizes = NativeSparse { stride: 0, ..NativeSparse::default() };
    refused(AttentionMechanism::NativeSparse(sizes), &qkv, "stride 0");
    refused(AttentionMechanism::NativeSparse(NativeSparse::default()), &qkv, "gates");
    let reformer = AttentionMechanism::Reformer(Reformer { chunk: 4, causal: true, wrap: true });
    let rotations = noise(1, &[1, 4, 2], 1.0);
    refused(reformer, &[("qk", &q), ("v", &v), ("R", &rotations)], "chunk 4");
    let routing = Routing { w: 0, ..Routing::default() };
    refused(AttentionMechanism::Routing(routing), &qkv, "w 0");
    Ok(())
}
