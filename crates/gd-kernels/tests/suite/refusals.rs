//! Every refusal of the operators, and the values its message names.

use candle_core::{DType, Device, Result as Candle, Tensor};
use gd_kernels::{
    Backend, Barrier, Candidates, Estimator, Gate, Isa, Mask, Rescored, Result, Scan, Select, plan, scan,
    scan_all, select, support_table,
};

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

/// q `[2, 4, 3, 8]`, k `[2, 2, 5, 8]`, v `[2, 2, 5, 6]`, beta `[4]`.
struct Good {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    mask: Mask,
}

fn good() -> Good {
    Good {
        q: zeros(&[2, 4, 3, 8]),
        k: zeros(&[2, 2, 5, 8]),
        v: zeros(&[2, 2, 5, 6]),
        beta: (zeros(&[4]) + 1.0).unwrap(),
        mask: Mask::none(),
    }
}

/// Fails unless the result is an error whose text has all of the words.
#[track_caller]
fn refused<T>(result: Result<T>, words: &[&str]) {
    let Err(error) = result else { panic!("accepted, although {words:?}") };
    let text = error.to_string();
    assert!(!text.contains('\n') || text.contains(&support_table()), "{text}");
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
}

fn with_scan(change: impl Fn(&mut Scan), words: &[&str]) {
    let g = good();
    let mut options = Scan::new(&g.beta, &g.mask, 4);
    change(&mut options);
    refused(scan(&g.q, &g.k, &options), words);
}

#[test]
fn scan_refuses_shapes_and_dtypes() {
    let g = good();
    let run = |q: &Tensor, k: &Tensor| scan(q, k, &Scan::new(&g.beta, &g.mask, 4));
    assert!(run(&g.q, &g.k).is_ok());
    refused(run(&zeros(&[4, 3, 8]), &g.k), &["q [4, 3, 8]", "rank 4"]);
    refused(run(&g.q, &zeros(&[2, 2, 0, 8])), &["k [2, 2, 0, 8]", "empty"]);
    refused(run(&g.q, &zeros(&[3, 2, 5, 8])), &["q [2, 4, 3, 8]", "k [3, 2, 5, 8]", "batch"]);
    refused(run(&g.q, &zeros(&[2, 2, 5, 7])), &["k [2, 2, 5, 7]", "head_dim"]);
    refused(run(&g.q, &zeros(&[2, 3, 5, 8])), &["4 query heads", "3 key heads"]);
    refused(run(&g.q, &g.k.to_dtype(DType::F64).unwrap()), &["q is F32", "k is F64"]);
    refused(run(&g.q.to_dtype(DType::F16).unwrap(), &g.k), &["q is F16", "k is F32"]);
    let whole = |t: &Tensor| t.to_dtype(DType::U32).unwrap();
    refused(run(&whole(&g.q), &whole(&g.k)), &["dtype u32", "supported", "f32, f16, bf16, f64"]);
    refused(run(&zeros(&[2, 4, 3, 1025]), &zeros(&[2, 2, 5, 1025])), &["head_dim 1025", "1..=1024"]);
}

