//! What a scan keeps of the scores of each query: the greatest, or the K greatest.

use pulp::Simd;

use super::tile::{MAX_KEYS, REGISTERS};
use crate::element::Real;

/// Takes scores panel by panel: in rising order of the panels if ties go to the first key, in
/// falling order if they go to the last.
pub(crate) trait Keep<A: Real> {
    /// Scores of rows `row..row + R` against all keys of a panel.
    fn offer<S: Simd, const R: usize>(
        &mut self,
        simd: S,
        row: usize,
        scores: &[[A::Lanes<S>; REGISTERS]; R],
        panel: usize,
    );
}

/// K = 1: every lane remembers its greatest score and the panel that had it. No branch depends on a
/// score; the key is found once, at the end.
pub(crate) struct Lead<A> {
    score: Vec<A>,
    panel: Vec<A>,
    width: usize,
}

impl<A: Real> Lead<A> {
    /// For `rows` queries and panels of `width` keys.
    pub(crate) fn new(rows: usize, width: usize) -> Self {
        Self { score: vec![A::neg_infinity(); rows * width], panel: vec![A::zero(); rows * width], width }
    }

    /// Whether some score left the range of its type: such a key may hide a better one.
    pub(crate) fn overflowed(&self) -> bool {
        self.score.contains(&A::infinity())
    }

    /// The key of greatest score of a row; of equals the first or the last.
    #[inline(always)]
    pub(crate) fn key(&self, row: usize, last: bool) -> Option<u32> {
        let lanes = row * self.width..(row + 1) * self.width;
        let (mut best, mut key) = (A::neg_infinity(), None);
        for (w, (&s, p)) in self.score[lanes.clone()].iter().zip(&self.panel[lanes]).enumerate() {
            // Panel numbers are small integers, exact in A.
            let j = (p.wide() as usize * self.width + w) as u32;
            let wins = key.is_none_or(|k| s > best || s == best && (j < k) != last);
            if s > A::neg_infinity() && wins {
                (best, key) = (s, Some(j));
            }
        }
        key
    }
}

impl<A: Real> Keep<A> for Lead<A> {
    #[inline(always)]
    fn offer<S: Simd, const R: usize>(
        &mut self,
        simd: S,
        row: usize,
        scores: &[[A::Lanes<S>; REGISTERS]; R],
        panel: usize,
    ) {
        let at = row * self.width..(row + R) * self.width;
        let best = A::lanes_mut::<S>(&mut self.score[at.clone()]).chunks_exact_mut(REGISTERS);
        let panels = A::lanes_mut::<S>(&mut self.panel[at]).chunks_exact_mut(REGISTERS);
        let this = A::of(panel as f64).splat(simd);
        for ((best, panels), scores) in best.zip(panels).zip(scores) {
            for r in 0..REGISTERS {
                let better = A::greater(simd, scores[r], best[r]);
                best[r] = A::pick(simd, better, scores[r], best[r]);
                panels[r] = A::pick(simd, better, this, panels[r]);
            }
        }
    }
}

/// K > 1: sorted lists, best first; equal scores keep the order in which they were offered.
pub(crate) struct Best<A> {
    /// The last score of each list.
    threshold: Vec<A>,
    /// Lists of K behind a slot of +inf, so that "the entry before" always exists.
    score: Vec<A>,
    key: Vec<u32>,
    len: Vec<usize>,
    capacity: usize,
    width: usize,
    backwards: bool,
}

impl<A: Real> Best<A> {
    /// Empty lists of `capacity` for `rows` queries, panels of `width` keys; `backwards` if ties go to
    /// the last key.
    pub(crate) fn new(rows: usize, capacity: usize, width: usize, backwards: bool) -> Self {
        let mut score = vec![A::neg_infinity(); rows * (capacity + 1)];
        score.iter_mut().step_by(capacity + 1).for_each(|s| *s = A::infinity());
        Self {
            threshold: vec![A::neg_infinity(); rows],
            score,
            key: vec![0; rows * (capacity + 1)],
            len: vec![0; rows],
            capacity,
            width,
            backwards,
        }
    }

