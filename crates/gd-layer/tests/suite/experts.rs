//! The Switch layer, ReSAN and the Energy Transformer: against loops, and their gradients by finite differences.

use candle_core::{DType, Device, Result, Tensor};
use gd_layer::mechanisms::{AttentionMechanism, Direction, EnergyTransformer, Inputs, Resan, Switch};
use gd_testing::properties;
use gd_testing::tensors::*;
use proptest::prelude::*;

const SWITCH: [&str; 6] = ["x", "Wr", "W1", "b1", "W2", "b2"];
const RESAN: [&str; 17] = [
    "x", "W1h", "b1h", "w2h", "b2h", "W1d", "b1d", "w2d", "b2d", "Wr", "br", "Wd", "Wh", "bl", "Wf1", "Wf2",
    "bf",
];
const ENERGY: [&str; 6] = ["x", "gamma", "delta", "Wq", "Wk", "Xi"];

fn named(names: &[&str], tensors: &[Tensor]) -> Inputs {
    names.iter().zip(tensors).fold(Inputs::new(), |inputs, (name, t)| inputs.with(name, t))
}

fn random(seed: u64, shapes: &[&[usize]]) -> Vec<Tensor> {
    shapes.iter().enumerate().map(|(i, shape)| noise(seed + i as u64, shape, 1.0)).collect()
}

fn switch_tensors(seed: u64, tokens: usize, experts: usize) -> Vec<Tensor> {
    let e = experts;
    random(seed, &[&[tokens, 3], &[3, e], &[e, 3, 4], &[e, 4], &[e, 4, 3], &[e, 3]])
}

/// Every token through its expert alone, in order, until the expert is full.
fn check_switch(seed: u64, tokens: usize, experts: usize, capacity_factor: f64) -> Result<()> {
    let tensors = switch_tensors(seed, tokens, experts);
    let mechanism = AttentionMechanism::Switch(Switch { capacity_factor, aux_coef: 0.01 });
    let outputs = mechanism.attend(&named(&SWITCH, &tensors))?;
    let p = candle_nn::ops::softmax(&tensors[0].matmul(&tensors[1])?, 1)?.to_vec2::<f64>()?;
    let capacity = (capacity_factor * tokens as f64 / experts as f64).ceil() as i64;
    let (mut taken, mut shares) = (vec![0i64; experts], vec![0.0; experts]);
    let (experts_of, slots) =
        (outputs.get("expert")?.to_vec1::<i64>()?, outputs.get("slot")?.to_vec1::<i64>()?);
    for t in 0..tokens {
        let e = (0..experts).reduce(|a, b| if p[t][b] > p[t][a] { b } else { a }).expect("an expert");
        shares[e] += 1.0 / tokens as f64;
        let of = |i: usize| tensors[i].narrow(0, e, 1)?.squeeze(0);
        let hidden = tensors[0].narrow(0, t, 1)?.matmul(&of(2)?)?.broadcast_add(&of(3)?)?.relu()?;
        let y = (hidden.matmul(&of(4)?)?.broadcast_add(&of(5)?)? * p[t][e])?;
        let fits = taken[e] < capacity;
        let y = if fits { y } else { y.zeros_like()? };
        assert_close("token", &outputs.get("out")?.narrow(0, t, 1)?, &y, 1e-12);
        assert_eq!((experts_of[t], slots[t]), (e as i64, if fits { taken[e] } else { -1 }));
        taken[e] += i64::from(fits);
    }
    let mean = |e: usize| p.iter().map(|row| row[e]).sum::<f64>() / tokens as f64;
    let balance: f64 = (0..experts).map(|e| shares[e] * mean(e)).sum::<f64>() * 0.01 * experts as f64;
    let loss = outputs.extra_loss.expect("a loss").to_scalar::<f64>()?;
    assert!((loss - balance).abs() < 1e-12, "{loss}, not {balance}");
    Ok(())
}

