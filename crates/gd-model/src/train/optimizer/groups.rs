//! The parameters to which weight decay applies, and those that Muon can update: a table of names.

/// How an optimizer treats a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// A projection matrix of a block. Updated by Muon if it is configured, else by AdamW; decays.
    Matrix,
    /// Another array of weights, such as an embedding or a filter. Updated by AdamW; decays.
    Array,
    /// A bias, the weight of a norm, or a scalar per head. Updated by AdamW; does not decay.
    Gain,
}

/// Groups by the end of the name; the first match counts.
const TABLE: &[(&str, Group)] = &[
    ("_proj.weight", Group::Matrix),
    ("lora_A.weight", Group::Array),
    ("lora_B.weight", Group::Array),
    ("norm.weight", Group::Gain),
    (".bias", Group::Gain),
    (".gd.beta", Group::Gain),
    (".gd.threshold", Group::Gain),
    (".gd.threshold_slope", Group::Gain),
    (".gd.alpha", Group::Gain),
    // Deviations of the round weights from (1, 0, ..).
    (".gd.rounds", Group::Gain),
    // Vectors of further mechanisms.
    (".mechanism.a", Group::Gain),
    (".mechanism.b", Group::Gain),
    (".mechanism.s", Group::Gain),
    (".mechanism.t", Group::Gain),
    (".mechanism.Wg", Group::Array),
    (".mechanism.gw", Group::Gain),
    (".mechanism.lk1", Group::Gain),
    (".mechanism.lk2", Group::Gain),
    (".mechanism.lq1", Group::Gain),
    (".mechanism.lq2", Group::Gain),
    ("embed_tokens.weight", Group::Array),
    ("lm_head.weight", Group::Array),
    (".beacon.conv.weight", Group::Array),
    (".beacon.memory.weight", Group::Array),
    (".beacon.prior.weight", Group::Array),
];

impl Group {
    /// The group of a parameter by its name and number of dimensions. A name without an entry in the table is a
    /// [`Group::Array`] from two dimensions on, else a [`Group::Gain`].
    pub fn of(name: &str, rank: usize) -> Self {
        match TABLE.iter().find(|(end, _)| name.ends_with(end)) {
            Some((_, Self::Matrix)) if rank != 2 => Self::Array,
            Some((_, group)) => *group,
            None if rank >= 2 => Self::Array,
            None => Self::Gain,
        }
    }

    /// Whether weight decay applies.
    pub fn decays(self) -> bool {
        self != Self::Gain
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use gd_kernels::Gate;
    use gd_layer::GdConfig;

    use super::*;
    use crate::analysis::variants::variants;
    use crate::config::{PRESETS, Recipe};
    use crate::model::Transformer;
    use crate::model::params::Params;

    #[test]
    fn every_parameter_is_in_the_table_and_no_vector_decays() {
        for (preset, _) in PRESETS.iter().take(1) {
            let mut base = Recipe::load(preset).unwrap().model;
            (base.attention_bias, base.gd.output_gate, base.tie_word_embeddings) = (true, true, false);
            base.gd.select = GdConfig {
                threshold: Some(1.0),
                threshold_by_length: true,
                rounds: 2,
                gate: Gate::Coherence,
                ..GdConfig::default()
            };
            for v in variants().iter().filter(|v| v.applies(&base)) {
                let params = Params::new(0, DType::F32, &Device::Cpu);
                Transformer::new(&v.config(&base).unwrap(), params.builder()).unwrap();
                for (name, var) in params.vars() {
                    assert!(TABLE.iter().any(|(end, _)| name.ends_with(end)), "{name}");
                    let group = Group::of(&name, var.rank());
                    assert!(var.rank() >= 2 || group == Group::Gain, "{name}: {group:?}");
                    let inner = name.contains("layers.") && name.ends_with("proj.weight");
                    assert_eq!(group == Group::Matrix, inner, "{name}: {group:?}");
                }
            }
        }
    }
}
