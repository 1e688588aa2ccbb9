//! Deserialization of a JSON tree with errors as values.
//!
//! [`serde_json`] reports an unknown or missing key as text. [`ValueError`] has the names in fields instead, so that
//! the caller can suggest a similar name without parsing a message. The rules of the format are those of
//! `serde_json::from_value`.

use std::fmt;

use serde::de::{
    self, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess, SeqAccess, Unexpected,
    VariantAccess, Visitor,
};
use serde_json::{Map, Value};

/// Why a tree is not a value of the expected type.
#[derive(Debug)]
pub(super) enum ValueError {
    /// A key that the type does not have.
    UnknownField { name: String, allowed: &'static [&'static str] },
    /// A required key is absent.
    MissingField(&'static str),
    /// A word that is not a variant of the type.
    UnknownVariant { name: String, allowed: &'static [&'static str] },
    /// Anything else, such as a value of another type.
    Other(String),
}

type Result<T> = std::result::Result<T, ValueError>;

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownField { name, .. } => write!(f, "unknown key {name}"),
            Self::MissingField(name) => write!(f, "{name} is missing"),
            Self::UnknownVariant { name, .. } => write!(f, "{name:?} is unknown"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for ValueError {}

impl de::Error for ValueError {
    fn custom<T: fmt::Display>(text: T) -> Self {
        Self::Other(text.to_string())
    }

    fn unknown_field(name: &str, allowed: &'static [&'static str]) -> Self {
        Self::UnknownField { name: name.into(), allowed }
    }

    fn missing_field(name: &'static str) -> Self {
        Self::MissingField(name)
    }

    fn unknown_variant(name: &str, allowed: &'static [&'static str]) -> Self {
        Self::UnknownVariant { name: name.into(), allowed }
    }

    fn invalid_type(actual: Unexpected, expected: &dyn de::Expected) -> Self {
        match actual {
            // The word of JSON.
            Unexpected::Unit => Self::Other(format!("invalid type: null, expected {expected}")),
            other => Self::Other(format!("invalid type: {other}, expected {expected}")),
        }
    }
}

/// A node of the tree.
pub(super) struct Tree(pub(super) Value);

impl<'de> IntoDeserializer<'de, ValueError> for Tree {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

fn unexpected(value: &Value) -> Unexpected<'_> {
    match value {
        Value::Null => Unexpected::Unit,
        Value::Bool(b) => Unexpected::Bool(*b),
        Value::Number(n) => match (n.as_u64(), n.as_i64(), n.as_f64()) {
            (Some(n), ..) => Unexpected::Unsigned(n),
            (_, Some(n), _) => Unexpected::Signed(n),
            (.., Some(x)) => Unexpected::Float(x),
            _ => Unexpected::Other("number"),
        },
        Value::String(text) => Unexpected::Str(text),
        Value::Array(_) => Unexpected::Seq,
        Value::Object(_) => Unexpected::Map,
    }
}

impl<'de> Deserializer<'de> for Tree {
    type Error = ValueError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(b) => visitor.visit_bool(b),
            Value::Number(n) => match (n.as_u64(), n.as_i64(), n.as_f64()) {
                (Some(n), ..) => visitor.visit_u64(n),
                (_, Some(n), _) => visitor.visit_i64(n),
                (.., Some(x)) => visitor.visit_f64(x),
                _ => Err(ValueError::Other(format!("the number {n} is not supported"))),
            },
            Value::String(text) => visitor.visit_string(text),
            Value::Array(items) => {
                let mut items = Items(items.into_iter());
                let value = visitor.visit_seq(&mut items)?;
                match items.0.len() {
                    0 => Ok(value),
                    more => Err(ValueError::Other(format!("{more} elements too many"))),
                }
            }
            Value::Object(map) => visitor.visit_map(Entries { entries: map.into_iter(), value: Value::Null }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            value => visitor.visit_some(Self(value)),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        match self.0 {
            Value::String(name) => visitor.visit_enum(Variant { name, value: None }),
            Value::Object(map) if map.len() == 1 => {
                let variant =
                    map.into_iter().next().map(|(name, value)| Variant { name, value: Some(value) });
                visitor.visit_enum(variant.unwrap_or(Variant { name: String::new(), value: None }))
            }
            Value::Object(_) => Err(de::Error::invalid_value(Unexpected::Map, &"map with a single key")),
            other => Err(de::Error::invalid_type(unexpected(&other), &"string or map")),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq
        tuple tuple_struct map struct identifier
    }
}

/// The elements of an array.
struct Items(std::vec::IntoIter<Value>);

impl<'de> SeqAccess<'de> for Items {
    type Error = ValueError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>> {
        self.0.next().map(|value| seed.deserialize(Tree(value))).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.0.len())
    }
}

