//! The hashes that bind records to each other and to their header.
//!
//! With H = BLAKE3 and `|` for concatenation: a leaf is `H(0 | record)`; the chain starts as `H(1 | header)` and
//! goes on as `H(2 | chain | leaf)`; two nodes of the Merkle tree make `H(3 | left | right)`, and a node without a
//! partner moves up as it is; the head is `H(4 | chain | root | count as u64)`. The first byte keeps one kind of
//! hash from passing for another.

/// 32 bytes.
pub type Hash = [u8; 32];

fn hash(kind: u8, parts: &[&[u8]]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[kind]);
    parts.iter().for_each(|part| {
        hasher.update(part);
    });
    *hasher.finalize().as_bytes()
}

/// The hashes of a growing trace.
#[derive(Debug, Clone)]
pub struct Chain {
    chain: Hash,
    count: u64,
    /// Roots of whole subtrees, each of half as many leaves as the one before or fewer: the binary digits of
    /// the count.
    peaks: Vec<(u32, Hash)>,
}

/// The hashes of a whole trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// Records.
    pub count: u64,
    /// The last link of the chain.
    pub chain: Hash,
    /// The root of the Merkle tree over the records; zeros without a record.
    pub root: Hash,
    /// What stands for all of it: what is kept, printed or signed.
    pub head: Hash,
}

impl Chain {
    /// A trace without a record.
    pub fn new(header: &[u8]) -> Self {
        Self { chain: hash(1, &[header]), count: 0, peaks: Vec::new() }
    }

    /// Takes the bytes of the next record.
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

    /// The hashes of all that was taken.
    pub fn seal(&self) -> Seal {
        let peaks = self.peaks.iter().rev().map(|(_, node)| *node);
        let root = peaks.reduce(|right, left| hash(3, &[&left, &right])).unwrap_or_default();
        let head = hash(4, &[&self.chain, &root, &self.count.to_le_bytes()]);
        Seal { count: self.count, chain: self.chain, root, head }
    }
}

/// Hexadecimal digits.
pub fn hex(hash: &Hash) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree level by level, a node without a partner moving up.
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
    fn the_growing_tree_is_the_whole_tree() {
        let leaves: Vec<Vec<u8>> = (0..20u8).map(|i| vec![i; usize::from(i)]).collect();
        let leaves: Vec<&[u8]> = leaves.iter().map(Vec::as_slice).collect();
        for n in 0..=leaves.len() {
            let mut chain = Chain::new(b"header");
            leaves[..n].iter().for_each(|leaf| chain.push(leaf));
            assert_eq!(chain.seal().root, root(&leaves[..n]), "{n} leaves");
        }
    }

    #[test]
    fn every_part_moves_the_head() {
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
