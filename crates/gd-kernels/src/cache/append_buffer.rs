//! Tensors that grow with a cache, and where new rows go in them.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};

/// Rows to a multiple of which a growing tensor is extended.
const BLOCK: usize = 256;

/// The dimension that grows.
const ROWS: usize = 2;

/// Where rows go in a cache: each entry of a batch of new rows into a piece, a batch entry or a page, from a row of
/// that piece on. `[piece, first row]`.
pub type Place = [usize; 2];

/// Refuses places that are not one for each of `entries` new entries of `rows` rows, that are beyond the pieces or
/// leave rows before them unwritten, and pieces that are named twice. `lengths` are the rows of every piece.
pub(crate) fn check_places(at: &[Place], entries: usize, rows: usize, lengths: &[usize]) -> Result<()> {
    if at.len() != entries {
        return Err(Error::Invalid(format!("{} places for {entries} entries of new rows", at.len())));
    }
    let mut seen = vec![false; lengths.len()];
    for &[piece, first] in at {
        let Some(length) = lengths.get(piece) else {
            return Err(Error::Invalid(format!("piece {piece} of a cache of {}", lengths.len())));
        };
        if first > *length {
            return Err(Error::Invalid(format!(
                "rows {first}..{} of piece {piece}, which has {length} rows so far",
                first + rows
            )));
        }
        if std::mem::replace(&mut seen[piece], true) {
            return Err(Error::Invalid(format!("piece {piece} is written to twice at once")));
        }
    }
    Ok(())
}

/// The places behind the last row of every piece.
pub(crate) fn ends(lengths: &[usize]) -> Vec<Place> {
    lengths.iter().copied().enumerate().map(|(piece, length)| [piece, length]).collect()
}

/// Copies `rows [R, H, m, ..]` to their places in `to [pieces, H, room, ..]`, which is contiguous.
pub(crate) fn write_rows(to: &Tensor, rows: &Tensor, at: &[Place]) -> Result<()> {
    let rows = rows.detach().contiguous()?;
    let first = at.first().map_or(0, |place| place[1]);
    if at.len() == to.dim(0)? && at.iter().enumerate().all(|(r, place)| *place == [r, first]) {
        return Ok(to.slice_set(&rows, ROWS, first)?);
    }
    for (r, &[piece, first]) in at.iter().enumerate() {
        to.narrow(0, piece, 1)?.slice_set(&rows.narrow(0, r, 1)?, ROWS, first)?;
    }
    Ok(())
}

/// A tensor `[pieces, H, rows, ..]` that grows in its rows without copying what it holds at every step; each piece
/// has a number of rows of its own. What stands behind the last row of a shorter piece is for nobody to see.
///
/// Clones share their memory until one of them is written to.
#[derive(Debug, Clone)]
pub struct Growing {
    buffer: Arc<Tensor>,
    lengths: Vec<usize>,
}

impl Growing {
    /// Nothing yet, in memory of `dims`, which has room for `dims[2]` rows of every piece.
    ///
    /// # Errors
    /// Fewer than three dimensions, or what the device reports.
    pub fn new(dims: &[usize], dtype: DType, device: &Device) -> Result<Self> {
        if dims.len() <= ROWS {
            return Err(Error::Invalid(format!(
                "{dims:?} has no rows to grow in: [pieces, heads, rows, ..]"
            )));
        }
        let buffer = Arc::new(Tensor::zeros(dims, dtype, device)?);
        Ok(Self { buffer, lengths: vec![0; dims[0]] })
    }

