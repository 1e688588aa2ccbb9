//! What is measured: one table of ways to compute attention or a selection.
//!
//! Shapes: k, v `[B, H, N, D]`; q as k, in a decoding pass `[B, H, 1, D]`.

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops;
use gd_kernels::{
    Estimator, KeyCache, Mask, Precision, Int8Keys, Rescored, Scan, Score, Select, scan, scan_select,
    select,
};
use gd_layer::norm_prior;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::shape::{Pass, Shape, Work};

/// One way to compute the output.
pub(super) struct Contender {
    pub(super) name: &'static str,
    /// For the help.
    pub(super) what: &'static str,
    /// The passes it has.
    pub(super) passes: &'static [Pass],
    pub(super) work: Work,
    /// Whether it stores N x N matrices.
    pub(super) square: bool,
    /// The kinds of devices that it runs on, where they are not all.
    pub(super) only_on: &'static [&'static str],
    /// Everything that is done once, before the clock starts.
    pub(super) prepare: fn(&Inputs) -> Result<Runner>,
}

impl Contender {
    /// Whether it runs on a device of this kind.
    pub(super) fn runs_on(&self, device: &Device) -> bool {
        let name = gd_model::config::device::name(device);
        self.only_on.is_empty() || self.only_on.iter().any(|&kind| name.split(':').next() == Some(kind))
    }
}

/// One measured run.
pub(super) type Runner = Box<dyn Fn() -> Result<Output>>;

const INFERENCE: &[Pass] = &[Pass::Fwd, Pass::Decode];
const ALL: &[Pass] = &[Pass::Fwd, Pass::Fwdbwd, Pass::Decode];

/// The base of each pass ([`Pass::base`]) comes before what is compared to it.
pub(super) const CONTENDERS: &[Contender] = &[
    Contender {
        name: "gd k=1",
        what: "scan and select: the least-energy key and its value row",
        passes: INFERENCE,
        work: Work::Select,
        square: false,
        only_on: &[],
        prepare: |x| selection(x, 1, Precision::Native),
    },
    Contender {
        name: "gd k=8",
        what: "scan for 8 candidates, then select; gradient through the 8",
        passes: ALL,
        work: Work::Select,
        square: false,
        only_on: &[],
        prepare: |x| selection(x, 8, Precision::Native),
    },
    Contender {
        name: "gd k=1 certified",
        what: "as gd k=1, by 8-bit integers with exact re-scoring; decode keeps K as integers, too",
        passes: INFERENCE,
        work: Work::Certified,
        square: false,
        only_on: &["cpu", "cuda"],
        prepare: |x| selection(x, 1, Precision::Certified),
    },
    Contender {
        name: "gd k=8 certified",
        what: "as gd k=8, in the same way",
        passes: ALL,
        work: Work::Certified,
        square: false,
        only_on: &["cpu", "cuda"],
        prepare: |x| selection(x, 8, Precision::Certified),
    },
    Contender {
        name: "gd k=8 norm prior",
        what: "as gd k=8 certified, by dot product: the prior of the keys' norms is kept, as K is",
        passes: &[Pass::Decode],
        work: Work::Certified,
        square: false,
        only_on: &["cpu"],
        prepare: |x| by_dot_product(x, true),
    },
    Contender {
        name: "gd k=8 norm prior anew",
        what: "the same with the norms of all keys worked out at every step",
        passes: &[Pass::Decode],
        work: Work::Certified,
        square: false,
        only_on: &["cpu"],
        prepare: |x| by_dot_product(x, false),
    },
    Contender {
        name: "gd k=2",
        what: "the same with 2 candidates",
        passes: &[Pass::Fwdbwd],
        work: Work::Select,
        square: false,
        only_on: &[],
        prepare: |x| selection(x, 2, Precision::Native),
    },
    Contender {
        name: "gd k=1 winner",
        what: "one candidate, whose value row alone gets a gradient",
        passes: &[Pass::Fwdbwd],
        work: Work::Select,
        square: false,
        only_on: &[],
        prepare: |x| selection_by(x, 1, Precision::Native, Estimator::Winner),
    },
    Contender {
        name: "candle softmax",
        what: "softmax(q k^T / sqrt(D) + mask) v from candle's differentiable operations",
        passes: ALL,
        work: Work::Blend,
        square: true,
        only_on: &[],
        prepare: |x| blend(x, |scores| ops::softmax(scores, 3)),
    },
    Contender {
        name: "candle softmax_last_dim",
        what: "the same with the fused softmax, which has no gradient",
        passes: INFERENCE,
        work: Work::Blend,
        square: true,
        only_on: &[],
        prepare: |x| blend(x, ops::softmax_last_dim),
    },
    Contender {
        name: "candle flash",
        what: "candle-nn's flash attention for the CPU, which has no gradient",
        passes: INFERENCE,
        work: Work::Blend,
        square: false,
        only_on: &["cpu"],
        prepare: flash,
    },
    #[cfg(feature = "metal")]
    Contender {
        name: "candle sdpa",
        what: "candle-nn's fused attention for Metal, which has no gradient",
        passes: INFERENCE,
        work: Work::Blend,
        square: false,
        only_on: &["metal"],
        prepare: sdpa,
    },
];

