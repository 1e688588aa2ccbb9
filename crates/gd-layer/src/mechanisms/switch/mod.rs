//! The Switch layer (Fedus et al. 2022, arXiv 2101.03961): every token goes to one of several feed-forward experts.

mod places;

use candle_core::{DType, Result, Tensor, bail};
use candle_nn::ops::softmax;
use serde::{Deserialize, Serialize};

use self::places::Places;
use super::definition::{Definition, Info};
use super::indices::{matmul, one_hot, take_rows, top_k_positions};
use super::inputs::{Inputs, Outputs};
use super::stages::Computation;

/// A mixture of experts in which each token goes to one expert of limited capacity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Switch {
    /// Capacity of an expert as a multiple of an even share of the tokens: `ceil(capacity_factor * T / E)` tokens.
    pub capacity_factor: f64,
    /// Coefficient of the load-balancing loss.
    pub aux_coef: f64,
}

impl Default for Switch {
    fn default() -> Self {
        Self { capacity_factor: 1.25, aux_coef: 0.01 }
    }
}

impl Definition for Switch {
    const INFO: Info = Info {
        formula: "p_e (relu(x W1 + b1) W2 + b2) of the expert e with the greatest p = softmax(x Wr)",
        source: "Fedus et al. 2022",
        inputs: &[("x", "[T,D]")],
        learned: &[("Wr", "[D,E]"), ("W1", "[E,D,F]"), ("b1", "[E,F]"), ("W2", "[E,F,D]"), ("b2", "[E,D]")],
        constants: &[],
        parameters: &[
            ("capacity_factor", "capacity of an expert as a multiple of an even share, above 0"),
            ("aux_coef", "coefficient of the load-balancing loss"),
        ],
        memory: "E x capacity x (D + F)",
        not_in_models: Some("it takes the place of a feed-forward layer"),
        ..Info::DEFAULT
    };

    fn computation(&self) -> Computation<'_> {
        Computation::whole("router > top 1 within capacity > experts > gate", |inputs| self.forward(inputs))
    }

    fn validate(&self) -> Result<()> {
        if !(self.capacity_factor > 0.0 && self.capacity_factor.is_finite()) {
            bail!("capacity_factor {}: a number above 0 expected", self.capacity_factor);
        }
        Ok(())
    }
}

impl Switch {
    fn forward(&self, inputs: &Inputs) -> Result<Outputs> {
        let (x, router, weight1) = (inputs.get("x")?, inputs.get("Wr")?, inputs.get("W1")?);
        let ((tokens, d), (width, experts)) = (x.dims2()?, router.dims2()?);
        if width != d || weight1.rank() != 3 || weight1.dims()[..2] != [experts, d] {
            let (x, router, weight1) = (x.dims(), router.dims(), weight1.dims());
            bail!("x {x:?}, Wr {router:?}, W1 {weight1:?}: [T,D], [D,E] and [E,D,F] expected");
        }
        let capacity = (self.capacity_factor * tokens as f64 / experts as f64).ceil() as usize;
        let p = softmax(&matmul(x, router)?, 1)?;
        // Of equal probabilities, the one of least index.
        let expert = top_k_positions(&p, 1)?.squeeze(1)?;
        let chosen = one_hot(&expert, experts, x.dtype())?;
        let load = chosen.mean(0)?;
        let loss = ((&load * p.mean(0)?)?.sum_all()? * (self.aux_coef * experts as f64))?;
        let places = Places::new(&expert, experts, capacity.min(tokens))?;
        // A row of zeros behind the tokens fills unused slots, and one behind the slots is what a dropped token gets.
        let slots = take_rows(&x.pad_with_zeros(0, 0, 1)?, &places.token)?.reshape((experts, (), d))?;
        let output = feed_forward(&slots, inputs)?.reshape(((), d))?.pad_with_zeros(0, 0, 1)?;
        let gate = (&p * chosen)?.sum_keepdim(1)?;
        let mut outputs = Outputs { extra_loss: Some(loss.clone()), ..Outputs::default() };
        for (name, t) in [
            ("out", take_rows(&output, &places.row)?.broadcast_mul(&gate)?),
            ("aux", loss.reshape(1)?),
            ("probs", p),
            ("expert", expert.to_dtype(DType::I64)?),
            ("kept", places.slot.ge(0i64)?),
            ("slot", places.slot),
            ("f", load),
        ] {
            outputs.insert(name, t);
        }
        Ok(outputs)
    }
}

/// All experts on x `[E, slots, D]`.
fn feed_forward(x: &Tensor, inputs: &Inputs) -> Result<Tensor> {
    let bias = |name| inputs.get(name)?.unsqueeze(1);
    let hidden = matmul(x, inputs.get("W1")?)?.broadcast_add(&bias("b1")?)?.relu()?;
    matmul(&hidden, inputs.get("W2")?)?.broadcast_add(&bias("b2")?)
}
