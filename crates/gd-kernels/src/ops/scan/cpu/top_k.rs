//! What a scan keeps of the scores of each query: the greatest, or the K greatest.

use pulp::Simd;

use crate::backend::cpu::element::Real;
use crate::ops::scan::cpu::tile::{MAX_KEYS, REGISTERS};

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

/// The K greatest, as sorted lists of ranked integers: a smaller (for ties to the last, a greater) key
/// goes before an equal score.
pub(crate) struct Best<A: Real> {
    /// The last score of each list.
    threshold: Vec<A>,
    /// Lists of K behind one greatest entry, so that "the entry before" always exists.
    list: Vec<A::Ranked>,
    capacity: usize,
    width: usize,
    backwards: bool,
}

impl<A: Real> Best<A> {
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

    /// Enters a score that exceeds the threshold; infinity is no score.
    #[inline(always)]
    pub(crate) fn insert(&mut self, row: usize, score: A, key: u32) {
        if score == A::infinity() {
            return;
        }
        let entry = score.ranked(if self.backwards { key } else { !key });
        let list = &mut self.list[row * (self.capacity + 1)..(row + 1) * (self.capacity + 1)];
        match self.capacity {
            1 => enter::<A, 1>(list, entry),
            2 => enter::<A, 2>(list, entry),
            4 => enter::<A, 4>(list, entry),
            8 => enter::<A, 8>(list, entry),
            16 => enter::<A, 16>(list, entry),
            32 => enter::<A, 32>(list, entry),
            64 => enter::<A, 64>(list, entry),
            k => {
                // Long lists: where it belongs is far from everywhere else.
                let at = list.partition_point(|&e| e >= entry);
                list.copy_within(at..k, at + 1);
                list[at] = entry;
            }
        }
        self.threshold[row] = A::unranked(list[self.capacity]).0;
    }

    /// The keys of a row, best first, into `keys`.
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

/// Inserts into a sorted list without branches: every entry becomes the greater of itself and the
/// lesser of its predecessor and the new one.
#[inline(always)]
fn enter<A: Real, const K: usize>(list: &mut [A::Ranked], entry: A::Ranked) {
    let Some(before) = list.first_chunk::<K>().copied() else { unreachable!("a list of {K}") };
    let Some(list) = list.last_chunk_mut::<K>() else { unreachable!("a list of {K}") };
    for (e, before) in list.iter_mut().zip(before) {
        let moved = if before < entry { before } else { entry };
        *e = if moved > *e { moved } else { *e };
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
