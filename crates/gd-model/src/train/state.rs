//! The state of a run between two steps, apart from its parameters: named tensors and plain values.
//!
//! Each component of the trainer that changes from step to step is [`Stateful`]; `Trainer::components` lists them. A
//! component that is restored continues with the same bits. A state must not depend on the number of threads or
//! processes. Values that follow from the seed and the step alone (learning rate, order of the data) are not part of it.

use std::collections::BTreeMap;

use candle_core::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Error, Result};

/// The state of one component, or of several under their names.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Tensor>,
    /// All other values. JSON keeps the bits of a finite f64 and cannot hold any other.
    pub values: Value,
}

/// A component whose state is saved between two steps.
pub trait Stateful {
    /// The state: everything that changes from step to step.
    ///
    /// # Errors
    /// A state that cannot be copied.
    fn save(&self) -> Result<State>;

    /// Restores the result of [`Stateful::save`]. After an error the component is unchanged.
    ///
    /// # Errors
    /// Names the tensor or value that is missing or does not fit.
    fn restore(&mut self, state: State) -> Result<()>;
}

impl State {
    /// A state without tensors.
    ///
    /// # Errors
    /// A value that JSON cannot hold.
    pub fn of(values: &impl Serialize) -> Result<Self> {
        let values = serde_json::to_value(values)
            .map_err(|e| Error::Invalid(format!("the training state does not fit JSON: {e}")))?;
        Ok(Self { tensors: BTreeMap::new(), values })
    }

    /// The values as the type that they were made from.
    ///
    /// # Errors
    /// Values of another type.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.values.clone())
            .map_err(|e| Error::Invalid(format!("the training state does not fit: {e}")))
    }

    /// Adds the state of a component under `name`.
    pub fn insert(&mut self, name: &str, component: State) {
        self.tensors.extend(component.tensors.into_iter().map(|(key, t)| (format!("{name}.{key}"), t)));
        if self.values.is_null() {
            self.values = Value::Object(serde_json::Map::new());
        }
        self.values[name] = component.values;
    }

    /// Removes and returns the state of the component `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn remove(&mut self, name: &str) -> Result<State> {
        let values = self.values.as_object_mut().and_then(|values| values.remove(name));
        let values = values.ok_or_else(|| Error::Invalid(format!("the training state has no {name}")))?;
        let prefix = format!("{name}.");
        let (own, others): (BTreeMap<_, _>, _) =
            std::mem::take(&mut self.tensors).into_iter().partition(|(key, _)| key.starts_with(&prefix));
        self.tensors = others;
        let tensors = own.into_iter().map(|(key, t)| (key[prefix.len()..].to_owned(), t)).collect();
        Ok(State { tensors, values })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn components_are_restored_by_their_names() {
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
