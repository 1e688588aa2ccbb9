//! Thresholds that follow the number of visible keys, against a layer that is written down from the definition.

use candle_core::{DType, Result, Tensor};
use gd_kernels::{Gate, Mask};
use gd_layer::{AttentionConfig, GdConfig, LayerCache, Pass};

use crate::layers::{Fixture, Numbers, attend_in_parts, config, difference, fixture};

const TEMPERATURE: f64 = 0.7;
/// Sequences, positions and width.
const SHAPE: [usize; 3] = [2, 13, 12];

fn by_length(exclude_below: f64, window: Option<usize>) -> AttentionConfig {
    let gd = GdConfig {
        candidates: 4,
        gate: Gate::Energy { temperature: TEMPERATURE },
        exclude_below,
        threshold: Some(0.9),
        threshold_by_length: true,
        ..GdConfig::default()
    };
    AttentionConfig { window, qk_norm: false, output_gate: false, ..config(gd, None) }
}

/// The parameters of a layer as numbers.
fn values(f: &Fixture, name: &str) -> Result<Vec<f64>> {
    let (_, var) = f.vars.iter().find(|(other, _)| other == name).expect("a parameter of this name");
    var.flatten_all()?.to_dtype(DType::F64)?.to_vec1()
}

/// A projection of x `[N][C]`, row by row.
fn project(f: &Fixture, name: &str, x: &[Vec<f64>]) -> Result<Vec<Vec<f64>>> {
    let (weight, bias) = (values(f, &format!("{name}.weight"))?, values(f, &format!("{name}.bias"))?);
    let width = weight.len() / bias.len();
    let output = |row: &Vec<f64>| {
        let dot = |w: &[f64]| w.iter().zip(row).map(|(w, x)| w * x).sum::<f64>();
        weight.chunks(width).zip(&bias).map(|(w, b)| dot(w) + b).collect()
    };
    Ok(x.iter().map(output).collect())
}

/// The head `h` of a row of heads of `d` elements, rotated by `position`.
fn rotated(row: &[f64], h: usize, d: usize, position: usize) -> Vec<f64> {
    let (head, half) = (&row[h * d..(h + 1) * d], d / 2);
    let mut out = vec![0.0; d];
    for i in 0..half {
        let angle = position as f64 * 10_000f64.powf(-(i as f64) / half as f64);
        let (a, b) = (head[i], head[i + half]);
        out[i] = a * angle.cos() - b * angle.sin();
        out[i + half] = b * angle.cos() + a * angle.sin();
    }
    out
}

/// The output of the layer for x `[N][C]`, with `sees(i, j)` whether query i sees key j.
fn naive(
    f: &Fixture,
    cfg: &AttentionConfig,
    x: &[Vec<f64>],
    sees: impl Fn(usize, usize) -> bool,
) -> Result<Vec<Vec<f64>>> {
    let (d, group) = (cfg.head_dim, cfg.group());
    let [q, k, v] = ["q_proj", "k_proj", "v_proj"].map(|name| project(f, name, x));
    let (q, k, v) = (q?, k?, v?);
    let (beta, tau, slope) =
        (values(f, "gd.beta")?, values(f, "gd.threshold")?, values(f, "gd.threshold_slope")?);
    let mut rows = vec![vec![0.0; cfg.num_attention_heads * d]; x.len()];
    for (i, row) in rows.iter_mut().enumerate() {
        for h in 0..cfg.num_attention_heads {
            let query = rotated(&q[i], h, d, i);
            let energy = |j: usize| {
                let key = rotated(&k[j], h / group, d, j);
                beta[h].exp() * query.iter().zip(&key).map(|(q, k)| (q - k).powi(2)).sum::<f64>()
            };
            let visible: Vec<usize> = (0..x.len()).filter(|&j| sees(i, j)).collect();
            let least = |a: &usize, b: &usize| energy(*a).total_cmp(&energy(*b));
            let Some(winner) = visible.iter().copied().min_by(least) else { continue };
            let threshold = tau[h] + slope[h] * (visible.len() as f64).ln();
            let rho = 1.0 / (1.0 + ((energy(winner) - threshold) / TEMPERATURE).exp());
            if rho >= cfg.gd.exclude_below {
                let value = &v[winner][h / group * d..][..d];
                row[h * d..(h + 1) * d].iter_mut().zip(value).for_each(|(y, v)| *y = rho * v);
            }
        }
    }
    project(f, "o_proj", &rows)
}

