//! The JSON schema of configurations, and the list of their keys, both made from the types that read them.

use std::collections::BTreeSet;

use schemars::{JsonSchema, schema_for};
use serde::Serialize;
use serde_json::{Value, json};

use super::load::PRESET;
use super::{PRESETS, Recipe};

/// A key of a configuration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KeyInfo {
    /// The dotted path, such as `train.lr.peak`.
    pub key: String,
    /// The type: `integer`, `number`, `string`, `boolean`, `list`, `table`, or the words that are allowed.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether the key must be present, in the file or in the preset that it changes.
    pub required: bool,
    /// The value of an absent key; `None` if there is none, or if it depends on other values.
    pub default: Option<Value>,
    /// What it means.
    pub meaning: String,
}

/// The JSON schema of a configuration file. Every key may be absent, because a file may change a preset.
pub fn schema() -> Value {
    let mut schema = schema_of::<Recipe>();
    remove_required(&mut schema);
    let names: Vec<_> = PRESETS.iter().map(|(name, _)| name).collect();
    schema["properties"][PRESET] =
        json!({ "description": "The preset that the file changes.", "enum": names, "type": "string" });
    schema["title"] = "Configuration of gd train".into();
    schema
}

/// Every key of a configuration, in alphabetical order.
pub fn keys() -> Vec<KeyInfo> {
    let schema = schema_of::<Recipe>();
    let mut keys = Vec::new();
    Walk { schema: &schema, keys: &mut keys }.table("", &schema);
    keys.sort_by(|a, b| a.key.cmp(&b.key));
    keys
}

fn schema_of<T: JsonSchema>() -> Value {
    schema_for!(T).to_value()
}

/// Removes the lists of required keys, except inside the alternatives of a word or a table, where they distinguish them.
fn remove_required(node: &mut Value) {
    match node {
        Value::Object(map) => {
            if map.contains_key("properties") {
                map.remove("required");
            }
            map.iter_mut().filter(|(key, _)| *key != "oneOf").for_each(|(_, child)| remove_required(child));
        }
        Value::Array(items) => items.iter_mut().for_each(remove_required),
        _ => {}
    }
}

/// A walk through a schema that collects keys.
struct Walk<'a> {
    schema: &'a Value,
    keys: &'a mut Vec<KeyInfo>,
}

impl<'a> Walk<'a> {
    /// The schema that a node refers to, or the node itself.
    fn resolved(&self, node: &'a Value) -> &'a Value {
        let reference = node.get("$ref").and_then(Value::as_str);
        reference.and_then(|path| self.schema.pointer(path.trim_start_matches('#'))).unwrap_or(node)
    }

    /// The alternatives of a node, or the node itself, each with whether it is a variant of an enum.
    fn alternatives(&self, node: &'a Value, is_variant: bool) -> Vec<(&'a Value, bool)> {
        let node = self.resolved(node);
        let nodes = |name: &str| node.get(name).and_then(Value::as_array);
        match (nodes("anyOf"), nodes("oneOf")) {
            (Some(any), _) => any.iter().flat_map(|node| self.alternatives(node, is_variant)).collect(),
            (None, Some(one)) => one.iter().flat_map(|node| self.alternatives(node, true)).collect(),
            (None, None) => vec![(node, is_variant)],
        }
    }

    /// Adds the keys of the tables that a node may be.
    fn table(&mut self, path: &str, node: &'a Value) {
        for (alternative, is_variant) in self.alternatives(node, false) {
            let Some(properties) = alternative.get("properties").and_then(Value::as_object) else { continue };
            let required = alternative.get("required").and_then(Value::as_array);
            for (name, child) in properties {
                let key = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                self.keys.push(KeyInfo {
                    kind: self.kind(child),
                    required: !is_variant && required.is_some_and(|names| names.iter().any(|n| n == name)),
                    default: child.get("default").cloned(),
                    meaning: self
                        .meaning(child)
                        .or(text_of(alternative).filter(|_| is_variant))
                        .unwrap_or_default(),
                    key: key.clone(),
                });
                self.table(&key, child);
            }
        }
    }

    /// The description of a key, or else that of its type.
    fn meaning(&self, node: &'a Value) -> Option<String> {
        text_of(node).or_else(|| text_of(self.resolved(node)))
    }

    /// The type of a node in words.
    fn kind(&self, node: &'a Value) -> String {
        let mut kinds = BTreeSet::new();
        for (alternative, _) in self.alternatives(node, false) {
            let listed = alternative.get("enum").and_then(Value::as_array).into_iter().flatten();
            let words: Vec<_> =
                alternative.get("const").into_iter().chain(listed).map(|word| format!("`{word}`")).collect();
            match alternative.get("type") {
                _ if !words.is_empty() => kinds.extend(words),
                Some(Value::String(kind)) => kinds.extend(name_of(kind)),
                Some(Value::Array(all)) => {
                    kinds.extend(all.iter().filter_map(Value::as_str).filter_map(name_of))
                }
                _ => kinds.extend(["any".to_owned()]),
            }
        }
        kinds.into_iter().collect::<Vec<_>>().join(" or ")
    }
}

/// The description of a node.
fn text_of(node: &Value) -> Option<String> {
    node.get("description").and_then(Value::as_str).map(plain)
}

/// The name of a JSON type; `None` for null, which stands for an absent value.
fn name_of(kind: &str) -> Option<String> {
    match kind {
        "null" => None,
        "object" => Some("table".into()),
        "array" => Some("list".into()),
        other => Some(other.into()),
    }
}

/// The text of a documentation comment on one line, without the targets of its links.
fn plain(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut plain = String::new();
    let mut rest = line.as_str();
    while let Some(start) = rest.find("[`") {
        let Some(length) = rest[start..].find("`]") else { break };
        plain.push_str(&rest[..start]);
        plain.push_str(&rest[start + 1..start + length + 1]);
        rest = &rest[start + length + 2..];
        if let (true, Some(end)) = (rest.starts_with('('), rest.find(')')) {
            rest = &rest[end + 1..];
        }
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_comments_are_text() {
        assert_eq!(
            plain("Settings of [`AdamW`](crate::x).\nSee [`B`] and [0, 1)."),
            "Settings of `AdamW`. See `B` and [0, 1)."
        );
        assert_eq!(plain("no link"), "no link");
    }

    #[test]
    fn keys_have_types_defaults_and_meanings() {
        let keys = keys();
        let key = |name: &str| keys.iter().find(|k| k.key == name).unwrap_or_else(|| panic!("no {name}"));
        let peak = key("train.lr.peak");
        assert_eq!((peak.kind.as_str(), peak.required, &peak.default), ("number", true, &None));
        assert!(peak.meaning.starts_with("The maximal learning rate"), "{}", peak.meaning);
        assert_eq!(key("train.clip").default, Some(json!(1.0)));
        assert_eq!(key("train.guard.window").default, Some(json!(128)));
        assert_eq!(key("train.lr.shape").kind, "`\"constant\"` or `\"cosine\"` or table");
        assert!(key("train.ema.decay").required);
        assert!(!key("train.lr.shape.wsd").required && key("train.lr.shape.wsd.decay").required);
        assert_eq!(key("model.gd.select.score").default, Some(json!("energy")));
        assert!(key("model.gd.beacon.barrier.floor").required);
        assert!(keys.iter().all(|key| !key.meaning.is_empty() && !key.kind.is_empty()), "{keys:#?}");
    }
}
