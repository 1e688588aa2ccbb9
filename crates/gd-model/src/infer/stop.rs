//! Stop strings in streamed text.

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
    stops: Vec<String>,
    /// Text that was pushed and has not been returned.
    held: String,
    stopped: bool,
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
        Ok(Self { stops, ..Self::default() })
    }

    /// Adds a chunk of text. Returns the text that certainly precedes any stop string; after a stop string, the empty
    /// string.
    pub fn push(&mut self, chunk: &str) -> String {
        let mut out = String::new();
        // One character at a time, so that the first complete stop string counts regardless of the chunk boundaries.
        for c in chunk.chars() {
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
                // The first position from which the held text is a prefix of a stop string.
                let possible = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
                let certain =
                    self.held.char_indices().map(|(at, _)| at).find(possible).unwrap_or(self.held.len());
                out.extend(self.held.drain(..certain));
            }
        }
        out
    }

    /// Whether a stop string has occurred.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The text that is still held back, to be called when the text ends without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
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

    proptest! {
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
