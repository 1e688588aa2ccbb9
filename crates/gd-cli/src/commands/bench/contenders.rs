//! The contenders: ways to compute attention or a selection.
//!
//! Shapes: k, v `[B, H, N, D]`; q as k, in a decode pass `[B, H, 1, D]`.

use anyhow::{Context as _, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops;
use gd_kernels::{
    Estimator, Int8Keys, KeyCache, Mask, Precision, Rescored, Scan, Score, Select, scan, scan_select, select,
    softmax_attention,
};
use gd_layer::norm_prior;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

use super::shape::{Pass, Shape, Work};

/// A way to compute the output.
pub(super) struct Contender {
    pub(super) name: &'static str,
    /// Description for the help text.
    pub(super) description: &'static str,
    /// The supported passes.
    pub(super) passes: &'static [Pass],
    pub(super) work: Work,
    /// Whether N x N matrices are stored.
    pub(super) stores_matrix: bool,
    /// The kinds of devices that the contender runs on; empty for all.
    pub(super) only_on: &'static [&'static str],
    /// Prepares everything that is not part of the measured time.
    pub(super) prepare: fn(&Inputs) -> Result<Runner>,
}

impl Contender {
    /// Whether the contender runs on this device.
    pub(super) fn runs_on(&self, device: &Device) -> bool {
        let name = gd_model::config::device::name(device);
        self.only_on.is_empty() || self.only_on.iter().any(|&kind| name.split(':').next() == Some(kind))
    }
}

/// One measured run.
pub(super) type Runner = Box<dyn Fn() -> Result<Output>>;

const INFERENCE: &[Pass] = &[Pass::Fwd, Pass::Decode];
const ALL: &[Pass] = &[Pass::Fwd, Pass::Fwdbwd, Pass::Decode];

/// The baseline of each pass ([`Pass::baseline`]) comes before the contenders that are compared with it.
pub(super) const CONTENDERS: &[Contender] = &[
    Contender {
        name: "gd k=1",
        description: "scan and select: the least-energy key and its value row",
        passes: INFERENCE,
        work: Work::Select,
        stores_matrix: false,
        only_on: &[],
        prepare: |x| selection(x, 1, Precision::Native),
    },
    Contender {
        name: "gd k=8",
        description: "scan for 8 candidates, then select; gradient through the 8",
        passes: ALL,
        work: Work::Select,
        stores_matrix: false,
        only_on: &[],
        prepare: |x| selection(x, 8, Precision::Native),
    },
    Contender {
        name: "gd k=1 certified",
        description: "as gd k=1 with 8-bit integers and exact rescoring; decode also caches K as integers",
        passes: INFERENCE,
        work: Work::Certified,
        stores_matrix: false,
        only_on: &["cpu", "cuda"],
        prepare: |x| selection(x, 1, Precision::Certified),
    },
    Contender {
        name: "gd k=8 certified",
        description: "as gd k=8 with 8-bit integers and exact rescoring",
        passes: ALL,
        work: Work::Certified,
        stores_matrix: false,
        only_on: &["cpu", "cuda"],
        prepare: |x| selection(x, 8, Precision::Certified),
    },
    Contender {
        name: "gd k=8 norm prior",
        description: "as gd k=8 certified with a prior that orders keys by dot product; the prior is cached",
        passes: &[Pass::Decode],
        work: Work::Certified,
        stores_matrix: false,
        only_on: &["cpu"],
        prepare: |x| by_dot_product(x, true),
    },
    Contender {
        name: "gd k=8 norm prior anew",
        description: "as gd k=8 norm prior, but the prior is computed in every step",
        passes: &[Pass::Decode],
        work: Work::Certified,
        stores_matrix: false,
        only_on: &["cpu"],
        prepare: |x| by_dot_product(x, false),
    },
    Contender {
        name: "gd k=2",
        description: "as gd k=8 with 2 candidates",
        passes: &[Pass::Fwdbwd],
        work: Work::Select,
        stores_matrix: false,
        only_on: &[],
        prepare: |x| selection(x, 2, Precision::Native),
    },
    Contender {
        name: "gd k=1 winner",
        description: "one candidate; only its value row gets a gradient",
        passes: &[Pass::Fwdbwd],
        work: Work::Select,
        stores_matrix: false,
        only_on: &[],
        prepare: |x| selection_by(x, 1, Precision::Native, Estimator::Winner),
    },
    Contender {
        name: "softmax in blocks",
        description: "softmax attention without the matrix of weights, with gradients",
        passes: ALL,
        work: Work::Blend,
        stores_matrix: false,
        only_on: &["cpu"],
        prepare: blend_in_blocks,
    },
    Contender {
        name: "candle softmax",
        description: "softmax(q k^T / sqrt(D) + mask) v with candle's differentiable operations",
        passes: ALL,
        work: Work::Blend,
        stores_matrix: true,
        only_on: &[],
        prepare: |x| blend(x, |scores| ops::softmax(scores, 3)),
    },
    Contender {
        name: "candle softmax_last_dim",
        description: "as candle softmax with the fused softmax, which has no gradient",
        passes: INFERENCE,
        work: Work::Blend,
        stores_matrix: true,
        only_on: &[],
        prepare: |x| blend(x, ops::softmax_last_dim),
    },
    Contender {
        name: "candle flash",
        description: "candle-nn's flash attention for the CPU, which has no gradient",
        passes: INFERENCE,
        work: Work::Blend,
        stores_matrix: false,
        only_on: &["cpu"],
        prepare: flash,
    },
    #[cfg(feature = "metal")]
    Contender {
        name: "candle sdpa",
        description: "candle-nn's fused attention for Metal, which has no gradient",
        passes: INFERENCE,
        work: Work::Blend,
        stores_matrix: false,
        only_on: &["metal"],
        prepare: sdpa,
    },
];

