//! The checked mode of a scan: rows that take part must be finite, and their dot products within the range of a scan.

use num_traits::Float;

use crate::backend::cpu::element::{Element, Real};
use crate::backend::cpu::parallel::par_map;
use crate::error::{Error, Result};
use crate::ops::scan::cpu::arguments::Arguments;
use crate::ops::scan::cpu::ill_conditioned::has_large_norm;
use crate::ops::scan::problem::Problem;
use crate::options::Score;

/// Rows that a task checks.
const CHUNK_ROWS: usize = 256;

/// Refuses a NaN or an infinity in a query that has a visible key, or in a key that is visible to some query, and dot
/// products that may overflow for some keys of a query and not for others. Rows that are not read, such as padding, are
/// not checked.
pub(crate) fn rows<T: Element>(problem: &Problem, x: &Arguments<'_, T>) -> Result<()> {
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
        if problem.score == Score::Dot {
            for h in 0..problem.kv_heads {
                check_dot_products(problem, x, [b, h], &rows, &keys)?;
            }
        }
    }
    Ok(())
}

/// Refuses a query of the group of a key-value head whose dot products may overflow although it is not long enough to be
/// ranked in f64 for its length alone: a scan does not find the keys whose products overflow. `|<q, k>|` is at most D times
/// the greatest elements of both.
fn check_dot_products<T: Element>(
    problem: &Problem,
    x: &Arguments<'_, T>,
    [b, kv_head]: [usize; 2],
    rows: &[usize],
    keys: &[usize],
) -> Result<()> {
    let of_chunk = |keys: &[usize]| {
        let each = keys.iter().map(|&j| (greatest(x.k.row(b, kv_head, j)), j));
        each.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)))
    };
    let of_chunks = chunks(keys, &of_chunk).into_iter().flatten();
    let longest = of_chunks.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
    let Some((largest_key, j)) = longest else { return Ok(()) };
    let range = T::Acc::max_value().wide() / problem.head_dim as f64;
    let overflows = |q: &[T::Acc]| !has_large_norm(q) && greatest(q) > range / largest_key;
    let group = problem.group();
    let refused = (kv_head * group..(kv_head + 1) * group).find_map(|h| {
        let of_chunk = |rows: &[usize]| rows.iter().copied().find(|&i| overflows(x.q.row(b, h, i)));
        chunks(rows, &of_chunk).into_iter().flatten().next().map(|i| (h, i))
    });
    match refused {
        Some((h, i)) => Err(Error::Invalid(format!(
            "the dot product of query q[{b}, {h}, {i}], with an element of magnitude {:.1e}, and key k[{b}, {kv_head}, {j}], \
             with one of {largest_key:.1e}, may overflow {:.1e}; scale q or k down",
            greatest(x.q.row(b, h, i)),
            T::Acc::max_value().wide(),
        ))),
        None => Ok(()),
    }
}

/// The results of `f` for chunks of the rows, in parallel.
fn chunks<R: Send>(rows: &[usize], f: &(dyn Fn(&[usize]) -> R + Sync)) -> Vec<R> {
    par_map(rows.chunks(CHUNK_ROWS).collect(), &|_, rows| f(rows))
}

/// The greatest magnitude in a row.
fn greatest<T: Element>(row: &[T]) -> f64 {
    row.iter().map(|x| x.up().wide().abs()).fold(0.0, f64::max)
}

fn check_rows<'a, T: Element>(
    name: &str,
    rows: &[usize],
    [b, h]: [usize; 2],
    row: impl Fn(usize) -> &'a [T] + Sync,
) -> Result<()> {
    let not_finite = |&i: &usize| row(i).iter().position(|x| !x.up().is_finite()).map(|d| (i, d));
    match chunks(rows, &|rows| rows.iter().find_map(not_finite)).into_iter().flatten().next() {
        Some((i, d)) => {
            Err(Error::Invalid(format!("{name}[{b}, {h}, {i}, {d}] is {}, not finite", row(i)[d].up())))
        }
        None => Ok(()),
    }
}
