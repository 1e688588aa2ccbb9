//! Decoding with derived data in the cache gives the bits of decoding without them. A layer whose parameters are
//! variables, at native precision, computes everything again in every step; the same layer over tensors without
//! gradients caches 8-bit keys and the prior of the norms, and computes only the winner where that is enough.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use gd_kernels::{Estimator, Mask, Precision, Score, TieBreak};
use gd_layer::{
    Attention, AttentionConfig, BeaconConfig, GdAttention, GdConfig, LayerCache, Pass, RopeScaling, Rotary,
};

use crate::layers::{Fixture, Numbers, config, fixture, selecting};

/// The same layer over tensors without gradients.
pub(crate) fn frozen(f: &Fixture, cfg: &AttentionConfig, dtype: DType) -> Result<GdAttention> {
    let tensors: HashMap<String, Tensor> =
        f.vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().detach())).collect();
    let rotary = Arc::new(Rotary::new(cfg.head_dim, 256, 10_000.0, RopeScaling::None, dtype, &Device::Cpu)?);
    GdAttention::new(cfg, rotary, VarBuilder::from_tensors(tensors, dtype, &Device::Cpu))
}

pub(crate) fn bits(t: &Tensor) -> Result<Vec<u32>> {
    let values = t.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

/// The configurations: all estimators, barriers, gates and rounds, and those for which decoding has a path of its own.
pub(crate) fn cases() -> Vec<(&'static str, AttentionConfig)> {
    let mut all: Vec<_> = selecting().into_iter().map(|(name, _, cfg)| (name, cfg)).collect();
    let of = |gd: GdConfig, beacon: Option<BeaconConfig>| config(gd, beacon);
    let norms = |gd: GdConfig| GdConfig { norm_prior: true, ..gd };
    let beacon = || Some(BeaconConfig::default());
    let one = || GdConfig { candidates: 1, threshold: Some(1.2), ..GdConfig::default() };
    all.extend([
        ("prior of the norms", of(norms(GdConfig::default()), None)),
        ("prior of the norms, learned prior", of(norms(GdConfig::default()), beacon())),
        ("dot", of(GdConfig { score: Score::Dot, tie: TieBreak::Last, ..GdConfig::default() }, None)),
        ("one candidate", of(one(), None)),
        ("one candidate, prior of the norms, learned prior", of(norms(one()), beacon())),
        ("one candidate, dot", of(GdConfig { score: Score::Dot, ..one() }, beacon())),
        ("one candidate, window", AttentionConfig { window: Some(40), ..of(norms(one()), None) }),
        ("one candidate, blend", of(GdConfig { estimator: Estimator::Blend, ..one() }, beacon())),
    ]);
    all
}

/// A layer and its cache, of several sequences of one text each.
struct Reader<'a> {
    layer: &'a dyn Attention,
    cache: LayerCache,
}

impl Reader<'_> {
    /// The next `n` positions of every sequence of `texts` `[B, N, C]`.
    fn read(&mut self, texts: &Tensor, n: usize) -> Result<Tensor> {
        let lengths = match self.cache.lengths() {
            [] => vec![0; texts.dim(0)?],
            lengths => lengths.to_vec(),
        };
        let parts = lengths.iter().enumerate().map(|(b, at)| texts.narrow(0, b, 1)?.narrow(1, *at, n));
        let x = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
        let mask = Mask::causal(0).with_offsets(lengths.iter().map(|at| *at as i64).collect());
        self.layer.attend(&x, &Pass::new(&mask), Some(&mut self.cache))
    }
}

/// The same sequences decoded without derived data in the cache, and with them.
struct Both<'a>([Reader<'a>; 2]);

impl Both<'_> {
    fn read(&mut self, texts: &Tensor, n: usize, name: &str) -> Result<()> {
        let [plain, cached] = &mut self.0;
        let (want, got) = (plain.read(texts, n)?, cached.read(texts, n)?);
        assert_eq!(plain.cache.lengths(), cached.cache.lengths(), "{name}");
        assert_eq!(bits(&got)?, bits(&want)?, "{name}, {:?} positions", cached.cache.lengths());
        Ok(())
    }
}