/// Names and descriptions of all contenders for the help text.
pub(super) fn descriptions() -> String {
    let lines = CONTENDERS.iter().map(|c| format!("  {:<24} {}", c.name, c.description));
    lines.collect::<Vec<_>>().join("\n")
}

/// The inputs of all contenders of one shape and pass, normally distributed.
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

/// The result of a run.
pub(super) struct Output {
    /// The output, with the shape of q and without gradient.
    pub(super) y: Tensor,
    /// The selected key of every query, if the contender selects one.
    pub(super) winners: Option<Tensor>,
    /// How many of the visible pairs were scored in full precision.
    pub(super) rescored: Option<Rescored>,
}

/// Prevents the compiler from removing a result that is not used. Asynchronous devices are synchronized once per
/// round.
fn use_result(t: &Tensor) {
    std::hint::black_box(t);
}

/// Returns a function that runs `forward(q, k, v)`, and the backward pass if the pass has one.
fn runner(
    x: &Inputs,
    forward: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Output> + 'static,
) -> Result<Runner> {
    if x.pass != Pass::Fwdbwd {
        let (q, k, v) = (x.q.clone(), x.k.clone(), x.v.clone());
        return Ok(Box::new(move || {
            let out = forward(&q, &k, &v)?;
            use_result(&out.y);
            Ok(out)
        }));
    }
    let vars = [Var::from_tensor(&x.q)?, Var::from_tensor(&x.k)?, Var::from_tensor(&x.v)?];
    Ok(Box::new(move || {
        let [q, k, v] = &vars;
        let out = forward(q, k, v)?;
        // The upstream gradient is 1, so that only the operator is measured.
        let grads = out.y.backward()?;
        for (name, var) in ["q", "k", "v"].iter().zip(&vars) {
            use_result(grads.get(var).with_context(|| format!("{name} got no gradient"))?);
        }
        // The graph is dropped here, within the measured time.
        Ok(Output { y: out.y.detach(), ..out })
    }))
}

/// Scan and selection with the default estimator.
fn selection(x: &Inputs, candidates: usize, precision: Precision) -> Result<Runner> {
    selection_by(x, candidates, precision, Estimator::default())
}

/// Scan and selection.
fn selection_by(x: &Inputs, candidates: usize, precision: Precision, estimator: Estimator) -> Result<Runner> {
    let beta = Tensor::ones(x.shape.heads, DType::F32, x.q.device())?;
    let mask = if x.pass == Pass::Decode { Mask::none() } else { Mask::causal(0) };
    // On the CPU a native decode step uses no cached data besides the keys.
    let caches = x.pass == Pass::Decode && !(precision == Precision::Native && x.k.device().is_cpu());
    let cache = caches.then(|| KeyCache::new(&x.k, Score::Energy, precision)).transpose()?;
    // On a GPU the fused operator has its own kernel. It is the only one that decodes with 8-bit keys, and it does not
    // report the number of rescored pairs.
    let native = precision == Precision::Native;
    let fused = candidates == 1 && x.pass != Pass::Fwdbwd && (native || x.k.device().is_cuda());
    runner(x, move |q, k, v| {
        let args = Scan { precision, ..Scan::new(&beta, &mask, candidates) };
        let args = match &cache {
            Some(cache) => args.with_cached(cache),
            None => args,
        };
        let (selected, rescored) = match fused {
            true => (scan_select(q, k, v, &args, None)?, native.then_some(Rescored::ALL)),
            false => {
                let candidates = scan(q, k, &args)?;
                let options = Select { estimator, ..Select::new(&beta) };
                (select(q, k, v, &candidates, &options)?, Some(candidates.rescored))
            }
        };
        Ok(Output { y: selected.y, winners: Some(selected.index), rescored })
    })
}

