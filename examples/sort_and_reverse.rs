//! Copying, reversing and sorting digits by an encoder-decoder, with the attention of Luong, Bahdanau, pointer networks and
//! monotonic attention.
//!
//! The encoder gives every digit a state, its embedding plus that of its position. The decoder makes a state of the digit
//! before and the own position, and attends from it to the encoder's states. Luong and Bahdanau return a mixture of encoder
//! states, from which the next digit is read; the weights of the others point to the digit itself. Monotonic attention never
//! goes back, so that of the three tasks it can only learn to copy.
//!
//! `cargo run --release -p gd-examples --bin sort_and_reverse [STEPS]`

use anyhow::{Context, Result};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{AdamW, Embedding, Linear, Module, Optimizer, ParamsAdamW, VarBuilder};
use gd_layer::mechanisms::{AttentionMechanism, Inputs};
use gd_model::model::params::Params;

/// Different digits; the decoder starts with one more symbol.
const DIGITS: usize = 10;
/// Digits of a sequence, all different.
const LENGTH: usize = 6;
const BATCH: usize = 64;
/// Width of the states.
const WIDTH: usize = 32;

/// What is to be written for the digits that are read.
#[derive(Clone, Copy)]
enum Task {
    Copy,
    Reverse,
    Sort,
}

impl Task {
    fn answer(self, digits: &[u32]) -> Vec<u32> {
        let mut answer = digits.to_vec();
        match self {
            Self::Copy => (),
            Self::Reverse => answer.reverse(),
            Self::Sort => answer.sort_unstable(),
        }
        answer
    }

    /// A batch of inputs and answers, `[B, LENGTH]` each.
    fn batch(self, numbers: &mut Numbers) -> Result<[Tensor; 2]> {
        let (mut inputs, mut answers) = (Vec::new(), Vec::new());
        for _ in 0..BATCH {
            let mut digits: Vec<u32> = (0..DIGITS as u32).collect();
            for i in (1..DIGITS).rev() {
                digits.swap(i, numbers.below(i + 1));
            }
            answers.extend(self.answer(&digits[..LENGTH]));
            inputs.extend(&digits[..LENGTH]);
        }
        let tensor = |digits| Tensor::from_vec(digits, (BATCH, LENGTH), &Device::Cpu);
        Ok([tensor(inputs)?, tensor(answers)?])
    }
}

/// A xorshift generator, so that the example needs no crate for random numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

/// An encoder and a decoder with a mechanism between them.
struct Model {
    mechanism: AttentionMechanism,
    /// The learned parameters of the mechanism.
    learned: Inputs,
    digits: Embedding,
    positions: Tensor,
    query: Linear,
    output: Linear,
}

impl Model {
    fn new(mechanism: AttentionMechanism, vb: VarBuilder) -> Result<Self> {
        let mut learned = Inputs::new();
        for &(name, _) in mechanism.info().learned {
            let shape: &[usize] = match (mechanism.name(), name) {
                (_, "g" | "r") => &[1],
                (_, "vec" | "b") => &[WIDTH],
                _ => &[WIDTH, WIDTH],
            };
            let init = match name {
                "g" => candle_nn::Init::Const((WIDTH as f64).sqrt()),
                "r" | "b" => candle_nn::Init::Const(0.0),
                _ => candle_nn::Init::Randn { mean: 0.0, stdev: (WIDTH as f64).sqrt().recip() },
            };
            learned.insert(name, vb.pp("attention").get_with_hints(shape, name, init)?);
        }
        let normal = candle_nn::Init::Randn { mean: 0.0, stdev: 1.0 };
        Ok(Self {
            mechanism,
            learned,
            digits: candle_nn::embedding(DIGITS + 1, WIDTH, vb.pp("digits"))?,
            positions: vb.get_with_hints((LENGTH, WIDTH), "positions", normal)?,
            query: candle_nn::linear(2 * WIDTH, WIDTH, vb.pp("query"))?,
            output: candle_nn::linear(WIDTH, DIGITS, vb.pp("output"))?,
        })
    }

