//! The inverse of the candidates: for every key the queries that hold it, so that key gradients are summed in a fixed
//! order and no two threads write one row.

/// For every key of one key-value head, the flat slots (query row * K + slot) that hold it, in ascending order.
pub(super) struct InverseIndex {
    start: Vec<u32>,
    entry: Vec<u32>,
}

impl InverseIndex {
    /// Inverts `index`: the concatenated rows of K slots of the query heads that read the head.
    pub(super) fn new(index: &[i32], keys: usize) -> Self {
        let mut start = vec![0u32; keys + 1];
        for &j in index.iter().filter(|&&j| j >= 0) {
            start[j as usize + 1] += 1;
        }
        for j in 0..keys {
            start[j + 1] += start[j];
        }
        let mut next = start.clone();
        let mut entry = vec![0u32; start[keys] as usize];
        for (at, &j) in index.iter().enumerate().filter(|(_, j)| **j >= 0) {
            entry[next[j as usize] as usize] = at as u32;
            next[j as usize] += 1;
        }
        Self { start, entry }
    }

    /// The flat slots (row * K + slot) that hold key `j`.
    pub(super) fn readers(&self, j: usize) -> impl Iterator<Item = usize> + '_ {
        self.entry[self.start[j] as usize..self.start[j + 1] as usize].iter().map(|&e| e as usize)
    }
}
