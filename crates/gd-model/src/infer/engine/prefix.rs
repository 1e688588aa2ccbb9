//! Caches of texts that were processed, for later prompts that begin with the same tokens.

use candle_core::Result;
use gd_layer::LayerCache;

/// The state after a text.
#[derive(Debug)]
pub(super) struct Prefix {
    /// One cache per layer.
    pub(super) cache: Vec<LayerCache>,
    /// The number of tokens in it.
    pub(super) tokens: usize,
    /// The logits `[V]` after the last token, if the whole prompt was stored with them.
    pub(super) logits: Option<Vec<f32>>,
}

#[derive(Debug)]
struct Entry {
    tokens: Vec<u32>,
    cache: Vec<LayerCache>,
    logits: Option<Vec<f32>>,
    /// When it was last read or written, in calls of this store.
    used: u64,
}

/// Stores the caches of texts up to a total number of tokens; those that were not used for the longest time make way.
#[derive(Debug)]
pub(super) struct PrefixStore {
    entries: Vec<Entry>,
    capacity: usize,
    clock: u64,
}

impl PrefixStore {
    /// An empty store for `capacity` tokens. With 0 it stores nothing.
    pub(super) fn new(capacity: usize) -> Self {
        Self { entries: Vec::new(), capacity, clock: 0 }
    }

    /// Whether a text of so many tokens is stored.
    pub(super) fn holds(&self, tokens: usize) -> bool {
        (1..=self.capacity).contains(&tokens)
    }

    /// The longest stored beginning of `prompt`. It is shorter than the prompt by at least one token, unless the logits after
    /// the prompt are stored and `with_logits` is set.
    pub(super) fn longest(&mut self, prompt: &[u32], with_logits: bool) -> Result<Option<Prefix>> {
        let usable = |entry: &Entry| {
            let common = entry.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
            let whole = common == entry.tokens.len();
            match (whole, common == prompt.len()) {
                (true, true) if with_logits && entry.logits.is_some() => common,
                (true, false) => common,
                _ if entry.cache.iter().all(LayerCache::is_positional) => common.min(prompt.len() - 1),
                _ => 0,
            }
        };
        let longest = self.entries.iter().map(usable).enumerate().max_by_key(|(_, tokens)| *tokens);
        let Some((at, tokens)) = longest.filter(|(_, tokens)| *tokens > 0) else { return Ok(None) };
        self.clock += 1;
        let entry = &mut self.entries[at];
        entry.used = self.clock;
        if tokens == entry.tokens.len() {
            let logits = entry.logits.clone().filter(|_| tokens == prompt.len());
            return Ok(Some(Prefix { cache: entry.cache.clone(), tokens, logits }));
        }
        let cache = entry.cache.iter().map(|layer| layer.shortened(tokens)).collect::<Result<_>>()?;
        Ok(Some(Prefix { cache, tokens, logits: None }))
    }

    /// Stores the caches after `tokens`. Stored beginnings that can be cut from them again are removed.
    pub(super) fn insert(&mut self, tokens: Vec<u32>, cache: Vec<LayerCache>, logits: Option<Vec<f32>>) {
        if !self.holds(tokens.len()) {
            return;
        }
        let positional = cache.iter().all(LayerCache::is_positional);
        self.entries.retain(|entry| {
            let begins = tokens.starts_with(&entry.tokens);
            !begins || (!positional && entry.tokens.len() < tokens.len())
        });
        self.clock += 1;
        self.entries.push(Entry { tokens, cache, logits, used: self.clock });
        while self.entries.iter().map(|entry| entry.tokens.len()).sum::<usize>() > self.capacity {
            let oldest = self.entries.iter().enumerate().min_by_key(|(_, entry)| entry.used);
            let Some((at, _)) = oldest else { break };
            self.entries.swap_remove(at);
        }
    }
}
