//! The change of selections from one evaluation to the next.

use candle_core::{Device, Tensor};

use super::state::{State, Stateful};
use crate::error::Result;

/// The selections of the last evaluation of a text.
#[derive(Debug, Default)]
pub(super) struct Churn {
    selections: Vec<i32>,
}

impl Churn {
    /// Replaces the selections by those of a new evaluation. Returns the fraction that differ; `None` without an earlier
    /// evaluation of as many.
    pub(super) fn update(&mut self, selections: Vec<i32>) -> Option<f64> {
        let last = std::mem::replace(&mut self.selections, selections);
        let changed = last.iter().zip(&self.selections).filter(|(a, b)| a != b).count();
        (!last.is_empty() && last.len() == self.selections.len()).then(|| changed as f64 / last.len() as f64)
    }
}

impl Stateful for Churn {
    fn save(&self) -> Result<State> {
        let selections = Tensor::from_slice(&self.selections, self.selections.len(), &Device::Cpu)?;
        let tensors =
            (!self.selections.is_empty()).then(|| ("last".to_owned(), selections)).into_iter().collect();
        Ok(State { tensors, ..State::default() })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.selections = match state.tensors.get("last") {
            Some(selections) => selections.to_vec1()?,
            None => Vec::new(),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn churn_is_the_fraction_of_changed_selections_and_survives_a_restart() {
        let mut churn = Churn::default();
        assert_eq!(churn.update(vec![1, 2, -1, 4]), None);
        assert_eq!(churn.update(vec![1, 3, -1, 0]), Some(0.5));
        let mut other = Churn::default();
        other.restore(churn.save().unwrap()).unwrap();
        assert_eq!(other.update(vec![1, 3, -1, 0]), Some(0.0));
        let mut fresh = Churn { selections: vec![1] };
        fresh.restore(Churn::default().save().unwrap()).unwrap();
        assert_eq!(fresh.update(vec![1]), None);
    }
}
