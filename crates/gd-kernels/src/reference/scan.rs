//! The naive scan: the energies of all visible keys of a row `[M]`, sorted; the first K are the candidates.

use super::problem::Problem;
use super::{distance2, dot};
use crate::mask::Mask;
use crate::options::{Score, TieBreak};

/// The candidates of every row, `[B, Hq, N, W]` with `W = K + P`, sorted by energy (equal energies
/// by the tie rule) and padded with -1 and +infinity.
#[derive(Debug, Clone)]
pub struct Candidates {
    /// W.
    pub width: usize,
    /// Key positions.
    pub index: Vec<i32>,
    /// Energies.
    pub energy: Vec<f64>,
    /// Whether the key is protected.
    pub protected: Vec<bool>,
}

/// Whether query `i` of batch entry `b` may see key `j` of `keys`.
pub fn may_see(mask: &Mask, b: usize, i: usize, j: usize, keys: usize) -> bool {
    let (at, key) = (i as i128 + i128::from(mask.offset(b)), j as i128);
    let in_past = !mask.is_causal() || key <= at;
    let in_window = mask.window_len().is_none_or(|w| key > at - w as i128);
    let in_same_sequence = mask.boundaries().is_none_or(|boundaries| {
        let ends = &boundaries[if boundaries.len() == 1 { 0 } else { b }];
        // The number of boundaries at or before a position numbers its sequence.
        let sequence = |x: i128| ends.iter().filter(|&&e| e as i128 <= x).count();
        (0..keys as i128).contains(&at) && sequence(at) == sequence(key)
    });
    let in_length = mask.lengths().is_none_or(|n| j < n[if n.len() == 1 { 0 } else { b }]);
    in_past && in_window && in_same_sequence && in_length
}

/// The selection energy of a key: `beta |q - k|^2 - prior`, or `-beta <q, k> - prior` for [`Score::Dot`].
pub fn energy(q: &[f64], k: &[f64], beta: f64, prior: f64, score: Score) -> f64 {
    match score {
        Score::Energy => beta * distance2(q, k) - prior,
        Score::Dot => -beta * dot(q, k) - prior,
    }
}

/// The `k` visible keys of least energy in each row, and the visible protected keys. Keys whose energy is not finite
/// are left out.
pub fn scan(problem: &Problem, k: usize) -> Candidates {
    let rows = problem.batch * problem.q_heads * problem.queries;
    let protected_count = problem.protected.as_ref().map_or(0, |p| p.len() / rows.max(1));
    let width = k + protected_count;
    let mut out = Candidates { width, index: vec![], energy: vec![], protected: vec![] };
    for (row, (b, h, i)) in problem.rows() {
        let query = &problem.q[problem.q_at(b, h, i)];
        let mut scored: Vec<(f64, i32)> = (0..problem.keys)
            .filter(|&j| may_see(&problem.mask, b, i, j, problem.keys))
            .map(|j| {
                let key = &problem.k[problem.k_at(b, h, j)];
                let prior = problem.prior_of(b, h, j);
                (energy(query, key, problem.beta[h], prior, problem.score), j as i32)
            })
            .filter(|(e, _)| e.is_finite())
            .collect();
        scored.sort_by(|x, y| {
            let tie = match problem.tie {
                TieBreak::First => x.1.cmp(&y.1),
                TieBreak::Last => y.1.cmp(&x.1),
            };
            // Adding 0 makes -0 and +0 the same energy.
            (x.0 + 0.0).total_cmp(&(y.0 + 0.0)).then(tie)
        });
        let list = problem
            .protected
            .as_ref()
            .map_or(&[][..], |p| &p[row * protected_count..(row + 1) * protected_count]);
        let top = scored.iter().enumerate().filter(|(rank, (_, j))| *rank < k || list.contains(j));
        let mut top: Vec<_> = top.map(|(_, &(e, j))| (j, e, list.contains(&j))).collect();
        top.resize(width, (-1, f64::INFINITY, false));
        out.index.extend(top.iter().map(|c| c.0));
        out.energy.extend(top.iter().map(|c| c.1));
        out.protected.extend(top.iter().map(|c| c.2));
    }
    out
}
