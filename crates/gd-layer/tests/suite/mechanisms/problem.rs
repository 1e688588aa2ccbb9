//! Random problems for every mechanism.

use candle_core::{DType, Device, Result, Tensor};
use gd_layer::mechanisms::{AttentionMechanism, Inputs, Outputs};
use serde_json::{Value, json};

use crate::layers::Numbers;

/// The sizes of a problem: `heads` is a multiple of `key_value_heads`, and `queries` at most `keys`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) heads: usize,
    pub(super) key_value_heads: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
}

/// Batch entries.
const B: usize = 2;
/// Width of heads, encoder states and decoder states.
const D_HEAD: usize = 4;
/// Width of the hidden layer of additive scores.
const A: usize = 3;

/// A mechanism with what holds for it.
#[derive(Debug, Clone)]
pub(super) struct Subject {
    pub(super) mechanism: AttentionMechanism,
    /// Whether another order of the keys changes only the order of the weights.
    pub(super) equivariant: bool,
    /// Whether a vector added to all keys, which shifts the scores of a row alike, changes no weight.
    pub(super) shift_invariant: bool,
}

/// The mechanism of this configuration.
pub(super) fn mechanism(config: Value) -> AttentionMechanism {
    serde_json::from_value(config).expect("a configuration of a mechanism")
}

/// All mechanisms over queries and keys, with several parameters each.
pub(super) fn subjects() -> Vec<Subject> {
    let subject = |config: Value, equivariant, shift_invariant| Subject {
        mechanism: mechanism(config),
        equivariant,
        shift_invariant,
    };
    vec![
        subject(json!({"name": "softmax"}), true, true),
        subject(json!({"name": "luong", "kind": "dot"}), true, true),
        subject(json!({"name": "luong", "kind": "general"}), true, true),
        subject(json!({"name": "luong", "kind": "concat"}), true, false),
        subject(json!({"name": "bahdanau"}), true, false),
        subject(json!({"name": "pointer"}), true, false),
        subject(json!({"name": "sparsemax"}), true, true),
        subject(json!({"name": "entmax", "alpha": 1.25}), true, true),
        subject(json!({"name": "entmax", "alpha": 1.5}), true, true),
        subject(json!({"name": "entmax", "alpha": 2.4}), true, true),
        subject(json!({"name": "entmax", "alpha": "learned"}), true, true),
        subject(json!({"name": "topk", "k": 2}), true, true),
        subject(json!({"name": "explicit_sparse", "k": 3}), true, true),
        subject(json!({"name": "hard"}), true, true),
        subject(json!({"name": "hard", "ties": "last"}), true, true),
        subject(json!({"name": "hard", "ties": "average"}), true, true),
        subject(json!({"name": "patterns", "pattern": "strided", "l": 2}), false, true),
        subject(json!({"name": "patterns", "pattern": "fixed", "l": 3, "c": 1}), false, true),
        subject(json!({"name": "patterns", "pattern": "longformer", "w": 2, "globals": [1]}), false, true),
        subject(json!({"name": "patterns", "pattern": "bigbird", "block": 2}), false, true),
        subject(json!({"name": "selective"}), false, false),
        subject(json!({"name": "differential", "lambda_init": 0.3}), true, true),
        subject(json!({"name": "ssmax"}), true, true),
        subject(json!({"name": "gated"}), true, true),
        subject(json!({"name": "sigmoid"}), true, false),
        subject(json!({"name": "softmax1"}), true, false),
        subject(json!({"name": "sink"}), true, false),
        subject(json!({"name": "hopfield", "T": 0}), true, true),
        subject(json!({"name": "hopfield", "T": 2, "beta": 1.5}), true, false),
    ]
}

impl Subject {
    pub(super) fn name(&self) -> &'static str {
        self.mechanism.name()
    }

    /// The sizes that this mechanism can have: selective attention is self-attention.
    pub(super) fn fit(&self, sizes: Sizes) -> Sizes {
        let queries = if self.name() == "selective" { sizes.keys } else { sizes.queries };
        Sizes { queries, ..sizes }
    }

    /// The name of the input with the keys.
    pub(super) fn keys(&self) -> &'static str {
        if self.name() == "pointer" { "e" } else { "k" }
    }

    /// The shape of an input that is not the mask; none for one that the problems do not have.
    fn shape(&self, tensor: &str, sizes: &Sizes) -> Option<Vec<usize>> {
        let Sizes { heads: h, key_value_heads: hk, queries: n, keys: m } = *sizes;
        let additive = ["luong", "bahdanau", "pointer"].contains(&self.name());
        let maps = if self.name() == "differential" { 2 } else { 1 };
        let kind = serde_json::to_value(&self.mechanism).expect("JSON")["kind"].clone();
        Some(match tensor {
            "q" | "dec" if additive => vec![B, n, D_HEAD],
            "k" | "e" if additive => vec![B, m, D_HEAD],
            "q" => vec![B, maps * h, n, D_HEAD],
            "k" => vec![B, maps * hk, m, D_HEAD],
            "v" => vec![B, hk, m, maps * D_HEAD],
            "W" if kind == "general" => vec![D_HEAD, D_HEAD],
            "W" if kind == "concat" => vec![A, 2 * D_HEAD],
            "W" if kind == "dot" => return None,
            "W" | "U" | "W1" | "W2" => vec![A, D_HEAD],
            "vec" => vec![A],
            "a" | "s" | "b" | "t" => vec![h],
            "lq1" | "lk1" | "lq2" | "lk2" => vec![D_HEAD],
            "gw" => vec![2 * D_HEAD],
            "x" => vec![B, n, D_HEAD],
            "Wg" => vec![D_HEAD, h],
            "Wo" => vec![h * D_HEAD, D_HEAD],
            "noise" => vec![B, h, n, m],
            _ => return None,
        })
    }

    /// A random problem. Row 0 of the mask, if there is one, sees no key.
    pub(super) fn problem(&self, sizes: &Sizes, masked: bool, seed: u64, dtype: DType) -> Result<Inputs> {
        let mut numbers = Numbers(seed);
        let info = self.mechanism.info();
        let mut inputs = Inputs::new();
        for &(tensor, _) in info.inputs.iter().chain(info.learned).chain(info.constants) {
            if let Some(shape) = self.shape(tensor, sizes) {
                inputs.insert(tensor, numbers.tensor(&shape, 1.5, dtype)?);
            }
        }
        if self.name() == "patterns" {
            inputs.insert("rand_blocks", random_blocks(sizes.keys.div_ceil(2), &mut numbers)?);
        }
        if masked {
            inputs.insert("mask", random_mask(sizes, &mut numbers)?);
        }
        Ok(inputs)
    }

    pub(super) fn attend(&self, inputs: &Inputs) -> Result<Outputs> {
        self.mechanism.attend(inputs)
    }
}

/// One random block for each of `blocks`.
fn random_blocks(blocks: usize, numbers: &mut Numbers) -> Result<Tensor> {
    let block = |_| ((numbers.next() + 1.0) / 2.0 * blocks as f64) as i64;
    let all: Vec<i64> = (0..blocks).map(block).collect();
    Tensor::from_vec(all, (blocks, 1), &Device::Cpu)
}

/// Two thirds of the keys are visible, but none to query 0.
fn random_mask(sizes: &Sizes, numbers: &mut Numbers) -> Result<Tensor> {
    let Sizes { queries: n, keys: m, .. } = *sizes;
    let visible = |at: usize| u8::from(numbers.next() > -0.33 && at >= m);
    Tensor::from_vec((0..n * m).map(visible).collect(), (n, m), &Device::Cpu)
}