#[test]
fn scan_refuses_options() {
    for n in [0, 3, 128] {
        with_scan(|s| s.candidates = n, &[&format!("{n} candidates"), "[1, 2, 4, 8, 16, 32, 64]"]);
    }
    let beta = |x: &[f32]| Tensor::new(x, &Device::Cpu).unwrap();
    for (values, words) in [
        (vec![1.0; 3], ["beta [3]", "[4]"]),
        (vec![1.0, 1.0, 0.0, 1.0], ["beta of head 2 is 0", "> 0"]),
        (vec![1.0, -2.5, 1.0, 1.0], ["beta of head 1 is -2.5", "> 0"]),
        (vec![f32::NAN; 4], ["beta of head 0 is NaN", "finite"]),
        (vec![1.0, 1.0, 1.0, f32::INFINITY], ["beta of head 3 is inf", "finite"]),
    ] {
        let g = good();
        refused(scan(&g.q, &g.k, &Scan::new(&beta(&values), &g.mask, 4)), &words);
    }
    for shape in [vec![2, 3, 5], vec![3, 4, 5], vec![2, 4, 6], vec![4, 5]] {
        let prior = zeros(&shape);
        let expected = "[2 or 1, 4 or 2, 5]";
        let g = good();
        let options = Scan { prior: Some(&prior), ..Scan::new(&g.beta, &g.mask, 4) };
        refused(scan(&g.q, &g.k, &options), &[&format!("prior {shape:?}"), expected]);
    }
    for (bad, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        let mut values = vec![0f32; 10];
        values[7] = bad;
        let prior = Tensor::from_vec(values, (1, 2, 5), &Device::Cpu).unwrap();
        let g = good();
        let options = Scan { prior: Some(&prior), ..Scan::new(&g.beta, &g.mask, 4) };
        refused(scan(&g.q, &g.k, &options), &["prior value 7", text]);
    }
    let protect = |list: Tensor, words: &[&str]| {
        let g = good();
        refused(scan(&g.q, &g.k, &Scan { protected: Some(&list), ..Scan::new(&g.beta, &g.mask, 4) }), words);
    };
    let keys = |x: &[i32], shape: &[usize]| Tensor::from_slice(x, shape, &Device::Cpu).unwrap();
    protect(keys(&[0], &[1, 1, 1]), &["protected [1, 1, 1]", "slots"]);
    protect(keys(&[0; 3], &[3, 1, 1, 1]), &["protected [3, 1, 1, 1]", "[2 or 1, 4, 2 or 1, 3 or 1, slots]"]);
    protect(keys(&[1, 5], &[1, 1, 1, 2]), &["protected key 5", "5 keys"]);
    protect(zeros(&[1, 1, 1, 2]), &["protected holds F32", "i32"]);
}

#[test]
fn masks_are_checked() {
    for (mask, words) in [
        (Mask::window(0, 0), &["window of 0"][..]),
        (Mask::none().packed(vec![vec![0, 5]; 3]), &["3 lists of packed boundaries", "batch of 2"]),
        (Mask::none().packed(vec![vec![0, 3, 2, 5]]), &["[0, 3, 2, 5]", "entry 0", "5 keys"]),
        (Mask::none().packed(vec![vec![0, 5], vec![1, 5]]), &["[1, 5]", "entry 1"]),
        (Mask::none().packed(vec![vec![0, 4]]), &["[0, 4]", "5 keys"]),
        (Mask::none().packed(vec![vec![]]), &["[]", "5 keys"]),
        (Mask::none().kv_len(vec![1, 2, 3]), &["3 key lengths", "batch of 2"]),
        (Mask::causal(0).kv_len(vec![6]), &["length of 6", "5 keys"]),
    ] {
        let g = good();
        refused(scan(&g.q, &g.k, &Scan::new(&g.beta, &mask, 4)), words);
        refused(scan_all(&g.q, &g.k, &Scan::new(&g.beta, &mask, 4)), words);
        refused(plan(&g.q, &g.k, &Scan::new(&g.beta, &mask, 4)), words);
    }
}

#[test]
fn plans_name_what_they_run_and_what_is_missing() {
    let g = good();
    let options = |backend| Scan { backend, ..Scan::new(&g.beta, &g.mask, 4) };
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Avx512Amx, Isa::Neon] {
        let planned = plan(&g.q, &g.k, &options(Backend::Force(isa)));
        if Isa::available().contains(&isa) {
            let text = planned.unwrap().to_string();
            assert!(text.contains(&format!("cpu/{isa:?}")) && text.contains("f32"), "{text}");
        } else {
            refused(planned, &[&format!("{isa:?} on this machine"), "Portable"]);
            refused(scan(&g.q, &g.k, &options(Backend::Force(isa))), &["unsupported"]);
        }
    }
    let widest = Isa::available()[0];
    assert_eq!(plan(&g.q, &g.k, &options(Backend::Auto)).unwrap().cpu().unwrap().isa, widest);
    assert_eq!(Isa::available().last(), Some(&Isa::Portable));
    assert!(
        support_table()
            .starts_with("cpu: dtypes f32, f16, bf16, f64 (certified f32, f16, bf16); head_dim 1..=1024")
    );
}

fn candidates_of(g: &Good) -> Candidates {
    scan(&g.q, &g.k, &Scan::new(&g.beta, &g.mask, 4)).unwrap()
}

