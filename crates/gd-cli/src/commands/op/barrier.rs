//! The value of `--barrier`: the parameters of the conditional protection.

use anyhow::{Context, Result};
use gd_kernels::Barrier;
use serde::Deserialize;
use serde_json::Value;

use crate::context::usage;

/// The parameters in a JSON file, under their short names or those of the reference implementation, at the top level
/// or in an object `preset`.
#[derive(Deserialize)]
struct BarrierFile {
    #[serde(alias = "barrier_floor")]
    floor: f64,
    #[serde(alias = "rescue_margin")]
    margin: f64,
    #[serde(alias = "barrier_strength")]
    strength: f64,
    #[serde(alias = "entropy_trigger")]
    entropy: f64,
    #[serde(alias = "trigger_slack")]
    slack: f64,
}

/// Parses `NAME=NUMBER` pairs, or reads a JSON file with them.
///
/// # Errors
/// Names the pair, file or value that is not valid.
pub(super) fn parse(spec: &str) -> Result<Barrier> {
    let flag = || format!("--barrier {spec}");
    let json = if spec.contains('=') {
        let parse_pair = |part: &str| {
            let (name, value) = part.split_once('=')?;
            Some((name.trim().to_owned(), value.trim().parse::<f64>().ok()?.into()))
        };
        let pairs = spec.split(',').map(|part| {
            parse_pair(part).ok_or_else(|| usage(format!("{}: `{part}` is not NAME=NUMBER", flag())))
        });
        Value::Object(pairs.collect::<Result<_>>()?)
    } else {
        serde_json::from_str(&std::fs::read_to_string(spec).with_context(flag)?).with_context(flag)?
    };
    from_json(json).map_err(|e| usage(format!("{}: {e}", flag())))
}

/// The barrier that a JSON value describes.
pub(in crate::commands) fn from_json(mut json: Value) -> Result<Barrier, serde_json::Error> {
    let json = json.get_mut("preset").map(Value::take).unwrap_or(json);
    let b: BarrierFile = serde_json::from_value(json)?;
    Ok(Barrier {
        floor: b.floor,
        margin: b.margin,
        strength: b.strength,
        entropy_trigger: b.entropy,
        slack: b.slack,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn barriers_are_parsed_from_pairs_and_from_the_reference_preset() -> Result<()> {
        let pairs = parse("floor=0.18,margin=1.45,strength=2.8,entropy=0.63,slack=0.45")?;
        let file = tempfile::NamedTempFile::new()?;
        let preset = r#"{"preset": {"noise_std": 0.42, "barrier_floor": 0.18, "rescue_margin": 1.45,
            "barrier_strength": 2.8, "entropy_trigger": 0.63, "trigger_slack": 0.45}}"#;
        std::fs::write(file.path(), preset)?;
        assert_eq!(parse(&file.path().display().to_string())?, pairs);
        for bad in ["floor=0.1", "floor=a,margin=1,strength=1,entropy=1,slack=1", "nowhere.json"] {
            assert!(format!("{:#}", parse(bad).unwrap_err()).contains(bad));
        }
        Ok(())
    }
}
