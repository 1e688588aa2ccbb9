//! The hash chain and the Merkle tree over the header and the records of a trace.
//!
//! H is BLAKE3 and `|` is concatenation. The leaf of a record is `H(0 | record)`. The chain starts as `H(1 | header)` and is
//! updated to `H(2 | chain | leaf)`. The parent of two nodes of the Merkle tree is `H(3 | left | right)`; a node without a
//! sibling moves up unchanged. The head is `H(4 | chain | root | count)` with the count as little-endian u64. The first byte
//! separates the domains of the five kinds of hashes.

/// A BLAKE3 hash.
pub type Hash = [u8; 32];

fn hash(kind: u8, parts: &[&[u8]]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[kind]);
    parts.iter().for_each(|part| {
        hasher.update(part);
    });
    *hasher.finalize().as_bytes()
}

/// The hashes of a trace to which records are appended.
#[derive(Debug, Clone)]
pub struct Chain {
    chain: Hash,
    count: u64,
    /// The level and root of the complete subtrees, from the largest to the smallest. Their sizes are the powers of two
    /// that sum to `count`.
    peaks: Vec<(u32, Hash)>,
}

/// The hashes of a complete trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// The number of records.
    pub count: u64,
    /// The last value of the hash chain.
    pub chain: Hash,
    /// The root of the Merkle tree over the records; zeros if there are no records.
    pub root: Hash,
    /// The hash of all of the above, which identifies the trace. It is printed and signed.
    pub head: Hash,
}

impl Chain {
    /// Starts the chain with the bytes of the header.
    pub fn new(header: &[u8]) -> Self {
        Self { chain: hash(1, &[header]), count: 0, peaks: Vec::new() }
    }

    /// Appends the bytes of a record.
    pub fn push(&mut self, record: &[u8]) {
        let leaf = hash(0, &[record]);
        self.chain = hash(2, &[&self.chain, &leaf]);
        self.count += 1;
        let mut node = (0, leaf);
        while let Some(&(level, left)) = self.peaks.last().filter(|(level, _)| *level == node.0) {
            self.peaks.pop();
            node = (level + 1, hash(3, &[&left, &node.1]));
        }
        self.peaks.push(node);
    }

    /// The hashes of the header and all records so far.
    pub fn seal(&self) -> Seal {
        let peaks = self.peaks.iter().rev().map(|(_, node)| *node);
        let root = peaks.reduce(|right, left| hash(3, &[&left, &right])).unwrap_or_default();
        let head = hash(4, &[&self.chain, &root, &self.count.to_le_bytes()]);
        Seal { count: self.count, chain: self.chain, root, head }
    }
}

/// The hash as 64 hexadecimal digits.
pub fn hex(hash: &Hash) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The root of the Merkle tree, computed level by level.
    fn root(leaves: &[&[u8]]) -> Hash {
        let mut level: Vec<Hash> = leaves.iter().map(|leaf| hash(0, &[leaf])).collect();
        while level.len() > 1 {
            level = level
                .chunks(2)
                .map(|pair| if let [l, r] = pair { hash(3, &[l, r]) } else { pair[0] })
                .collect();
        }
        level.first().copied().unwrap_or_default()
    }

    #[test]
    fn the_incremental_root_is_that_of_the_whole_tree() {
        let leaves: Vec<Vec<u8>> = (0..20u8).map(|i| vec![i; usize::from(i)]).collect();
        let leaves: Vec<&[u8]> = leaves.iter().map(Vec::as_slice).collect();
        for n in 0..=leaves.len() {
            let mut chain = Chain::new(b"header");
            leaves[..n].iter().for_each(|leaf| chain.push(leaf));
            assert_eq!(chain.seal().root, root(&leaves[..n]), "{n} leaves");
        }
    }

    #[test]
    fn the_head_depends_on_every_part() {
        let head = |header: &[u8], records: &[&[u8]]| {
            let mut chain = Chain::new(header);
            records.iter().for_each(|record| chain.push(record));
            chain.seal().head
        };
        let heads = [
            head(b"h", &[b"a", b"b"]),
            head(b"g", &[b"a", b"b"]),
            head(b"h", &[b"b", b"a"]),
            head(b"h", &[b"a", b"b", b"b"]),
            head(b"h", &[b"a"]),
            head(b"h", &[b"ab"]),
            head(b"h", &[]),
        ];
        let different: std::collections::BTreeSet<_> = heads.iter().collect();
        assert_eq!(different.len(), heads.len());
    }
}
