//! A vector whose elements start at a cache line. Loading an AMX tile whose rows cross cache lines takes about five times
//! as long, and the allocator aligns to 16 bytes.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

/// The bytes of a cache line.
const LINE_BYTES: usize = 64;

#[derive(Debug, Clone, Copy, Zeroable, Pod)]
#[repr(C, align(64))]
struct Line([u8; LINE_BYTES]);

/// Elements of an integer or floating-point type, the first of which starts at a cache line.
#[derive(Debug, Clone)]
pub(crate) struct AlignedVec<T> {
    lines: Vec<Line>,
    len: usize,
    _elements: PhantomData<T>,
}

impl<T> Default for AlignedVec<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), len: 0, _elements: PhantomData }
    }
}

impl<T: Pod> AlignedVec<T> {
    /// `len` zeros.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "the tiles of AMX use it"))]
    pub(crate) fn zeros(len: usize) -> Self {
        let mut new = Self::default();
        new.set_len(len);
        new
    }

    /// Changes the length; new elements are `value`.
    pub(crate) fn resize(&mut self, len: usize, value: T) {
        let before = self.len;
        self.set_len(len);
        if let Some(new) = self.get_mut(before..) {
            new.fill(value);
        }
    }

    /// Appends a slice.
    pub(crate) fn extend_from_slice(&mut self, more: &[T]) {
        let before = self.len;
        self.set_len(before + more.len());
        self[before..].copy_from_slice(more);
    }

    fn set_len(&mut self, len: usize) {
        self.lines.resize((len * size_of::<T>()).div_ceil(LINE_BYTES), Line::zeroed());
        self.len = len;
    }
}

impl<T: Pod> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_its_elements_at_a_cache_line() {
        let mut v = AlignedVec::<u16>::zeros(3);
        v.copy_from_slice(&[1, 2, 3]);
        v.resize(5, 9);
        v.extend_from_slice(&[4; 100]);
        v.resize(103, 7);
        v.resize(104, 7);
        let expected = [&[1, 2, 3, 9, 9][..], &[4; 98], &[7]].concat();
        assert_eq!((&v[..], v.as_ptr().align_offset(LINE_BYTES)), (&expected[..], 0));
        assert!(AlignedVec::<f32>::default().is_empty());
    }
}
