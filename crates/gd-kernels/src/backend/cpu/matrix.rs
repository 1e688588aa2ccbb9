//! Products of small matrices in slices, on the calling thread, by register tiles.
//!
//! The rows of the right factor and of the result are padded to a multiple of [`PAD`] elements, so that they consist of
//! whole registers.

use pulp::{Simd, WithSimd};

use crate::backend::cpu::element::Real;

/// The rows of padded matrices have a multiple of this number of elements, that of the widest registers.
pub(crate) const PAD: usize = 16;

/// Rows of a register tile.
const TILE_ROWS: usize = 6;

/// `len` rounded up to a multiple of [`PAD`].
pub(crate) const fn padded(len: usize) -> usize {
    len.next_multiple_of(PAD)
}

/// The left factor of a product: `rows` by `columns` elements, row by row or column by column.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    /// Distance between the starts of two rows, or of two columns if it is transposed.
    stride: usize,
    /// The elements of a column that can be read, if it is transposed.
    transposed: Option<usize>,
}

impl<'a, T> Left<'a, T> {
    /// The matrix whose row `r` starts at `r * stride`.
    ///
    /// # Panics
    /// If the slice is too short.
    pub(crate) fn new(data: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(columns <= stride && (rows == 0 || (rows - 1) * stride + columns <= data.len()));
        Self { data, rows, columns, stride, transposed: None }
    }

    /// The transpose of the matrix whose row `r` starts at `r * stride`. At least six elements of each row can be read,
    /// also if the matrix has fewer columns.
    ///
    /// # Panics
    /// If the slice is too short.
    pub(crate) fn transposed(data: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        let width = columns.max(TILE_ROWS);
        assert!(width <= stride && (rows == 0 || (rows - 1) * stride + width <= data.len()));
        Self { data, rows: columns, columns: rows, stride, transposed: Some(width) }
    }
}

/// A right factor or a result: rows of padded length at a distance of `stride` elements.
pub(crate) struct Padded<S> {
    pub(crate) data: S,
    pub(crate) stride: usize,
}

/// Writes `scale a b` to the first `padded(columns)` elements of the rows of `out`, or adds it to them if `add` is set. `b`
/// has a row for each column of `a`.
///
/// # Panics
/// If a slice is too short.
pub(crate) fn multiply<T: Real>(
    out: Padded<&mut [T]>,
    columns: usize,
    add: bool,
    scale: T,
    a: Left<'_, T>,
    b: Padded<&[T]>,
) {
    pulp::Arch::new().dispatch(Product { out, columns: padded(columns), add, scale, a, b });
}

struct Product<'a, T> {
    out: Padded<&'a mut [T]>,
    columns: usize,
    add: bool,
    scale: T,
    a: Left<'a, T>,
    b: Padded<&'a [T]>,
}

impl<T: Real> WithSimd for Product<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let lanes = size_of::<T::Lanes<S>>() / size_of::<T>();
        let mut from = 0;
        while from < self.columns {
            let left = (self.columns - from) / lanes;
            // As many accumulators as there are registers beside those of the factors.
            let registers = if left >= 4 && S::REGISTER_COUNT >= 32 {
                self.panel::<S, 4>(simd, from);
                4
            } else if left >= 2 {
                self.panel::<S, 2>(simd, from);
                2
            } else {
                self.panel::<S, 1>(simd, from);
                1
            };
            from += registers * lanes;
        }
    }
}

