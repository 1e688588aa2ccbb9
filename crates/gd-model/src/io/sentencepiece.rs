//! Byte-pair encoding with scores, as SentencePiece and llama.cpp compute it.
//!
//! The symbols of a text are its characters at first. Of all pairs of adjacent symbols that together are a token, the one
//! whose token has the highest score is merged, and of several with this score the leftmost, until no pair is a token. The
//! model BPE of the `tokenizers` library has another order: each merge has a rank of its own, so that of two merges with
//! equal scores one always precedes the other, wherever they are in the text.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeSet, BinaryHeap};

use tokenizers::models::bpe::BPE;
use tokenizers::{Model, Token};

/// The scores of the tokens of a vocabulary.
#[derive(Debug)]
pub(crate) struct Scores {
    /// One score for each token, by id.
    scores: Vec<f64>,
    /// Whether two tokens that result from merges have the same score.
    has_equal: bool,
}

/// A pair of adjacent symbols that together are a token. The greatest pair is merged first.
#[derive(Debug, PartialEq)]
struct Pair {
    score: f64,
    left: usize,
    right: usize,
    /// The length in bytes when the pair was found. The pair is out of date if one of its symbols has grown since.
    bytes: usize,
}

impl Eq for Pair {}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| Reverse(self.left).cmp(&Reverse(other.left)))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// A part of the text. A symbol that was merged into the one before it has no bytes.
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

impl Scores {
    /// `scores` has one value for each token, by id; none of them is NaN. `merged` are the ids of the tokens that result
    /// from merges.
    pub(crate) fn new(mut scores: Vec<f64>, merged: impl Iterator<Item = usize>) -> Self {
        // 0 and -0 are equal.
        scores.iter_mut().for_each(|score| *score += 0.0);
        let merged: BTreeSet<usize> = merged.collect();
        let mut order: Vec<f64> = merged.into_iter().filter_map(|id| scores.get(id).copied()).collect();
        order.sort_by(f64::total_cmp);
        let has_equal = order.windows(2).any(|pair| pair[0] == pair[1]);
        Self { scores, has_equal }
    }

    /// One score for each token, by id.
    pub(crate) fn by_id(&self) -> &[f64] {
        &self.scores
    }

    /// Whether two tokens have the same score, so that the order of their merges depends on the text. The format
    /// `tokenizer.json` cannot express that.
    pub(crate) fn has_equal(&self) -> bool {
        self.has_equal
    }

    /// The tokens of a normalized text. A character that is no token becomes the tokens of its bytes if the vocabulary has
    /// them, else the unknown token, of which there is one for adjacent characters.
    pub(crate) fn tokenize(&self, model: &BPE, text: &str) -> Vec<Token> {
        let mut symbols = characters(text);
        let pair = |symbols: &[Symbol], left: usize, right: usize| {
            let (start, end) = (symbols[left].start, symbols[right].end);
            let id = model.token_to_id(&text[start..end])?;
            let score = *self.scores.get(id as usize)?;
            Some(Pair { score, left, right, bytes: end - start })
        };
        let mut pairs: BinaryHeap<Pair> =
            (1..symbols.len()).filter_map(|right| pair(&symbols, right - 1, right)).collect();
        while let Some(Pair { left, right, bytes, .. }) = pairs.pop() {
            let length = |at: usize| symbols[at].end - symbols[at].start;
            if length(left) == 0 || length(right) == 0 || length(left) + length(right) != bytes {
                continue;
            }
            symbols[left].end = symbols[right].end;
            symbols[right].start = symbols[right].end;
            let next = symbols[right].next;
            symbols[left].next = next;
            if let Some(next) = next {
                symbols[next].previous = Some(left);
                pairs.extend(pair(&symbols, left, next));
            }
            if let Some(previous) = symbols[left].previous {
                pairs.extend(pair(&symbols, previous, left));
            }
        }
        let mut tokens: Vec<Token> = Vec::new();
        for symbol in symbols.iter().filter(|symbol| symbol.start < symbol.end) {
            push(&mut tokens, model, text, (symbol.start, symbol.end));
        }
        tokens
    }
}

fn characters(text: &str) -> Vec<Symbol> {
    let count = text.chars().count();
    let symbol = |(at, (start, c)): (usize, (usize, char))| Symbol {
        start,
        end: start + c.len_utf8(),
        previous: at.checked_sub(1),
        next: (at + 1 < count).then_some(at + 1),
    };
    text.char_indices().enumerate().map(symbol).collect()
}

