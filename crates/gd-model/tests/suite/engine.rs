//! The engine that decodes sequences together as they come and go.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use gd_kernels::Mask;
use gd_layer::Pass;
use gd_model::config::{self, ModelConfig};
use gd_model::infer::engine::{BatchEngine, EngineLimits, Event, Generated, Request};
use gd_model::infer::generate::generate;
use gd_model::infer::logprobs::TokenLogprobs;
use gd_model::infer::sampler::{Sampler, Sampling};
use gd_model::model::Transformer;
use gd_model::model::params::Params;
use gd_model::{Error, Result};
use gd_testing::log_cases;
use serde_json::{Value, json};

const CPU: Device = Device::Cpu;

/// A model with random parameters, so that each of them affects the result.
fn model(gd: &Value) -> Result<Transformer> {
    let config: ModelConfig = config::parse(json!({
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96,
        "tie_word_embeddings": false, "gd": gd,
    }))
    .map_err(|problems| Error::Invalid(format!("{problems:?}")))?;
    let params = Params::new(5, DType::F32, &CPU);
    let model = Transformer::new(&config, params.frozen())?;
    for (at, (_, var)) in params.vars().iter().enumerate() {
        let noise = (0..var.elem_count()).map(|i| ((i * 37 + at * 101) as f32 * 12.9898).sin() * 0.25);
        let noise = Tensor::from_vec(noise.collect::<Vec<f32>>(), var.shape(), &CPU)?;
        var.set(&(var.as_tensor() + noise)?)?;
    }
    Ok(model)
}

/// Models with caches that can be shortened, and with states that cannot.
fn models() -> [(&'static str, Value); 6] {
    let beacon = json!({ "conv_width": 3, "averages": 1, "prior": true, "protected": 1 });
    [
        ("softmax", json!({ "mechanism": ["softmax"] })),
        ("gd", json!({ "mechanism": ["gd"], "select": { "candidates": 4 } })),
        ("gd with a Beacon", json!({ "mechanism": ["softmax", "gd"], "beacon": beacon })),
        ("selective", json!({ "mechanism": ["selective"] })),
        (
            "thresholds by length",
            json!({ "mechanism": ["gd"], "windows": [null, 9], "select": {
                "candidates": 4, "threshold": 0.7, "threshold_by_length": true, "exclude_below": 0.3,
                "gate": { "energy": { "temperature": 0.5 } } } }),
        ),
        (
            "margin gate",
            json!({ "mechanism": ["gd"], "select": {
                "candidates": 4, "threshold": 0.05, "exclude_below": 0.3,
                "gate": { "margin": { "temperature": 0.5 } } } }),
        ),
    ]
}

/// Those models with every dtype of cached keys and values.
fn cached_models() -> Result<Vec<(&'static str, DType, Transformer)>> {
    let mut all = Vec::new();
    for (name, gd) in models() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let mut model = model(&gd)?;
            model.set_cache_dtype(dtype)?;
            all.push((name, dtype, model));
        }
    }
    Ok(all)
}

fn greedy() -> Sampler {
    Sampler::new(Sampling { temperature: 0.0, ..Sampling::default() }, 0).unwrap()
}

fn prompt(seed: usize) -> Vec<u32> {
    (0..3 + seed * 5 % 29).map(|at| ((at * at * 7 + seed * 31 + at) % 96) as u32).collect()
}

/// Runs the engine to its end. Returns the tokens of every sequence.
fn run(engine: &mut BatchEngine) -> Result<BTreeMap<u64, Vec<Generated>>> {
    let mut all: BTreeMap<u64, Vec<Generated>> = BTreeMap::new();
    while !engine.is_idle() {
        engine.step(|id, event| match event {
            Event::Prompt(_) => true,
            Event::Token(token) => {
                all.entry(id).or_default().push(token);
                true
            }
            Event::Failed(error) => panic!("{error}"),
        })?;
    }
    Ok(all)
}

fn tokens(generated: &[Generated]) -> Vec<u32> {
    generated.iter().map(|one| one.token).collect()
}

