//! Layers, losses and optimizers that are composed of candle's operations off the CPU, against their CPU kernels.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Module, Result, Tensor, Var};
use gd_kernels::cross_entropy::{
    IGNORE, cross_entropy, linear_cross_entropy, linear_distillation, linear_token_losses, token_losses,
};
use gd_kernels::{newton_schulz, rms_norm, swiglu};
use gd_layer::{Linear, RopeScaling, Rotary};
use gd_model::config::{AdamWConfig, MuonConfig};
use gd_model::train::optimizer::{Optimizer, global_norm, not_finite};

use crate::graph::{noise, relative_difference};
use crate::{Target, targets};

/// The portable kernels: which GPU it is makes no difference to candle's operations.
fn target() -> Target {
    let [first, ..] = targets();
    first
}

fn count_case() {
    gd_testing::log_cases("emulated-tensors", 1);
}

/// Fails unless result and gradients of all inputs on the target are close to those on the CPU.
fn assert_close_to_cpu(
    what: &str,
    inputs: &[Tensor],
    bound: f64,
    run: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<()> {
    let all = || -> Result<Vec<Tensor>> {
        let vars = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let y = run(&tensors)?;
        let weights = noise(99, y.dims()).to_dtype(y.dtype())?;
        let grads = (&y * weights)?.sum_all()?.backward()?;
        let mut all = vec![y.detach()];
        for (i, var) in vars.iter().enumerate() {
            all.push(grads.get(var).unwrap_or_else(|| panic!("{what}: input {i} got no gradient")).clone());
        }
        Ok(all)
    };
    let (want, got) = (all()?, target().run(all)?);
    for (i, (a, b)) in got.iter().zip(&want).enumerate() {
        let off = relative_difference(a, b);
        assert!(
            off <= bound,
            "{what}, result or gradient {i}: a relative difference of {off}, {bound} allowed"
        );
    }
    count_case();
    Ok(())
}

/// Rounding of a dtype over a few operations.
const BOUNDS: [(DType, f64); 3] = [(DType::F32, 2e-6), (DType::BF16, 3e-2), (DType::F16, 4e-3)];

#[test]
fn layers_and_their_gradients_are_those_of_the_cpu() -> Result<()> {
    for (dtype, bound) in BOUNDS {
        let float = |seed, shape: &[usize]| noise(seed, shape).to_dtype(dtype);
        // Parts of larger tensors, the second one strided in its last dimension.
        let inputs = [float(1, &[2, 5, 40])?, float(2, &[37])?];
        assert_close_to_cpu(&format!("rms_norm {dtype:?}"), &inputs, bound, |x| {
            Ok(rms_norm(&x[0].narrow(2, 3, 37)?, &x[1], 1e-5)?)
        })?;
        let inputs = [float(1, &[2, 5, 40])?, float(2, &[2, 40, 5])?];
        assert_close_to_cpu(&format!("swiglu {dtype:?}"), &inputs, bound, |x| {
            Ok(swiglu(&x[0], &x[1].transpose(1, 2)?)?)
        })?;
        for scaling in [RopeScaling::None, RopeScaling::Linear { factor: 2.0 }] {
            assert_close_to_cpu(&format!("rope {dtype:?}"), &[float(1, &[2, 7, 3, 16])?], bound, |x| {
                let rotary = Rotary::new(16, 32, 1e4, scaling, dtype, &Device::Cpu)?;
                rotary.apply_each(&x[0].transpose(1, 2)?, &[0, 25])
            })?;
        }
    }
    // Weights in half precision under activations in f32; few rows and many.
    for dtype in [DType::BF16, DType::F16] {
        for rows in [1, 40] {
            let inputs =
                [noise(1, &[1, rows, 24]).to_dtype(DType::F32)?, noise(2, &[9, 24]).to_dtype(dtype)?];
            let bound = if dtype == DType::BF16 { 1e-2 } else { 2e-3 };
            assert_close_to_cpu(&format!("projection {rows} {dtype:?}"), &inputs, bound, |x| {
                Linear::new(x[1].clone(), None).forward(&x[0])
            })?;
        }
    }
    Ok(())
}

#[test]
fn losses_and_their_gradients_are_those_of_the_cpu() -> Result<()> {
    let (rows, c, v) = (11, 8, 19);
    let ids: Vec<u32> =
        (0..rows as u32).map(|i| if i % 4 == 1 { IGNORE } else { i * 5 % v as u32 }).collect();
    let targets = Tensor::new(&ids[..], &Device::Cpu)?;
    for (dtype, bound) in BOUNDS {
        let float = |seed, shape: &[usize]| noise(seed, shape).to_dtype(dtype);
        let logits = [float(1, &[rows, v])?];
        assert_close_to_cpu(&format!("cross entropy {dtype:?}"), &logits, bound, |x| {
            Ok(cross_entropy(&x[0], &targets)?)
        })?;
        let inputs = [float(1, &[rows, c])?, float(2, &[v, c])?];
        assert_close_to_cpu(&format!("linear cross entropy {dtype:?}"), &inputs, bound, |x| {
            Ok(linear_cross_entropy(&x[0], &x[1], &targets)?)
        })?;
        let (other, head) = (float(3, &[rows, c])?, float(4, &[v, c])?);
        assert_close_to_cpu(&format!("distillation {dtype:?}"), &inputs, bound, |x| {
            Ok(linear_distillation((&x[0], &x[1]), &targets, (&other, &head), 0.7)?)
        })?;
        let each = || -> Result<[Vec<f32>; 2]> {
            Ok([token_losses(&logits[0], &targets)?, linear_token_losses(&inputs[0], &inputs[1], &targets)?])
        };
        for (a, b) in target().run(each)?.iter().flatten().zip(each()?.iter().flatten()) {
            assert!((f64::from(*a) - f64::from(*b)).abs() <= bound * 4.0, "{dtype:?}: {a} not {b}");
        }
        count_case();
    }
    Ok(())
}

/// Parameters and optimizer state after three steps, and the norms of the gradients.
fn optimized(dtype: DType, muon: Option<MuonConfig>) -> Result<(BTreeMap<String, Tensor>, Vec<f64>)> {
    let var = |seed, shape: &[usize]| Var::from_tensor(&noise(seed, shape).to_dtype(dtype)?);
    let names = [
        ("model.layers.0.self_attn.q_proj.weight", var(1, &[12, 20])?),
        ("model.layers.0.self_attn.k_proj.weight", var(2, &[20, 12])?),
        ("model.norm.weight", var(3, &[33])?),
    ];
    let vars: Vec<(String, Var)> = names.map(|(name, var)| (name.to_owned(), var)).into();
    let mut optimizer = Optimizer::new(vars.clone(), AdamWConfig::default(), muon).unwrap();
    let mut norms = Vec::new();
    for step in 0..3u64 {
        let mut loss = Tensor::zeros((), DType::F32, &Device::Cpu)?;
        for (i, (_, var)) in vars.iter().enumerate() {
            let slope = noise(10 * step + i as u64, var.dims()).to_dtype(dtype)?;
            // The loss is summed in f32.
            loss = (loss + (var.as_tensor() * slope)?.to_dtype(DType::F32)?.sum_all()?)?;
        }
        let grads = loss.backward()?;
        norms.push(global_norm(&vars, &grads).unwrap());
        assert_eq!(not_finite(&vars, &grads).unwrap(), None);
        optimizer.step(&grads, 0.05, 0.5).unwrap();
        // Saving and restoring the state does not change the steps that follow.
        let state = optimizer.state().unwrap();
        optimizer.load_state(&state).unwrap();
    }
    let mut all = optimizer.state().unwrap();
    all.extend(vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())));
    Ok((all, norms))
}

