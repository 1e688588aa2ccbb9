//! For every query, a list of the keys that may still be candidates, with bounds of their scores.

use crate::backend::cpu::quantize::KEYS;

/// Entries of a list; a row with more keys that may be candidates is scanned densely.
pub(crate) fn capacity(candidates: usize) -> usize {
    if candidates <= 32 { 96 } else { 192 }
}

/// For every row, the keys that may still be candidates, with an upper and a lower bound of their scores.
pub(crate) struct BoundedLists {
    /// Entries after which a list is full. Memory is allocated for one panel more.
    capacity: usize,
    /// K.
    pub(crate) candidates: usize,
    pub(crate) count: Vec<usize>,
    pub(crate) key: Vec<u32>,
    pub(crate) upper: Vec<f32>,
    pub(crate) lower: Vec<f32>,
    /// Keys whose upper bound is below this cannot be candidates. Initially the least finite number, because -inf is the
    /// bound of an excluded key.
    pub(crate) threshold: Vec<f32>,
    /// Keys whose scores have no finite bound, for any row.
    pub(crate) unbounded: Vec<u32>,
}

impl BoundedLists {
    /// Empty lists.
    pub(crate) fn new(rows: usize, capacity: usize, candidates: usize) -> Self {
        let len = rows * (capacity + KEYS);
        Self {
            capacity,
            candidates,
            count: vec![0; rows],
            key: vec![0; len],
            upper: vec![0.0; len],
            lower: vec![0.0; len],
            threshold: vec![f32::MIN; rows],
            unbounded: Vec::new(),
        }
    }

    /// Appends a key to a list that is not full.
    #[inline(always)]
    pub(crate) fn push(&mut self, row: usize, key: u32, upper: f32, lower: f32) {
        let at = self.first(row) + self.count[row];
        (self.key[at], self.upper[at], self.lower[at]) = (key, upper, lower);
        self.count[row] += 1;
    }

    pub(crate) fn first(&self, row: usize) -> usize {
        row * (self.capacity + KEYS)
    }

    /// Whether a list has no capacity for another panel.
    pub(crate) fn full(&self, row: usize) -> bool {
        self.count[row] > self.capacity
    }

    /// Lower bounds of a row's scores.
    pub(crate) fn lower(&self, row: usize) -> &[f32] {
        &self.lower[self.first(row)..][..self.count[row]]
    }

    /// Upper bounds of a row's scores.
    pub(crate) fn upper(&self, row: usize) -> &[f32] {
        &self.upper[self.first(row)..][..self.count[row]]
    }

    /// Raises the threshold of a row to a value that K of its lower bounds reach, and removes the keys whose upper bound is
    /// below it. Returns whether at least a quarter of the capacity is free afterwards.
    #[inline(always)]
    pub(crate) fn tighten(&mut self, row: usize) -> bool {
        let threshold = reached_by(self.lower(row), self.candidates, self.threshold[row]);
        self.threshold[row] = threshold;
        let first = self.first(row);
        let mut to = first;
        for at in first..first + self.count[row] {
            (self.key[to], self.upper[to], self.lower[to]) = (self.key[at], self.upper[at], self.lower[at]);
            to += usize::from(self.upper[at] >= threshold);
        }
        self.count[row] = to - first;
        self.count[row] <= self.capacity / 4 * 3
    }

    /// The keys of a row.
    pub(crate) fn keys(&self, row: usize) -> &[u32] {
        &self.key[self.first(row)..][..self.count[row]]
    }
}

/// A number that at least `k` of the values reach, close to the greatest such number, or `floor` if none above `floor`
/// is reached by k values.
#[inline(always)]
pub(crate) fn reached_by(values: &[f32], k: usize, floor: f32) -> f32 {
    /// Steps of the bisection.
    const BISECTION_STEPS: usize = 12;
    if values.len() < k {
        return floor;
    }
    let (least, greatest) = extremes(values);
    if k == 1 {
        return if greatest > floor { greatest } else { floor };
    }
    // All values reach the least.
    let (mut low, mut high) = (if least > floor { least } else { floor }, greatest);
    for _ in 0..BISECTION_STEPS {
        let middle = 0.5 * low + 0.5 * high;
        let count: u32 = values.iter().map(|&x| u32::from(x >= middle)).sum();
        (low, high) = if count as usize >= k { (middle, high) } else { (low, middle) };
    }
    low
}

/// The least and the greatest of finite values.
#[inline(always)]
fn extremes(values: &[f32]) -> (f32, f32) {
    const LANES: usize = 16;
    let (mut least, mut greatest) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    for values in values.chunks(LANES) {
        for ((l, g), &x) in least.iter_mut().zip(&mut greatest).zip(values) {
            *l = if x < *l { x } else { *l };
            *g = if x > *g { x } else { *g };
        }
    }
    let least = least.into_iter().fold(f32::INFINITY, |m, x| if x < m { x } else { m });
    (least, greatest.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m }))
}
