//! The flag `--lora` of `gd train`.

use std::str::FromStr;

use serde_json::{Map, Value, json};

/// The settings of an adapter, parsed from a text such as `r=16,alpha=32,targets=q_proj,v_proj`.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraArg(Map<String, Value>);

impl LoraArg {
    /// The block `train.lora` of an adapter of the model `base`.
    pub(super) fn block(&self, base: &str) -> Value {
        let mut block = self.0.clone();
        block.insert("base".into(), base.into());
        Value::Object(block)
    }
}

impl FromStr for LoraArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut block = Map::new();
        let mut targets: Option<Vec<&str>> = None;
        for part in text.split(',').map(str::trim) {
            match (part.split_once('='), &mut targets) {
                (Some(("r", value)), _) => {
                    let r: u64 = value.parse().map_err(|_| format!("r={value} is not a number"))?;
                    block.insert("r".into(), json!(r));
                }
                (Some((name @ ("alpha" | "dropout"), value)), _) => {
                    let number: f64 = value.parse().map_err(|_| format!("{name}={value} is not a number"))?;
                    block.insert(name.into(), json!(number));
                }
                (Some(("targets", value)), _) => targets = Some(vec![value]),
                (None, Some(targets)) if !part.is_empty() => targets.push(part),
                _ => {
                    return Err(format!(
                        "{part:?}: r=N, alpha=X, dropout=P and targets=NAME,NAME are expected"
                    ));
                }
            }
        }
        if let Some(targets) = targets {
            block.insert("targets".into(), json!(targets));
        }
        Ok(Self(block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_a_list_and_other_keys_are_refused() {
        let of = |text: &str| text.parse::<LoraArg>().map(|lora| lora.block("b"));
        assert_eq!(
            of("r=16,alpha=32,targets=q_proj,v_proj"),
            Ok(json!({ "base": "b", "r": 16, "alpha": 32.0, "targets": ["q_proj", "v_proj"] }))
        );
        assert_eq!(
            of("targets=all-linear,r=4,dropout=0.05"),
            Ok(json!({ "base": "b", "r": 4, "dropout": 0.05, "targets": ["all-linear"] }))
        );
        for text in ["", "16", "r=x", "rank=4", "q_proj", "r=4,,", "alpha=", "dropout=x"] {
            assert!(of(text).is_err(), "{text}");
        }
    }
}
