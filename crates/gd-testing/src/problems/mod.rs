//! Generated problems for the operator tests: size, mask, memory layout and kind of data follow from a seed.
//!
//! A [`Spec`] holds f64 values; [`Spec::build`] rounds them to a dtype, so that reference and operator read the same
//! values: q `[B, Hq, N, D]`, k `[B, Hk, M, D]`, v `[B, Hk, M, Dv]`.

pub mod choices;
pub mod offsets;

use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use gd_kernels::reference::scan::may_see;
use gd_kernels::reference::{Problem, distance2};
use gd_kernels::{Candidates, Mask, Scan, Score, TieBreak};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// Head dimensions of problems for the CPU.
pub const DIMS: [usize; 9] = [1, 3, 8, 16, 24, 40, 64, 80, 128];
/// Numbers of candidates.
pub const CANDIDATES: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Sizes near multiples of panel widths (2 to 32 keys) and of the 64 rows of a block.
const EDGES: [usize; 12] = [1, 2, 31, 32, 33, 63, 64, 65, 95, 127, 129, 150];

/// The distribution of the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Uniform.
    Plain,
    /// Half of the queries lie on, or next to, a key.
    Near,
    /// Half of the keys repeat another one.
    Duplicates,
    /// Small integers: every energy is exact in every dtype, and many are equal.
    Integer,
    /// Coordinates of 1e15 (4096 in f16).
    Huge,
    /// Coordinates of 1e-15 (1/256 in f16).
    Tiny,
}

/// The memory layout of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// Contiguous.
    Plain,
    /// The transpose of `[B, N, H, D]`.
    Heads,
    /// A part of a larger tensor whose other elements are NaN.
    Part,
    /// The transpose of `[B, H, D, N]`: the last dimension is strided.
    Turned,
}

impl View {
    /// The tensor that the view makes of `base`.
    pub fn of(self, base: &Tensor) -> Tensor {
        let d = base.dims();
        match self {
            View::Plain => Ok(base.clone()),
            View::Heads => base.transpose(1, 2),
            View::Part => base
                .narrow(1, 1, d[1] - 1)
                .and_then(|t| t.narrow(2, 1, d[2] - 2))
                .and_then(|t| t.narrow(3, 2, d[3] - 3)),
            View::Turned => base.transpose(2, 3),
        }
        .unwrap()
    }

    /// A contiguous tensor whose view has `values` `[dims]`.
    fn base(self, values: &[f64], dims: [usize; 4], dtype: DType) -> Tensor {
        let plain = || Tensor::from_vec(values.to_vec(), &dims, &Device::Cpu).unwrap();
        let base = match self {
            View::Plain => plain(),
            View::Heads => plain().transpose(1, 2).unwrap().contiguous().unwrap(),
            View::Turned => plain().transpose(2, 3).unwrap().contiguous().unwrap(),
            View::Part => {
                let [b, h, n, d] = dims;
                let mut all = vec![f64::NAN; b * (h + 1) * (n + 2) * (d + 3)];
                for (row, x) in values.chunks(d).enumerate() {
                    let (bh, i) = (row / n, row % n);
                    let at = ((bh / h * (h + 1) + bh % h + 1) * (n + 2) + i + 1) * (d + 3) + 2;
                    all[at..at + d].copy_from_slice(x);
                }
                Tensor::from_vec(all, &[b, h + 1, n + 2, d + 3], &Device::Cpu).unwrap()
            }
        };
        base.to_dtype(dtype).unwrap()
    }
}

/// A tensor with a memory layout.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The contiguous tensor.
    pub base: Tensor,
    /// The view of it that the operators get.
    pub view: View,
}

impl Stored {
    /// The tensor as the operators get it.
    pub fn tensor(&self) -> Tensor {
        self.view.of(&self.base)
    }
}

