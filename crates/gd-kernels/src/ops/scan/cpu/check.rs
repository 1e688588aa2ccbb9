//! The checked mode of a scan: rows that take part must be finite.

use num_traits::Float;
use rayon::prelude::*;

use crate::backend::cpu::element::Element;
use crate::error::{Error, Result};
use crate::ops::scan::cpu::arguments::Arguments;
use crate::ops::scan::problem::Problem;

/// Refuses a NaN or an infinity in a query that has a visible key, or in a key that is visible to some query. Rows that
/// are not read, such as padding, are not checked.
pub(crate) fn finite<T: Element>(problem: &Problem, x: &Arguments<'_, T>) -> Result<()> {
    for b in 0..problem.batch {
        let mut rows = Vec::new();
        // The queries that read key j are the sum of `edge[..=j]`: +1 at the start of every range, -1 at its end.
        let mut edge = vec![0i64; problem.keys + 1];
        for i in 0..problem.queries {
            let range = x.mask.visible(b, i, problem.keys);
            if !range.is_empty() {
                rows.push(i);
                edge[range.start] += 1;
                edge[range.end] -= 1;
            }
        }
        let mut readers = 0;
        let keys: Vec<usize> = (0..problem.keys)
            .filter(|&j| {
                readers += edge[j];
                readers > 0
            })
            .collect();
        for h in 0..problem.q_heads {
            check_rows("q", &rows, [b, h], |i| x.q.row(b, h, i))?;
        }
        for h in 0..problem.kv_heads {
            check_rows("k", &keys, [b, h], |j| x.k.row(b, h, j))?;
        }
    }
    Ok(())
}

fn check_rows<'a, T: Element>(
    name: &str,
    rows: &[usize],
    [b, h]: [usize; 2],
    row: impl Fn(usize) -> &'a [T] + Sync,
) -> Result<()> {
    let not_finite = |&i: &usize| row(i).iter().position(|x| !x.up().is_finite()).map(|d| (i, d));
    match rows.par_iter().find_map_first(not_finite) {
        Some((i, d)) => {
            Err(Error::Invalid(format!("{name}[{b}, {h}, {i}, {d}] is {}, not finite", row(i)[d].up())))
        }
        None => Ok(()),
    }
}