    /// Enters a score that exceeds the threshold; infinity is no score.
    #[inline(always)]
    pub(crate) fn insert(&mut self, row: usize, score: A, key: u32) {
        if score == A::infinity() {
            return;
        }
        self.len[row] = (self.len[row] + 1).min(self.capacity);
        let list = row * (self.capacity + 1)..(row + 1) * (self.capacity + 1);
        let (scores, keys) = (&mut self.score[list.clone()], &mut self.key[list]);
        match self.capacity {
            1 => enter::<A, 1>(scores, keys, score, key),
            2 => enter::<A, 2>(scores, keys, score, key),
            4 => enter::<A, 4>(scores, keys, score, key),
            8 => enter::<A, 8>(scores, keys, score, key),
            16 => enter::<A, 16>(scores, keys, score, key),
            k => {
                // Long lists: where it belongs is far from everywhere else.
                let at = scores.partition_point(|&s| s >= score);
                scores.copy_within(at..k, at + 1);
                keys.copy_within(at..k, at + 1);
                (scores[at], keys[at]) = (score, key);
            }
        }
        self.threshold[row] = scores[self.capacity];
    }

    /// What a score must exceed to enter a row's list: -inf while it has room.
    #[inline(always)]
    pub(crate) fn threshold(&self, row: usize) -> A {
        self.threshold[row]
    }

    /// Empties all lists.
    pub(crate) fn clear(&mut self) {
        self.threshold.fill(A::neg_infinity());
        self.len.fill(0);
        for list in self.score.chunks_exact_mut(self.capacity + 1) {
            list[1..].fill(A::neg_infinity());
        }
    }

    /// The keys of a row, best first.
    pub(crate) fn keys(&self, row: usize) -> &[u32] {
        let first = row * (self.capacity + 1) + 1;
        &self.key[first..first + self.len[row]]
    }
}

/// Inserts into a short sorted list without branches.
#[inline(always)]
fn enter<A: Real, const K: usize>(scores: &mut [A], keys: &mut [u32], score: A, key: u32) {
    let (Some(before), Some(old)) = (scores.first_chunk::<K>().copied(), scores.last_chunk_mut::<K>()) else {
        unreachable!("a list of {K}")
    };
    let (Some(keys_before), Some(old_keys)) = (keys.first_chunk::<K>().copied(), keys.last_chunk_mut::<K>())
    else {
        unreachable!("a list of {K}")
    };
    for i in 0..K {
        // Behind the new entry all move up by one.
        let (here, above) = (score > old[i], score > before[i]);
        let moved = if above { before[i] } else { score };
        let key = if above { keys_before[i] } else { key };
        old[i] = if here { moved } else { old[i] };
        old_keys[i] = if here { key } else { old_keys[i] };
    }
}

impl<A: Real> Keep<A> for Best<A> {
    #[inline(always)]
    fn offer<S: Simd, const R: usize>(
        &mut self,
        simd: S,
        row: usize,
        scores: &[[A::Lanes<S>; REGISTERS]; R],
        panel: usize,
    ) {
        let (mut hits, mut any) = ([0u32; R], 0);
        for ((hits, scores), threshold) in hits.iter_mut().zip(scores).zip(&self.threshold[row..row + R]) {
            let threshold = threshold.splat(simd);
            let bits = |s| A::bits::<S>(A::greater(simd, s, threshold));
            *hits = bits(scores[0]) | bits(scores[1]) << (self.width / REGISTERS);
            any |= *hits;
        }
        // Most tiles improve nothing.
        if any == 0 {
            return;
        }
        for (r, (mut hits, scores)) in hits.into_iter().zip(scores).enumerate() {
            if hits == 0 {
                continue;
            }
            let mut tile = [A::neg_infinity(); MAX_KEYS];
            A::lanes_mut::<S>(&mut tile)[..REGISTERS].copy_from_slice(scores);
            while hits != 0 {
                let w = if self.backwards { 31 - hits.leading_zeros() } else { hits.trailing_zeros() };
                hits ^= 1 << w;
                let score = tile[w as usize % MAX_KEYS];
                // The row's list may have risen since.
                if score > self.threshold[row + r] {
                    self.insert(row + r, score, (panel * self.width) as u32 + w);
                }
            }
        }
    }
}