#[test]
fn select_refuses_shapes_and_candidates() {
    let g = good();
    let good_candidates = candidates_of(&g);
    let run = |q: &Tensor, k: &Tensor, v: &Tensor, c: &Candidates| select(q, k, v, c, &Select::new(&g.beta));
    assert!(run(&g.q, &g.k, &g.v, &good_candidates).is_ok());
    refused(run(&zeros(&[2, 4, 3]), &g.k, &g.v, &good_candidates), &["q [2, 4, 3]", "rank 4"]);
    refused(run(&g.q, &g.k, &zeros(&[2, 2, 5, 0]), &good_candidates), &["v [2, 2, 5, 0]", "empty"]);
    refused(run(&g.q, &zeros(&[2, 2, 5, 7]), &g.v, &good_candidates), &["q [2, 4, 3, 8]", "k [2, 2, 5, 7]"]);
    refused(run(&g.q, &zeros(&[2, 3, 5, 8]), &g.v, &good_candidates), &["k [2, 3, 5, 8]"]);
    refused(run(&g.q, &g.k, &zeros(&[2, 2, 6, 6]), &good_candidates), &["k [2, 2, 5, 8]", "v [2, 2, 6, 6]"]);
    let wide = g.v.to_dtype(DType::F64).unwrap();
    refused(run(&g.q, &g.k, &wide, &good_candidates), &["q is F32", "v is F64"]);

    let change = |f: &dyn Fn(&Candidates) -> Candle<Candidates>| f(&good_candidates).unwrap();
    let other = |index: Tensor, energy: Tensor| Candidates {
        index,
        energy,
        protected: None,
        rescored: Rescored::ALL,
    };
    let cut = change(&|c| Ok(other(c.index.narrow(2, 0, 2)?, c.energy.narrow(2, 0, 2)?)));
    refused(run(&g.q, &g.k, &g.v, &cut), &["candidates [2, 4, 2, 4]", "q [2, 4, 3, 8]"]);
    let ragged = change(&|c| Ok(other(c.index.clone(), c.energy.narrow(3, 0, 2)?)));
    refused(run(&g.q, &g.k, &g.v, &ragged), &["candidates [2, 4, 3, 4]"]);
    let wide = change(&|c| Ok(other(c.index.clone(), c.energy.to_dtype(DType::F64)?)));
    refused(run(&g.q, &g.k, &g.v, &wide), &["I32 and F64", "F32"]);
    let float = change(&|c| Ok(other(c.index.to_dtype(DType::F32)?, c.energy.clone())));
    refused(run(&g.q, &g.k, &g.v, &float), &["F32 and F32", "i32"]);
    let far = change(&|c| {
        let ids = vec![9i32; c.index.elem_count()];
        Ok(other(Tensor::from_vec(ids, c.index.shape(), &Device::Cpu)?, c.energy.clone()))
    });
    refused(run(&g.q, &g.k, &g.v, &far), &["candidate key 9", "5 keys"]);
    let flags = change(&|c| {
        let protected = Some(Tensor::zeros((2, 4, 3, 1), DType::U8, &Device::Cpu)?);
        Ok(Candidates { protected, ..c.clone() })
    });
    refused(run(&g.q, &g.k, &g.v, &flags), &["protected [2, 4, 3, 1]", "[2, 4, 3, 4]"]);
    let flags = change(&|c| Ok(Candidates { protected: Some(c.index.clone()), ..c.clone() }));
    refused(run(&g.q, &g.k, &g.v, &flags), &["protected", "I32", "u8"]);
}

