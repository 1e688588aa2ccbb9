//! Heads that match content without positions and read what follows the match.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::ops::{sigmoid, softmax};
use gd_kernels::Mask;
use gd_layer::{AttentionConfig, BeaconConfig, GdConfig, LayerCache, Pass, RopeScaling, Rotary};

use crate::layers::{Fixture, Numbers, attend_in_parts, config, difference, fixture};

fn induction(heads: usize, beacon: Option<BeaconConfig>) -> AttentionConfig {
    AttentionConfig { induction_heads: heads, ..config(GdConfig::default(), beacon) }
}

/// Softmax attention of [`config`] over x `[B, N, C]` with induction heads, by candle operations on the matrix of all
/// scores.
fn reference(f: &Fixture, cfg: &AttentionConfig, x: &Tensor) -> Result<Tensor> {
    let (b, n, _) = x.dims3()?;
    let (d, group) = (cfg.head_dim, cfg.group());
    let var = |name: &str| f.vars.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_tensor()).expect("a var");
    let product = |x: &Tensor, name: &str| x.broadcast_matmul(&var(name).t()?);
    let heads = |x: &Tensor, name: &str| {
        let y = product(x, &format!("{name}.weight"))?.broadcast_add(var(&format!("{name}.bias")))?;
        y.reshape((b, n, (), d))?.transpose(1, 2)?.contiguous()
    };
    let normed = |x: Tensor, name: &str| {
        let rms = ((x.sqr()?.mean_keepdim(D::Minus1)? + cfg.rms_norm_eps)?).sqrt()?;
        x.broadcast_div(&rms)?.broadcast_mul(var(&format!("{name}.weight")))
    };
    let rotary = Rotary::new(d, 256, 10_000.0, RopeScaling::None, DType::F64, &Device::Cpu)?;
    let before = x.narrow(1, 0, n - 1)?.pad_with_zeros(1, 1, 0)?;
    // The first heads from their own input, unrotated; the others from x, rotated.
    let mixed = |first: &Tensor, name: &str, norm: &str, by_content: usize| {
        let first = normed(heads(first, name)?, norm)?;
        let others = rotary.apply(&normed(heads(x, name)?, norm)?, 0)?;
        let left = others.dim(1)? - by_content;
        Tensor::cat(&[first.narrow(1, 0, by_content)?, others.narrow(1, by_content, left)?], 1)
    };
    let q = mixed(x, "q_proj", "q_norm", cfg.induction_heads)?;
    let k = mixed(&before, "k_proj", "k_norm", cfg.induction_heads / group)?;
    let v = heads(x, "v_proj")?;
    let of_query_head = |x: &Tensor| {
        let shape = (b, cfg.num_key_value_heads, group, n, d);
        x.unsqueeze(2)?.broadcast_as(shape)?.reshape((b, cfg.num_attention_heads, n, d))
    };
    let hidden: Vec<f64> =
        (0..n * n).map(|at| if at % n > at / n { f64::NEG_INFINITY } else { 0.0 }).collect();
    let hidden = Tensor::from_vec(hidden, (n, n), &Device::Cpu)?;
    let scores = (q.matmul(&of_query_head(&k)?.t()?)? / (d as f64).sqrt())?.broadcast_add(&hidden)?;
    let y = softmax(&scores, D::Minus1)?.matmul(&of_query_head(&v)?)?;
    let y = y.transpose(1, 2)?.reshape((b, n, cfg.num_attention_heads * d))?;
    let y = (y * sigmoid(&product(x, "g_proj.weight")?)?)?;
    product(&y, "o_proj.weight")?.broadcast_add(var("o_proj.bias"))
}

