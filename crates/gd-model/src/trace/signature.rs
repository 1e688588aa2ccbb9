//! The signature of a trace.
//!
//! A signature covers a [`Statement`]: the head, the time, the version of the program, and the identifier of the key. The
//! signed bytes are `gd-trace signature 2`, a zero byte, the head (32 bytes), the time (little-endian u64), the identifier
//! of the key (32 bytes, BLAKE3 of a 7 and the key), and the version. In version 1 of the format the head alone is signed.

#[cfg(feature = "sign")]
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use super::chain::{Hash, key_id};
use super::file::{array, take};

/// The start of the signed bytes.
#[cfg(feature = "sign")]
const DOMAIN: &[u8] = b"gd-trace signature 2\0";

/// What a signature states in addition to the head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// The time of the signature in seconds since the start of 1970, by the clock of the signer.
    pub seconds: u64,
    /// The version of the program that signed, at most 255 bytes.
    pub version: String,
}

/// The signature of a trace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// The Ed25519 public key of the signer.
    pub key: Hash,
    /// The Ed25519 signature.
    pub signature: [u8; 64],
    /// What it states; `None` in version 1 of the format, where only the head is signed.
    pub statement: Option<Statement>,
}

impl Signed {
    /// Signs a head.
    #[cfg(feature = "sign")]
    pub(super) fn new(head: &Hash, key: &SigningKey, seconds: u64) -> Self {
        let statement = Statement { seconds, version: env!("CARGO_PKG_VERSION").into() };
        let public = key.verifying_key().to_bytes();
        let signature = key.sign(&signed_bytes(head, &public, &statement)).to_bytes();
        Self { key: public, signature, statement: Some(statement) }
    }

    /// The identifier of the key, BLAKE3 of a 7 and the key.
    pub fn key_id(&self) -> Hash {
        key_id(&self.key)
    }

    /// The bytes in a file of version 2 or 3, with the kind of the signature.
    #[cfg(feature = "sign")]
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![2];
        bytes.extend(self.key);
        if let Some(Statement { seconds, version }) = &self.statement {
            bytes.extend(seconds.to_le_bytes());
            bytes.push(version.len() as u8);
            bytes.extend(version.as_bytes());
        }
        bytes.extend(self.signature);
        bytes
    }

    /// Whether the signature of `head` by its key is valid.
    #[cfg(feature = "sign")]
    pub fn is_valid(&self, head: &Hash) -> bool {
        let bytes = match &self.statement {
            Some(statement) => signed_bytes(head, &self.key, statement),
            None => head.to_vec(),
        };
        let key = VerifyingKey::from_bytes(&self.key);
        key.is_ok_and(|key| key.verify_strict(&bytes, &Signature::from_bytes(&self.signature)).is_ok())
    }
}

#[cfg(feature = "sign")]
fn signed_bytes(head: &Hash, key: &Hash, statement: &Statement) -> Vec<u8> {
    let mut bytes = DOMAIN.to_vec();
    bytes.extend(head);
    bytes.extend(statement.seconds.to_le_bytes());
    bytes.extend(key_id(key));
    bytes.extend(statement.version.as_bytes());
    bytes
}

/// Reads the signature of a file, with its kind.
pub(super) fn read_signature(rest: &mut &[u8], version: u32) -> Result<Option<Signed>, String> {
    match (array(rest)?, version) {
        ([0], _) => Ok(None),
        ([1], 1) => Ok(Some(Signed { key: array(rest)?, signature: array(rest)?, statement: None })),
        ([2], 2 | 3) => {
            let (key, seconds) = (array(rest)?, u64::from_le_bytes(array(rest)?));
            let [length] = array(rest)?;
            let text = std::str::from_utf8(take(rest, usize::from(length))?).map_err(|e| e.to_string())?;
            let statement = Some(Statement { seconds, version: text.into() });
            Ok(Some(Signed { key, statement, signature: array(rest)? }))
        }
        ([kind], _) => Err(format!("a signature of kind {kind}")),
    }
}

/// Checks a signature of `head`, and that it is by `signer` if one is required. Returns why it is refused.
pub(super) fn check_signature(
    signed: Option<&Signed>,
    head: &Hash,
    signer: Option<Hash>,
) -> Result<(), String> {
    use super::chain::hex;
    if let Some(signed) = signed {
        check_valid(signed, head)?;
    }
    match (signer, signed) {
        (Some(_), None) => Err("it is not signed".into()),
        (Some(signer), Some(signed)) if signer != signed.key => {
            Err(format!("it is signed by {}, not by {}", hex(&signed.key), hex(&signer)))
        }
        _ => Ok(()),
    }
}

#[cfg(feature = "sign")]
fn check_valid(signed: &Signed, head: &Hash) -> Result<(), String> {
    match signed.is_valid(head) {
        true => Ok(()),
        false => Err("the signature of the head by its key is not valid".into()),
    }
}

/// Refuses every signature.
#[cfg(not(feature = "sign"))]
fn check_valid(_: &Signed, _: &Hash) -> Result<(), String> {
    Err("it is signed, and this build cannot check signatures (gd-model's feature `sign`)".into())
}
