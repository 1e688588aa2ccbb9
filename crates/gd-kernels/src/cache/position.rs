//! Where rows are written in a cache.

use candle_core::Tensor;

use crate::error::{Error, Result};

/// The dimension of the rows in a cache `[sequences, heads, rows, ..]`.
pub(crate) const ROWS: usize = 2;

/// Where rows are written in a cache: `[sequence, first row]`.
pub type WritePosition = [usize; 2];

/// Checks that there is one position for each of `entries` entries of `rows` rows, that every sequence exists and is
/// named once, and that no gap is left behind its stored rows. `lengths` are the stored rows of every sequence.
pub(crate) fn check_positions(
    at: &[WritePosition],
    entries: usize,
    rows: usize,
    lengths: &[usize],
) -> Result<()> {
    if at.len() != entries {
        return Err(Error::Invalid(format!(
            "{} write positions for {entries} entries of new rows",
            at.len()
        )));
    }
    let mut named = vec![false; lengths.len()];
    for &[sequence, first] in at {
        let Some(length) = lengths.get(sequence) else {
            return Err(Error::Invalid(format!("sequence {sequence} of a cache of {}", lengths.len())));
        };
        if first > *length {
            return Err(Error::Invalid(format!(
                "rows {first}..{} of sequence {sequence}, which has {length} rows",
                first + rows
            )));
        }
        if std::mem::replace(&mut named[sequence], true) {
            return Err(Error::Invalid(format!("sequence {sequence} is written to twice in one call")));
        }
    }
    Ok(())
}

/// The positions behind the last row of every sequence.
pub(crate) fn ends(lengths: &[usize]) -> Vec<WritePosition> {
    lengths.iter().copied().enumerate().map(|(sequence, length)| [sequence, length]).collect()
}

/// Copies `rows` `[R, heads, m, ..]` to their positions in `to` `[sequences, heads, capacity, ..]`, which is contiguous.
pub(crate) fn write_rows(to: &Tensor, rows: &Tensor, at: &[WritePosition]) -> Result<()> {
    let rows = rows.detach().contiguous()?;
    let first = at.first().map_or(0, |position| position[1]);
    if at.len() == to.dim(0)? && at.iter().enumerate().all(|(r, position)| *position == [r, first]) {
        return Ok(to.slice_set(&rows, ROWS, first)?);
    }
    for (r, &[sequence, first]) in at.iter().enumerate() {
        to.narrow(0, sequence, 1)?.slice_set(&rows.narrow(0, r, 1)?, ROWS, first)?;
    }
    Ok(())
}

/// The elements of `of` for these sequences; refuses a sequence that does not exist.
pub(crate) fn selected<T: Clone>(of: &[T], sequences: &[usize]) -> Result<Vec<T>> {
    let each = sequences.iter().map(|&sequence| {
        let element = of.get(sequence).cloned();
        element.ok_or_else(|| Error::Invalid(format!("sequence {sequence} of a cache of {}", of.len())))
    });
    each.collect()
}
