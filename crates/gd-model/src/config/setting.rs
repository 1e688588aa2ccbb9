//! Single values that replace those of a recipe, such as `train.lr.peak=1e-3`.

use std::str::FromStr;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A value for the key at a dotted path, such as `train.lr.peak`. It parses from `KEY=VALUE`, where the value is JSON,
/// TOML or a word without quotes.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    path: String,
    value: Value,
}

impl Setting {
    /// The value `value` for the key at `path`.
    pub fn new(path: &str, value: impl Into<Value>) -> Self {
        Self { path: path.into(), value: value.into() }
    }

    /// Replaces the value in the tree of a recipe, and creates the tables that it lies in.
    ///
    /// # Errors
    /// A value on the path that is not a table.
    pub(super) fn apply(&self, tree: &mut Value) -> Result<()> {
        let mut at = tree;
        let mut above = Vec::new();
        for key in self.path.split('.') {
            if at.is_null() {
                *at = Value::Object(Map::new());
            }
            let Value::Object(map) = at else {
                let above = above.join(".");
                return Err(Error::Invalid(format!("{}: {above} is {at}, not a table", self.path)));
            };
            at = map.entry(key).or_insert(Value::Null);
            above.push(key);
        }
        *at = self.value.clone();
        Ok(())
    }
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (path, value) = text.split_once('=').ok_or("KEY=VALUE is expected")?;
        if path.split('.').any(str::is_empty) {
            return Err(format!("{path:?} is not a dotted path of keys"));
        }
        Ok(Self { path: path.into(), value: parse(value)? })
    }
}

/// A value. White space around JSON and TOML is ignored; a word keeps it, because it may be a separator.
fn parse(text: &str) -> std::result::Result<Value, String> {
    let word = text;
    let text = text.trim();
    if let Ok(value) = serde_json::from_str(text) {
        return Ok(value);
    }
    if let Ok(mut table) = toml::from_str::<Map<String, Value>>(&format!("value = {text}")) {
        return table.remove("value").ok_or_else(|| format!("{text:?} is not a value"));
    }
    // A text with quotes or brackets was meant to be JSON or TOML.
    match text.is_empty() || text.contains(['"', '\'', '[', ']', '{', '}', '\n']) {
        true => Err(format!("{text:?} is neither JSON nor TOML nor a plain word")),
        false => Ok(word.into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_json_toml_or_words() {
        let cases = [
            ("a=1e-3", json!(1e-3)),
            ("a=6", json!(6)),
            ("a=1_000", json!(1000)),
            ("a=true", json!(true)),
            ("a=null", json!(null)),
            ("a=cosine", json!("cosine")),
            ("a=\"6\"", json!("6")),
            ("a='6'", json!("6")),
            ("a= 6 ", json!(6)),
            ("a=-- ", json!("-- ")),
            ("a=It was = so", json!("It was = so")),
            (r#"a=["gd", "softmax"]"#, json!(["gd", "softmax"])),
            (r#"a={"wsd": {"decay": 0.2}}"#, json!({ "wsd": { "decay": 0.2 } })),
            ("a={ wsd = { decay = 0.2 } }", json!({ "wsd": { "decay": 0.2 } })),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<Setting>(), Ok(Setting::new("a", expected)), "{text}");
        }
        for text in ["a", "=1", "a..b=1", "a.=1", "a=", "a=[1,", "a=\"x"] {
            assert!(text.parse::<Setting>().is_err(), "{text}");
        }
    }

    #[test]
    fn tables_on_the_path_are_created() {
        let mut tree = json!({ "a": { "b": 1 }, "c": null });
        for setting in ["a.b=2", "a.d.e=x", "c.f=[1]"] {
            setting.parse::<Setting>().unwrap().apply(&mut tree).unwrap();
        }
        assert_eq!(tree, json!({ "a": { "b": 2, "d": { "e": "x" } }, "c": { "f": [1] } }));
        let error = Setting::new("a.b.g", 1).apply(&mut tree).unwrap_err().to_string();
        assert_eq!(error, "a.b.g: a.b is 2, not a table");
    }
}
