//! Proofs of single records, and signatures.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ed25519_dalek::SigningKey;
use gd_model::trace::{self, Ending, Proof, Trace};
use gd_testing::log_cases;
use serde_json::{Value, json};

use super::{SECONDS, models, record, written, written_to};
use crate::program::{error, gd, json as run, succeeded};

fn key() -> SigningKey {
    SigningKey::from_bytes(&[3; 32])
}

/// A proof with a changed value.
fn changed(proof: &Value, path: &str, value: Value) -> Result<Proof> {
    let mut proof = proof.clone();
    *proof.pointer_mut(path).with_context(|| path.to_owned())? = value;
    Ok(Proof::from_bytes(Path::new("proof"), proof.to_string().as_bytes())?)
}

#[test]
fn every_record_has_a_proof_and_no_other_record_has_it() -> Result<()> {
    let recorded = record(&models()[0].1, "A whale", 6, &[])?;
    let bytes = written(&recorded.header, &recorded.records, Some(&key()))?;
    let trace = Trace::from_bytes(Path::new("trace"), &bytes)?;
    let (head, public) = (trace.stated.head, key().verifying_key().to_bytes());
    let count = recorded.records.len() as u64;
    let mut cases = 0;
    for position in 0..count {
        let proof = Proof::new(&trace, position)?;
        let proven = proof.check(Some(head), Some(public)).map_err(anyhow::Error::msg)?;
        // As text, because a coherence point that is not computed is NaN.
        let expected = format!("{:?}", recorded.records[position as usize]);
        ensure!(format!("{:?}", proven.record) == expected, "{position}");
        let signed = proven.signed.context("not signed")?;
        ensure!(signed.statement.is_some_and(|statement| statement.seconds == SECONDS));
        let json = serde_json::to_value(&proof)?;
        let other = serde_json::to_value(Proof::new(&trace, (position + 1) % count)?)?;
        let refused = |path: &str, value: Value| -> Result<()> {
            let proof = changed(&json, path, value)?;
            ensure!(proof.check(Some(head), Some(public)).is_err(), "{position}: {path} is not checked");
            Ok(())
        };
        for path in ["/record", "/index"] {
            refused(path, other[path.trim_start_matches('/')].clone())?;
            cases += 1;
        }
        let header = json["header"].as_str().context("header")?;
        let path = json["path"].as_array().context("path")?;
        for (at, value) in [
            ("/header", json!(header.replace("\"seed\":7", "\"seed\":8"))),
            ("/count", json!(count + 1)),
            ("/chain", json["head"].clone()),
            ("/ending", json!({ "reason": "context" })),
            ("/head", json["chain"].clone()),
            ("/path/0", json["chain"].clone()),
            ("/path", json!(path[1..])),
            ("/signature/seconds", json!(SECONDS + 1)),
            ("/signature/version", json!("9.9.9")),
            ("/signature/key", json["chain"].clone()),
            ("/signature", Value::Null),
            ("/record", json!("00")),
            ("/record", json!("xyz")),
        ] {
            refused(at, value)?;
            cases += 1;
        }
    }
    ensure!(Proof::new(&trace, count).err().context("accepted")?.to_string().contains("below 13"));
    log_cases("trace-proofs", cases);
    Ok(())
}

#[test]
fn a_signature_covers_head_time_version_and_key() -> Result<()> {
    let recorded = record(&models()[0].1, "A whale", 6, &[])?;
    let signed = written(&recorded.header, &recorded.records, Some(&key()))?;
    let plain = written_to(&recorded.header, &recorded.records, Ending::MaxTokens, None)?;
    let other = written(&recorded.header, &recorded.records, Some(&SigningKey::from_bytes(&[4; 32])))?;
    let verify = |bytes: &[u8]| {
        let trace = Trace::from_bytes(Path::new("trace"), bytes)?;
        trace::verify(&trace, None, Some(key().verifying_key().to_bytes()))
    };
    verify(&signed)?;
    ensure!(verify(&plain).is_err() && verify(&other).is_err());
    // The signature with its kind, before the hash of the file.
    let version = env!("CARGO_PKG_VERSION").len();
    let (start, end) = (signed.len() - 32 - 64 - version - 1 - 8 - 32, signed.len() - 32);
    for at in start..end {
        let mut forged = signed.clone();
        forged[at] ^= 1;
        let hash = blake3::hash(&forged[..end]);
        forged[end..].copy_from_slice(hash.as_bytes());
        ensure!(verify(&forged).is_err(), "byte {} of the signature is not covered", at - start);
    }
    log_cases("trace-proofs", end - start);
    Ok(())
}

#[test]
fn the_program_says_what_it_did_not_check() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let dir = folder.path();
    let card =
        ["name", "summary", "parameters", "mechanism", "tokenizer", "context", "data", "steps", "loss"];
    let gd_config = &models()[0].1;
    super::model(gd_config, 5)?.save(&dir.join("m"), &card.map(|key| (key, "test".to_owned())))?;
    run(dir, "trace m --prompt abcdef --max-tokens 8 --out t.trace --json")?;
    let text = succeeded(&gd(dir, "verify t.trace")?)?;
    ensure!(text.contains("ends with the maximal number of new tokens"), "{text}");
    ensure!(text.contains("not checked: that the model makes these selections"), "{text}");
    let text = succeeded(&gd(dir, "verify t.trace --model m")?)?;
    ensure!(!text.contains("not checked"), "{text}");
    // Interventions come first.
    run(dir, "trace m --prompt abcdef --ablate 1.0 --max-tokens 3 --out forced.trace --json")?;
    for args in ["verify forced.trace", "verify forced.trace --model m"] {
        let text = succeeded(&gd(dir, args)?)?;
        ensure!(
            text.starts_with("1 interventions: the model did not select and write freely: ablate 1.0@5\n"),
            "{text}"
        );
    }
    // Another backend has an exit code of its own.
    let trace = Trace::read(&dir.join("t.trace"))?;
    let mut header = trace.header.clone();
    header.isa = "Other".into();
    let ending = trace.ending.context("no ending")?;
    fs::write(dir.join("elsewhere.trace"), written_to(&header, &trace.decoded()?, ending, None)?)?;
    let e = error(dir, "verify elsewhere.trace --model m", 3)?;
    ensure!(
        e.contains("not everything was checked: bits: recorded on cpu Other in f32")
            && e.contains("drawn tokens:"),
        "{e}"
    );
    let verified: Value =
        serde_json::from_slice(&gd(dir, "verify elsewhere.trace --model m --json")?.stdout)?;
    ensure!(verified["not_checked"].as_array().is_some_and(|all| all.len() == 2), "{verified}");
    // A proof of one record.
    let proof = succeeded(&gd(dir, "verify t.trace --prove 7")?)?;
    fs::write(dir.join("p.json"), proof)?;
    let head = run(dir, "verify t.trace --json")?["head"].as_str().context("head")?.to_owned();
    let proven = run(dir, &format!("verify p.json --kept {head} --json"))?;
    ensure!((&proven["position"], &proven["generated"]) == (&json!(7), &json!(true)), "{proven}");
    let text = succeeded(&gd(dir, "verify p.json")?)?;
    ensure!(
        text.contains("contains record 7 of 14") && text.contains("not checked: the other records"),
        "{text}"
    );
    ensure!(error(dir, &format!("verify p.json --kept {}", "0".repeat(64)), 1)?.contains("not the expected"));
    ensure!(error(dir, "verify t.trace --prove 14", 2)?.contains("--prove must be a position below 14"));
    ensure!(error(dir, "verify p.json --model m", 2)?.contains("--model"));
    Ok(())
}