/// The table's names and what they mean, for the help.
pub(super) fn table() -> String {
    let lines = CONTENDERS.iter().map(|c| format!("  {:<24} {}", c.name, c.what));
    lines.collect::<Vec<_>>().join("\n")
}

/// What every contender of one shape and pass gets: the same numbers, normally distributed.
pub(super) struct Inputs {
    pub(super) shape: Shape,
    pub(super) pass: Pass,
    pub(super) q: Tensor,
    pub(super) k: Tensor,
    pub(super) v: Tensor,
}

impl Inputs {
    pub(super) fn new(shape: Shape, pass: Pass, dtype: DType, seed: u64, device: &Device) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = |rows: usize| -> Result<Tensor> {
            let Shape { batch, heads, dim, .. } = shape;
            let values: Vec<f32> =
                (0..batch * heads * rows * dim).map(|_| StandardNormal.sample(&mut rng)).collect();
            Ok(Tensor::from_vec(values, (batch, heads, rows, dim), device)?.to_dtype(dtype)?)
        };
        let queries = pass.queries(shape);
        let (k, v, q) = (normal(shape.len)?, normal(shape.len)?, normal(queries)?);
        Ok(Self { shape, pass, q, k, v })
    }

    fn scale(&self) -> f64 {
        (self.shape.dim as f64).sqrt().recip()
    }
}

/// What a run leaves behind.
pub(super) struct Output {
    /// As q, without its gradient.
    pub(super) y: Tensor,
    /// The selected key of every query, where one is selected.
    pub(super) winners: Option<Tensor>,
    /// Of the visible pairs the share that a selection scored in full precision.
    pub(super) rescored: Option<Rescored>,
}

/// Keeps the compiler from leaving out what nobody reads. Devices that compute behind our back are waited for
/// once a round.
fn touch(t: &Tensor) {
    std::hint::black_box(t);
}

/// Runs `forward(q, k, v)`, and the backward pass where there is one.
fn runner(
    x: &Inputs,
    forward: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Output> + 'static,
) -> Result<Runner> {
    if x.pass != Pass::Fwdbwd {
        let (q, k, v) = (x.q.clone(), x.k.clone(), x.v.clone());
        return Ok(Box::new(move || {
            let out = forward(&q, &k, &v)?;
            touch(&out.y);
            Ok(out)
        }));
    }
    let vars = [Var::from_tensor(&x.q)?, Var::from_tensor(&x.k)?, Var::from_tensor(&x.v)?];
    Ok(Box::new(move || {
        let [q, k, v] = &vars;
        let out = forward(q, k, v)?;
        // The gradient that comes from above is 1, so that nothing else is measured.
        let grads = out.y.backward()?;
        for (name, var) in ["q", "k", "v"].iter().zip(&vars) {
            touch(grads.get(var).with_context(|| format!("{name} got no gradient"))?);
        }
        // The rest of the graph ends here, inside the measured time.
        Ok(Output { y: out.y.detach(), ..out })
    }))
}