/// A problem in f64.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The seed from which it was generated.
    pub seed: u64,
    /// Distribution of the values.
    pub kind: Kind,
    /// Candidates per row.
    pub candidates: usize,
    /// Layouts of q, k and v.
    pub views: [View; 3],
    /// Key prior with its shape.
    pub prior: Option<(Vec<f64>, [usize; 3])>,
    /// Protected keys with their shape.
    pub protected: Option<(Vec<i32>, [usize; 4])>,
    /// The values, without prior and protected keys.
    pub raw: Problem,
    /// Whether beta is divided by the square of the values' scale, so that energies are near 1.
    pub scaled: bool,
}

/// The same values for the reference and for the operators.
#[derive(Debug, Clone)]
pub struct Case {
    /// The problem from which it was built.
    pub spec: Spec,
    /// The dtype to which values were rounded.
    pub dtype: DType,
    /// The rounded values, for the reference.
    pub problem: Problem,
    /// `[B, Hq, N, D]`.
    pub q: Stored,
    /// `[B, Hk, M, D]`.
    pub k: Stored,
    /// `[B, Hk, M, Dv]`.
    pub v: Stored,
    /// `[Hq]`.
    pub beta: Tensor,
    /// The key prior.
    pub prior: Option<Tensor>,
    /// Protected keys.
    pub protected: Option<Tensor>,
}

/// The random number generator of a seed.
pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// A random element of a list.
pub fn pick<T: Copy>(rng: &mut ChaCha8Rng, from: &[T]) -> T {
    from[rng.random_range(0..from.len())]
}

/// `n` uniform values in -1..1.
pub fn uniform(rng: &mut ChaCha8Rng, n: usize) -> Vec<f64> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// The values of a tensor, in row-major order.
pub fn values(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The accumulator type of a dtype.
pub fn acc(dtype: DType) -> DType {
    if dtype == DType::F64 { dtype } else { DType::F32 }
}

/// The unit roundoff of a dtype.
pub fn roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON / 2.0,
        DType::F32 => f64::from(f32::EPSILON) / 2.0,
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    }
}

/// A tensor of values rounded to a dtype, and the rounded values.
pub fn rounded(unrounded: &[f64], shape: &[usize], dtype: DType) -> (Tensor, Vec<f64>) {
    let t = Tensor::from_vec(unrounded.to_vec(), shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let back = values(&t);
    (t, back)
}

/// Pools of 1, 2 and 3 threads.
pub fn pools() -> &'static [ThreadPool; 3] {
    static POOLS: OnceLock<[ThreadPool; 3]> = OnceLock::new();
    POOLS.get_or_init(|| [1, 2, 3].map(|n| ThreadPoolBuilder::new().num_threads(n).build().unwrap()))
}

fn random_mask(rng: &mut ChaCha8Rng, batch: usize, n: usize, m: usize) -> Mask {
    let (ni, mi) = (n as i64, m as i64);
    let near = pick(rng, &[0, mi - ni, mi - ni, -1, -3, 5, mi / 2, mi / 2, mi]);
    let offset = if rng.random_bool(0.04) { -ni - 1 } else { near };
    let mut mask = match rng.random_range(0..10) {
        0..3 => Mask::none(),
        3..7 => Mask::causal(offset),
        _ => Mask::window(pick(rng, &[1, 2, 7, 32, 40, 200]), offset),
    };
    let entries = pick(rng, &[1, batch]);
    if rng.random_bool(0.25) {
        mask = mask.packed(
            (0..entries)
                .map(|_| {
                    let mut ends: Vec<usize> =
                        (0..rng.random_range(0..4)).map(|_| rng.random_range(0..=m)).collect();
                    ends.extend([0, m]);
                    ends.sort_unstable();
                    ends
                })
                .collect(),
        );
    }
    if rng.random_bool(0.3) {
        let length = |rng: &mut ChaCha8Rng| rng.random_range(0..=m).max(rng.random_range(0..=m));
        mask = mask.kv_len((0..entries).map(|_| length(rng)).collect());
    }
    if batch > 1 && (n + m).is_multiple_of(3) {
        mask = mask.with_offsets((0..batch as i64).map(|b| offset - 2 * b).collect());
    }
    mask
}

