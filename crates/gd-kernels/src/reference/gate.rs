//! The consistency gate of one selected key.

use super::sigmoid;
use super::theory::density;
use crate::options::{CoherenceMode, Gate};

/// The gate and its derivatives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GateValue {
    /// The gate rho.
    pub rho: f64,
    /// The derivative with respect to the energy of the key.
    pub d_energy: f64,
    /// The derivative with respect to the threshold.
    pub d_threshold: f64,
    /// The derivative with respect to `t = beta |q - k|^2`.
    pub d_t: f64,
    /// The derivative with respect to alpha.
    pub d_alpha: f64,
}

/// The gate of a key with the given energy and `t = beta |q - k|^2`: `sigmoid((threshold - energy) / temperature)` for
/// [`Gate::Energy`] and [`Gate::Margin`], whose threshold is that of the query, the mixture density at the coherence point for
/// [`Gate::Coherence`], 1 for [`Gate::None`].
///
/// # Panics
/// If the gate needs a threshold or an alpha and there is none.
pub fn gate(
    gate: Gate,
    energy: f64,
    t: f64,
    threshold: Option<f64>,
    alpha: Option<f64>,
    mode: CoherenceMode,
) -> GateValue {
    let open = GateValue { rho: 1.0, d_energy: 0.0, d_threshold: 0.0, d_t: 0.0, d_alpha: 0.0 };
    match gate {
        Gate::None => open,
        Gate::Energy { temperature } | Gate::Margin { temperature } => {
            let x = (threshold.expect("this gate needs a threshold") - energy) / temperature;
            let rho = sigmoid(x);
            let slope = rho * sigmoid(-x) / temperature;
            GateValue { rho, d_energy: -slope, d_threshold: slope, ..open }
        }
        Gate::Coherence => {
            let rho = density(t, alpha.expect("the coherence gate needs an alpha"), mode);
            GateValue { rho: rho.value, d_t: rho.d_t, d_alpha: rho.d_alpha, ..open }
        }
    }
}
