//! A key-value cache in pages, as serving programs store it: a block table names the pages of every sequence.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use crate::backend::check::dims4;
use crate::cache::key_bias::KEY_PADDING;
use crate::cache::key_cache::KeyCache;
use crate::cache::position::{WritePosition, write_rows};
use crate::cache::sequence_cache::SequenceCache;
use crate::error::{Error, Result};

/// A key-value cache in pages, for [`decode_paged`](crate::decode_paged).
#[derive(Debug, Clone, Copy)]
pub struct PagedCache<'a> {
    /// Keys `[pages, Hk, page, D]`; a page holds a multiple of 64 keys.
    pub k: &'a Tensor,
    /// Values `[pages, Hk, page, Dv]`, of the dtype of the keys.
    pub v: &'a Tensor,
    /// The block table `[B, pages per sequence]`, u32, i32 or i64: key j of sequence b is row `j % page` of page
    /// `table[b, j / page]`. Entries behind the last key of a sequence are not read.
    pub table: &'a Tensor,
}

/// The rows of one [`PagedCache::write`] that go to the same rows of different pages.
#[derive(Default)]
struct PageRows {
    sequences: Vec<u32>,
    at: Vec<WritePosition>,
}

impl PagedCache<'_> {
    /// Keys per sequence that the table has entries for, and keys per page; checks the shapes of the cache.
    pub(crate) fn sizes(&self) -> Result<[usize; 2]> {
        let (pages, heads, page, _) = dims4("k", self.k)?;
        let (v_pages, v_heads, v_page, _) = dims4("v", self.v)?;
        if [v_pages, v_heads, v_page] != [pages, heads, page] || self.v.dtype() != self.k.dtype() {
            return Err(Error::Invalid(format!(
                "pages of values {:?} {:?} for pages of keys {:?} {:?}",
                self.v.dims(),
                self.v.dtype(),
                self.k.dims(),
                self.k.dtype()
            )));
        }
        if !page.is_multiple_of(KEY_PADDING) {
            return Err(Error::Invalid(format!(
                "pages of {page} keys; multiples of {KEY_PADDING} are supported"
            )));
        }
        if !matches!(self.table.dtype(), DType::U32 | DType::I32 | DType::I64) {
            return Err(Error::Invalid(format!(
                "a block table of {:?}; u32, i32 and i64 are supported",
                self.table.dtype()
            )));
        }
        match *self.table.dims() {
            [b, row] if b * row > 0 => Ok([row * page, page]),
            _ => Err(Error::Invalid(format!("block table {:?} is not [batch, pages]", self.table.dims()))),
        }
    }

    /// Writes the keys k `[B, Hk, m, D]` and values v `[B, Hk, m, Dv]` of new positions into the pages that the table
    /// names for them: row i of sequence b becomes its position `first[b] + i`. A [`KeyCache`] of the pages is updated
    /// with the same keys.
    ///
    /// The pages are contiguous tensors and are changed in place, for everyone who shares their memory, as
    /// [`Tensor::slice_set`] does. On a GPU this waits for the values of the table.
    ///
    /// # Errors
    /// Rows of another shape, dtype or device; positions for which the table has no entry, or names a page that does
    /// not exist; a page that would be written for two sequences; a `KeyCache` of other pages.
    pub fn write(
        &self,
        k: &Tensor,
        v: &Tensor,
        first: &[usize],
        mut key_cache: Option<&mut KeyCache>,
    ) -> Result<()> {
        let [_, page] = self.sizes()?;
        let more = dims4("k", k)?.2;
        self.check_rows(k, v, more)?;
        if let Some(key_cache) = key_cache.as_deref() {
            self.check_key_cache(key_cache, page)?;
        }
        let groups = self.page_rows(first, more)?;
        for ([at, count], PageRows { sequences, at: positions }) in groups {
            let whole = sequences.len() == first.len();
            let sequences = Tensor::new(sequences, k.device())?;
            let rows = |t: &Tensor| -> Result<Tensor> {
                let t = t.detach().narrow(2, at, count)?;
                Ok(if whole { t } else { t.contiguous()?.index_select(&sequences, 0)? })
            };
            let k = rows(k)?;
            write_rows(self.k, &k, &positions)?;
            write_rows(self.v, &rows(v)?, &positions)?;
            if let Some(key_cache) = key_cache.as_deref_mut() {
                key_cache.write(&k, &positions)?;
            }
        }
        Ok(())
    }

    /// Checks new keys and values against the pages.
    fn check_rows(&self, k: &Tensor, v: &Tensor, more: usize) -> Result<()> {
        let batch = self.table.dim(0)?;
        for (name, rows, pages) in [("keys", k, self.k), ("values", v, self.v)] {
            let (_, heads, _, dim) = dims4(name, pages)?;
            let fits = rows.dims() == [batch, heads, more, dim] && rows.dtype() == pages.dtype();
            if !fits || !rows.device().same_device(pages.device()) || !pages.is_contiguous() {
                return Err(Error::Invalid(format!(
                    "new {name} {:?} {:?} for pages {:?} {:?}, which must be contiguous, and a table of {batch} \
                     sequences",
                    rows.dims(),
                    rows.dtype(),
                    pages.dims(),
                    pages.dtype()
                )));
            }
        }
        Ok(())
    }

    /// Checks that a key cache covers the pages.
    fn check_key_cache(&self, key_cache: &KeyCache, page: usize) -> Result<()> {
        let (pages, lengths) = (self.k.dim(0)?, key_cache.lengths());
        if lengths.len() != pages || lengths.iter().any(|length| *length != page) {
            return Err(Error::Invalid(format!(
                "a key cache of {} sequences of {} keys; the cache has {pages} pages of {page}",
                lengths.len(),
                key_cache.longest()
            )));
        }
        Ok(())
    }

    /// Splits `more` new rows per sequence, from position `first[b]` on, by pages: for every range `[first row, rows]`
    /// of the new rows, the sequences and the write positions in the pages.
    fn page_rows(&self, first: &[usize], more: usize) -> Result<BTreeMap<[usize; 2], PageRows>> {
        let [table_keys, page] = self.sizes()?;
        let lengths: Vec<usize> = first.iter().map(|first| first + more).collect();
        if lengths.len() != self.table.dim(0)? || lengths.iter().any(|length| *length > table_keys) {
            return Err(Error::Invalid(format!(
                "{more} new positions of {} sequences from {first:?} on, in a block table {:?} of pages of {page} keys",
                self.table.dim(0)?,
                self.table.dims()
            )));
        }
        let mut groups: BTreeMap<[usize; 2], PageRows> = BTreeMap::new();
        let mut owners: BTreeMap<usize, usize> = BTreeMap::new();
        for (b, row) in self.host_table(&lengths, page)?.iter().enumerate() {
            let mut at = 0;
            while at < more {
                let (position, id) = (first[b] + at, row[(first[b] + at) / page] as usize);
                let count = (page - position % page).min(more - at);
                if let Some(other) = owners.insert(id, b) {
                    return Err(Error::Invalid(format!(
                        "page {id} would take new positions of sequence {other} and again of sequence {b}"
                    )));
                }
                let group = groups.entry([at, count]).or_default();
                group.sequences.push(b as u32);
                group.at.push([id, position % page]);
                at += count;
            }
        }
        Ok(groups)
    }

    /// The table on the host, with page 0 in entries behind the last key of a sequence; refuses pages that do not exist.
    pub(crate) fn host_table(&self, lengths: &[usize], page: usize) -> Result<Vec<Vec<u32>>> {
        let pages = self.k.dim(0)?;
        let mut table = self.table.to_device(&Device::Cpu)?.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        for (b, row) in table.iter_mut().enumerate() {
            let used = lengths[if lengths.len() == 1 { 0 } else { b }].div_ceil(page);
            for (at, id) in row.iter_mut().enumerate() {
                if at >= used {
                    *id = 0;
                } else if !(0..pages as i64).contains(id) {
                    return Err(Error::Invalid(format!(
                        "page {at} of sequence {b} is {id} in the block table; the cache has {pages} pages"
                    )));
                }
            }
        }
        Ok(table.into_iter().map(|row| row.into_iter().map(|id| id as u32).collect()).collect())
    }
}

/// Copies the pages t `[pages, Hk, page, D]` of a table together: `[B, Hk, pages per sequence * page, D]`.
pub(crate) fn gather_pages(t: &Tensor, table: &[Vec<u32>]) -> Result<Tensor> {
    let (_, heads, page, dim) = t.dims4()?;
    let (batch, row) = (table.len(), table[0].len());
    let table = Tensor::from_vec(table.concat(), batch * row, t.device())?;
    let pages = t.detach().contiguous()?.index_select(&table, 0)?;
    let pages = pages.reshape((batch, row, heads, page, dim))?.transpose(1, 2)?;
    Ok(pages.reshape((batch, heads, row * page, dim))?)
}