impl Spec {
    /// The problem of a seed with at most `limit` products B Hq N M D.
    pub fn new(seed: u64, limit: usize) -> Self {
        Self::with_dims(seed, limit, &DIMS)
    }

    /// The same with a head_dim of `dims`.
    pub fn with_dims(seed: u64, limit: usize, dims: &[usize]) -> Self {
        Self::with_sizes(seed, limit, dims, None)
    }

    /// The same with numbers of queries and of keys from two lists.
    pub fn with_sizes(seed: u64, limit: usize, dims: &[usize], sizes: Option<[&[usize]; 2]>) -> Self {
        use Kind::*;
        let mut rng = rng(seed);
        let kind = pick(&mut rng, &[Plain, Plain, Plain, Near, Duplicates, Integer, Huge, Tiny]);
        let (mut batch, kv_heads, group) =
            (pick(&mut rng, &[1, 2, 3]), pick(&mut rng, &[1, 1, 2, 3]), pick(&mut rng, &[1, 1, 2, 3, 8]));
        let (q_heads, dim) = (kv_heads * group, pick(&mut rng, dims));
        let size = |rng: &mut ChaCha8Rng| {
            if rng.random_bool(0.4) { pick(rng, &EDGES) } else { rng.random_range(1..=150) }
        };
        let (mut queries, mut keys) = match sizes {
            None => (size(&mut rng), size(&mut rng)),
            Some([queries, keys]) => (pick(&mut rng, queries), pick(&mut rng, keys)),
        };
        while batch * q_heads * queries * keys * dim > limit {
            match (batch, queries > keys) {
                (2.., _) => batch -= 1,
                (_, true) => queries = queries.div_ceil(2),
                (_, false) => keys = keys.div_ceil(2),
            }
        }
        let value_dim = pick(&mut rng, &[1, 3, 4, 8, 20, 33]);
        let mut draw = |n: usize| match kind {
            Integer => (0..n).map(|_| f64::from(rng.random_range(-2..=2))).collect(),
            _ => uniform(&mut rng, n),
        };
        let mut q: Vec<f64> = draw(batch * q_heads * queries * dim);
        let mut k: Vec<f64> = draw(batch * kv_heads * keys * dim);
        let v = draw(batch * kv_heads * keys * value_dim);
        if kind == Duplicates {
            for row in 0..batch * kv_heads * keys {
                if rng.random_bool(0.5) {
                    let from = (row / keys * keys + rng.random_range(0..keys)) * dim;
                    k.copy_within(from..from + dim, row * dim);
                }
            }
        }
        if kind == Near {
            for (row, q) in q.chunks_mut(dim).enumerate().filter(|(row, _)| row % 2 == 0) {
                let (b, h) = (row / queries / q_heads, row / queries % q_heads);
                let from = ((b * kv_heads + h / group) * keys + rng.random_range(0..keys)) * dim;
                let step = pick(&mut rng, &[0.0, 1e-3]);
                q.iter_mut().zip(&k[from..]).for_each(|(q, k)| *q = k + step * *q);
            }
        }
        let sharpness = pick(&mut rng, &[1.0, 1.0, 6.0]);
        let beta = (0..q_heads).map(|_| match kind {
            Integer => pick(&mut rng, &[0.5, 1.0, 2.0]),
            _ => sharpness * rng.random_range(0.7..2.0) / dim as f64,
        });
        let beta = beta.collect();
        let prior = rng.random_bool(0.5).then(|| {
            let dims = [pick(&mut rng, &[1, batch]), pick(&mut rng, &[q_heads, kv_heads]), keys];
            let banned = if rng.random_bool(0.4) { 0.15 } else { 0.0 };
            let values = (0..dims.iter().product()).map(|_| match kind {
                _ if rng.random_bool(banned) => f64::NEG_INFINITY,
                Integer | Duplicates => f64::from(rng.random_range(-2..=2)) * 0.5,
                _ => rng.random_range(-1.0..1.0),
            });
            (values.collect(), dims)
        });
        let protected = rng.random_bool(0.35).then(|| {
            let dims = [
                pick(&mut rng, &[1, batch]),
                pick(&mut rng, &[1, q_heads, kv_heads]),
                pick(&mut rng, &[1, queries]),
                rng.random_range(1..=3),
            ];
            let list = (0..dims.iter().product()).map(|_| rng.random_range(-1..keys as i32)).collect();
            (list, dims)
        });
        let views = [(); 3].map(|()| pick(&mut rng, &[View::Plain, View::Heads, View::Part, View::Turned]));
        let raw = Problem {
            batch,
            q_heads,
            kv_heads,
            queries,
            keys,
            dim,
            value_dim,
            q,
            k,
            v,
            beta,
            prior: None,
            protected: None,
            mask: random_mask(&mut rng, batch, queries, keys),
            score: pick(&mut rng, &[Score::Energy, Score::Energy, Score::Dot]),
            tie: pick(&mut rng, &[TieBreak::First, TieBreak::Last]),
        };
        // Every eighth problem has the greatest number of candidates.
        let candidates = pick(&mut rng, &CANDIDATES[..6]);
        let candidates = if seed % 8 == 7 { CANDIDATES[6] } else { candidates };
        let scaled = rng.random_bool(0.6);
        Self { seed, kind, candidates, views, prior, protected, raw, scaled }
    }

