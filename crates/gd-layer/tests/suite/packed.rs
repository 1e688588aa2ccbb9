//! Packed documents: a row of several gives the values and gradients of each of them alone.

use candle_core::{DType, Result, Tensor, Var};
use gd_kernels::Mask;
use gd_layer::{BeaconConfig, GdConfig, LayerCache, Pass};

use crate::layers::{Fixture, Numbers, config, fixture, selecting};

/// Two rows of 20 positions and their documents: single tokens, longer than the candidates, a pair.
const DOCUMENTS: [&[usize]; 2] = [&[0, 1, 6, 18, 20], &[0, 12, 13, 14, 20]];

/// y `[2, 20, C]` of the rows as they are packed.
fn packed(f: &Fixture, x: &Tensor, hardness: f64) -> Result<Tensor> {
    let mask = Mask::causal(0).packed(DOCUMENTS.iter().map(|d| d.to_vec()).collect());
    f.layer.attend(x, &Pass { hardness, ..Pass::new(&mask) }, None)
}

/// The same from every document alone.
fn alone(f: &Fixture, x: &Tensor, hardness: f64) -> Result<Tensor> {
    let mask = Mask::causal(0);
    let row = |(b, cuts): (usize, &&[usize])| {
        let document = |c: &[usize]| {
            let x = x.narrow(0, b, 1)?.narrow(1, c[0], c[1] - c[0])?;
            f.layer.attend(&x, &Pass { hardness, ..Pass::new(&mask) }, None)
        };
        Tensor::cat(&cuts.windows(2).map(document).collect::<Result<Vec<_>>>()?, 1)
    };
    Tensor::cat(&DOCUMENTS.iter().enumerate().map(row).collect::<Result<Vec<_>>>()?, 0)
}

/// y and the gradients of `<y, w>` for x and every parameter.
fn all(f: &Fixture, x: &Var, y: Tensor) -> Result<Vec<(String, Vec<f64>)>> {
    let w = Numbers(99).tensor(y.dims(), 1.0, DType::F64)?;
    let grads = (&y * w)?.sum_all()?.backward()?;
    let mut results = vec![("y".to_owned(), y.flatten_all()?.to_vec1()?)];
    let x = ("x".to_owned(), x.clone());
    for (name, var) in f.vars.iter().chain([&x]) {
        // Not every estimator reaches every parameter, but packing must not change which.
        let grad = grads.get(var.as_tensor()).map(|g| g.flatten_all()?.to_vec1::<f64>()).transpose()?;
        results.push((name.clone(), grad.unwrap_or_default()));
    }
    Ok(results)
}

fn compare(name: &str, f: &Fixture) -> Result<()> {
    let x = Var::from_tensor(&Numbers(7).tensor(&[2, 20, 12], 1.0, DType::F64)?)?;
    for hardness in [0.0, 0.5, 1.0] {
        let packed = all(f, &x, packed(f, x.as_tensor(), hardness)?)?;
        let alone = all(f, &x, alone(f, x.as_tensor(), hardness)?)?;
        for ((what, a), (_, b)) in packed.iter().zip(&alone) {
            assert_eq!(a.len(), b.len(), "{name}: {what}");
            for (a, b) in a.iter().zip(b) {
                assert!(
                    (a - b).abs() <= 1e-9 * (1.0 + b.abs()),
                    "{name}, h {hardness}: {what}: {a} against {b}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn selecting_layers_keep_packed_documents_apart() -> Result<()> {
    for (name, _, cfg) in selecting() {
        compare(name, &fixture(&cfg, true, DType::F64, 3)?)?;
    }
    Ok(())
}

#[test]
fn softmax_layers_keep_packed_documents_apart() -> Result<()> {
    for beacon in [None, Some(BeaconConfig::default())] {
        compare("softmax", &fixture(&config(GdConfig::default(), beacon), false, DType::F64, 3)?)?;
    }
    Ok(())
}

#[test]
fn a_cache_and_packed_documents_exclude_each_other() -> Result<()> {
    let f = fixture(&config(GdConfig::default(), None), true, DType::F64, 3)?;
    let x = Numbers(7).tensor(&[1, 4, 12], 1.0, DType::F64)?;
    let mask = Mask::causal(0).packed(vec![vec![0, 2, 4]]);
    let error = f.layer.attend(&x, &Pass::new(&mask), Some(&mut LayerCache::new())).unwrap_err().to_string();
    assert!(error.contains("cache") && error.contains("packs"), "{error}");
    Ok(())
}