#[test]
fn sequences_that_come_and_go_get_the_tokens_that_they_get_alone() -> Result<()> {
    let mut cases = 0;
    for (name, dtype, model) in cached_models()? {
        let limits = EngineLimits { sequences: 4, tokens_per_step: 7, stored_tokens: 300 };
        let mut engine = BatchEngine::new(&model, &CPU, limits)?;
        let (mut all, mut sent): (BTreeMap<u64, Vec<u32>>, usize) = (BTreeMap::new(), 0);
        while sent < 16 || !engine.is_idle() {
            // Two prompts arrive in every third step; every fifth text is short.
            for _ in 0..if engine.counts().steps.is_multiple_of(3) && sent < 16 { 2 } else { 0 } {
                let limit = if sent.is_multiple_of(5) { 3 } else { 20 };
                let request = Request { logprobs: Some(1), ..Request::new(prompt(sent), limit, greedy()) };
                assert_eq!(engine.submit(request)?, sent as u64);
                sent += 1;
            }
            let read = engine.counts();
            engine.step(|id, event| {
                if let Event::Token(token) = event {
                    all.entry(id).or_default().push(token.token);
                }
                true
            })?;
            let now = engine.counts();
            assert!(engine.running() <= 4, "{name}: {} sequences", engine.running());
            assert!(now.prompt_tokens - read.prompt_tokens <= 7, "{name}: {read:?} {now:?}");
        }
        for (id, new) in &all {
            let limit = if id.is_multiple_of(5) { 3 } else { 20 };
            let alone = match dtype {
                DType::F32 => {
                    generate(&model, &prompt(*id as usize), limit, &mut greedy(), &CPU, |_| Ok(true))?
                }
                // In parts of other lengths, the last bits of keys and values may differ, and then what they are rounded to.
                _ => {
                    let limits = EngineLimits { sequences: 1, stored_tokens: 0, ..limits };
                    let mut engine = BatchEngine::new(&model, &CPU, limits)?;
                    engine.submit(Request::new(prompt(*id as usize), limit, greedy()))?;
                    tokens(&run(&mut engine)?.into_values().next().unwrap_or_default())
                }
            };
            assert_eq!(*new, alone, "{name}, {dtype:?}, sequence {id}");
            cases += 1;
        }
        let distinct: std::collections::BTreeSet<_> = all.values().flatten().collect();
        assert!(distinct.len() >= 8, "{name}: {} different tokens are too few", distinct.len());
    }
    log_cases("engine", cases);
    Ok(())
}

#[test]
fn the_next_turn_reads_only_what_is_new() -> Result<()> {
    for (name, dtype, model) in cached_models()? {
        let limits = EngineLimits { sequences: 2, tokens_per_step: 16, stored_tokens: 400 };
        let mut engine = BatchEngine::new(&model, &CPU, limits)?;
        let mut turn = prompt(4);
        for more in [0, 5, 9] {
            turn.extend((0..more).map(|at| (at * 11 + more) % 96));
            engine.submit(Request::new(turn.clone(), 6, greedy()))?;
            let before = engine.counts();
            let new = tokens(&run(&mut engine)?.into_values().next().unwrap_or_default());
            let alone = generate(&model, &turn, 6, &mut greedy(), &CPU, |_| Ok(true))?;
            assert_eq!(new, alone, "{name}, {dtype:?}, {more} more tokens");
            let read = engine.counts().prompt_tokens - before.prompt_tokens;
            // The last token of an answer is no input.
            let expected = if more == 0 { turn.len() } else { more as usize + 1 };
            assert_eq!(read, expected as u64, "{name}, {more} more tokens");
            turn.extend(new);
        }
        // Another continuation of the same text. Only caches of single positions can be cut.
        let positional = !matches!(name, "gd with a Beacon" | "selective");
        turn.truncate(20);
        turn.extend([1, 2]);
        engine.submit(Request::new(turn.clone(), 6, greedy()))?;
        let before = engine.counts();
        let new = tokens(&run(&mut engine)?.into_values().next().unwrap_or_default());
        assert_eq!(new, generate(&model, &turn, 6, &mut greedy(), &CPU, |_| Ok(true))?, "{name}");
        let reused = engine.counts().reused_tokens - before.reused_tokens;
        assert!(if positional { reused >= 20 } else { reused <= 20 }, "{name}: {reused} reused");
    }
    Ok(())
}

#[test]
fn a_prompt_with_several_continuations_is_read_once() -> Result<()> {
    for (name, gd) in models() {
        let model = model(&gd)?;
        let limits = EngineLimits { sequences: 3, tokens_per_step: 64, stored_tokens: 100 };
        let mut engine = BatchEngine::new(&model, &CPU, limits)?;
        for seed in 0..3 {
            let sampler = Sampler::new(Sampling::default(), seed)?;
            engine.submit(Request::new(prompt(5), 8, sampler))?;
        }
        let all = run(&mut engine)?;
        assert_eq!(engine.counts().prompt_tokens, prompt(5).len() as u64, "{name}");
        for (seed, new) in &all {
            let mut sampler = Sampler::new(Sampling::default(), *seed)?;
            let alone = generate(&model, &prompt(5), 8, &mut sampler, &CPU, |_| Ok(true))?;
            assert_eq!(tokens(new), alone, "{name}, seed {seed}");
        }
        assert_ne!(all[&0], all[&1], "{name}");
    }
    Ok(())
}

