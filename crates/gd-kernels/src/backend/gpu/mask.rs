//! Masks as kernel parameters: numbers, and a table if batch entries differ.

use bytemuck::cast_slice;

use crate::backend::gpu::Gpu;
use crate::backend::gpu::params::{MaskParams, MaskTableCode};
use crate::error::{Error, Result};
use crate::mask::Mask;

/// Offsets are clamped to this magnitude, which exceeds every number of keys.
const MAX_OFFSET: i64 = 1 << 30;

/// The parameters of a mask over `keys` keys for `queries` queries, and its table, which may be empty.
///
/// # Errors
/// More than 2^30 queries or keys; an offset beyond 2^30 with a window that reaches back from there.
pub(crate) fn params(
    mask: &Mask,
    batch: usize,
    queries: usize,
    keys: usize,
) -> Result<(MaskParams, Vec<i32>)> {
    if queries.max(keys) as i64 >= MAX_OFFSET {
        return Err(Error::Unsupported(format!(
            "a mask over {queries} queries and {keys} keys; fewer than {MAX_OFFSET} are supported"
        )));
    }
    // Clamping an offset leaves all keys visible or none, unless the start of the window depends on it.
    if let Some(window) = mask.window_len().filter(|&w| w as u128 + keys as u128 >= MAX_OFFSET as u128)
        && let Some(offset) =
            (0..batch).map(|b| mask.offset(b)).find(|x| x.saturating_add(queries as i64) > MAX_OFFSET)
    {
        return Err(Error::Unsupported(format!(
            "a window of {window} keys with an offset of {offset}; offsets up to {MAX_OFFSET} are supported for it"
        )));
    }
    let offset = |b: usize| mask.offset(b).clamp(-MAX_OFFSET, MAX_OFFSET) as i32;
    let length = |b: usize| match mask.lengths() {
        Some([n]) => *n as i32,
        Some(lengths) => lengths[b] as i32,
        None => keys as i32,
    };
    let mut table = Vec::new();
    if mask.differs() || mask.boundaries().is_some() {
        table.extend((0..batch).map(offset));
        table.extend((0..batch).map(length));
    }
    if let Some(boundaries) = mask.boundaries() {
        let list = |b: usize| &boundaries[if boundaries.len() == 1 { 0 } else { b }];
        let mut first = 0;
        for b in 0..batch {
            table.push(first);
            first += list(b).len() as i32;
        }
        table.push(first);
        for b in 0..batch {
            table.extend(list(b).iter().map(|&end| end as i32));
        }
    }
    let code = match (table.is_empty(), mask.boundaries()) {
        (true, _) => MaskTableCode::None,
        (false, None) => MaskTableCode::Lengths,
        (false, Some(_)) => MaskTableCode::Boundaries,
    };
    let params = MaskParams {
        causal: u32::from(mask.is_causal()),
        window: mask.window_len().map_or(0, |w| w.min(MAX_OFFSET as usize) as u32),
        offset: offset(0),
        length: length(0),
        table: code as u32,
        batch: batch as u32,
        keys: keys as u32,
    };
    Ok((params, table))
}

/// As [`params`], with the table on the GPU.
pub(crate) fn upload<G: Gpu>(
    gpu: &G,
    mask: &Mask,
    batch: usize,
    queries: usize,
    keys: usize,
) -> Result<(MaskParams, Option<G::Buffer>)> {
    let (params, table) = params(mask, batch, queries, keys)?;
    let table = if table.is_empty() { None } else { Some(gpu.upload(cast_slice(&table))?) };
    Ok((params, table))
}