    /// The rows of every piece.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Rows of the longest piece.
    pub fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0)
    }

    /// Rows of a piece for which there is memory.
    pub fn room(&self) -> usize {
        self.buffer.dims()[ROWS]
    }

    /// All of the memory: `[pieces, H, room, ..]`.
    pub fn buffer(&self) -> &Tensor {
        &self.buffer
    }

    /// The rows of all pieces, as many as the longest has; a view.
    ///
    /// # Errors
    /// What candle reports.
    pub fn get(&self) -> Result<Tensor> {
        Ok(self.buffer.narrow(ROWS, 0, self.longest())?)
    }

    /// Counts `rows` rows at these places, which [`check_places`] has let through, as written, and gives them memory
    /// that nobody shares.
    ///
    /// # Errors
    /// What the device reports.
    pub(crate) fn claim(&mut self, at: &[Place], rows: usize) -> Result<()> {
        let needed = at.iter().map(|[_, first]| first + rows).max().unwrap_or(0);
        let room = match self.room() {
            room if needed > room => needed.max(2 * room).next_multiple_of(BLOCK),
            room => room,
        };
        if room != self.room() || Arc::get_mut(&mut self.buffer).is_none() {
            self.buffer = Arc::new(self.copied(room)?);
        }
        for &[piece, first] in at {
            self.lengths[piece] = self.lengths[piece].max(first + rows);
        }
        Ok(())
    }

    /// The rows held, in new memory for `room`.
    fn copied(&self, room: usize) -> Result<Tensor> {
        let mut dims = self.buffer.dims().to_vec();
        dims[ROWS] = room;
        let new = Tensor::zeros(dims, self.buffer.dtype(), self.buffer.device())?;
        if self.longest() > 0 {
            new.slice_set(&self.get()?.contiguous()?, ROWS, 0)?;
        }
        Ok(new)
    }

    /// Writes `rows [R, H, m, ..]` to their places, over what stood there or behind it.
    ///
    /// # Errors
    /// Rows of another shape, dtype or device, or places that do not fit the pieces.
    pub fn write(&mut self, rows: &Tensor, at: &[Place]) -> Result<()> {
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
        check_places(at, dims[0], dims[ROWS], &self.lengths)?;
        self.claim(at, dims[ROWS])?;
        write_rows(&self.buffer, rows, at)
    }

    /// Appends `rows [pieces, H, m, ..]`, to each piece behind its own last row.
    ///
    /// # Errors
    /// Rows of another shape, dtype or device.
    pub fn append(&mut self, rows: &Tensor) -> Result<()> {
        self.write(rows, &ends(&self.lengths))
    }

    /// What lies behind the first `from[b]` rows of every piece: tensors `[R, H, m, ..]` and the places that their
    /// rows have here, in as few parts as there are different numbers of rows.
    ///
    /// # Errors
    /// What candle reports.
    pub fn since(&self, from: &[usize]) -> Result<Vec<(Tensor, Vec<Place>)>> {
        let mut groups: BTreeMap<usize, Vec<Place>> = BTreeMap::new();
        for (piece, (&length, &from)) in self.lengths.iter().zip(from).enumerate() {
            if length > from {
                groups.entry(length - from).or_default().push([piece, from]);
            }
        }
        let part = |(rows, at): (usize, Vec<Place>)| -> Result<_> {
            let first = at[0][1];
            if at.len() == self.lengths.len() && at.iter().all(|place| place[1] == first) {
                return Ok((self.buffer.narrow(ROWS, first, rows)?, at));
            }
            let each =
                at.iter().map(|&[piece, first]| self.buffer.narrow(0, piece, 1)?.narrow(ROWS, first, rows));
            Ok((Tensor::cat(&each.collect::<candle_core::Result<Vec<_>>>()?, 0)?, at))
        };
        groups.into_iter().map(part).collect()
    }

    /// Some of the pieces, in any order.
    ///
    /// # Errors
    /// A piece that is not there.
    pub fn select(&self, pieces: &[usize]) -> Result<Self> {
        let lengths = selected(&self.lengths, pieces)?;
        let places: Vec<u32> = pieces.iter().map(|&piece| piece as u32).collect();
        let places = Tensor::new(places, self.buffer.device())?;
        Ok(Self { buffer: Arc::new(self.buffer.index_select(&places, 0)?), lengths })
    }

    /// The pieces of several, in their order.
    ///
    /// # Errors
    /// None to stack, or others than rows of one shape, dtype and device.
    pub fn stack(all: &[&Self]) -> Result<Self> {
        let Some(first) = all.first() else { return Err(Error::Invalid("no caches to stack".into())) };
        let lengths: Vec<usize> = all.iter().flat_map(|one| one.lengths.iter().copied()).collect();
        let longest = all.iter().map(|one| one.longest()).max().unwrap_or(0);
        let mut dims = first.buffer.dims().to_vec();
        (dims[0], dims[ROWS]) = (lengths.len(), longest.next_multiple_of(BLOCK));
        let stacked = Tensor::zeros(dims, first.buffer.dtype(), first.buffer.device())?;
        let mut piece = 0;
        for one in all {
            let pieces = one.lengths.len();
            if one.longest() > 0 {
                stacked.narrow(0, piece, pieces)?.slice_set(&one.get()?.contiguous()?, ROWS, 0)?;
            }
            piece += pieces;
        }
        Ok(Self { buffer: Arc::new(stacked), lengths })
    }
}

