//! Stop strings in streamed text.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// Ends a streamed text at the first stop string. Text that could be the start of a stop string is held back until the
/// next characters decide.
///
/// ```
/// use gd_model::infer::stop::StopStrings;
///
/// let mut stop = StopStrings::new(vec!["END".into()])?;
/// assert_eq!(stop.push("text E"), "text ");
/// assert_eq!(stop.push("ND more"), "");
/// assert!(stop.stopped());
/// # Ok::<(), gd_model::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<Vec<Unit>>,
    /// What was pushed and has not been returned.
    held: Vec<Unit>,
    stopped: bool,
}

/// A part of a stop string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Char(char),
    /// A special token, which has no text.
    Special(u32),
}

impl StopStrings {
    /// Stops at any of `stops`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if one of them is empty.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::Invalid("a stop string must not be empty".into()));
        }
        let stops = stops.iter().map(|stop| stop.chars().map(Unit::Char).collect()).collect();
        Ok(Self { stops, ..Self::default() })
    }

    /// Stops also at special tokens that a stop string names, alone or beside other text, as `<|im_end|>` does. `special` are
    /// the special tokens by name, see [`Tokenizer::special_tokens`](crate::io::tokenizer::Tokenizer::special_tokens).
    /// [`StopStrings::push_special`] reports them, because the text of a stream does not have them.
    #[must_use]
    pub fn with_special_tokens(mut self, special: &BTreeMap<String, u32>) -> Self {
        let names: Vec<(Vec<Unit>, u32)> =
            special.iter().map(|(name, &id)| (name.chars().map(Unit::Char).collect(), id)).collect();
        let mut named = Vec::new();
        for stop in &self.stops {
            let (mut rest, mut units) = (stop.as_slice(), Vec::new());
            while let Some((first, others)) = rest.split_first() {
                let starting = names.iter().filter(|(name, _)| !name.is_empty() && rest.starts_with(name));
                match starting.max_by_key(|(name, _)| name.len()) {
                    Some((name, id)) => {
                        units.push(Unit::Special(*id));
                        rest = &rest[name.len()..];
                    }
                    None => {
                        units.push(*first);
                        rest = others;
                    }
                }
            }
            if units != *stop {
                named.push(units);
            }
        }
        self.stops.extend(named);
        self
    }

    /// Whether a special token is a part of a stop string.
    pub fn has_special(&self, token: u32) -> bool {
        self.stops.iter().flatten().any(|unit| *unit == Unit::Special(token))
    }

    /// Adds a chunk of text. Returns the text that certainly precedes any stop string; after a stop string, the empty
    /// string.
    pub fn push(&mut self, chunk: &str) -> String {
        // One character at a time, so that the first complete stop string counts regardless of the chunk boundaries.
        chunk.chars().map(|c| self.advance(Unit::Char(c))).collect()
    }

    /// Adds a special token, which follows the text that was added before. Returns text as [`StopStrings::push`].
    pub fn push_special(&mut self, token: u32) -> String {
        self.advance(Unit::Special(token))
    }

    fn advance(&mut self, unit: Unit) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push(unit);
        let complete = self.stops.iter().filter(|stop| self.held.ends_with(stop));
        let certain = match complete.map(Vec::len).max() {
            Some(length) => {
                self.stopped = true;
                self.held.len() - length
            }
            None => {
                // The first position from which what is held is the start of a stop string.
                let possible = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
                (0..self.held.len()).find(possible).unwrap_or(self.held.len())
            }
        };
        let text = text(self.held.drain(..certain));
        if self.stopped {
            self.held.clear();
        }
        text
    }

    /// Whether a stop string has occurred.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text that is still held back, to be called when the text ends without a stop string.
    pub fn finish(&mut self) -> String {
        text(self.held.drain(..))
    }
}

/// The characters among the units.
fn text(units: impl Iterator<Item = Unit>) -> String {
    let char = |unit| match unit {
        Unit::Char(c) => Some(c),
        Unit::Special(_) => None,
    };
    units.filter_map(char).collect()
}

#[cfg(test)]
mod tests {
    use gd_testing::properties;
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], chunks: &[&str]) -> (Vec<String>, bool, String) {
        let mut stop = StopStrings::new(stops.iter().map(ToString::to_string).collect()).unwrap();
        let out = chunks.iter().map(|chunk| stop.push(chunk)).collect();
        (out, stop.stopped(), stop.finish())
    }

    #[test]
    fn a_possible_start_is_held_back_and_released() {
        let (out, stopped, rest) = run(&["END"], &["abE", "N", "x", "E"]);
        assert_eq!(
            (out, stopped, rest),
            (vec!["ab".into(), "".into(), "ENx".into(), "".into()], false, "E".into())
        );
        let (out, stopped, rest) = run(&["END"], &["abE", "ND more", "after"]);
        assert_eq!((out, stopped, rest), (vec!["ab".into(), "".into(), "".into()], true, "".into()));
        let (out, ..) = run(&["é—"], &["aé", "b"]);
        assert_eq!(out, ["a", "éb"]);
        assert!(StopStrings::new(vec![String::new()]).is_err());
    }

    #[test]
    fn a_special_token_stops_where_a_stop_string_names_it() {
        let special = BTreeMap::from([("<|end|>".to_owned(), 9), ("<|e".to_owned(), 8)]);
        let stops = |stops: &[&str]| {
            let stops = stops.iter().map(ToString::to_string).collect();
            StopStrings::new(stops).unwrap().with_special_tokens(&special)
        };
        // The longest name counts, and the same text without the token stops, too.
        let mut stop = stops(&["<|end|>"]);
        assert!(stop.has_special(9) && !stop.has_special(8));
        assert_eq!(
            (stop.push("ab"), stop.push_special(8), stop.push_special(9)),
            ("ab".into(), "".into(), "".into())
        );
        assert!(stop.stopped() && stop.finish().is_empty());
        let mut stop = stops(&["<|end|>"]);
        assert_eq!(stop.push("a<|end|>b"), "a");
        assert!(stop.stopped());
        // A token beside text.
        let mut stop = stops(&["x<|end|>\n"]);
        assert_eq!((stop.push("ax"), stop.push_special(9)), ("a".into(), "".into()));
        assert_eq!(
            (stop.push("b"), stop.push("x"), stop.push_special(9)),
            ("xb".into(), "".into(), "".into())
        );
        assert_eq!((stop.push("\nc"), stop.stopped()), ("".into(), true));
        // A stop string that is a part of the name of a token does not stop at it.
        let mut stop = stops(&["nd"]);
        assert_eq!((stop.push_special(9), stop.push("a"), stop.stopped()), ("".into(), "a".into(), false));
    }

    proptest! {
        #![proptest_config(properties(256))]

        // The output is the text before the first stop string, for any division into chunks.
        #[test]
        fn chunk_boundaries_do_not_matter(
            chunks in prop::collection::vec("[ab—]{0,4}", 0..12),
            stops in prop::collection::vec("[ab—]{1,4}", 0..3),
        ) {
            let text = chunks.concat();
            let mut stop = StopStrings::new(stops.clone()).unwrap();
            let mut out: String = chunks.iter().map(|chunk| stop.push(chunk)).collect();
            prop_assert_eq!(stop.stopped(), stops.iter().any(|s| text.contains(s)));
            out.push_str(&stop.finish());
            // A stop string counts as soon as it is complete, even if a longer one started before it.
            let first = (0..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
                stops.iter().filter_map(|s| text[..end].find(s.as_str())).min()
            });
            prop_assert_eq!(out, &text[..first.unwrap_or(text.len())]);
        }
    }
}
