//! A tensor to which rows are appended as a cache grows.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::cache::position::{ROWS, WritePosition, check_positions, selected, write_rows};
use crate::cache::sequence_cache::SequenceCache;
use crate::error::{Error, Result};

/// The capacity of a buffer that grows is a multiple of this many rows.
const CAPACITY_STEP_ROWS: usize = 256;

/// A tensor `[sequences, heads, rows, ..]` with spare capacity along `rows`, so that appending rows does not copy the
/// stored ones every time. Every sequence has its own number of rows; elements behind the last row of a shorter
/// sequence are undefined.
///
/// Clones share their memory until one of them is written to.
#[derive(Debug, Clone)]
pub struct AppendBuffer {
    buffer: Arc<Tensor>,
    lengths: Vec<usize>,
}

impl AppendBuffer {
    /// An empty buffer of shape `dims`, with capacity for `dims[2]` rows per sequence.
    ///
    /// # Errors
    /// Fewer than three dimensions, or an allocation that fails.
    pub fn new(dims: &[usize], dtype: DType, device: &Device) -> Result<Self> {
        if dims.len() <= ROWS {
            return Err(Error::Invalid(format!(
                "a buffer of shape {dims:?} has no dimension of rows: [sequences, heads, rows, ..]"
            )));
        }
        let buffer = Arc::new(Tensor::zeros(dims, dtype, device)?);
        Ok(Self { buffer, lengths: vec![0; dims[0]] })
    }

    /// Rows per sequence for which memory is allocated.
    pub fn capacity(&self) -> usize {
        self.buffer.dims()[ROWS]
    }

    /// All of the memory: `[sequences, heads, capacity, ..]`.
    pub fn buffer(&self) -> &Tensor {
        &self.buffer
    }

    /// The rows of all sequences, as many as the longest has, as a view.
    ///
    /// # Errors
    /// Those of candle.
    pub fn get(&self) -> Result<Tensor> {
        Ok(self.buffer.narrow(ROWS, 0, self.longest())?)
    }

    /// Counts `rows` rows at these positions as stored, and makes sure that the memory for them is not shared with a
    /// clone. The positions have passed [`check_positions`]; the caller writes the rows.
    ///
    /// # Errors
    /// An allocation that fails.
    pub(crate) fn reserve(&mut self, at: &[WritePosition], rows: usize) -> Result<()> {
        let needed = at.iter().map(|[_, first]| first + rows).max().unwrap_or(0);
        let capacity = match self.capacity() {
            capacity if needed > capacity => needed.max(2 * capacity).next_multiple_of(CAPACITY_STEP_ROWS),
            capacity => capacity,
        };
        if capacity != self.capacity() || Arc::get_mut(&mut self.buffer).is_none() {
            self.buffer = Arc::new(self.copied(capacity)?);
        }
        for &[sequence, first] in at {
            self.lengths[sequence] = self.lengths[sequence].max(first + rows);
        }
        Ok(())
    }

    /// The stored rows in new memory for `capacity` rows.
    fn copied(&self, capacity: usize) -> Result<Tensor> {
        let mut dims = self.buffer.dims().to_vec();
        dims[ROWS] = capacity;
        let new = Tensor::zeros(dims, self.buffer.dtype(), self.buffer.device())?;
        if self.longest() > 0 {
            new.slice_set(&self.get()?.contiguous()?, ROWS, 0)?;
        }
        Ok(new)
    }

