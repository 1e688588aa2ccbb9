//! Gradients of every mechanism against finite differences.

use candle_core::{DType, Result, Tensor, Var};
use gd_layer::mechanisms::Inputs;

use super::problem::{Sizes, Subject, subjects};
use crate::layers::Numbers;

/// The step of the differences.
const STEP: f64 = 1e-5;

/// sum(out * dout) for a fixed dout.
fn loss(subject: &Subject, inputs: &Inputs) -> Result<Tensor> {
    let outputs = subject.attend(inputs)?;
    let out = outputs.get("out")?;
    (out * Numbers(99).tensor(out.dims(), 1.0, DType::F64)?)?.sum_all()
}

/// Whether differences see the gradient: that of a hard choice is that of the softmax, on purpose.
fn is_exact(subject: &Subject, input: &str) -> bool {
    subject.name() != "hard" || input == "v"
}

#[test]
fn gradients_are_those_of_finite_differences() -> Result<()> {
    let sizes = Sizes { heads: 4, key_value_heads: 2, queries: 4, keys: 5 };
    let mut compared = 0;
    for (subject, masked) in subjects().into_iter().flat_map(|s| [(s.clone(), false), (s, true)]) {
        let sizes = subject.fit(sizes);
        let inputs = subject.problem(&sizes, masked, 21, DType::F64)?;
        let info = subject.mechanism.info();
        for &(name, _) in info.inputs.iter().chain(info.learned) {
            let Some(value) = inputs.optional(name).filter(|_| is_exact(&subject, name)) else { continue };
            let var = Var::from_tensor(value)?;
            let gradients = loss(&subject, &inputs.clone().with(name, &var))?.backward()?;
            let gradient = gradients.get(&var).cloned().map_or_else(|| var.zeros_like(), Ok)?;
            let direction = Numbers(5).tensor(value.dims(), 1.0, DType::F64)?;
            let slope = (gradient * &direction)?.sum_all()?.to_scalar::<f64>()?;
            let at = |step: f64| -> Result<f64> {
                loss(&subject, &inputs.clone().with(name, &(value + (&direction * step)?)?))?.to_scalar()
            };
            let difference = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
            let what = format!("{:?}, masked {masked}: d{name}", subject.mechanism);
            assert!(
                (slope - difference).abs() < 1e-6 * slope.abs().max(1.0),
                "{what} {slope}, not {difference}"
            );
            compared += 1;
        }
    }
    assert!(compared > 150, "{compared} gradients");
    Ok(())
}

#[test]
fn a_hard_choice_has_the_gradient_of_its_softmax() -> Result<()> {
    let sizes = Sizes { heads: 2, key_value_heads: 2, queries: 3, keys: 4 };
    for subject in subjects().into_iter().filter(|subject| subject.name() == "hard") {
        let inputs = subject.problem(&sizes, true, 8, DType::F64)?;
        let q = Var::from_tensor(inputs.get("q")?)?;
        let gradients = loss(&subject, &inputs.clone().with("q", &q))?.backward()?;
        let hard = gradients.get(&q).expect("a gradient").clone();
        // Without a mask and noise in the way: the weights of softmax with the scores of q and the noise.
        let softmax = |q: &Tensor| -> Result<Tensor> {
            let scores = (q.matmul(&inputs.get("k")?.t()?)? * 0.5)?.broadcast_add(inputs.get("noise")?)?;
            let hidden = (inputs.get("mask")?.to_dtype(DType::F64)? - 1.0)? * 1e9;
            let weights = candle_nn::ops::softmax(&scores.broadcast_add(&hidden?)?, 3)?;
            let sees = inputs.get("mask")?.max_keepdim(1)?.to_dtype(DType::F64)?;
            weights.broadcast_mul(&sees)?.matmul(inputs.get("v")?)
        };
        let out = softmax(&q)?;
        let loss = (&out * Numbers(99).tensor(out.dims(), 1.0, DType::F64)?)?.sum_all()?;
        let soft = loss.backward()?.get(&q).expect("a gradient").clone();
        let apart = crate::layers::difference(&hard, &soft)?;
        assert!(apart < 1e-12, "{:?}: {apart}", subject.mechanism);
    }
    Ok(())
}

#[test]
fn a_query_without_keys_has_no_gradient() -> Result<()> {
    let sizes = Sizes { heads: 2, key_value_heads: 1, queries: 3, keys: 4 };
    for subject in subjects() {
        let sizes = subject.fit(sizes);
        let inputs = subject.problem(&sizes, true, 13, DType::F64)?;
        let name = if subject.name() == "pointer" { "dec" } else { "q" };
        let var = Var::from_tensor(inputs.get(name)?)?;
        let gradients = loss(&subject, &inputs.clone().with(name, &var))?.backward()?;
        let gradient = gradients.get(&var).expect("a gradient");
        let of_row = gradient.narrow(candle_core::D::Minus2, 0, 1)?.abs()?.sum_all()?.to_scalar::<f64>()?;
        let of_all = gradient.abs()?.sum_all()?.to_scalar::<f64>()?;
        assert!(
            of_row == 0.0 && of_all.is_finite() && of_all > 0.0,
            "{:?}: {of_row} of {of_all}",
            subject.mechanism
        );
    }
    Ok(())
}
