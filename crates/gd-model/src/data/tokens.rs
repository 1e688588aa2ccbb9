//! A stream of tokens with the ends of its documents, in memory or in memory-mapped shards.

use std::ops::Range;
use std::sync::Arc;

use super::shard::Shard;

/// The tokens of consecutive documents, stored in one or more parts that hold whole documents. Clones share the tokens.
#[derive(Clone, Debug)]
pub struct Tokens {
    parts: Arc<[Part]>,
    /// The position of the first token of every part, followed by the number of all tokens.
    starts: Arc<[usize]>,
    /// The ids of begin and end tokens, which are no text where they stand at the start or the end of a document.
    framing: Arc<[u32]>,
}

#[derive(Debug)]
enum Part {
    /// Ids, and the end of each document, counted from the start of the part.
    Memory {
        ids: Ids,
        ends: Vec<usize>,
        /// Which of the ids are to be learned; `None` for all.
        learned: Option<Vec<bool>>,
    },
    Mapped(Shard),
}

/// Ids in memory: of 16 bits as long as all of them are small, which is half of the memory.
#[derive(Debug)]
enum Ids {
    Small(Vec<u16>),
    Large(Vec<u32>),
}

impl Ids {
    fn len(&self) -> usize {
        match self {
            Self::Small(ids) => ids.len(),
            Self::Large(ids) => ids.len(),
        }
    }

    fn read(&self, range: Range<usize>, out: &mut Vec<u32>) {
        match self {
            Self::Small(ids) => out.extend(ids[range].iter().map(|&id| u32::from(id))),
            Self::Large(ids) => out.extend_from_slice(&ids[range]),
        }
    }

    fn extend(&mut self, more: &[u32]) {
        if let Self::Small(ids) = self {
            let before = ids.len();
            ids.extend(more.iter().map_while(|&id| u16::try_from(id).ok()));
            if ids.len() == before + more.len() {
                return;
            }
            ids.truncate(before);
            *self = Self::Large(ids.iter().map(|&id| u32::from(id)).collect());
        }
        if let Self::Large(ids) = self {
            ids.extend_from_slice(more);
        }
    }
}

/// Collects tokens document by document, without holding the ids of all of them twice.
#[derive(Debug)]
pub(super) struct TokenCollector {
    ids: Ids,
    ends: Vec<usize>,
}

impl TokenCollector {
    /// A collector with space for this number of small ids.
    pub(super) fn with_capacity(tokens: usize) -> Self {
        Self { ids: Ids::Small(Vec::with_capacity(tokens)), ends: Vec::new() }
    }

    /// Adds a part of a document.
    pub(super) fn extend(&mut self, ids: &[u32]) {
        self.ids.extend(ids);
    }

    /// Ends a document. One without tokens is omitted.
    pub(super) fn end_document(&mut self) {
        let end = self.ids.len();
        if self.ends.last().copied().unwrap_or(0) < end {
            self.ends.push(end);
        }
    }

    /// The stream of the documents.
    pub(super) fn finish(self) -> Tokens {
        Tokens::join(vec![Part::Memory { ids: self.ids, ends: self.ends, learned: None }])
    }
}

impl Part {
    fn len(&self) -> usize {
        match self {
            Self::Memory { ids, .. } => ids.len(),
            Self::Mapped(shard) => shard.len(),
        }
    }

    fn documents(&self) -> usize {
        match self {
            Self::Memory { ends, .. } => ends.len(),
            Self::Mapped(shard) => shard.documents(),
        }
    }

    fn end(&self, document: usize) -> usize {
        match self {
            Self::Memory { ends, .. } => ends[document],
            Self::Mapped(shard) => shard.end(document),
        }
    }

    /// The first document that ends after `at`.
    fn first_ending_after(&self, at: usize) -> usize {
        let (mut low, mut high) = (0, self.documents());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.end(middle) <= at { low = middle + 1 } else { high = middle }
        }
        low
    }
}

impl From<Vec<u32>> for Tokens {
    /// A stream of one document.
    fn from(ids: Vec<u32>) -> Self {
        Self::documents([ids])
    }
}

impl Tokens {
    /// A stream of documents in memory. Documents without tokens are omitted.
    pub fn documents(documents: impl IntoIterator<Item = Vec<u32>>) -> Self {
        let mut collector = TokenCollector::with_capacity(0);
        for document in documents {
            collector.extend(&document);
            collector.end_document();
        }
        collector.finish()
    }

    /// A stream of documents in memory, with whether each token is to be learned. Others are read, and predicted by
    /// nothing that counts.
    pub fn with_learned(documents: Vec<Vec<(u32, bool)>>) -> Self {
        let flags: Vec<bool> = documents.iter().flatten().map(|(_, learned)| *learned).collect();
        let mut collector = TokenCollector::with_capacity(flags.len());
        for document in documents {
            collector.extend(&document.iter().map(|(id, _)| *id).collect::<Vec<_>>());
            collector.end_document();
        }
        let TokenCollector { ids, ends } = collector;
        let learned = flags.contains(&false).then_some(flags);
        Self::join(vec![Part::Memory { ids, ends, learned }])
    }