/// Decoding with a prior of the key norms, with which energies order keys as dot products do. The prior is cached or
/// computed in every step.
fn by_dot_product(x: &Inputs, cache_prior: bool) -> Result<Runner> {
    let beta = Tensor::ones(x.shape.heads, DType::F32, x.q.device())?;
    let (mask, keys) = (Mask::none(), Int8Keys::new(&x.k, Score::Energy)?);
    let cached_prior = cache_prior.then(|| norm_prior(&x.k, &beta, None)).transpose()?;
    runner(x, move |q, k, v| {
        let prior = match &cached_prior {
            Some(prior) => prior.clone(),
            None => norm_prior(k, &beta, None)?,
        };
        let args = Scan {
            prior: Some(&prior),
            precision: Precision::Certified,
            cached: Some((&keys).into()),
            ..Scan::new(&beta, &mask, 8)
        };
        let candidates = scan(q, k, &args)?;
        let selected = select(q, k, v, &candidates, &Select { prior: Some(&prior), ..Select::new(&beta) })?;
        Ok(Output { y: selected.y, winners: Some(selected.index), rescored: Some(candidates.rescored) })
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
        // There are fewer queries than scores to scale.
        let mut scores = (q * scale)?.matmul(&k.t()?)?;
        if let Some(bias) = &bias {
            // Assigned instead of shadowed, so that the old matrix is freed if there is no gradient.
            scores = scores.broadcast_add(bias)?;
        }
        scores = softmax(&scores)?;
        Ok(Output { y: scores.matmul(v)?, winners: None, rescored: None })
    })
}

/// Attention in blocks, whose backward pass computes the weights again.
fn blend_in_blocks(x: &Inputs) -> Result<Runner> {
    let mask = if x.pass == Pass::Decode { Mask::none() } else { Mask::causal(0) };
    let scale = x.scale();
    runner(x, move |q, k, v| {
        let y = softmax_attention(q, k, v, None, None, &mask, scale)?;
        Ok(Output { y, winners: None, rescored: None })
    })
}

/// Attention without the matrix.
fn flash(x: &Inputs) -> Result<Runner> {
    // [B, N, H, D]. The operator reads one batch entry with strides and copies several ones first. The copy is not part
    // of the measurement.
    let rows_first = |t: &Tensor| -> candle_core::Result<Tensor> {
        let t = t.transpose(1, 2)?;
        if x.shape.batch == 1 { Ok(t) } else { t.contiguous() }
    };
    let (q, k, v) = (rows_first(&x.q)?, rows_first(&x.k)?, rows_first(&x.v)?);
    let mask = if x.pass == Pass::Decode { AttnMask::None } else { AttnMask::causal() };
    let scale = x.scale() as f32;
    Ok(Box::new(move || {
        let y = flash_attn::<f32>(&q, &k, &v, scale, mask.clone(), None, None)?;
        use_result(&y);
        Ok(Output { y, winners: None, rescored: None })
    }))
}

/// Attention without the matrix, on Metal.
#[cfg(feature = "metal")]
fn sdpa(x: &Inputs) -> Result<Runner> {
    let (causal, scale) = (x.pass != Pass::Decode, x.scale() as f32);
    // A soft cap of 1 means none.
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

    /// The contenders of each kind compute the same output, so that their times are comparable.
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
    fn every_pass_starts_with_its_baseline_and_names_are_unique() {
        for pass in [Pass::Fwd, Pass::Fwdbwd, Pass::Decode] {
            let first = CONTENDERS.iter().find(|c| c.passes.contains(&pass)).map(|c| c.name);
            assert_eq!(first, Some(pass.baseline()));
        }
        for (i, c) in CONTENDERS.iter().enumerate() {
            assert!(CONTENDERS[..i].iter().all(|d| d.name != c.name), "{} twice", c.name);
            assert!(!c.name.contains(','), "--only separates names by commas: {}", c.name);
        }
    }
}