proptest! {
    #![proptest_config(properties(48))]

    #[test]
    fn tokens_go_through_their_expert_in_order(
        tokens in 1usize..20, experts in 1usize..6, factor in 0.1f64..3.0, seed in 0u64..1 << 40,
    ) {
        check_switch(seed, tokens, experts, factor).unwrap();
    }

    #[test]
    fn the_energy_falls_and_tokens_have_no_order(n in 2usize..6, diag in any::<bool>(), seed in 0u64..1 << 40) {
        check_energy(n, diag, seed).unwrap();
    }
}

fn energy_tensors(seed: u64, n: usize) -> Vec<Tensor> {
    let mut tensors = random(seed, &[&[2, n, 5], &[1], &[5], &[2, 3, 5], &[2, 3, 5], &[5, 4]]);
    // A gain above 0, for which the energy falls.
    tensors[1] = tensors[1].abs().unwrap();
    tensors
}

fn check_energy(n: usize, diag: bool, seed: u64) -> Result<()> {
    let mechanism = AttentionMechanism::EnergyTransformer(EnergyTransformer { step: 0.02, steps: 8, diag });
    let tensors = energy_tensors(seed, n);
    let outputs = mechanism.attend(&named(&ENERGY, &tensors))?;
    let path = outputs.get("E_path")?.t()?.to_vec2::<f64>()?;
    assert!(path.iter().all(|e| e.len() == 9 && e.windows(2).all(|e| e[1] <= e[0] + 1e-9)), "{path:?}");
    let order: Vec<u32> = (0..n as u32).rev().collect();
    let order = Tensor::new(order, &Device::Cpu)?;
    let mut moved = tensors.clone();
    moved[0] = tensors[0].index_select(&order, 1)?;
    let other = mechanism.attend(&named(&ENERGY, &moved))?;
    assert_close("x8", &outputs.get("x8")?.index_select(&order, 1)?, other.get("x8")?, 1e-11);
    Ok(())
}

#[test]
fn the_gradient_of_the_energy_is_that_of_differentiation() -> Result<()> {
    for diag in [true, false] {
        let mechanism =
            AttentionMechanism::EnergyTransformer(EnergyTransformer { steps: 1, diag, ..Default::default() });
        // delta is added to g of every token, so its gradient is the sum of dE/dg over tokens.
        let tensors = energy_tensors(3, 4);
        let delta = candle_core::Var::from_tensor(&tensors[2])?;
        let mut inputs = named(&ENERGY, &tensors);
        inputs.insert("delta", delta.as_tensor().clone());
        let outputs = mechanism.attend(&inputs)?;
        let energy = (outputs.get("E_att")? + outputs.get("E_hn")?)?.sum_all()?;
        let gradient = energy.backward()?.get(&delta).expect("a gradient").clone();
        assert_close("delta", &outputs.get("dE_dg")?.detach().sum((0, 1))?, &gradient, 1e-12);
    }
    Ok(())
}

/// Shapes of the inputs of ReSAN for D 3, A 4 and F 2.
fn resan_tensors(seed: u64) -> Vec<Tensor> {
    let selector: [&[usize]; 4] = [&[4, 9], &[4], &[4], &[1]];
    let rest: [&[usize]; 8] = [&[2, 3], &[2], &[2, 2], &[2, 2], &[2], &[2, 2], &[2, 2], &[2]];
    let x: [&[usize]; 1] = [&[2, 5, 3]];
    random(seed, &[&x[..], &selector, &selector, &rest].concat())
}

fn resan_constants(inputs: Inputs, valid: &[[u8; 5]; 2]) -> Inputs {
    let valid = Tensor::new(valid, &Device::Cpu).unwrap();
    let uniform = |seed: u64| ((noise(seed, &[2, 5], 1.0) + 1.0).unwrap() * 0.5).unwrap();
    inputs
        .with("valid", &valid)
        .with("u_head", &uniform(70))
        .with("u_dep", &uniform(71))
        .with("reward", &noise(72, &[2], 1.0))
}