#[test]
fn log_probabilities_are_those_of_the_forward_pass() -> Result<()> {
    for (name, gd) in models() {
        let model = model(&gd)?;
        let limits = EngineLimits { sequences: 1, tokens_per_step: 5, stored_tokens: 100 };
        let mut engine = BatchEngine::new(&model, &CPU, limits)?;
        // The same prompt twice: what is stored of the first has no log-probabilities.
        for _ in 0..2 {
            let request = Request::new(prompt(3), 4, greedy());
            engine.submit(Request { logprobs: Some(3), prompt_logprobs: true, ..request })?;
            let (mut of_prompt, mut new) = (Vec::new(), Vec::new());
            while !engine.is_idle() {
                engine.step(|_, event| {
                    match event {
                        Event::Prompt(prompt) => of_prompt = prompt.logprobs,
                        Event::Token(token) => new.extend(token.logprobs),
                        Event::Failed(error) => panic!("{error}"),
                    }
                    true
                })?;
            }
            let all: Vec<u32> = prompt(3).into_iter().chain(new.iter().map(|one| one.token)).collect();
            let ids = Tensor::new(all.as_slice(), &CPU)?.unsqueeze(0)?;
            let logits = model.forward(&ids, &Pass::new(&Mask::causal(0)), None)?.squeeze(0)?;
            let rows = logits.to_vec2::<f32>()?;
            let reported: Vec<_> = of_prompt.iter().chain(&new).collect();
            assert_eq!(reported.len(), all.len() - 1, "{name}");
            for (at, one) in reported.into_iter().enumerate() {
                let expected = TokenLogprobs::new(&rows[at], all[at + 1], 3);
                assert!((one.logprob - expected.logprob).abs() <= 1e-4, "{name}, {at}: {one:?} {expected:?}");
                assert_eq!((one.token, one.top.len()), (all[at + 1], 3), "{name}, {at}");
            }
        }
    }
    Ok(())
}

#[test]
fn sources_name_a_position_before_the_token_for_every_selecting_head() -> Result<()> {
    let model = model(&models()[2].1)?;
    let limits = EngineLimits { sequences: 3, tokens_per_step: 64, stored_tokens: 0 };
    let mut engine = BatchEngine::new(&model, &CPU, limits)?;
    for seed in [1, 2, 3] {
        // Only some sequences of the batch ask for sources.
        engine.submit(Request { sources: seed != 2, ..Request::new(prompt(seed), 5, greedy()) })?;
    }
    let together = run(&mut engine)?;
    for (id, seed) in [1, 2, 3].into_iter().enumerate() {
        let new = &together[&(id as u64)];
        assert_eq!(tokens(new), generate(&model, &prompt(seed), 5, &mut greedy(), &CPU, |_| Ok(true))?);
        for (at, token) in new.iter().enumerate() {
            // The second layer selects, with four heads.
            assert_eq!(token.sources.len(), if seed == 2 { 0 } else { 4 });
            for (head, source) in token.sources.iter().enumerate() {
                assert_eq!((source.layer, source.head), (1, head));
                assert!(source.position.is_none_or(|position| position < prompt(seed).len() + at));
                assert!(source.margin >= 0.0, "{source:?}");
            }
        }
        let mut alone = BatchEngine::new(&model, &CPU, limits)?;
        alone.submit(Request { sources: seed != 2, ..Request::new(prompt(seed), 5, greedy()) })?;
        let positions = |all: &[Generated]| -> Vec<_> {
            all.iter().flat_map(|one| one.sources.iter().map(|source| source.position)).collect()
        };
        assert_eq!(positions(&run(&mut alone)?[&0]), positions(new), "prompt {seed}");
    }
    Ok(())
}

#[test]
fn a_sequence_that_fails_or_is_cancelled_does_not_affect_the_others() -> Result<()> {
    let model = model(&models()[1].1)?;
    let limits = EngineLimits { sequences: 3, tokens_per_step: 32, stored_tokens: 50 };
    let mut engine = BatchEngine::new(&model, &CPU, limits)?;
    let mut left = 3;
    let failing = Box::new(move |_: &[f32], _: &[u32]| {
        left -= 1;
        if left == 0 { Err(Error::Invalid("no token".into())) } else { Ok(7) }
    });
    engine.submit(Request::sampled_by(prompt(1), 10, failing))?;
    for seed in 2..6 {
        engine.submit(Request::new(prompt(seed), 10, greedy()))?;
    }
    let (mut all, mut failed) = (BTreeMap::<u64, Vec<u32>>::new(), Vec::<(u64, String)>::new());
    while !engine.is_idle() {
        engine.step(|id, event| {
            match event {
                Event::Token(token) => all.entry(id).or_default().push(token.token),
                Event::Failed(error) => failed.push((id, error.to_string())),
                Event::Prompt(_) => {}
            }
            // The third text ends after four tokens.
            id != 2 || all.get(&2).map_or(0, Vec::len) < 4
        })?;
        if engine.counts().steps == 3 {
            // One of the batch and one that waits.
            engine.cancel(&[1, 4, 99])?;
        }
    }
    assert_eq!(failed, [(0, "no token".to_owned())]);
    assert_eq!(all.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3]);
    for (id, seed) in [(1, 2), (2, 3), (3, 4)] {
        let alone = generate(&model, &prompt(seed), 10, &mut greedy(), &CPU, |_| Ok(true))?;
        assert_eq!(all[&id], alone[..all[&id].len()], "sequence {id}");
    }
    assert_eq!((all[&0].len(), all[&2].len(), all[&3].len()), (2, 4, 10));
    assert!(all[&1].len() < 10);
    Ok(())
}