/// This repository's operators.
fn selection(x: &Inputs, candidates: usize, precision: Precision) -> Result<Runner> {
    selection_by(x, candidates, precision, Estimator::default())
}

/// The same with this gradient.
fn selection_by(x: &Inputs, candidates: usize, precision: Precision, estimator: Estimator) -> Result<Runner> {
    let beta = Tensor::ones(x.shape.heads, DType::F32, x.q.device())?;
    let mask = if x.pass == Pass::Decode { Mask::none() } else { Mask::causal(0) };
    // On the CPU a native step reads the keys alone.
    let keeps = x.pass == Pass::Decode && !(precision == Precision::Native && x.k.device().is_cpu());
    let kept = keeps.then(|| KeyCache::new(&x.k, Score::Energy, precision)).transpose()?;
    // On a GPU the fused form has a kernel of its own, which alone decodes with 8-bit keys and does not tell how much
    // it scored.
    let native = precision == Precision::Native;
    let fused = candidates == 1 && x.pass != Pass::Fwdbwd && (native || x.k.device().is_cuda());
    runner(x, move |q, k, v| {
        let args = Scan { precision, ..Scan::new(&beta, &mask, candidates) };
        let args = match &kept {
            Some(kept) => args.with_cached(kept),
            None => args,
        };
        let (selected, rescored) = match fused {
            true => (scan_select(q, k, v, &args, None)?, native.then_some(Rescored::ALL)),
            false => {
                let found = scan(q, k, &args)?;
                let how = Select { estimator, ..Select::new(&beta) };
                (select(q, k, v, &found, &how)?, Some(found.rescored))
            }
        };
        Ok(Output { y: selected.y, winners: Some(selected.index), rescored })
    })
}

/// Decoding by energies that a prior of the keys' norms has order keys as dot products do: the prior kept, or worked
/// out anew at every step.
fn by_dot_product(x: &Inputs, kept: bool) -> Result<Runner> {
    let beta = Tensor::ones(x.shape.heads, DType::F32, x.q.device())?;
    let (mask, keys) = (Mask::none(), Int8Keys::new(&x.k, Score::Energy)?);
    let kept = kept.then(|| norm_prior(&x.k, &beta, None)).transpose()?;
    runner(x, move |q, k, v| {
        let prior = match &kept {
            Some(prior) => prior.clone(),
            None => norm_prior(k, &beta, None)?,
        };
        let args = Scan {
            prior: Some(&prior),
            precision: Precision::Certified,
            cached: Some((&keys).into()),
            ..Scan::new(&beta, &mask, 8)
        };
        let found = scan(q, k, &args)?;
        let selected = select(q, k, v, &found, &Select { prior: Some(&prior), ..Select::new(&beta) })?;
        Ok(Output { y: selected.y, winners: Some(selected.index), rescored: Some(found.rescored) })
    })
}

/// Attention with its N x N matrix of weights.
fn blend(x: &Inputs, softmax: fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Runner> {
    let (n, scale) = (x.shape.len, x.scale());
    let mut bias = None;
    if x.pass != Pass::Decode {
        let row = |i| (0..n).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY });
        let values: Vec<f32> = (0..n).flat_map(row).collect();
        bias = Some(Tensor::from_vec(values, (n, n), x.q.device())?.to_dtype(x.q.dtype())?);
    }
    runner(x, move |q, k, v| {
        // The queries are fewer numbers to scale than the scores.
        let mut scores = (q * scale)?.matmul(&k.t()?)?;
        if let Some(bias) = &bias {
            // Assigned, not shadowed: without a gradient the old matrix goes at once.
            scores = scores.broadcast_add(bias)?;
        }
        scores = softmax(&scores)?;
        Ok(Output { y: scores.matmul(v)?, winners: None, rescored: None })
    })
}

