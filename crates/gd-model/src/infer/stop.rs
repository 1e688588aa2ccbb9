//! Stop strings in a text that comes in pieces.

use crate::error::{Error, Result};

/// Cuts a streamed text at the first of some strings. What could be the start of one is held back.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that has come and has not been handed on.
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Stops at any of `stops`, none of which may be empty.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::Invalid("a stop string must not be empty".into()));
        }
        Ok(Self { stops, ..Self::default() })
    }

    /// Takes a piece; gives the text that may be handed on. After a stop string there is no more.
    pub fn push(&mut self, piece: &str) -> String {
        let mut out = String::new();
        // One character at a time: what counts is the first stop string to be complete, however the text is
        // cut into pieces.
        for c in piece.chars() {
            if self.stopped {
                break;
            }
            self.held.push(c);
            let complete = self.stops.iter().filter(|stop| self.held.ends_with(stop.as_str()));
            if let Some(length) = complete.map(String::len).max() {
                self.stopped = true;
                out.push_str(&self.held[..self.held.len() - length]);
                self.held.clear();
            } else {
                // The earliest place from which all that is held starts some stop string.
                let possible = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
                let keep =
                    self.held.char_indices().map(|(at, _)| at).find(possible).unwrap_or(self.held.len());
                out.extend(self.held.drain(..keep));
            }
        }
        out
    }

    /// Whether a stop string has come.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What is still held back when the text ends without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool, String) {
        let mut stop = StopStrings::new(stops.iter().map(ToString::to_string).collect()).unwrap();
        let out = pieces.iter().map(|p| stop.push(p)).collect();
        (out, stop.stopped(), stop.finish())
    }

    #[test]
    fn a_possible_start_is_held_and_released() {
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

    proptest! {
        // However the text is cut into pieces, what comes out is the text before the first stop string.
        #[test]
        fn pieces_do_not_matter(
            pieces in prop::collection::vec("[ab—]{0,4}", 0..12),
            stops in prop::collection::vec("[ab—]{1,4}", 0..3),
        ) {
            let text = pieces.concat();
            let mut stop = StopStrings::new(stops.clone()).unwrap();
            let mut out: String = pieces.iter().map(|p| stop.push(p)).collect();
            prop_assert_eq!(stop.stopped(), stops.iter().any(|s| text.contains(s)));
            out.push_str(&stop.finish());
            // A stop string counts as soon as it is complete, though a longer one may have started before.
            let first = (0..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
                stops.iter().filter_map(|s| text[..end].find(s.as_str())).min()
            });
            prop_assert_eq!(out, &text[..first.unwrap_or(text.len())]);
        }
    }
}