/// The entries of `of` in these places; refuses one that is not there.
pub(crate) fn selected<T: Clone>(of: &[T], places: &[usize]) -> Result<Vec<T>> {
    let each = places.iter().map(|&place| {
        let found = of.get(place).cloned();
        found.ok_or_else(|| Error::Invalid(format!("sequence {place} of a cache of {}", of.len())))
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[pieces, 2, rows, 3]`, every number another one.
    fn rows(pieces: usize, rows: usize, from: f32) -> Tensor {
        let count = pieces * 2 * rows * 3;
        let values: Vec<f32> = (0..count).map(|i| from + i as f32).collect();
        Tensor::from_vec(values, (pieces, 2, rows, 3), &Device::Cpu).unwrap()
    }

    fn values(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn pieces_grow_on_their_own_and_clones_stay_as_they_were() {
        let mut all = Growing::new(&[2, 2, 4, 3], DType::F32, &Device::Cpu).unwrap();
        all.append(&rows(2, 3, 0.0)).unwrap();
        all.write(&rows(1, 2, 1000.0), &[[1, 3]]).unwrap();
        assert_eq!((all.lengths(), all.longest()), (&[3, 5][..], 5));
        let (before, mut other) = (values(&all.get().unwrap()), all.clone());
        // Both grow within the memory that they shared, and neither sees what the other wrote.
        all.append(&rows(2, 1, 2000.0)).unwrap();
        other.append(&rows(2, 1, 3000.0)).unwrap();
        let at = |cache: &Growing, piece: usize, row: usize| {
            values(&cache.buffer().narrow(0, piece, 1).unwrap().narrow(ROWS, row, 1).unwrap())[0]
        };
        assert_eq!([at(&all, 0, 3), at(&all, 1, 5)], [2000.0, 2006.0]);
        assert_eq!([at(&other, 0, 3), at(&other, 1, 5)], [3000.0, 3006.0]);
        let first = all.buffer().narrow(ROWS, 0, 3).unwrap();
        let old = Tensor::from_vec(before, (2, 2, 5, 3), &Device::Cpu).unwrap().narrow(ROWS, 0, 3).unwrap();
        assert_eq!(values(&first), values(&old));
        // Growth far beyond the memory keeps what is there.
        all.append(&rows(2, 700, 9e4)).unwrap();
        assert!(all.room() >= 706 && all.room().is_multiple_of(BLOCK));
        assert_eq!([at(&all, 0, 3), at(&all, 1, 5), at(&all, 0, 4)], [2000.0, 2006.0, 9e4]);
    }

    #[test]
    fn what_came_since_is_grouped_by_its_number_of_rows() {
        let mut all = Growing::new(&[3, 2, 4, 3], DType::F32, &Device::Cpu).unwrap();
        all.append(&rows(3, 3, 0.0)).unwrap();
        let parts = all.since(&[1, 1, 1]).unwrap();
        assert_eq!((parts.len(), parts[0].1.as_slice()), (1, &[[0, 1], [1, 1], [2, 1]][..]));
        assert_eq!(values(&parts[0].0), values(&rows(3, 3, 0.0).narrow(ROWS, 1, 2).unwrap()));
        let parts = all.since(&[2, 3, 0]).unwrap();
        let places: Vec<_> = parts.iter().map(|(part, at)| (part.dims()[ROWS], at.clone())).collect();
        assert_eq!(places, [(1, vec![[0, 2]]), (3, vec![[2, 0]])]);
        assert_eq!(values(&parts[1].0), values(&rows(3, 3, 0.0).narrow(0, 2, 1).unwrap()));
    }

    #[test]
    fn places_that_do_not_fit_are_refused() {
        let mut all = Growing::new(&[2, 2, 4, 3], DType::F32, &Device::Cpu).unwrap();
        all.append(&rows(2, 3, 0.0)).unwrap();
        let mut refused = |rows: &Tensor, at: &[Place], value: &str| {
            let e = all.write(rows, at).unwrap_err().to_string();
            assert!(e.contains(value), "{e} does not name {value}");
        };
        refused(&rows(1, 1, 0.0), &[[2, 0]], "piece 2 of a cache of 2");
        refused(&rows(1, 2, 0.0), &[[1, 4]], "rows 4..6 of piece 1, which has 3 rows");
        refused(&rows(2, 1, 0.0), &[[1, 3]], "1 places for 2 entries");
        refused(&rows(2, 1, 0.0), &[[1, 3], [1, 2]], "piece 1 is written to twice");
        refused(&rows(1, 1, 0.0).narrow(3, 0, 2).unwrap(), &[[0, 0]], "[1, 2, 1, 2]");
        refused(&rows(1, 1, 0.0).to_dtype(DType::F16).unwrap(), &[[0, 0]], "F16");
        assert!(all.select(&[0, 2]).unwrap_err().to_string().contains("sequence 2 of a cache of 2"));
        assert_eq!(all.lengths(), [3, 3]);
    }
}