#[test]
fn the_threshold_of_every_query_is_that_of_the_keys_it_sees() -> Result<()> {
    let x = Numbers(17).tensor(&SHAPE, 1.0, DType::F64)?;
    // A single token, a pair, and documents that are longer and shorter than the window and the candidates.
    let documents: [&[usize]; 2] = [&[0, 1, 3, 13], &[0, 8, 13]];
    let packed = Mask::causal(0).packed(documents.iter().map(|cuts| cuts.to_vec()).collect());
    let document = |b: usize, i: usize| documents[b].iter().filter(|&&cut| cut <= i).count();
    for (exclude_below, window) in [(0.0, None), (0.45, None), (0.0, Some(5)), (0.45, Some(5))] {
        let cfg = by_length(exclude_below, window);
        let f = fixture(&cfg, true, DType::F64, 5)?;
        for mask in [Mask::causal(0), packed.clone(), Mask::none(), Mask::causal(0).kv_len(vec![13, 6])] {
            let got = f.layer.attend(&x, &Pass::new(&mask), None)?.to_vec3::<f64>()?;
            for (b, x) in x.to_vec3::<f64>()?.iter().enumerate() {
                let sees = |i: usize, j: usize| {
                    (!mask.is_causal() || j <= i)
                        // A window limits the past of a query.
                        && window.is_none_or(|window| j + window > i)
                        && (mask.boundaries().is_none() || document(b, i) == document(b, j))
                        && mask.lengths().is_none_or(|lengths| j < lengths[b])
                };
                let want = naive(&f, &cfg, x, sees)?;
                for (i, (got, want)) in got[b].iter().zip(&want).enumerate() {
                    for (y, z) in got.iter().zip(want) {
                        assert!(
                            (y - z).abs() < 1e-9,
                            "{mask:?}, below {exclude_below}, row {i} of {b}: {y}, {z}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_slope_of_0_changes_no_bit() -> Result<()> {
    let with = by_length(0.3, Some(7));
    let without =
        AttentionConfig { gd: GdConfig { threshold_by_length: false, ..with.gd.clone() }, ..with.clone() };
    let (a, b) = (fixture(&with, true, DType::F32, 5)?, fixture(&without, true, DType::F32, 6)?);
    for (name, var) in &a.vars {
        match b.vars.iter().find(|(other, _)| other == name) {
            Some((_, other)) => var.set(other)?,
            None => {
                assert_eq!(name, "gd.threshold_slope");
                var.set(&var.zeros_like()?)?;
            }
        }
    }
    let x = Numbers(17).tensor(&SHAPE, 1.0, DType::F32)?;
    let mask = Mask::causal(0);
    let pass = Pass { threshold: Some(0.25), ..Pass::new(&mask) };
    let run = |f: &Fixture| -> Result<(Tensor, Tensor, Vec<Tensor>)> {
        let y = f.layer.attend(&x, &pass, None)?;
        let grads = y.sqr()?.sum_all()?.backward()?;
        let known = f.vars.iter().filter(|(name, _)| name != "gd.threshold_slope");
        let grads = known.filter_map(|(_, var)| grads.get(var.as_tensor()).cloned()).collect();
        let decoded = attend_in_parts(f.layer.as_ref(), &x, &[5, 1, 1, 6], &mut LayerCache::new())?;
        Ok((y, decoded, grads))
    };
    let ((y, decoded, grads), (other, other_decoded, other_grads)) = (run(&a)?, run(&b)?);
    assert_eq!(difference(&y, &other)?, 0.0);
    assert_eq!(difference(&decoded, &other_decoded)?, 0.0);
    assert_eq!(grads.len(), other_grads.len());
    for ((_, var), (grad, other)) in b.vars.iter().zip(grads.iter().zip(&other_grads)) {
        // The gradient of the threshold is summed in another order.
        assert!(
            difference(grad, other)? < 1e-5 * (1.0 + other.abs()?.max_all()?.to_scalar::<f32>()? as f64),
            "{var:?}"
        );
    }
    Ok(())
}

#[test]
fn a_slope_without_a_threshold_is_refused() {
    let mut cfg = by_length(0.0, None);
    cfg.gd.threshold = None;
    let error = cfg.validate().expect_err("no threshold").to_string();
    assert!(error.contains("threshold_by_length needs gd.threshold"), "{error}");
}