    /// Rounds to `dtype`. Keys and values that no query attends to become NaN, and so do queries without a visible key.
    pub fn build(&self, dtype: DType) -> Case {
        let raw = &self.raw;
        let Problem { batch, q_heads, kv_heads, queries, keys, dim, value_dim, .. } = *raw;
        let scale: f64 = match (self.kind, dtype) {
            (Kind::Huge, DType::F16) => 4096.0,
            (Kind::Huge, _) => 1e15,
            (Kind::Tiny, DType::F16) => 1.0 / 256.0,
            (Kind::Tiny, _) => 1e-15,
            _ => 1.0,
        };
        let sized = |x: &[f64]| x.iter().map(|x| x * scale).collect::<Vec<_>>();
        let (mut q, mut k, mut v) = (sized(&raw.q), sized(&raw.k), raw.v.clone());
        for b in 0..batch {
            let sees = |i: usize, j: usize| may_see(&raw.mask, b, i, j, keys);
            for i in (0..queries).filter(|&i| !(0..keys).any(|j| sees(i, j))) {
                (0..q_heads).for_each(|h| q[raw.q_at(b, h, i)].fill(f64::NAN));
            }
            for j in (0..keys).filter(|&j| !(0..queries).any(|i| sees(i, j))) {
                for h in (0..q_heads).step_by(q_heads / kv_heads) {
                    k[raw.k_at(b, h, j)].fill(f64::NAN);
                    v[raw.v_at(b, h, j)].fill(f64::NAN);
                }
            }
        }
        let store = |x: &[f64], dims: [usize; 4], view: View| {
            let (_, back) = rounded(x, &dims, dtype);
            (Stored { base: view.base(x, dims, dtype), view }, back)
        };
        let [qv, kv, vv] = self.views;
        let (q, q_values) = store(&q, [batch, q_heads, queries, dim], qv);
        let (k, k_values) = store(&k, [batch, kv_heads, keys, dim], kv);
        let (v, v_values) = store(&v, [batch, kv_heads, keys, value_dim], vv);
        let beta = match (self.kind, self.scaled) {
            (Kind::Huge | Kind::Tiny, true) => raw.beta.iter().map(|x| x / (scale * scale)).collect(),
            _ => raw.beta.clone(),
        };
        let (beta, beta_values) = rounded(&beta, &[q_heads], acc(dtype));
        // A prior may have the dtype of the tensors or that of the accumulator.
        let prior_dtype = if self.seed.is_multiple_of(3) { dtype } else { acc(dtype) };
        let prior = self.prior.as_ref().map(|(x, dims)| rounded(x, dims, prior_dtype));
        let heads =
            |b: usize, h: usize, [batch, heads]: [usize; 2]| (b % batch) * heads + h / (q_heads / heads);
        let wide_prior = prior.as_ref().zip(self.prior.as_ref()).map(|((_, x), (_, dims))| {
            let row = |bh: usize| heads(bh / q_heads, bh % q_heads, [dims[0], dims[1]]) * keys;
            (0..batch * q_heads).flat_map(|bh| x[row(bh)..row(bh) + keys].to_vec()).collect()
        });
        let wide_protected = self.protected.as_ref().map(|(list, [pb, ph, pn, p])| {
            let row = |(_, (b, h, i)): (usize, (usize, usize, usize))| {
                let row = heads(b, h, [*pb, *ph]) * pn + i % pn;
                list[row * p..(row + 1) * p].to_vec()
            };
            raw.rows().flat_map(row).collect()
        });
        let protected = self
            .protected
            .as_ref()
            .map(|(list, dims)| Tensor::from_vec(list.clone(), dims, &Device::Cpu).unwrap());
        let problem = Problem {
            q: q_values,
            k: k_values,
            v: v_values,
            beta: beta_values,
            prior: wide_prior,
            protected: wide_protected,
            ..raw.clone()
        };
        Case { spec: self.clone(), dtype, problem, q, k, v, beta, prior: prior.map(|p| p.0), protected }
    }
}