#[test]
fn optimizers_take_the_same_steps_as_on_the_cpu() -> Result<()> {
    for (dtype, bound) in [(DType::F32, 2e-6), (DType::BF16, 1e-2)] {
        for muon in [None, Some(MuonConfig::default())] {
            let ((want, a), (got, b)) = (optimized(dtype, muon)?, target().run(|| optimized(dtype, muon))?);
            assert!(want.keys().eq(got.keys()) && want.len() >= 8, "{:?} {:?}", want.keys(), got.keys());
            for (name, t) in &want {
                let bound = if muon.is_some() { 4.0 * bound } else { bound };
                let off = relative_difference(&got[name], t);
                assert!(
                    off <= bound,
                    "{name} in {dtype:?}, Muon {}: a relative difference of {off}",
                    muon.is_some()
                );
            }
            for (a, b) in a.iter().zip(&b) {
                assert!((a - b).abs() <= 1e-5 * a, "norm {b} not {a}");
            }
            count_case();
        }
    }
    // The orthogonalised zero matrix is zero.
    let zero = Tensor::zeros((3, 5), DType::F32, &Device::Cpu)?;
    assert_eq!(relative_difference(&target().run(|| newton_schulz(&zero)).unwrap(), &zero), 0.0);
    // The parameter with a gradient that is not finite is reported.
    let reported = target().run(|| -> Result<Option<String>> {
        let var = Var::ones(3, DType::F32, &Device::Cpu)?;
        let vars = [("p".to_owned(), var.clone())];
        let grads = (var.as_tensor() * f64::NAN)?.sum_all()?.backward()?;
        assert!(global_norm(&vars, &grads).unwrap().is_nan());
        Ok(not_finite(&vars, &grads).unwrap().map(str::to_owned))
    })?;
    assert_eq!(reported.as_deref(), Some("p"));
    count_case();
    Ok(())
}
