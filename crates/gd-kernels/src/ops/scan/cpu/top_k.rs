//! The greatest score of each query, or the K greatest.

use pulp::Simd;

use crate::backend::cpu::element::Real;
use crate::ops::scan::cpu::tile::{MAX_KEYS, REGISTERS};

/// Consumes scores panel by panel: in ascending order of the panels if ties go to the first key, in descending order if
/// they go to the last.
pub(crate) trait ScoreSink<A: Real> {
    /// Scores of rows `row..row + R` against all keys of a panel.
    fn add<S: Simd, const R: usize>(
        &mut self,
        simd: S,
        row: usize,
        scores: &[[A::Lanes<S>; REGISTERS]; R],
        panel: usize,
    );
}

/// K = 1: every lane stores its greatest score and the panel of that score. No branch depends on a score; the key is
/// computed once, at the end.
pub(crate) struct Top1<A> {
    score: Vec<A>,
    panel: Vec<A>,
    width: usize,
}

impl<A: Real> Top1<A> {
    /// For `rows` queries and panels of `width` keys.
    pub(crate) fn new(rows: usize, width: usize) -> Self {
        Self { score: vec![A::neg_infinity(); rows * width], panel: vec![A::zero(); rows * width], width }
    }

    /// Whether a score overflowed to infinity: such a key could hide a valid one.
    pub(crate) fn overflowed(&self) -> bool {
        self.score.contains(&A::infinity())
    }

    /// The key of the greatest score of a row; of several equal scores the first or the last key.
    #[inline(always)]
    pub(crate) fn key(&self, row: usize, last: bool) -> Option<u32> {
        let lanes = row * self.width..(row + 1) * self.width;
        let (mut greatest, mut key) = (A::neg_infinity(), None);
        for (w, (&s, p)) in self.score[lanes.clone()].iter().zip(&self.panel[lanes]).enumerate() {
            // Panel numbers are small integers, exact in A.
            let j = (p.wide() as usize * self.width + w) as u32;
            let wins = key.is_none_or(|k| s > greatest || s == greatest && (j < k) != last);
            if s > A::neg_infinity() && wins {
                (greatest, key) = (s, Some(j));
            }
        }
        key
    }
}

impl<A: Real> ScoreSink<A> for Top1<A> {
    #[inline(always)]
    fn add<S: Simd, const R: usize>(
        &mut self,
        simd: S,
        row: usize,
        scores: &[[A::Lanes<S>; REGISTERS]; R],
        panel: usize,
    ) {
        let at = row * self.width..(row + R) * self.width;
        let greatest = A::lanes_mut::<S>(&mut self.score[at.clone()]).chunks_exact_mut(REGISTERS);
        let panels = A::lanes_mut::<S>(&mut self.panel[at]).chunks_exact_mut(REGISTERS);
        let this = A::of(panel as f64).splat(simd);
        for ((greatest, panels), scores) in greatest.zip(panels).zip(scores) {
            for r in 0..REGISTERS {
                let greater = A::greater(simd, scores[r], greatest[r]);
                greatest[r] = A::pick(simd, greater, scores[r], greatest[r]);
                panels[r] = A::pick(simd, greater, this, panels[r]);
            }
        }
    }
}

/// The K greatest scores of each row, as sorted lists of integers that rank scores: of equal scores the smaller key comes
/// first, or the greater key if ties go to the last.
pub(crate) struct TopK<A: Real> {
    /// The last score of each list.
    threshold: Vec<A>,
    /// Lists of K entries, each behind a sentinel that is greater than all, so that every entry has a predecessor.
    list: Vec<A::Ranked>,
    capacity: usize,
    width: usize,
    backwards: bool,
}

impl<A: Real> TopK<A> {
    /// Empty lists of `capacity` for `rows` queries, panels of `width` keys; `backwards` if ties go to
    /// the last key.
    pub(crate) fn new(rows: usize, capacity: usize, width: usize, backwards: bool) -> Self {
        let mut list = vec![A::neg_infinity().ranked(0); rows * (capacity + 1)];
        list.iter_mut().step_by(capacity + 1).for_each(|e| *e = A::infinity().ranked(u32::MAX));
        Self { threshold: vec![A::neg_infinity(); rows], list, capacity, width, backwards }
    }

    /// Empties all lists.
    pub(crate) fn clear(&mut self) {
        self.threshold.fill(A::neg_infinity());
        for list in self.list.chunks_exact_mut(self.capacity + 1) {
            list[1..].fill(A::neg_infinity().ranked(0));
        }
    }

    /// Whether a score exceeds the threshold of its row.
    #[inline(always)]
    pub(crate) fn admits(&self, row: usize, score: A) -> bool {
        score > self.threshold[row]
    }

    /// Inserts a score that exceeds the threshold of its row; infinite scores are ignored.
    #[inline(always)]
    pub(crate) fn insert(&mut self, row: usize, score: A, key: u32) {
        if score == A::infinity() {
            return;
        }
        let entry = score.ranked(if self.backwards { key } else { !key });
        let list = &mut self.list[row * (self.capacity + 1)..(row + 1) * (self.capacity + 1)];
        match self.capacity {
            1 => insert_sorted::<A, 1>(list, entry),
            2 => insert_sorted::<A, 2>(list, entry),
            4 => insert_sorted::<A, 4>(list, entry),
            8 => insert_sorted::<A, 8>(list, entry),
            16 => insert_sorted::<A, 16>(list, entry),
            32 => insert_sorted::<A, 32>(list, entry),
            64 => insert_sorted::<A, 64>(list, entry),
            k => {
                // A long list: find the position by bisection.
                let at = list.partition_point(|&e| e >= entry);
                list.copy_within(at..k, at + 1);
                list[at] = entry;
            }
        }
        self.threshold[row] = A::unranked(list[self.capacity]).0;
    }

    /// Writes the keys of a row into `keys`, in descending order of the scores.
    #[inline(always)]
    pub(crate) fn keys(&self, row: usize, keys: &mut Vec<u32>) {
        keys.clear();
        let list = &self.list[row * (self.capacity + 1)..(row + 1) * (self.capacity + 1)];
        for &entry in &list[1..] {
            let (score, tie) = A::unranked(entry);
            if score > A::neg_infinity() {
                keys.push(if self.backwards { tie } else { !tie });
            }
        }
    }
}

/// Inserts into a sorted list without branches: every entry becomes the greater of itself and the smaller of its
/// predecessor and the new entry.
#[inline(always)]
fn insert_sorted<A: Real, const K: usize>(list: &mut [A::Ranked], entry: A::Ranked) {
    let Some(before) = list.first_chunk::<K>().copied() else { unreachable!("a list of {K}") };
    let Some(list) = list.last_chunk_mut::<K>() else { unreachable!("a list of {K}") };
    for (e, before) in list.iter_mut().zip(before) {
        let moved = if before < entry { before } else { entry };
        *e = if moved > *e { moved } else { *e };
    }
}

impl<A: Real> ScoreSink<A> for TopK<A> {
    #[inline(always)]
    fn add<S: Simd, const R: usize>(
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
        // No score of most tiles exceeds its threshold.
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
                // The threshold may have risen since the comparison.
                if self.admits(row + r, score) {
                    self.insert(row + r, score, (panel * self.width) as u32 + w);
                }
            }
        }
    }
}
