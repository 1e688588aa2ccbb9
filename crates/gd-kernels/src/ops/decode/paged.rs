//! Decoding over a cache in pages, as serving programs keep it: a block table names the pages of every sequence.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};

use crate::backend::check::dims4;
#[cfg(feature = "gpu")]
use crate::backend::dispatch::{on_cpu, on_gpu};
use crate::cache::append_buffer::{WritePosition, write_rows};
use crate::cache::key_cache::KeyCache;
use crate::error::{Error, Result};
use crate::ops::decode::PAGE_STEP;
use crate::ops::scan::Scan;
use crate::ops::select::{Selected, scan_select};
use crate::options::Precision;

/// A key-value cache in pages.
#[derive(Debug, Clone, Copy)]
pub struct PagedCache<'a> {
    /// Keys `[pages, Hk, page, D]`; a page holds a multiple of 64 keys.
    pub k: &'a Tensor,
    /// Values `[pages, Hk, page, Dv]`.
    pub v: &'a Tensor,
    /// The block table `[B, most pages]`, u32, i32 or i64: key j of a sequence is row `j % page` of page
    /// `table[b, j / page]`. Entries behind a sequence's last key may be anything.
    pub table: &'a Tensor,
}

impl PagedCache<'_> {
    /// Keys for which the table has room, and those of a page.
    fn keys(&self) -> Result<[usize; 2]> {
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
        if !page.is_multiple_of(PAGE_STEP) {
            return Err(Error::Invalid(format!("pages of {page} keys; multiples of {PAGE_STEP} are")));
        }
        if !matches!(self.table.dtype(), DType::U32 | DType::I32 | DType::I64) {
            return Err(Error::Invalid(format!(
                "a block table of {:?}; u32, i32 and i64 are",
                self.table.dtype()
            )));
        }
        match *self.table.dims() {
            [b, row] if b * row > 0 => Ok([row * page, page]),
            _ => Err(Error::Invalid(format!("block table {:?} is not [batch, pages]", self.table.dims()))),
        }
    }

    /// Writes the keys k `[B, Hk, m, D]` and values v `[B, Hk, m, Dv]` of new positions into the pages that the
    /// table names for them, and into what is kept of the pages' keys, if anything is: row i of sequence b becomes its
    /// position `first[b] + i`. Nothing else is changed.
    ///
    /// The pages are contiguous tensors, and are changed in place for all who share their memory, as by
    /// [`Tensor::slice_set`]. On a GPU this waits for the table's values.
    ///
    /// # Errors
    /// Rows of another shape, dtype or device; positions for which the table has no room or names no page of the
    /// cache; a page that two of the positions' sequences share; what is kept of other keys.
    pub fn write(
        &self,
        k: &Tensor,
        v: &Tensor,
        first: &[usize],
        mut kept: Option<&mut KeyCache>,
    ) -> Result<()> {
        let [room, page] = self.keys()?;
        let (pages, more) = (self.k.dim(0)?, dims4("k", k)?.2);
        for (name, rows, held) in [("keys", k, self.k), ("values", v, self.v)] {
            let batch = self.table.dim(0)?;
            let (_, heads, _, dim) = dims4(name, held)?;
            let fits = rows.dims() == [batch, heads, more, dim] && rows.dtype() == held.dtype();
            if !fits || !rows.device().same_device(held.device()) || !held.is_contiguous() {
                return Err(Error::Invalid(format!(
                    "new {name} {:?} {:?} for pages {:?} {:?}, which must be contiguous, and a table of {batch} \
                     sequences",
                    rows.dims(),
                    rows.dtype(),
                    held.dims(),
                    held.dtype()
                )));
            }
        }
        if let Some(kept) = kept.as_deref()
            && (kept.lengths().len() != pages || kept.lengths().iter().any(|length| *length != page))
        {
            return Err(Error::Invalid(format!(
                "what is kept is of {} pieces of {} keys; the cache has {pages} pages of {page}",
                kept.lengths().len(),
                kept.lengths().iter().max().unwrap_or(&0)
            )));
        }
        let lengths: Vec<usize> = first.iter().map(|first| first + more).collect();
        if lengths.len() != self.table.dim(0)? || lengths.iter().any(|length| *length > room) {
            return Err(Error::Invalid(format!(
                "{more} new positions of {} sequences from {first:?} on, in a block table {:?} of pages of {page} keys",
                self.table.dim(0)?,
                self.table.dims()
            )));
        }
        // Rows from `at` on, so many, of these sequences, and their places.
        let mut parts: BTreeMap<[usize; 2], (Vec<u32>, Vec<WritePosition>)> = BTreeMap::new();
        let mut owners: BTreeMap<usize, usize> = BTreeMap::new();
        for (b, row) in self.table(&lengths, page)?.iter().enumerate() {
            let mut at = 0;
            while at < more {
                let (position, id) = (first[b] + at, row[(first[b] + at) / page] as usize);
                let count = (page - position % page).min(more - at);
                if let Some(other) = owners.insert(id, b) {
                    return Err(Error::Invalid(format!(
                        "page {id} would take new positions of sequence {other} and again of sequence {b}"
                    )));
                }
                let (sequences, places) = parts.entry([at, count]).or_default();
                sequences.push(b as u32);
                places.push([id, position % page]);
                at += count;
            }
        }
        for ([at, count], (sequences, places)) in parts {
            let whole = sequences.len() == lengths.len();
            let sequences = Tensor::new(sequences, k.device())?;
            let rows = |t: &Tensor| -> Result<Tensor> {
                let t = t.detach().narrow(2, at, count)?;
                Ok(if whole { t } else { t.contiguous()?.index_select(&sequences, 0)? })
            };
            let k = rows(k)?;
            write_rows(self.k, &k, &places)?;
            write_rows(self.v, &rows(v)?, &places)?;
            if let Some(kept) = kept.as_deref_mut() {
                kept.write(&k, &places)?;
            }
        }
        Ok(())
    }

    /// The table on the host, with page 0 where no key of a sequence lies; refuses pages that are not there.
    fn table(&self, lengths: &[usize], page: usize) -> Result<Vec<Vec<u32>>> {
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

/// [`scan_select`] over a cache in pages: q `[B, Hq, N, D]`; how many keys every sequence has is in the mask
/// ([`Mask::kv_len`](crate::Mask::kv_len)), and a prior is `[B|1, Hq|Hk, table row * page]`. The indices are positions in
/// the sequences. What is kept of the pages' keys ([`KeyCache`], filled by [`PagedCache::write`]) is read as that of a
/// cache in one piece.
///
/// On a GPU the pages are read where they lie, by up to 16 queries a sequence, and the table's values are looked
/// at in the checked mode alone, since that waits for the device: an id that names no page then reads another one. On
/// the CPU the pages are first copied together. Nothing that is kept means that the biases, or at certified precision
/// the 8-bit keys, are made anew for every call, of all pages on a GPU.
///
/// # Errors
/// As [`scan_select`]; pages that are no multiple of 64 keys, a table of another dtype or shape, or with pages that
/// the cache does not have; what is kept of other pages.
pub fn scan_select_paged(
    q: &Tensor,
    cache: &PagedCache,
    scan: &Scan,
    threshold: Option<&Tensor>,
) -> Result<Selected> {
    let (batch, q_heads, _, head_dim) = dims4("q", q)?;
    let [keys, page] = cache.keys()?;
    let (_, kv_heads, _, kd) = dims4("k", cache.k)?;
    if cache.table.dim(0)? != batch
        || kd != head_dim
        || q_heads % kv_heads != 0
        || q.dtype() != cache.k.dtype()
    {
        return Err(Error::Invalid(format!(
            "q {:?} {:?} for pages {:?} {:?} and a block table of {:?}",
            q.dims(),
            q.dtype(),
            cache.k.dims(),
            cache.k.dtype(),
            cache.table.dims()
        )));
    }
    for (name, t) in [("the pages", cache.k), ("the values", cache.v), ("the block table", cache.table)] {
        if !t.device().same_device(q.device()) {
            return Err(Error::Invalid(format!("q and {name} are on different devices")));
        }
    }
    scan.mask.validate(batch, keys)?;
    let whole = [keys];
    let lengths = scan.mask.lengths().unwrap_or(&whole);
    #[cfg(feature = "gpu")]
    if !on_cpu(q.device()) {
        use crate::ops::scan::gpu::tensors::scan_select_paged;
        if scan.checked {
            let k = gathered(cache.k, &cache.table(lengths, page)?)?;
            let (problem, _) = crate::ops::scan::planned(q, &k, &Scan { candidates: 1, ..scan.clone() })?;
            crate::ops::scan::check_values(&problem, q, &k, scan)?;
        }
        on_gpu!(q.device(), G => scan_select_paged::<G>(q, cache, [keys, page], scan, threshold));
    }
    let table = cache.table(lengths, page)?;
    let quantized = scan.quantized.filter(|_| scan.precision == Precision::Certified);
    let quantized = quantized.map(|kept| kept.of_pages(cache.k, scan.score, &table)).transpose()?;
    let scan = &Scan { quantized: quantized.as_ref(), ..scan.clone() };
    scan_select(q, &gathered(cache.k, &table)?, &gathered(cache.v, &table)?, scan, threshold)
}

/// The pages `[pages, Hk, page, D]` of a table together: `[B, Hk, row * page, D]`.
fn gathered(t: &Tensor, table: &[Vec<u32>]) -> Result<Tensor> {
    let (_, heads, page, dim) = t.dims4()?;
    let (batch, row) = (table.len(), table[0].len());
    let table = Tensor::from_vec(table.concat(), batch * row, t.device())?;
    let pages = t.detach().contiguous()?.index_select(&table, 0)?;
    let pages = pages.reshape((batch, row, heads, page, dim))?.transpose(1, 2)?;
    Ok(pages.reshape((batch, heads, row * page, dim))?)
}