const SOME_PADDING: [[u8; 5]; 2] = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]];

#[test]
fn padding_is_not_read() -> Result<()> {
    for direction in [Direction::Forward, Direction::Backward] {
        let mechanism = AttentionMechanism::Resan(Resan { direction, ..Resan::default() });
        let tensors = resan_tensors(11);
        let plain = mechanism.attend(&resan_constants(named(&RESAN, &tensors), &SOME_PADDING))?;
        let mut other = tensors.clone();
        let padding =
            Tensor::new(&SOME_PADDING, &Device::Cpu)?.eq(0u8)?.to_dtype(DType::F64)?.unsqueeze(2)?;
        other[0] = other[0].broadcast_add(&(padding * 7.0)?)?;
        let other = mechanism.attend(&resan_constants(named(&RESAN, &other), &SOME_PADDING))?;
        for name in ["out", "ctx", "logp", "p_head"] {
            assert_close(name, plain.get(name)?, other.get(name)?, 1e-14);
        }
        let out = plain.get("out")?.to_vec3::<f64>()?;
        assert!(
            out[1][3..].iter().flatten().all(|&x| x == 0.0)
                && out.iter().flatten().flatten().any(|&x| x != 0.0)
        );
        // The first token that may read something does not read what lies on the other side.
        let edge = if direction == Direction::Forward { 0 } else { 4 };
        assert!(plain.get("ctx")?.to_vec3::<f64>()?[0][edge].iter().all(|&x| x == 0.0));
    }
    Ok(())
}

#[test]
fn gradients_match_finite_differences() {
    for capacity_factor in [0.5, 4.0] {
        let mechanism = AttentionMechanism::Switch(Switch { capacity_factor, aux_coef: 2.0 });
        check_gradients(&switch_tensors(5, 8, 3), |t| {
            let outputs = mechanism.attend(&named(&SWITCH, t))?;
            outputs.get("out")?.broadcast_add(outputs.extra_loss.as_ref().expect("a loss"))
        });
    }
    for diag in [true, false] {
        let mechanism =
            AttentionMechanism::EnergyTransformer(EnergyTransformer { step: 0.1, steps: 2, diag });
        check_gradients(&energy_tensors(7, 4), |t| mechanism.attend(&named(&ENERGY, t))?.get("x2").cloned());
    }
    for direction in [Direction::Forward, Direction::Backward] {
        let mechanism = AttentionMechanism::Resan(Resan { direction, ..Resan::default() });
        check_gradients(&resan_tensors(13), |t| {
            let outputs = mechanism.attend(&resan_constants(named(&RESAN, t), &SOME_PADDING))?;
            outputs.get("out")?.broadcast_add(outputs.extra_loss.as_ref().expect("a loss"))
        });
    }
}

#[test]
fn invalid_sizes_are_named() {
    let refused = |mechanism: AttentionMechanism, inputs: &Inputs, word: &str| {
        let error = mechanism.attend(inputs).unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    };
    let switch = |capacity_factor| AttentionMechanism::Switch(Switch { capacity_factor, aux_coef: 0.01 });
    let mut tensors = switch_tensors(1, 4, 2);
    refused(switch(0.0), &named(&SWITCH, &tensors), "capacity_factor 0");
    tensors[1] = noise(1, &[5, 2], 1.0);
    refused(switch(1.0), &named(&SWITCH, &tensors), "[5, 2]");
    let energy =
        |steps, diag| AttentionMechanism::EnergyTransformer(EnergyTransformer { step: 0.1, steps, diag });
    refused(energy(0, true), &named(&ENERGY, &energy_tensors(1, 3)), "T 0");
    refused(energy(1, false), &named(&ENERGY, &energy_tensors(1, 1)), "diag false");
    let inputs = resan_constants(named(&RESAN, &resan_tensors(1)), &SOME_PADDING)
        .with("u_dep", &noise(1, &[2, 4], 1.0));
    refused(AttentionMechanism::Resan(Resan::default()), &inputs, "u_dep");
}