#[test]
fn limits_and_prompts_that_do_not_fit_are_refused() -> Result<()> {
    let model = model(&models()[0].1)?;
    let base = EngineLimits::default();
    for (limits, name) in [
        (EngineLimits { sequences: 0, ..base }, "sequences must be at least 1"),
        (EngineLimits { tokens_per_step: 0, ..base }, "tokens_per_step must be at least 1"),
    ] {
        let error = BatchEngine::new(&model, &CPU, limits).err().map(|error| error.to_string());
        assert!(error.as_ref().is_some_and(|error| error.starts_with(name)), "{error:?}");
    }
    let mut engine = BatchEngine::new(&model, &CPU, base)?;
    for (prompt, names) in [(vec![], "0 tokens"), (vec![1; 97], "97 tokens"), (vec![96], "96")] {
        let error = engine.submit(Request::new(prompt, 3, greedy())).unwrap_err().to_string();
        assert!(error.contains(names), "{error}");
    }
    // Nothing is generated behind the last position, and nothing if nothing is asked for.
    engine.submit(Request::new(vec![1; 96], 10, greedy()))?;
    engine.submit(Request::new(vec![1; 4], 0, greedy()))?;
    let all = run(&mut engine)?;
    assert_eq!(all.values().map(Vec::len).collect::<Vec<_>>(), [1]);
    Ok(())
}

#[test]
fn a_cache_is_shortened_to_positions_that_it_has() -> Result<()> {
    for (name, gd) in models() {
        let model = model(&gd)?;
        let mut cache = model.new_cache();
        let ids = Tensor::new(prompt(5).as_slice(), &CPU)?.unsqueeze(0)?;
        model.forward(&ids, &Pass::new(&Mask::causal(0)), Some(&mut cache))?;
        let positional = !matches!(name, "gd with a Beacon" | "selective");
        let (layer, length) = (&cache[1], prompt(5).len());
        assert_eq!(layer.is_positional(), positional, "{name}");
        let error = layer.shortened(length + 1).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{} positions of a sequence of {length}", length + 1)),
            "{name}: {error}"
        );
        match positional {
            true => {
                assert_eq!(layer.shortened(3)?.lengths(), [3], "{name}");
                assert!(layer.shortened(0)?.is_empty(), "{name}");
            }
            false => {
                let error = layer.shortened(3).unwrap_err().to_string();
                assert!(error.contains("cannot be shortened to 3"), "{name}: {error}");
            }
        }
    }
    Ok(())
}

/// The dtype changes what is computed, and one that the model cannot cache is refused.
#[test]
fn caches_have_the_dtype_that_was_set() -> Result<()> {
    let (_, gd) = &models()[0];
    let mut logits = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut model = model(gd)?;
        model.set_cache_dtype(dtype)?;
        let mut cache = model.new_cache();
        let ids = Tensor::new(prompt(5), &CPU)?.unsqueeze(0)?;
        let mask = Mask::causal(0);
        logits
            .push(model.forward(&ids, &Pass::new(&mask), Some(&mut cache))?.flatten_all()?.to_vec1::<f32>()?);
    }
    let off = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let (f16, bf16) = (off(&logits[1], &logits[0]), off(&logits[2], &logits[0]));
    assert!(f16 > 1e-6 && f16 < 0.02 && bf16 > 2.0 * f16 && bf16 < 0.2, "{f16} {bf16}");
    let error = model(gd)?.set_cache_dtype(DType::F64).unwrap_err().to_string();
    assert!(error.contains("f64") && error.contains("f32, f16, bf16 for this model on the CPU"), "{error}");
    let params = Params::new(5, DType::F64, &CPU);
    let error = Transformer::new(model(gd)?.config(), params.frozen())?.set_cache_dtype(DType::F16);
    assert!(error.unwrap_err().to_string().contains("f16"));
    Ok(())
}
