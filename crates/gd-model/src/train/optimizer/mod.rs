//! Optimizers: AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the others.

mod adamw;
mod groups;
mod muon;
mod norm;
mod parameter;

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

pub use self::adamw::{AdamW, DeviceVerdict, Updated};
pub use self::groups::Group;
pub use self::muon::Muon;
pub use self::norm::{accumulate, clip_scale, global_norm, not_finite, squares};
use crate::config::{AdamWConfig, MuonConfig};
use crate::error::{Error, Result};
use crate::train::state::{State, Stateful};

/// The optimizer of a training run.
#[derive(Debug)]
pub struct Optimizer {
    adamw: AdamW,
    /// Over the parameters of [`Group::Matrix`] if Muon is configured, else over none.
    muon: Muon,
}

impl Optimizer {
    /// AdamW over named parameters. With a configuration of Muon, Muon updates the matrices among them
    /// ([`Group::Matrix`]).
    ///
    /// # Errors
    /// As [`AdamW::new`] and [`Muon::new`].
    pub fn new(vars: Vec<(String, Var)>, adamw: AdamWConfig, muon: Option<MuonConfig>) -> Result<Self> {
        let is_matrix = |(name, var): &(String, Var)| Group::of(name, var.rank()) == Group::Matrix;
        let (matrices, others) = vars.into_iter().partition(|v| muon.is_some() && is_matrix(v));
        Ok(Self { adamw: AdamW::new(others, adamw)?, muon: Muon::new(matrices, muon.unwrap_or_default())? })
    }

    /// Updates every parameter that has a gradient, with the gradients times `scale` (for clipping and averaging) at the
    /// learning rate `lr`.
    ///
    /// # Errors
    /// As [`AdamW::step`].
    pub fn step(&mut self, grads: &GradStore, lr: f64, scale: f64) -> Result<()> {
        self.adamw.step(grads, lr, scale)?;
        self.muon.step(grads, lr, scale)
    }

    /// Whether the device can apply an update before the host knows the scale of its gradients: on a GPU, without Muon.
    pub fn is_asynchronous(&self) -> bool {
        self.muon.is_empty() && self.adamw.takes_verdicts()
    }

    /// As [`AdamW::step_by_verdict`].
    ///
    /// # Errors
    /// As [`AdamW::step_by_verdict`], or an optimizer that is not [asynchronous](Optimizer::is_asynchronous).
    pub fn step_by_verdict(
        &mut self,
        grads: &GradStore,
        lr: f64,
        verdict: &DeviceVerdict<'_>,
    ) -> Result<Updated> {
        match self.is_asynchronous() {
            true => self.adamw.step_by_verdict(grads, lr, verdict),
            false => Err(Error::Invalid(
                "updates by a verdict need parameters on a GPU that AdamW updates, without Muon".into(),
            )),
        }
    }

    /// As [`AdamW::undo_step`].
    pub fn undo_step(&mut self, updated: &Updated) {
        self.adamw.undo_step(updated);
    }

    /// The state of both optimizers by name. With the parameters it is all that an exact continuation needs.
    ///
    /// # Errors
    /// An error of the device.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut state = self.adamw.state()?;
        state.extend(self.muon.state());
        Ok(state)
    }

    /// Restores the result of [`Optimizer::state`] for the same parameters and settings. After an error the state is
    /// unchanged.
    ///
    /// # Errors
    /// Names the tensor that is missing, superfluous, or of another shape or dtype.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let (muon, adamw) = state.clone().into_iter().partition(|(key, _)| self.muon.owns(key));
        let (adamw, muon) = (self.adamw.read(adamw)?, self.muon.read(muon)?);
        self.adamw.adopt(adamw);
        self.muon.adopt(muon);
        Ok(())
    }
}

impl Stateful for Optimizer {
    fn save(&self) -> Result<State> {
        Ok(State { tensors: self.state()?, ..State::default() })
    }

    fn restore(&mut self, state: State) -> Result<()> {
        self.load_state(&state.tensors)
    }
}
