//! Who may send requests: the API key, and the names by which a local server may be called.

use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, HOST};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::args::Args;
use super::error::ApiError;

/// The environment variable of the key.
const KEY_VARIABLE: &str = "GD_API_KEY";

/// What a request must show.
#[derive(Debug)]
pub(super) struct Access {
    /// The hash of the key. Hashes have equal lengths, so that their comparison does not depend on that of the key.
    key: Option<[u8; 32]>,
    /// Whether only this machine reaches the server.
    is_loopback: bool,
}

impl Access {
    /// The key of `--api-key-file`, else that of the environment.
    ///
    /// # Errors
    /// A file that cannot be read, and an empty key.
    pub(super) fn new(args: &Args) -> Result<Self> {
        let (source, key) = match &args.api_key_file {
            Some(path) => {
                let name = format!("--api-key-file {}", path.display());
                let text = fs::read_to_string(path).with_context(|| name.clone())?;
                (name, Some(text))
            }
            None => (KEY_VARIABLE.to_owned(), std::env::var(KEY_VARIABLE).ok()),
        };
        let key = key.map(|key| key.trim().to_owned());
        if key.as_ref().is_some_and(String::is_empty) {
            bail!("{source}: the key is empty");
        }
        Ok(Self { key: key.map(|key| hash(key.as_bytes())), is_loopback: args.host.is_loopback() })
    }

    /// Checks the key of a request.
    pub(super) fn check_key(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(key) = &self.key else { return Ok(()) };
        let sent = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let equal = hash(sent.unwrap_or_default()).ct_eq(key);
        if sent.is_some() && bool::from(equal) { Ok(()) } else { Err(ApiError::unauthorized()) }
    }

    /// Checks the name of the server in a request. A page in a browser can give another name the address of this machine,
    /// and would then be allowed to read the answers of a server that only this machine should reach.
    pub(super) fn check_host(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let host = headers.get(HOST).and_then(|host| host.to_str().ok());
        match host {
            Some(host) if self.is_loopback && !is_local(host) => Err(ApiError::refused(
                axum::http::StatusCode::FORBIDDEN,
                format!("the host {host:?} is not this machine; --host makes the server public"),
            )),
            _ => Ok(()),
        }
    }
}

fn hash(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// Whether a host, with or without a port, names this machine.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or(host),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "127.1.2.3", "[::1]:8080", "[::1]"] {
            assert!(is_local(host), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:80", "10.0.0.1", "", "[2001:db8::1]:80", "::1"] {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn a_key_must_be_equal() {
        let access = Access { key: Some(hash(b"secret")), is_loopback: true };
        let check = |value: Option<&'static str>| {
            let values = value.map(|value| (AUTHORIZATION, HeaderValue::from_static(value)));
            access.check_key(&values.into_iter().collect()).is_ok()
        };
        assert!(check(Some("Bearer secret")));
        for value in [None, Some("secret"), Some("Bearer "), Some("Bearer secre"), Some("Bearer secrets")] {
            assert!(!check(value), "{value:?}");
        }
        assert!(Access { key: None, is_loopback: true }.check_key(&HeaderMap::new()).is_ok());
    }
}
