//! The hash chain and the Merkle tree over the header and the records of a trace.
//!
//! H is BLAKE3 and `|` is concatenation. The leaf of a record is `H(0 | record)`. The chain starts as `H(1 | header)` and is
//! updated to `H(2 | chain | leaf)`. The parent of two nodes of the Merkle tree is `H(3 | left | right)`; a node without a
//! sibling moves up unchanged. The head is `H(5 | H(6 | header) | chain | root | count | ending)` with the count as
//! little-endian u64 and the five bytes of the [`Ending`]. In version 1 of the format, which has no ending, it is
//! `H(4 | chain | root | count)`. The first byte separates the domains of the kinds of hashes.

use super::ending::Ending;

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
    /// The hash of the header alone.
    header: Hash,
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
        Self { header: hash(6, &[header]), chain: hash(1, &[header]), count: 0, peaks: Vec::new() }
    }

    /// Appends the bytes of a record.
    pub fn push(&mut self, record: &[u8]) {
        let leaf = leaf(record);
        self.chain = hash(2, &[&self.chain, &leaf]);
        self.count += 1;
        let mut node = (0, leaf);
        while let Some(&(level, left)) = self.peaks.last().filter(|(level, _)| *level == node.0) {
            self.peaks.pop();
            node = (level + 1, hash(3, &[&left, &node.1]));
        }
        self.peaks.push(node);
    }

    /// The hashes of the header, all records so far, and the reason why they end; without one, those of version 1 of the
    /// format.
    pub fn seal(&self, ending: Option<Ending>) -> Seal {
        let peaks = self.peaks.iter().rev().map(|(_, node)| *node);
        let root = peaks.reduce(|right, left| hash(3, &[&left, &right])).unwrap_or_default();
        let count = self.count.to_le_bytes();
        let head = match ending {
            Some(ending) => head(&self.header, &self.chain, &root, self.count, ending),
            None => hash(4, &[&self.chain, &root, &count]),
        };
        Seal { count: self.count, chain: self.chain, root, head }
    }
}

/// The head of a trace from its parts.
fn head(header: &Hash, chain: &Hash, root: &Hash, count: u64, ending: Ending) -> Hash {
    hash(5, &[header, chain, root, &count.to_le_bytes(), &ending.encode()])
}

/// The leaf of a record in the Merkle tree.
pub(super) fn leaf(record: &[u8]) -> Hash {
    hash(0, &[record])
}

/// The identifier of an Ed25519 public key, `H(7 | key)`.
pub(super) fn key_id(key: &Hash) -> Hash {
    hash(7, &[key])
}

/// The siblings of the nodes from the leaf `index` up to the root, lowest first. A node without a sibling has none.
pub(super) fn path(mut level: Vec<Hash>, mut index: usize) -> Vec<Hash> {
    let mut path = Vec::new();
    while level.len() > 1 {
        path.extend(level.get(index ^ 1));
        level = level
            .chunks(2)
            .map(|pair| if let [left, right] = pair { hash(3, &[left, right]) } else { pair[0] })
            .collect();
        index /= 2;
    }
    path
}

/// The root of a tree of `count` leaves that has `leaf` at `index` with this [`path`]; `None` if the path has another
/// length than in such a tree.
pub(super) fn root_of(leaf: Hash, index: u64, count: u64, path: &[Hash]) -> Option<Hash> {
    if index >= count {
        return None;
    }
    let (mut node, mut index, mut count, mut path) = (leaf, index, count, path.iter());
    while count > 1 {
        if index ^ 1 < count {
            let sibling = path.next()?;
            node = if index % 2 == 0 { hash(3, &[&node, sibling]) } else { hash(3, &[sibling, &node]) };
        }
        (index, count) = (index / 2, count.div_ceil(2));
    }
    path.next().is_none().then_some(node)
}

/// The head of a trace with these bytes of the header and these hashes.
pub(super) fn head_of(header: &[u8], chain: &Hash, root: &Hash, count: u64, ending: Ending) -> Hash {
    head(&hash(6, &[header]), chain, root, count, ending)
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
            assert_eq!(chain.seal(None).root, root(&leaves[..n]), "{n} leaves");
        }
    }

    #[test]
    fn the_path_of_every_leaf_leads_to_the_root_and_no_other_does() {
        for n in 1..=20u64 {
            let leaves: Vec<Hash> = (0..n as u8).map(|i| leaf(&[i])).collect();
            let mut chain = Chain::new(b"header");
            (0..n as u8).for_each(|i| chain.push(&[i]));
            let root = Some(chain.seal(None).root);
            for i in 0..n {
                let path = path(leaves.clone(), i as usize);
                let at = leaves[i as usize];
                assert_eq!(root_of(at, i, n, &path), root, "{i} of {n}");
                assert_ne!(root_of(leaf(b"other"), i, n, &path), root);
                for (index, count) in [(i + 1, n), (i, n + 1), (i ^ 1, n), (n, n)] {
                    let moved = root_of(at, index, count, &path) == root;
                    // The number of leaves is in the head; a path may fit trees of several sizes.
                    assert!(!moved || count != n, "{i} of {n} as {index} of {count}");
                }
                assert_eq!(root_of(at, i, n, &[path.as_slice(), &[at]].concat()), None);
                if let Some((_, shorter)) = path.split_last() {
                    assert_eq!(root_of(at, i, n, shorter), None);
                }
            }
        }
    }

    #[test]
    fn the_head_depends_on_every_part() {
        let ended = |header: &[u8], records: &[&[u8]], ending: Option<Ending>| {
            let mut chain = Chain::new(header);
            records.iter().for_each(|record| chain.push(record));
            chain.seal(ending).head
        };
        let head = |header: &[u8], records: &[&[u8]]| ended(header, records, Some(Ending::Read));
        let heads = [
            ended(b"h", &[b"a", b"b"], None),
            ended(b"h", &[b"a", b"b"], Some(Ending::MaxTokens)),
            ended(b"h", &[b"a", b"b"], Some(Ending::EndToken { token: 0 })),
            ended(b"h", &[b"a", b"b"], Some(Ending::EndToken { token: 1 })),
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