/// Appends the tokens of a symbol that is not merged further.
fn push(tokens: &mut Vec<Token>, model: &BPE, text: &str, (start, end): (usize, usize)) {
    let symbol = &text[start..end];
    if let Some(id) = model.token_to_id(symbol) {
        tokens.push(Token::new(id, symbol.to_owned(), (start, end)));
        return;
    }
    let byte = |(at, byte): (usize, u8)| {
        let name = format!("<0x{byte:02X}>");
        Some(Token::new(model.token_to_id(&name)?, name, (start + at, start + at + 1)))
    };
    if let Some(bytes) = symbol.bytes().enumerate().map(byte).collect::<Option<Vec<_>>>() {
        tokens.extend(bytes);
    } else if let Some((name, id)) =
        model.unk_token.as_ref().and_then(|name| Some((name, model.token_to_id(name)?)))
    {
        match tokens.last_mut() {
            Some(last) if last.id == id && last.offsets.1 == start => last.offsets.1 = end,
            _ => tokens.push(Token::new(id, name.clone(), (start, end))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokens of `text` by a search over the whole text before each merge.
    fn by_definition(vocabulary: &[(&str, f64)], text: &str) -> Vec<String> {
        let mut symbols: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let score = |pair: &[String]| {
                let joined = pair.concat();
                vocabulary.iter().find(|(token, _)| *token == joined).map(|(_, score)| *score)
            };
            let scores: Vec<Option<f64>> = symbols.windows(2).map(score).collect();
            let Some(greatest) = scores.iter().flatten().copied().reduce(f64::max) else { return symbols };
            let at = scores.iter().position(|score| *score == Some(greatest)).unwrap_or(0);
            let right = symbols.remove(at + 1);
            symbols[at].push_str(&right);
        }
    }

    #[test]
    fn merges_are_those_of_the_definition() {
        let vocabulary = [
            ("a", -9.0),
            ("b", -9.0),
            ("_", -9.0),
            ("aa", -1.0),
            ("ab", -1.0),
            ("ba", -1.0),
            ("_a", -2.0),
            ("a_", -2.0),
            ("aaa", -3.0),
            ("aba", 0.0),
            ("_b", -0.0),
            ("ab_", -4.0),
            ("_ab", -4.0),
            ("é", -5.0),
            ("aé", -1.0),
        ];
        let vocab: tokenizers::models::bpe::Vocab =
            vocabulary.iter().zip(0..).map(|((token, _), id)| ((*token).to_owned(), id)).collect();
        let model = BPE::builder().vocab_and_merges(vocab, Vec::new()).build().unwrap();
        let scores = Scores::new(vocabulary.iter().map(|(_, score)| *score).collect(), 3..6);
        let alphabet = ['a', 'b', '_', 'é'];
        let mut cases = 0;
        for length in 0..=7usize {
            for number in 0..4usize.pow(length as u32) {
                let text: String = (0..length).map(|at| alphabet[number >> (2 * at) & 3]).collect();
                let tokens: Vec<String> =
                    scores.tokenize(&model, &text).into_iter().map(|token| token.value).collect();
                assert_eq!(tokens, by_definition(&vocabulary, &text), "{text:?}");
                cases += 1;
            }
        }
        assert_eq!(cases, 21_845);
        assert!(scores.has_equal() && !Scores::new(vec![1.0, 1.0, 2.0, 3.0], 1..4).has_equal());
    }

    #[test]
    fn characters_outside_of_the_vocabulary_are_bytes_or_unknown() {
        let model = |tokens: &[&str]| {
            let vocab: tokenizers::models::bpe::Vocab =
                tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id)).collect();
            BPE::builder().vocab_and_merges(vocab, Vec::new()).unk_token("?".into()).build().unwrap()
        };
        let ids = |model: &BPE| -> Vec<u32> {
            Scores::new(vec![0.0; 4], 0..0)
                .tokenize(model, "aééa")
                .into_iter()
                .map(|token| token.id)
                .collect()
        };
        assert_eq!(ids(&model(&["?", "a", "<0xC3>", "<0xA9>"])), [1, 2, 3, 2, 3, 1]);
        assert_eq!(ids(&model(&["?", "a", "<0xC3>"])), [1, 0, 1]);
    }
}
