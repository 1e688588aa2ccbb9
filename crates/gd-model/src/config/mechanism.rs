//! The attention mechanism of a layer, in a configuration its name or an object with its parameters.

use std::fmt;
use std::sync::LazyLock;

use gd_layer::mechanisms::{AttentionMechanism, TABLE};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The attention mechanism of a layer. In a configuration it is a name, `"gd"`, or an object with parameters,
/// `{"name": "topk", "k": 4}`.
#[derive(Debug, Clone, PartialEq)]
pub enum Mechanism {
    /// Softmax attention.
    Softmax,
    /// Softmax over the selection energies, with a learned null slot: the control of selection attention.
    SoftmaxNull,
    /// Selection attention, with the options of the block `select`.
    Gd,
    /// Another mechanism, with its parameters.
    Other(AttentionMechanism),
}

/// The names of the mechanisms that a layer can have.
static NAMES: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
    let in_models = TABLE.iter().filter(|(_, info)| info.not_in_models.is_none()).map(|(name, _)| *name);
    ["gd", "softmax-null"].into_iter().chain(in_models).collect()
});

impl Mechanism {
    /// The names of all mechanisms that a layer can have.
    pub fn names() -> &'static [&'static str] {
        &NAMES
    }

    /// The mechanism of this name with default parameters, if a layer can have it.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "gd" => Some(Self::Gd),
            "softmax-null" => Some(Self::SoftmaxNull),
            name if NAMES.contains(&name) => AttentionMechanism::named(name).map(Self::from),
            _ => None,
        }
    }

    /// The mechanism as it is compared with others at this context length in tokens, where its parameters would make it the
    /// same as another mechanism.
    #[must_use]
    pub fn at_context(&self, tokens: usize) -> Self {
        match self {
            Self::Other(other) => Self::Other(other.at_context(tokens)),
            Self::Softmax | Self::SoftmaxNull | Self::Gd => self.clone(),
        }
    }

    /// The name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::SoftmaxNull => "softmax-null",
            Self::Gd => "gd",
            Self::Other(other) => other.name(),
        }
    }
}

impl From<AttentionMechanism> for Mechanism {
    fn from(mechanism: AttentionMechanism) -> Self {
        match mechanism {
            // Layers rotate queries and keys before any mechanism.
            AttentionMechanism::Softmax(_) => Self::Softmax,
            other => Self::Other(other),
        }
    }
}

impl Serialize for Mechanism {
    /// The name, or an object if a parameter is not the default.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Other(other) if AttentionMechanism::named(other.name()).as_ref() != Some(other) => {
                other.serialize(serializer)
            }
            named => serializer.serialize_str(named.name()),
        }
    }
}

impl<'de> Deserialize<'de> for Mechanism {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NameOrParameters)
    }
}

struct NameOrParameters;

impl<'de> Visitor<'de> for NameOrParameters {
    type Value = Mechanism;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a mechanism, or an object with its name and parameters")
    }

    fn visit_str<E: Error>(self, name: &str) -> Result<Mechanism, E> {
        Mechanism::named(name).ok_or_else(|| E::unknown_variant(name, &NAMES))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Mechanism, A::Error> {
        AttentionMechanism::deserialize(MapAccessDeserializer::new(map)).map(Mechanism::from)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json, to_value};

    use super::*;

    #[test]
    fn a_mechanism_is_a_name_or_an_object_and_is_written_in_the_shorter_form() {
        let read = |value: Value| from_value::<Mechanism>(value).unwrap();
        for name in Mechanism::names() {
            assert_eq!(read(json!(name)).name(), *name);
            assert_eq!(to_value(read(json!(name))).unwrap(), json!(name));
        }
        assert_eq!((read(json!("softmax")), read(json!("gd"))), (Mechanism::Softmax, Mechanism::Gd));
        assert_eq!(read(json!({"name": "topk", "k": 8})), read(json!("topk")));
        let other = json!({"name": "topk", "k": 3});
        assert_eq!(to_value(read(other.clone())).unwrap(), other);
        for (value, part) in [
            (json!("reformer"), "reformer"),
            (json!("pointer"), "pointer"),
            (json!({"name": "topk", "q": 3}), "`q`"),
            (json!({"k": 3}), "name"),
            (json!(3), "the name of a mechanism"),
        ] {
            let error = from_value::<Mechanism>(value.clone()).unwrap_err().to_string();
            assert!(error.contains(part), "{value}: {error}");
        }
    }
}