    /// The rows behind the first `from[s]` rows of every sequence `s`: tensors `[R, heads, m, ..]` and the positions of
    /// their rows in this buffer. Sequences with equally many new rows share one tensor.
    ///
    /// # Errors
    /// Those of candle.
    pub fn since(&self, from: &[usize]) -> Result<Vec<(Tensor, Vec<WritePosition>)>> {
        let mut groups: BTreeMap<usize, Vec<WritePosition>> = BTreeMap::new();
        for (sequence, (&length, &from)) in self.lengths.iter().zip(from).enumerate() {
            if length > from {
                groups.entry(length - from).or_default().push([sequence, from]);
            }
        }
        let group = |(rows, at): (usize, Vec<WritePosition>)| -> Result<_> {
            let first = at[0][1];
            if at.len() == self.lengths.len() && at.iter().all(|position| position[1] == first) {
                return Ok((self.buffer.narrow(ROWS, first, rows)?, at));
            }
            let each = at
                .iter()
                .map(|&[sequence, first]| self.buffer.narrow(0, sequence, 1)?.narrow(ROWS, first, rows));
            Ok((Tensor::cat(&each.collect::<candle_core::Result<Vec<_>>>()?, 0)?, at))
        };
        groups.into_iter().map(group).collect()
    }
}

impl SequenceCache for AppendBuffer {
    fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    fn write(&mut self, rows: &Tensor, at: &[WritePosition]) -> Result<()> {
        let (dims, own) = (rows.dims(), self.buffer.dims());
        let fits = dims.len() == own.len()
            && (1..own.len()).all(|d| d == ROWS || dims[d] == own[d])
            && rows.dtype() == self.buffer.dtype();
        if !fits {
            return Err(Error::Invalid(format!(
                "rows {dims:?} of {:?} for a cache of {own:?} of {:?}",
                rows.dtype(),
                self.buffer.dtype()
            )));
        }
        check_positions(at, dims[0], dims[ROWS], &self.lengths)?;
        self.reserve(at, dims[ROWS])?;
        write_rows(&self.buffer, rows, at)
    }

    fn select(&self, sequences: &[usize]) -> Result<Self> {
        let lengths = selected(&self.lengths, sequences)?;
        let entries: Vec<u32> = sequences.iter().map(|&sequence| sequence as u32).collect();
        let entries = Tensor::new(entries, self.buffer.device())?;
        Ok(Self { buffer: Arc::new(self.buffer.index_select(&entries, 0)?), lengths })
    }