#[test]
fn derived_data_in_the_cache_do_not_change_the_bits() -> Result<()> {
    const PROMPTS: [usize; 3] = [70, 3, 131];
    let mut read = 0;
    for (name, cfg) in cases() {
        for (dtype, stored) in [
            (DType::F32, DType::F32),
            (DType::BF16, DType::BF16),
            (DType::F16, DType::F16),
            (DType::F32, DType::F16),
            (DType::F32, DType::BF16),
        ] {
            let f = fixture(&cfg, true, dtype, 21)?;
            let frozen = frozen(&f, &cfg, dtype)?;
            // Keys and values of another dtype than the queries have no gradients.
            let plain = if stored == dtype { f.layer.as_ref() } else { &frozen as &dyn Attention };
            let texts = Numbers(31).tensor(&[3, 160, 12], 1.0, dtype)?;
            let name = format!("{name}, {dtype:?} cached in {stored:?}");
            let both = |caches: [LayerCache; 2]| {
                let [a, b] = caches;
                Both([Reader { layer: plain, cache: a }, Reader { layer: &frozen, cache: b }])
            };
            let empty = || LayerCache::new().with_dtype(stored);
            let caches = || [empty().with_precision(Precision::Native), empty()];
            // Prompts one by one, each in one pass.
            let mut alone = Vec::new();
            for (b, n) in PROMPTS.into_iter().enumerate() {
                let mut one = both(caches());
                one.read(&texts.narrow(0, b, 1)?, n, &format!("{name}, prompt {b}"))?;
                alone.push(one);
            }
            let stack = |i: usize| -> Result<LayerCache> {
                LayerCache::stack(&alone.iter().map(|both| &both.0[i].cache).collect::<Vec<_>>())
            };
            let mut all = both([stack(0)?, stack(1)?]);
            for n in [1, 1, 3, 1] {
                all.read(&texts, n, &format!("{name}, together"))?;
            }
            // A clone that continues with other rows, and its source.
            let mut fork = both([all.0[0].cache.clone(), all.0[1].cache.clone()]);
            let other = Numbers(77).tensor(&[3, 160, 12], 1.0, dtype)?;
            fork.read(&other, 2, &format!("{name}, fork"))?;
            all.read(&texts, 1, &format!("{name}, forked"))?;
            fork.read(&other, 1, &format!("{name}, fork"))?;
            // Reordered, one sequence twice; then without the longest.
            let some = |all: &Both, places: &[usize]| -> Result<Both<'_>> {
                Ok(both([all.0[0].cache.select(places)?, all.0[1].cache.select(places)?]))
            };
            let mut all = some(&all, &[2, 0, 1, 0])?;
            let rows = Tensor::new(&[2u32, 0, 1, 0], &Device::Cpu)?;
            let texts = texts.index_select(&rows, 0)?;
            all.read(&texts, 1, &format!("{name}, reordered"))?;
            let mut all = some(&all, &[2, 1])?;
            let texts = texts.index_select(&Tensor::new(&[2u32, 1], &Device::Cpu)?, 0)?;
            all.read(&texts, 1, &format!("{name}, the longest has left"))?;
            all.read(&texts, 2, &format!("{name}, the longest has left"))?;
            assert_eq!(all.0[1].cache.lengths(), [3 + 11, 70 + 11], "{name}");
            // Stacked with a cache that has no derived data: they are computed again for all sequences.
            let mut plain_alone = empty();
            let mask = Mask::causal(0);
            let x = texts.narrow(0, 0, 1)?.narrow(1, 0, 9)?;
            plain.attend(&x, &Pass::new(&mask), Some(&mut plain_alone))?;
            let joined = LayerCache::stack(&[&all.0[1].cache, &plain_alone])?;
            let mut native = empty().with_precision(Precision::Native);
            plain.attend(&x, &Pass::new(&mask), Some(&mut native))?;
            let mut all = both([LayerCache::stack(&[&all.0[0].cache, &native])?, joined]);
            let texts = Tensor::cat(&[&texts, &texts.narrow(0, 0, 1)?], 0)?;
            all.read(&texts, 1, &format!("{name}, joined"))?;
            read += 1;
        }
    }
    assert_eq!(read, 5 * cases().len());
    Ok(())
}

#[test]
fn a_cached_pass_over_everything_is_the_pass_without_a_cache() -> Result<()> {
    for (name, cfg) in cases() {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let f = fixture(&cfg, true, dtype, 5)?;
            let frozen = frozen(&f, &cfg, dtype)?;
            let x = Numbers(3).tensor(&[2, 101, 12], 1.0, dtype)?;
            let mask = Mask::causal(0);
            let want = bits(&f.layer.attend(&x, &Pass::new(&mask), None)?)?;
            for layer in [f.layer.as_ref(), &frozen as &dyn Attention] {
                let got = layer.attend(&x, &Pass::new(&mask), Some(&mut LayerCache::new()))?;
                assert_eq!(bits(&got)?, want, "{name}, {dtype:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_reach_every_parameter_through_a_cached_pass() -> Result<()> {
    for candidates in [1, 4] {
        let cfg = config(GdConfig { norm_prior: true, candidates, ..GdConfig::default() }, None);
        let f = fixture(&cfg, true, DType::F32, 3)?;
        let x = Numbers(7).tensor(&[1, 80, 12], 1.0, DType::F32)?;
        let gradients = |cache: Option<&mut LayerCache>| -> Result<Vec<Option<Tensor>>> {
            let mask = Mask::causal(0);
            let grads = f.layer.attend(&x, &Pass::new(&mask), cache)?.sqr()?.sum_all()?.backward()?;
            Ok(f.vars.iter().map(|(_, var)| grads.get(var).cloned()).collect())
        };
        let (with, without) = (gradients(Some(&mut LayerCache::new()))?, gradients(None)?);
        for ((name, _), (with, without)) in f.vars.iter().zip(with.iter().zip(&without)) {
            // Cached keys and values have no gradient.
            let cut = ["k_proj", "v_proj", "k_norm"].iter().any(|part| name.starts_with(part));
            assert_eq!((with.is_some(), without.is_some()), (!cut, true), "{name}");
            // Beta also has a gradient through the prior of the norms.
            if let (Some(with), Some(without), "gd.beta") = (with, without, name.as_str()) {
                assert_eq!(bits(with)?, bits(without)?, "{name}, {candidates} candidates");
                let moves = with.abs()?.max_all()?.to_scalar::<f32>()? > 0.0;
                assert_eq!(moves, candidates > 1, "{name}, {candidates} candidates");
            }
        }
    }
    Ok(())
}