impl Case {
    /// The options of the scan of this problem; `checked` in every second one.
    pub fn scan(&self) -> Scan<'_> {
        Scan {
            prior: self.prior.as_ref(),
            score: self.problem.score,
            tie: self.problem.tie,
            protected: self.protected.as_ref(),
            checked: self.spec.seed.is_multiple_of(2),
            ..Scan::new(&self.beta, &self.problem.mask, self.spec.candidates)
        }
    }

    /// Whether every energy is exact.
    pub fn exact(&self) -> bool {
        self.spec.kind == Kind::Integer
    }

    /// A name for messages.
    pub fn name(&self) -> String {
        let p = &self.problem;
        format!(
            "seed {} {:?} {:?} B{} Hq{} Hk{} N{} M{} D{} Dv{} K{} {:?} {:?} prior {} protected {} {:?}",
            self.spec.seed,
            self.dtype,
            self.spec.kind,
            p.batch,
            p.q_heads,
            p.kv_heads,
            p.queries,
            p.keys,
            p.dim,
            p.value_dim,
            self.spec.candidates,
            p.score,
            p.tie,
            p.prior.is_some(),
            p.protected.is_some(),
            p.mask
        )
    }

    /// Whether two keys of head `h` of batch entry `b` have equal elements and priors.
    pub fn same_key(&self, b: usize, h: usize, i: usize, j: usize) -> bool {
        let p = &self.problem;
        p.k[p.k_at(b, h, i)] == p.k[p.k_at(b, h, j)] && p.prior_of(b, h, i) == p.prior_of(b, h, j)
    }

    /// The sum of the absolute values of an energy's terms, to which its rounding error is relative.
    pub fn energy_size(&self, query: &[f64], (b, h): (usize, usize), j: usize) -> f64 {
        let p = &self.problem;
        let key = &p.k[p.k_at(b, h, j)];
        let terms = match p.score {
            Score::Energy => distance2(query, key),
            Score::Dot => products(query, key),
        };
        p.beta[h] * terms + p.prior_of(b, h, j).abs()
    }

    /// The error bound of a computed energy: each of the D terms is rounded twice and summed in a
    /// chain, then multiplied by beta and reduced by the prior, so `(D + 4) u` of
    /// [`Case::energy_size`]; 0 for exact data.
    pub fn energy_bound(&self, query: &[f64], (b, h): (usize, usize), j: usize) -> f64 {
        if self.exact() {
            return 0.0;
        }
        let steps = (self.problem.dim + 4) as f64;
        steps * (roundoff(acc(self.dtype)) * self.energy_size(query, (b, h), j) + self.underflow(h))
    }

    /// The error bound of the score `<q, k> - |k|^2 / 2 + b / (2 beta)` by which keys are ranked, in
    /// units of energy: `2 beta (2D + 4) u (sum |q_d k_d| + |k|^2 / 2 + |b| / (2 beta))`, because the
    /// bias is a chain of D steps of its own. For the dot product `beta (D + 4) u (sum |q_d k_d| +
    /// |b| / beta)`.
    pub fn rank_bound(&self, query: &[f64], (b, h): (usize, usize), j: usize) -> f64 {
        if self.exact() {
            return 0.0;
        }
        let p = &self.problem;
        let (key, beta, prior) = (&p.k[p.k_at(b, h, j)], p.beta[h], p.prior_of(b, h, j).abs());
        let (u, d) = (roundoff(acc(self.dtype)), p.dim as f64);
        let terms = match p.score {
            Score::Energy => {
                let norm = key.iter().map(|x| x * x).sum::<f64>();
                (2.0 * d + 4.0) * u * (2.0 * beta * products(query, key) + beta * norm + prior)
            }
            Score::Dot => (d + 4.0) * u * (beta * products(query, key) + prior),
        };
        terms + (2.0 * d + 4.0) * self.underflow(h)
    }

    /// The absolute error of a term that underflows.
    fn underflow(&self, h: usize) -> f64 {
        let smallest = if self.dtype == DType::F64 { 5e-324 } else { 1.5e-45 };
        smallest * (1.0 + 2.0 * self.problem.beta[h])
    }

    /// Replaces the value rows of keys that are no candidate of any query by NaN.
    pub fn poison_unread_values(&mut self, candidates: &Candidates) {
        let p = &mut self.problem;
        let slots = candidates.index.dims()[3];
        let index: Vec<i32> = candidates.index.flatten_all().unwrap().to_vec1().unwrap();
        let group = p.q_heads / p.kv_heads;
        let mut read = vec![false; p.batch * p.kv_heads * p.keys];
        for (row, (b, h, _)) in p.rows() {
            for &j in index[row * slots..][..slots].iter().filter(|&&j| j >= 0) {
                read[(b * p.kv_heads + h / group) * p.keys + j as usize] = true;
            }
        }
        for (v, _) in p.v.chunks_mut(p.value_dim).zip(&read).filter(|(_, read)| !**read) {
            v.fill(f64::NAN);
        }
        let dims = [p.batch, p.kv_heads, p.keys, p.value_dim];
        self.v.base = self.v.view.base(&p.v, dims, self.dtype);
    }

    /// Sums a gradient `[B, Hq, M]` over the dimensions along which the prior is broadcast.
    pub fn fold_prior(&self, wide: &[f64]) -> Vec<f64> {
        let Some((_, [pb, ph, keys])) = &self.spec.prior else { return vec![] };
        let (hq, mut sum) = (self.problem.q_heads, vec![0.0; pb * ph * keys]);
        for (bh, row) in wide.chunks(*keys).enumerate() {
            let at = ((bh / hq % pb) * ph + bh % hq / (hq / ph)) * keys;
            sum[at..at + keys].iter_mut().zip(row).for_each(|(s, x)| *s += x);
        }
        sum
    }
}

fn products(q: &[f64], k: &[f64]) -> f64 {
    q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum()
}