#[test]
fn select_refuses_options() {
    let g = good();
    let c = candidates_of(&g);
    let with = |change: &dyn Fn(&mut Select), words: &[&str]| {
        let mut options = Select::new(&g.beta);
        change(&mut options);
        refused(select(&g.q, &g.k, &g.v, &c, &options), words);
    };
    with(&|s| s.estimator = Estimator::Dense, &["dense", "all 5 keys", "not 4"]);
    with(&|s| s.preserve_floor = 1.5, &["preserve floor 1.5", "0..=1"]);
    with(&|s| s.value_floor = -0.25, &["value floor -0.25", "0..=1"]);
    with(&|s| s.hardness = f64::NAN, &["hardness NaN", "0..=1"]);
    with(&|s| s.temperature = 0.0, &["temperature 0", "> 0"]);
    with(&|s| s.temperature = f64::INFINITY, &["temperature inf", "finite"]);
    with(&|s| s.gate = Gate::Energy { temperature: -1.0 }, &["gate temperature -1", "> 0"]);
    with(&|s| s.gate = Gate::Energy { temperature: 1.0 }, &["energy gate needs a threshold"]);
    let margin = Gate::Margin { temperature: 1.0 };
    with(&|s| s.gate = Gate::Margin { temperature: 0.0 }, &["gate temperature 0", "> 0"]);
    with(&|s| s.gate = margin, &["margin gate needs a threshold"]);
    let weights = g.beta.unsqueeze(1).unwrap();
    let excluded =
        Select { gate: margin, threshold: Some(&g.beta), rounds: Some(&weights), ..Select::new(&g.beta) };
    refused(select(&g.q, &g.k, &g.v, &c, &excluded), &["margin gate excludes rounds and barrier"]);
    with(&|s| s.exclude_below = 1.0, &["exclude_below 1", "[0, 1)"]);
    with(&|s| s.gradient.gate_floor = -0.5, &["gate floor -0.5", "0..=1"]);
    with(&|s| s.gradient.temperature_spread = f64::NAN, &["temperature spread NaN", ">= 0"]);
    with(&|s| s.gate = Gate::Coherence, &["coherence gate needs alpha"]);
    let vector = |x: &[f32]| Tensor::new(x, &Device::Cpu).unwrap();
    let (short, zero) = (vector(&[1.0]), vector(&[1.0, 0.0, 1.0, 1.0]));
    refused(select(&g.q, &g.k, &g.v, &c, &Select::new(&short)), &["beta [1]", "[4]"]);
    refused(select(&g.q, &g.k, &g.v, &c, &Select::new(&zero)), &["beta of head 1 is 0"]);
    let nan = vector(&[0.5, 0.5, f32::NAN, 0.5]);
    let with_vector = |t: &Tensor, as_alpha: bool, words: &[&str]| {
        let (threshold, alpha) = if as_alpha { (None, Some(t)) } else { (Some(t), None) };
        let options = Select { threshold, alpha, ..Select::new(&g.beta) };
        refused(select(&g.q, &g.k, &g.v, &c, &options), words);
    };
    with_vector(&short, false, &["threshold [1]", "[4]"]);
    with_vector(&nan, false, &["threshold of head 2 is NaN"]);
    let per_query = g.q.narrow(3, 0, 1).unwrap().squeeze(3).unwrap().contiguous().unwrap();
    let other = Tensor::cat(&[&per_query, &per_query], 2).unwrap();
    with_vector(
        &other,
        false,
        &[&format!("threshold {:?}", other.dims()), &format!("{:?}", per_query.dims())],
    );
    let nan_of_a_query = (&per_query * f64::NAN).unwrap();
    with_vector(&nan_of_a_query, false, &["threshold of head 0 is NaN"]);
    with_vector(&short, true, &["alpha [1]", "[4]"]);
    with_vector(&nan, true, &["alpha of head 2 is NaN", "(0, 1)"]);
    with_vector(&zero, true, &["alpha of head 0 is 1", "(0, 1)"]);
    for shape in [&[4][..], &[3, 2], &[4, 0]] {
        let rounds = zeros(shape);
        let options = Select { rounds: Some(&rounds), ..Select::new(&g.beta) };
        refused(select(&g.q, &g.k, &g.v, &c, &options), &[&format!("rounds {shape:?}"), "[4, rounds >= 1]"]);
    }
    let rule = Barrier { floor: 0.1, margin: 0.5, strength: 1.0, entropy_trigger: 0.9, slack: 0.5 };
    for (bad, words) in [
        (Barrier { floor: 0.0, ..rule }, ["floor 0", "out of range"]),
        (Barrier { floor: 1.0, ..rule }, ["floor 1", "out of range"]),
        (Barrier { strength: -2.0, ..rule }, ["strength -2", "out of range"]),
        (Barrier { strength: f64::NAN, ..rule }, ["strength NaN", "out of range"]),
    ] {
        with(&|s| s.barrier = Some(bad), &words);
    }
    let prior = zeros(&[2, 3, 5]);
    let options = Select { prior: Some(&prior), ..Select::new(&g.beta) };
    refused(select(&g.q, &g.k, &g.v, &c, &options), &["prior [2, 3, 5]", "4 or 2"]);
}