    fn stack(caches: &[&Self]) -> Result<Self> {
        let Some(first) = caches.first() else { return Err(Error::Invalid("no caches to stack".into())) };
        if let Some(other) = caches.iter().find(|cache| cache.buffer.dtype() != first.buffer.dtype()) {
            return Err(Error::Invalid(format!(
                "caches of {:?} and {:?} cannot be stacked",
                first.buffer.dtype(),
                other.buffer.dtype()
            )));
        }
        let lengths: Vec<usize> = caches.iter().flat_map(|cache| cache.lengths.iter().copied()).collect();
        let longest = caches.iter().map(|cache| cache.longest()).max().unwrap_or(0);
        let mut dims = first.buffer.dims().to_vec();
        (dims[0], dims[ROWS]) = (lengths.len(), longest.next_multiple_of(CAPACITY_STEP_ROWS));
        let stacked = Tensor::zeros(dims, first.buffer.dtype(), first.buffer.device())?;
        let mut sequence = 0;
        for cache in caches {
            let sequences = cache.lengths.len();
            if cache.longest() > 0 {
                stacked.narrow(0, sequence, sequences)?.slice_set(&cache.get()?.contiguous()?, ROWS, 0)?;
            }
            sequence += sequences;
        }
        Ok(Self { buffer: Arc::new(stacked), lengths })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[sequences, 2, rows, 3]` of distinct numbers.
    fn rows(sequences: usize, rows: usize, from: f32) -> Tensor {
        let count = sequences * 2 * rows * 3;
        let values: Vec<f32> = (0..count).map(|i| from + i as f32).collect();
        Tensor::from_vec(values, (sequences, 2, rows, 3), &Device::Cpu).unwrap()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn sequences_have_own_lengths_and_clones_are_independent() {
        let mut all = AppendBuffer::new(&[2, 2, 4, 3], DType::F32, &Device::Cpu).unwrap();
        all.append(&rows(2, 3, 0.0)).unwrap();
        all.write(&rows(1, 2, 1000.0), &[[1, 3]]).unwrap();
        assert_eq!((all.lengths(), all.longest()), (&[3, 5][..], 5));
        let (before, mut other) = (values(&all.get().unwrap()), all.clone());
        // Both grow within the memory that they shared, and neither reads what the other wrote.
        all.append(&rows(2, 1, 2000.0)).unwrap();
        other.append(&rows(2, 1, 3000.0)).unwrap();
        let at = |cache: &AppendBuffer, sequence: usize, row: usize| {
            values(&cache.buffer().narrow(0, sequence, 1).unwrap().narrow(ROWS, row, 1).unwrap())[0]
        };
        assert_eq!([at(&all, 0, 3), at(&all, 1, 5)], [2000.0, 2006.0]);
        assert_eq!([at(&other, 0, 3), at(&other, 1, 5)], [3000.0, 3006.0]);
        let first = all.buffer().narrow(ROWS, 0, 3).unwrap();
        let old = Tensor::from_vec(before, (2, 2, 5, 3), &Device::Cpu).unwrap().narrow(ROWS, 0, 3).unwrap();
        assert_eq!(values(&first), values(&old));
        // Growth far beyond the capacity keeps the stored rows.
        all.append(&rows(2, 700, 9e4)).unwrap();
        assert!(all.capacity() >= 706 && all.capacity().is_multiple_of(CAPACITY_STEP_ROWS));
        assert_eq!([at(&all, 0, 3), at(&all, 1, 5), at(&all, 0, 4)], [2000.0, 2006.0, 9e4]);
    }

    #[test]
    fn new_rows_are_grouped_by_their_count() {
        let mut all = AppendBuffer::new(&[3, 2, 4, 3], DType::F32, &Device::Cpu).unwrap();
        all.append(&rows(3, 3, 0.0)).unwrap();
        let groups = all.since(&[1, 1, 1]).unwrap();
        assert_eq!((groups.len(), groups[0].1.as_slice()), (1, &[[0, 1], [1, 1], [2, 1]][..]));
        assert_eq!(values(&groups[0].0), values(&rows(3, 3, 0.0).narrow(ROWS, 1, 2).unwrap()));
        let groups = all.since(&[2, 3, 0]).unwrap();
        let positions: Vec<_> = groups.iter().map(|(rows, at)| (rows.dims()[ROWS], at.clone())).collect();
        assert_eq!(positions, [(1, vec![[0, 2]]), (3, vec![[2, 0]])]);
        assert_eq!(values(&groups[1].0), values(&rows(3, 3, 0.0).narrow(0, 2, 1).unwrap()));
    }

    #[test]
    fn positions_that_do_not_fit_are_refused() {
        let mut all = AppendBuffer::new(&[2, 2, 4, 3], DType::F32, &Device::Cpu).unwrap();
        all.append(&rows(2, 3, 0.0)).unwrap();
        let mut refused = |rows: &Tensor, at: &[WritePosition], value: &str| {
            let e = all.write(rows, at).unwrap_err().to_string();
            assert!(e.contains(value), "{e} does not name {value}");
        };
        refused(&rows(1, 1, 0.0), &[[2, 0]], "sequence 2 of a cache of 2");
        refused(&rows(1, 2, 0.0), &[[1, 4]], "rows 4..6 of sequence 1, which has 3 rows");
        refused(&rows(2, 1, 0.0), &[[1, 3]], "1 write positions for 2 entries");
        refused(&rows(2, 1, 0.0), &[[1, 3], [1, 2]], "sequence 1 is written to twice");
        refused(&rows(1, 1, 0.0).narrow(3, 0, 2).unwrap(), &[[0, 0]], "[1, 2, 1, 2]");
        refused(&rows(1, 1, 0.0).to_dtype(DType::F16).unwrap(), &[[0, 0]], "F16");
        assert!(all.select(&[0, 2]).unwrap_err().to_string().contains("sequence 2 of a cache of 2"));
        assert_eq!(all.lengths(), [3, 3]);
    }
}
