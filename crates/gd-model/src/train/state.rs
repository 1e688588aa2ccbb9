//! What a run knows between two steps, apart from its parameters: named tensors and plain values.
//!
//! Each part of the trainer that changes from step to step is [`Stateful`], and `Trainer::parts` lists them all.
//! A part that is restored from what it saved goes on to the bit. Nothing here may depend on how many threads or
//! processes share the work. What follows from the seed and the step alone (learning rate, order of the data)
//! is no state.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// The state of one part, or of several under their names.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// Everything else. JSON keeps a finite f64 to the bit, and cannot hold another.
    pub values: Value,
}

/// Something that can be stopped between two steps and go on as if it had not been.
pub trait Stateful {
    /// All that changes from step to step.
    fn save(&self) -> Result<State>;

    /// Takes over what [`Stateful::save`] gave. After an error nothing has changed.
    fn restore(&mut self, state: State) -> Result<()>;
}

impl State {
    /// State without tensors.
    pub fn of(values: &impl Serialize) -> Result<Self> {
        let values = serde_json::to_value(values)
            .map_err(|e| Error::Invalid(format!("the training state does not fit JSON: {e}")))?;
        Ok(Self { tensors: BTreeMap::new(), values })
    }

    /// The values as the type they were made from.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.values.clone())
            .map_err(|e| Error::Invalid(format!("the training state does not fit: {e}")))
    }

    /// Puts a part under a name.
    pub fn insert(&mut self, name: &str, part: State) {
        self.tensors.extend(part.tensors.into_iter().map(|(key, t)| (format!("{name}.{key}"), t)));
        if self.values.is_null() {
            self.values = Value::Object(serde_json::Map::new());
        }
        self.values[name] = part.values;
    }

    /// Takes the part of a name out again.
    pub fn remove(&mut self, name: &str) -> Result<State> {
        let values = self.values.as_object_mut().and_then(|values| values.remove(name));
        let values = values.ok_or_else(|| Error::Invalid(format!("the training state has no {name}")))?;
        let prefix = format!("{name}.");
        let (part, rest) =
            std::mem::take(&mut self.tensors).into_iter().partition(|(key, _)| key.starts_with(&prefix));
        self.tensors = rest;
        let part: BTreeMap<String, Tensor> = part;
        let tensors = part.into_iter().map(|(key, t)| (key[prefix.len()..].to_owned(), t)).collect();
        Ok(State { tensors, values })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn parts_come_back_under_their_names() {
        let tensor = Tensor::new(1u32, &Device::Cpu).unwrap();
        let odd = [0.1f64, 1e-310, -1.797_693_134_862_315_7e308, 2.225_073_858_507_201e-308];
        let with_tensor = State {
            tensors: BTreeMap::from([("w.step".to_owned(), tensor)]),
            values: serde_json::json!({"count": 3}),
        };
        let mut all = State::default();
        all.insert("a", with_tensor);
        all.insert("ab", State::of(&odd).unwrap());
        assert!(all.tensors.contains_key("a.w.step"));
        let text = all.values.to_string();
        all.values = serde_json::from_str(&text).unwrap();
        let a = all.remove("a").unwrap();
        assert!(a.tensors.contains_key("w.step") && all.tensors.is_empty());
        assert_eq!(a.values["count"], 3);
        let back: [f64; 4] = all.remove("ab").unwrap().read().unwrap();
        assert_eq!(back.map(f64::to_bits), odd.map(f64::to_bits));
        assert!(all.remove("ab").unwrap_err().to_string().contains("ab"));
    }
}
