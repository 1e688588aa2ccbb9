//! Why a recorded text ends.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::header::Header;

/// The reason why a recorded text ends where it does. Without it, the beginning of a trace could pass for all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case", deny_unknown_fields)]
pub enum Ending {
    /// A text was read, and no token was to be generated.
    Read,
    /// The maximal number of tokens was generated.
    MaxTokens,
    /// The model drew an end token, which is not recorded as a position.
    EndToken {
        /// The end token.
        token: u32,
    },
    /// All positions of the model are used.
    Context,
}

impl Ending {
    /// The number of bytes of an encoded ending.
    pub(super) const BYTES: usize = 5;

    /// The kind (u8), and the end token or 0 (little-endian u32).
    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let (kind, token) = match self {
            Self::Read => (0, 0),
            Self::MaxTokens => (1, 0),
            Self::EndToken { token } => (2, token),
            Self::Context => (3, 0),
        };
        let [a, b, c, d] = u32::to_le_bytes(token);
        [kind, a, b, c, d]
    }

    /// The ending with these bytes.
    pub(super) fn decode(bytes: [u8; Self::BYTES]) -> Result<Self, String> {
        let [kind, token @ ..] = bytes;
        let token = u32::from_le_bytes(token);
        match (kind, token) {
            (0, 0) => Ok(Self::Read),
            (1, 0) => Ok(Self::MaxTokens),
            (2, token) => Ok(Self::EndToken { token }),
            (3, 0) => Ok(Self::Context),
            _ => Err(format!("an ending of kind {kind} with token {token}")),
        }
    }

    /// Checks that a text of `positions` positions can end so. [`Ending::Context`] needs the model to be checked.
    pub(super) fn check(self, header: &Header, positions: usize) -> Result<(), String> {
        let new = positions.saturating_sub(header.prompt_tokens);
        let (Some(max_tokens), Some(end_tokens)) = (header.max_tokens, &header.end_tokens) else {
            return match self {
                Self::Read if new == 0 => Ok(()),
                _ => Err(format!("it ends with {self}, but its header describes no generation")),
            };
        };
        let possible = match self {
            Self::Read => false,
            Self::MaxTokens => new == max_tokens,
            Self::EndToken { token } => new < max_tokens && end_tokens.contains(&token),
            Self::Context => new < max_tokens,
        };
        match possible {
            true => Ok(()),
            false => Err(format!(
                "{new} new tokens end with {self}, at a maximum of {max_tokens} and the end tokens {end_tokens:?}"
            )),
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read => f.write_str("the last token of the text that was read"),
            Self::MaxTokens => f.write_str("the maximal number of new tokens"),
            Self::EndToken { token } => write!(f, "the end token {token}"),
            Self::Context => f.write_str("the last position of the model"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_have_one_encoding_each() {
        let all = [
            Ending::Read,
            Ending::MaxTokens,
            Ending::EndToken { token: 0 },
            Ending::EndToken { token: u32::MAX },
            Ending::Context,
        ];
        for ending in all {
            assert_eq!(Ending::decode(ending.encode()), Ok(ending));
        }
        for bytes in [[0, 1, 0, 0, 0], [1, 0, 0, 0, 1], [3, 1, 0, 0, 0], [4, 0, 0, 0, 0]] {
            assert!(Ending::decode(bytes).is_err(), "{bytes:?}");
        }
    }
}