#[test]
fn induction_heads_compare_unrotated_queries_with_the_keys_before() -> Result<()> {
    for heads in [0, 2, 4] {
        let cfg = induction(heads, None);
        let f = fixture(&cfg, false, DType::F64, 3)?;
        let x = Numbers(4).tensor(&[2, 9, 12], 1.0, DType::F64)?;
        let y = f.layer.attend(&x, &Pass::new(&Mask::causal(0)), None)?;
        let off = difference(&y, &reference(&f, &cfg, &x)?)?;
        assert!(off < 1e-12, "{heads} heads: {off}");
        let without = reference(&f, &induction(0, None), &x)?;
        assert!(heads == 0 || difference(&y, &without)? > 1e-3, "{heads} heads are like others");
    }
    Ok(())
}

#[test]
fn an_induction_head_reads_what_followed_its_token() -> Result<()> {
    let f = fixture(&induction(4, None), true, DType::F64, 3)?;
    let weight = |name: &str| f.vars.iter().find(|(n, _)| n == name).map(|(_, v)| v).expect("a var");
    // A key of its token is the query of this token, for the first head of each group.
    for part in ["weight", "bias"] {
        let q = weight(&format!("q_proj.{part}")).as_tensor();
        let first = [q.narrow(0, 0, 6)?, q.narrow(0, 12, 6)?];
        weight(&format!("k_proj.{part}")).set(&Tensor::cat(&first, 0)?)?;
    }
    weight("k_norm.weight").set(weight("q_norm.weight"))?;
    let tokens = Numbers(4).tensor(&[5, 12], 1.0, DType::F64)?;
    // Earlier occurrences: of token 0 at position 0, of 1 at 1, of 4 at 5, of 3 at 3; 2 occurs once.
    let order = Tensor::new(&[0u32, 1, 2, 3, 0, 4, 1, 3, 4], &Device::Cpu)?;
    let x = tokens.index_select(&order, 0)?.unsqueeze(0)?;
    let (record, mask) = (std::cell::RefCell::new(Vec::new()), Mask::causal(0));
    f.layer.attend(&x, &Pass { stats: Some(&record), ..Pass::new(&mask) }, None)?;
    let picks = record.borrow()[0].picks.clone();
    for head in [0, 2] {
        for (query, follows) in [(4, 1), (6, 2), (7, 4), (8, 6)] {
            assert_eq!(picks[head * 9 + query], follows, "head {head}, query {query}");
        }
    }
    Ok(())
}

#[test]
fn a_cache_continues_induction_heads() -> Result<()> {
    for (selects, beacon) in [(true, Some(BeaconConfig::default())), (false, None), (true, None)] {
        let f = fixture(&induction(2, beacon), selects, DType::F32, 5)?;
        let x = Numbers(7).tensor(&[3, 9, 12], 1.0, DType::F32)?;
        let full = f.layer.attend(&x, &Pass::new(&Mask::causal(0)), None)?;
        let mut cache = LayerCache::new();
        let out = attend_in_parts(f.layer.as_ref(), &x, &[4, 1, 3], &mut cache)?;
        assert!(difference(&out, &full.narrow(1, 0, 8)?)? < 1e-5);
        assert!(!cache.is_positional(), "the last input belongs to all positions");
        // Sequences in another order, stacked from two caches.
        let mut some = LayerCache::stack(&[&cache.select(&[2])?, &cache.select(&[0])?])?;
        let rows = Tensor::new(&[2u32, 0], &Device::Cpu)?;
        let of = |x: &Tensor| x.narrow(1, 8, 1)?.contiguous()?.index_select(&rows, 0);
        let y = f.layer.attend(&of(&x)?, &Pass::new(&Mask::causal(8)), Some(&mut some))?;
        assert!(difference(&y, &of(&full)?)? < 1e-5);
    }
    Ok(())
}

#[test]
fn induction_heads_are_whole_groups_of_reading_heads() {
    let message = |cfg: AttentionConfig| cfg.validate().expect_err("an error").to_string();
    assert!(message(induction(1, None)).contains("induction_heads 1 is not a multiple of 2 up to 4"));
    assert!(message(induction(6, None)).contains("induction_heads 6"));
    let two = AttentionConfig { selecting_heads: Some(2), ..induction(4, Some(BeaconConfig::default())) };
    assert!(message(two).contains("induction_heads 4 is not a multiple of 2 up to 2"));
}