    /// The log-probabilities `[B, n, DIGITS]` of the first n digits of the answer, from the `before` `[B, n]` each.
    fn forward(&self, inputs: &Tensor, before: &Tensor) -> Result<Tensor> {
        let (b, n) = before.dims2()?;
        let states = self.digits.forward(inputs)?.broadcast_add(&self.positions)?;
        let at = self.positions.narrow(0, 0, n)?.unsqueeze(0)?.broadcast_as((b, n, WIDTH))?;
        let queries = self.query.forward(&Tensor::cat(&[self.digits.forward(before)?, at], 2)?)?;
        // Every mechanism takes the names that it knows.
        let named = [("q", &queries), ("dec", &queries), ("k", &states), ("e", &states)];
        let is_input = |name: &str| self.mechanism.info().inputs.iter().any(|(input, _)| *input == name);
        let named = named.into_iter().filter(|(name, _)| is_input(name) && (*name != "e" || is_input("dec")));
        let tensors = named.fold(self.learned.clone(), |inputs, (name, t)| inputs.with(name, t));
        let outputs = self.mechanism.attend(&tensors)?;
        let out = outputs.get("out")?;
        if out.dim(2)? == WIDTH {
            return Ok(candle_nn::ops::log_softmax(&self.output.forward(out)?, D::Minus1)?);
        }
        // Weights over the positions of the input are probabilities of the digits there.
        let digits = Tensor::arange(0u32, DIGITS as u32, inputs.device())?;
        let digits = inputs.unsqueeze(2)?.broadcast_eq(&digits)?.to_dtype(out.dtype())?;
        Ok((out.contiguous()?.matmul(&digits)? + 1e-6)?.log()?)
    }

    /// The mean loss over a batch, with the answer before each digit given.
    fn loss(&self, inputs: &Tensor, answers: &Tensor) -> Result<Tensor> {
        let log_p = self.forward(inputs, &shifted(answers)?)?;
        Ok(log_p.gather(&answers.unsqueeze(2)?, 2)?.mean_all()?.neg()?)
    }

    /// The share of the digits that the model writes correctly by itself.
    fn accuracy(&self, inputs: &Tensor, answers: &Tensor) -> Result<f64> {
        let mut written = Tensor::full(DIGITS as u32, (BATCH, 1), inputs.device())?;
        for i in 0..LENGTH {
            let next = self.forward(inputs, &written)?.argmax(2)?.narrow(1, i, 1)?;
            written = Tensor::cat(&[written, next], 1)?;
        }
        let correct = written.narrow(1, 1, LENGTH)?.eq(answers)?.to_dtype(DType::F64)?;
        Ok(correct.mean_all()?.to_scalar()?)
    }
}

/// The symbol before each digit of the answers: the start symbol, then the digits.
fn shifted(answers: &Tensor) -> Result<Tensor> {
    let start = Tensor::full(DIGITS as u32, (answers.dim(0)?, 1), answers.device())?;
    Ok(Tensor::cat(&[start, answers.narrow(1, 0, LENGTH - 1)?], 1)?)
}

/// Trains a model and returns the share of correct digits on new sequences.
fn train(mechanism: AttentionMechanism, task: Task, steps: usize) -> Result<f64> {
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
    // Initial values that follow from a seed: those of a VarMap on the CPU differ from run to run.
    let params = Params::new(1, DType::F32, &Device::Cpu);
    let model = Model::new(mechanism, params.builder())?;
    let vars = params.vars().into_iter().map(|(_, var)| var).collect();
    let mut optimizer = AdamW::new(vars, ParamsAdamW { lr: 1e-2, weight_decay: 0.0, ..Default::default() })?;
    for _ in 0..steps {
        let [inputs, answers] = task.batch(&mut numbers)?;
        optimizer.backward_step(&model.loss(&inputs, &answers)?)?;
    }
    let [inputs, answers] = task.batch(&mut numbers)?;
    model.accuracy(&inputs, &answers)
}

fn main() -> Result<()> {
    let steps =
        std::env::args().nth(1).map_or(Ok(200), |steps| steps.parse()).context("the number of steps")?;
    println!("correct digits after {steps} steps (by chance 10 %)");
    for name in ["luong", "bahdanau", "pointer", "monotonic"] {
        let mechanism = AttentionMechanism::named(name).context("no such mechanism")?;
        let accuracy = |task| Ok::<_, anyhow::Error>(100.0 * train(mechanism.clone(), task, steps)?);
        let [copied, reversed, sorted] =
            [accuracy(Task::Copy)?, accuracy(Task::Reverse)?, accuracy(Task::Sort)?];
        println!("{name:<10} copying {copied:3.0} %, reversing {reversed:3.0} %, sorting {sorted:3.0} %");
    }
    Ok(())
}