/// Attention without the matrix.
fn flash(x: &Inputs) -> Result<Runner> {
    // [B, N, H, D]. One batch entry is read with strides, where a head's rows stay together; more
    // are copied together first, which is not to be measured.
    let rows_first = |t: &Tensor| -> candle_core::Result<Tensor> {
        let t = t.transpose(1, 2)?;
        if x.shape.batch == 1 { Ok(t) } else { t.contiguous() }
    };
    let (q, k, v) = (rows_first(&x.q)?, rows_first(&x.k)?, rows_first(&x.v)?);
    let mask = if x.pass == Pass::Decode { AttnMask::None } else { AttnMask::causal() };
    let scale = x.scale() as f32;
    Ok(Box::new(move || {
        let y = flash_attn::<f32>(&q, &k, &v, scale, mask.clone(), None, None)?;
        touch(&y);
        Ok(Output { y, winners: None, rescored: None })
    }))
}

/// Attention without the matrix, on Metal.
#[cfg(feature = "metal")]
fn sdpa(x: &Inputs) -> Result<Runner> {
    let (causal, scale) = (x.pass != Pass::Decode, x.scale() as f32);
    // 1: no soft cap.
    runner(x, move |q, k, v| {
        let y = ops::sdpa(q, k, v, None, causal, scale, 1.0)?;
        Ok(Output { y, winners: None, rescored: None })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(t: &Tensor) -> Result<Vec<f32>> {
        Ok(t.flatten_all()?.to_vec1()?)
    }

    /// Each family computes one thing, so that their times can be compared.
    #[test]
    fn contenders_of_a_kind_agree() -> Result<()> {
        for shape in ["1x2x33x16", "2x3x9x8"] {
            let shape: Shape = shape.parse().map_err(anyhow::Error::msg)?;
            for pass in [Pass::Fwd, Pass::Fwdbwd, Pass::Decode] {
                let inputs = Inputs::new(shape, pass, DType::F32, 3, &Device::Cpu)?;
                let (mut selected, mut blended) = (None::<Vec<f32>>, None::<Vec<f32>>);
                let mut by_product = None::<Vec<f32>>;
                for c in CONTENDERS.iter().filter(|c| c.passes.contains(&pass)) {
                    if !c.runs_on(&Device::Cpu) {
                        continue;
                    }
                    let out = (c.prepare)(&inputs)?()?;
                    let first = match c.work {
                        Work::Blend => &mut blended,
                        _ if c.name.contains("norm prior") => &mut by_product,
                        _ => &mut selected,
                    };
                    let y = values(&out.y)?;
                    assert_eq!(y.len(), inputs.q.elem_count(), "{} {pass} {shape}", c.name);
                    assert_eq!(out.winners.is_some(), c.work != Work::Blend, "{}", c.name);
                    let first = first.get_or_insert_with(|| y.clone());
                    for (a, b) in first.iter().zip(&y) {
                        assert!((a - b).abs() <= 1e-5, "{} {pass} {shape}: {a} against {b}", c.name);
                    }
                }
                assert!(selected.is_some() && blended.is_some());
            }
        }
        Ok(())
    }

    #[test]
    fn every_pass_has_its_base_and_no_name_comes_twice() {
        for pass in [Pass::Fwd, Pass::Fwdbwd, Pass::Decode] {
            let first = CONTENDERS.iter().find(|c| c.passes.contains(&pass)).map(|c| c.name);
            assert_eq!(first, Some(pass.base()));
        }
        for (i, c) in CONTENDERS.iter().enumerate() {
            assert!(CONTENDERS[..i].iter().all(|d| d.name != c.name), "{} twice", c.name);
            assert!(!c.name.contains(','), "--only separates names by commas: {}", c.name);
        }
    }
}