impl<T: Real> Product<'_, T> {
    /// The columns of the result from `from` on that fill `N` registers.
    #[inline(always)]
    fn panel<S: Simd, const N: usize>(&mut self, simd: S, from: usize) {
        let Left { data, rows, columns, stride, transposed } = self.a;
        let mut row = 0;
        while row < rows {
            let count = TILE_ROWS.min(rows - row);
            // The last tile overlaps the one before where it would leave the matrix.
            let start = transposed.map_or(row, |width| row.min(width - TILE_ROWS));
            let mut sums = [[T::zero().splat(simd); N]; TILE_ROWS];
            if transposed.is_some() {
                for p in 0..columns {
                    let column = &data[p * stride + start..][..TILE_ROWS];
                    self.add_products(simd, from, p, column, &mut sums);
                }
            } else {
                // Rows beyond the last one repeat it.
                let tile: [&[T]; TILE_ROWS] =
                    std::array::from_fn(|i| &data[(row + i.min(count - 1)) * stride..][..columns]);
                #[allow(clippy::needless_range_loop, reason = "p is a column of several rows")]
                for p in 0..columns {
                    let mut column = [T::zero(); TILE_ROWS];
                    for i in 0..TILE_ROWS {
                        column[i] = tile[i][p];
                    }
                    self.add_products(simd, from, p, &column, &mut sums);
                }
            }
            // Without an index that is computed, so that the sums are in registers during the loops above.
            for (i, sums) in sums.into_iter().enumerate() {
                if (row..rows).contains(&(start + i)) {
                    self.store::<S, N>(simd, (start + i) * self.out.stride + from, sums);
                }
            }
            row += TILE_ROWS;
        }
    }

    /// Adds the products of column `p` of the rows of a tile and row `p` of the right factor.
    #[inline(always)]
    fn add_products<S: Simd, const N: usize>(
        &self,
        simd: S,
        from: usize,
        p: usize,
        column: &[T],
        sums: &mut [[T::Lanes<S>; N]; TILE_ROWS],
    ) {
        let lanes = size_of::<T::Lanes<S>>() / size_of::<T>();
        let row = T::lanes::<S>(&self.b.data[p * self.b.stride + from..][..N * lanes]);
        let Some(&right) = row.first_chunk::<N>() else { unreachable!("N registers") };
        for i in 0..TILE_ROWS {
            let x = column[i].splat(simd);
            for j in 0..N {
                sums[i][j] = T::fused(simd, x, right[j], sums[i][j]);
            }
        }
    }

    /// Writes or adds the scaled sums to the result, from element `at` on.
    #[inline(always)]
    fn store<S: Simd, const N: usize>(&mut self, simd: S, at: usize, sums: [T::Lanes<S>; N]) {
        let lanes = size_of::<T::Lanes<S>>() / size_of::<T>();
        let scale = self.scale.splat(simd);
        let out = T::lanes_mut::<S>(&mut self.out.data[at..at + N * lanes]);
        for (out, sum) in out.iter_mut().zip(sums) {
            let before = if self.add { *out } else { T::zero().splat(simd) };
            *out = T::fused(simd, scale, sum, before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_match_their_definition() {
        let value = |i: usize| ((i * 37 % 101) as f64 - 50.0) / 16.0;
        let a: Vec<f64> = (0..4000).map(value).collect();
        let b: Vec<f64> = (0..4000).map(|i| value(i + 7)).collect();
        for (m, n, k) in
            [(1, 1, 1), (1, 9, 5), (7, 16, 3), (5, 40, 11), (13, 64, 4), (3, 70, 20), (6, 96, 7), (2, 4, 0)]
        {
            let (a_stride, b_stride, out_stride) = (k.max(m).max(6) + 2, padded(n) + 16, padded(n) + 3);
            for transposed in [false, true] {
                let left = match transposed {
                    false => Left::new(&a, m, k, a_stride),
                    true => Left::transposed(&a, k, m, a_stride),
                };
                let at =
                    |i: usize, p: usize| if transposed { a[p * a_stride + i] } else { a[i * a_stride + p] };
                for add in [false, true] {
                    let mut out = vec![1.5; m * out_stride];
                    let (data, right) = (&mut out[..], Padded { data: &b[..], stride: b_stride });
                    multiply(Padded { data, stride: out_stride }, n, add, 2.0, left, right);
                    for (i, &got) in out.iter().enumerate() {
                        let (r, c) = (i / out_stride, i % out_stride);
                        let product: f64 = (0..k).map(|p| at(r, p) * b[p * b_stride + c]).sum();
                        let expected = match (c < padded(n), add) {
                            (false, _) => 1.5,
                            (true, false) => 2.0 * product,
                            (true, true) => 1.5 + 2.0 * product,
                        };
                        assert!((got - expected).abs() < 1e-11, "{m} {n} {k}, {r} {c}: {got} {expected}");
                    }
                }
            }
        }
    }
}