/// The entries of an object.
struct Entries {
    entries: <Map<String, Value> as IntoIterator>::IntoIter,
    /// The value of the key that was taken last.
    value: Value,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = ValueError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>> {
        let Some((key, value)) = self.entries.next() else { return Ok(None) };
        self.value = value;
        seed.deserialize(Tree(Value::String(key))).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value> {
        seed.deserialize(Tree(self.value.take()))
    }
}

/// A variant of an enum, with its content if it has one.
struct Variant {
    name: String,
    value: Option<Value>,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = ValueError;
    type Variant = Content;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Content)> {
        Ok((seed.deserialize(Tree(Value::String(self.name)))?, Content(self.value)))
    }
}

struct Content(Option<Value>);

impl Content {
    fn value(self, expected: &str) -> Result<Tree> {
        match self.0 {
            Some(value) => Ok(Tree(value)),
            None => Err(de::Error::invalid_type(Unexpected::UnitVariant, &expected)),
        }
    }
}

impl<'de> VariantAccess<'de> for Content {
    type Error = ValueError;

    fn unit_variant(self) -> Result<()> {
        self.0.map_or(Ok(()), |value| de::Deserialize::deserialize(Tree(value)))
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value> {
        seed.deserialize(self.value("newtype variant")?)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value> {
        self.value("tuple variant")?.deserialize_any(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], visitor: V) -> Result<V::Value> {
        self.value("struct variant")?.deserialize_any(visitor)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        count: u32,
        #[serde(default)]
        kind: Option<Kind>,
        #[serde(default)]
        pairs: Vec<(f64, f64)>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase", deny_unknown_fields)]
    enum Kind {
        Plain,
        Wide { width: usize },
    }

    fn read(tree: Value) -> Result<Sample> {
        Sample::deserialize(Tree(tree))
    }

    #[test]
    fn values_are_read_as_serde_json_reads_them() {
        for tree in [
            json!({ "count": 3 }),
            json!({ "count": 3, "kind": "plain" }),
            json!({ "count": 3, "kind": { "plain": null } }),
            json!({ "count": 3, "kind": { "wide": { "width": 2 } }, "pairs": [[1, 2.5], [-1, 1e30]] }),
            json!({ "count": 3, "kind": null, "pairs": [] }),
        ] {
            let expected: Sample = serde_json::from_value(tree.clone()).unwrap();
            assert_eq!(read(tree).unwrap(), expected);
        }
    }

    #[test]
    fn whatever_serde_json_refuses_is_refused() {
        for tree in [
            json!(null),
            json!([]),
            json!({ "count": -1 }),
            json!({ "count": 3.5 }),
            json!({ "count": "3" }),
            json!({ "count": 3, "kind": { "wide": 2 } }),
            json!({ "count": 3, "kind": { "wide": {}, "plain": null } }),
            json!({ "count": 3, "kind": { "wide": { "width": 2, "height": 3 } } }),
            json!({ "count": 3, "kind": 4 }),
            json!({ "count": 3, "kind": "wide" }),
            json!({ "count": 3, "pairs": [[1]] }),
            json!({ "count": 3, "pairs": [[1, 2, 3]] }),
        ] {
            assert!(serde_json::from_value::<Sample>(tree.clone()).is_err(), "{tree}");
            assert!(read(tree.clone()).is_err(), "{tree}");
        }
    }

    #[test]
    fn errors_have_the_names_in_fields() {
        let error = read(json!({ "count": 3, "kin": "plain" })).unwrap_err();
        assert!(
            matches!(&error, ValueError::UnknownField { name, allowed } if name == "kin" && allowed.len() == 3),
            "{error:?}"
        );
        let error = read(json!({ "kind": "plain" })).unwrap_err();
        assert!(matches!(error, ValueError::MissingField("count")), "{error:?}");
        let error = read(json!({ "count": 3, "kind": "plane" })).unwrap_err();
        assert!(
            matches!(&error, ValueError::UnknownVariant { name, allowed } if name == "plane" && *allowed == ["plain", "wide"]),
            "{error:?}"
        );
        let error = read(json!({ "count": null })).unwrap_err();
        assert_eq!(error.to_string(), "invalid type: null, expected u32");
    }
}