    /// A stream of shards.
    pub(super) fn shards(shards: Vec<Shard>) -> Self {
        Self::join(shards.into_iter().map(Part::Mapped).collect())
    }

    fn join(parts: Vec<Part>) -> Self {
        let mut starts = vec![0];
        starts.extend(parts.iter().scan(0, |at, part| {
            *at += part.len();
            Some(*at)
        }));
        Self { parts: parts.into(), starts: starts.into(), framing: Arc::new([]) }
    }

    /// The same tokens with the ids of begin and end tokens, see [`Tokens::text_ranges`].
    #[must_use]
    pub fn with_framing(self, ids: Vec<u32>) -> Self {
        Self { framing: ids.into(), ..self }
    }

    /// For each document the start of its tokens and the range of those that are text: all but the begin tokens at its
    /// start and the end tokens at its end.
    pub fn text_ranges(&self) -> Vec<(usize, Range<usize>)> {
        let is_framing =
            |at: usize| self.read(at..at + 1).first().is_some_and(|id| self.framing.contains(id));
        let mut start = 0;
        let ranges = self.ends(0..self.len()).into_iter().map(|end| {
            let document = start..end;
            start = end;
            if self.framing.is_empty() {
                return (document.start, document);
            }
            let first = document.clone().find(|&at| !is_framing(at)).unwrap_or(end);
            let last = (first..end).rev().find(|&at| !is_framing(at)).map_or(first, |at| at + 1);
            (document.start, first..last)
        });
        ranges.collect()
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// The number of documents.
    pub fn document_count(&self) -> usize {
        self.parts.iter().map(Part::documents).sum()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The parts that overlap `range`, each with the range inside it and its start.
    fn segments(&self, range: Range<usize>) -> impl Iterator<Item = (&Part, Range<usize>, usize)> {
        let range = range.start..range.end.min(self.len());
        let first = self.starts.partition_point(|&s| s <= range.start).saturating_sub(1);
        let parts = self.parts.iter().zip(self.starts.iter().copied()).skip(first);
        parts.take_while(move |(_, start)| *start < range.end).map(move |(part, start)| {
            (part, range.start.max(start) - start..range.end.min(start + part.len()) - start, start)
        })
    }

    /// The ids of `range`, which is truncated at the end of the stream.
    pub fn read(&self, range: Range<usize>) -> Vec<u32> {
        let mut ids = Vec::with_capacity(range.len());
        for (part, inside, _) in self.segments(range) {
            match part {
                Part::Memory { ids: all, .. } => all.read(inside, &mut ids),
                Part::Mapped(shard) => ids.extend(shard.ids(inside)),
            }
        }
        ids
    }

    /// Whether the tokens of `range` are to be learned; `None` if all tokens of the stream are.
    pub fn learned(&self, range: Range<usize>) -> Option<Vec<bool>> {
        if !self.parts.iter().any(|part| matches!(part, Part::Memory { learned: Some(_), .. })) {
            return None;
        }
        let mut all = Vec::with_capacity(range.len());
        for (part, inside, _) in self.segments(range) {
            match part {
                Part::Memory { learned: Some(learned), .. } => all.extend_from_slice(&learned[inside]),
                _ => all.extend(inside.map(|_| true)),
            }
        }
        Some(all)
    }

    /// The ends of documents in `range`, counted from its start: ascending, in `1..=len`.
    pub fn ends(&self, range: Range<usize>) -> Vec<usize> {
        let mut ends_in_range = Vec::new();
        for (part, inside, start) in self.segments(range.clone()) {
            let ends = (part.first_ending_after(inside.start)..part.documents()).map(|d| part.end(d));
            ends_in_range.extend(ends.take_while(|&e| e <= inside.end).map(|e| start + e - range.start));
        }
        ends_in_range
    }

    /// The first tokens, at most `len`, as a stream in memory.
    pub fn head(&self, len: usize) -> Self {
        let (ids, mut ends) = (self.read(0..len), self.ends(0..len));
        if !ids.is_empty() && ends.last() != Some(&ids.len()) {
            ends.push(ids.len());
        }
        let mut small = Ids::Small(Vec::new());
        small.extend(&ids);
        let learned = self.learned(0..len);
        Self { framing: self.framing.clone(), ..Self::join(vec![Part::Memory { ids: small, ends, learned }]) }
    }

    /// Consecutive windows of `context` inputs; the last one may be shorter. Every token except the first is the target of
    /// exactly one input.
    pub fn windows(&self, context: usize) -> impl Iterator<Item = Range<usize>> {
        let (context, inputs) = (context.max(1), self.len().saturating_sub(1));
        (0..inputs).step_by(context).map(move |at| at..(at + context).min(inputs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_small_until_one_is_not() {
        let mut ids = Ids::Small(Vec::new());
        ids.extend(&[1, 65535]);
        assert!(matches!(ids, Ids::Small(_)));
        ids.extend(&[2, 65536, 3]);
        assert!(matches!(ids, Ids::Large(_)));
        ids.extend(&[4]);
        let mut read = Vec::new();
        ids.read(1..6, &mut read);
        assert_eq!((ids.len(), read), (6, vec![65535, 2, 65536, 3, 4]));
    }
}
