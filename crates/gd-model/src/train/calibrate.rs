//! Initial thresholds from the first batch.

use candle_core::{DType, Device, Tensor};
use gd_kernels::{Gate, Mask, above_runner_up};
use gd_layer::{GdConfig, Pass, SelectionStats};
use std::cell::RefCell;

use crate::config::Mechanism;
use crate::error::Result;
use crate::model::Transformer;
use crate::model::params::Params;

/// Halvings of the interval of a threshold: to the resolution of f32.
const HALVINGS: usize = 40;

/// Sets the threshold of every selecting head to where the mean over the queries of the pass `forward` of its energy gate
/// `sigmoid((tau - eps) / T)` is 1/2, with eps the least energy of a query's candidates, minus what the number of visible
/// keys adds to the threshold of the query. Without that gate, to where half of the queries abstain. Layers without
/// thresholds are unchanged.
///
/// # Errors
/// An error of the device.
pub fn calibrate_thresholds(
    model: &Transformer,
    params: &Params,
    forward: impl FnOnce(&Pass) -> Result<()>,
    mask: &Mask,
) -> Result<()> {
    let stats = RefCell::new(Vec::new());
    forward(&Pass { stats: Some(&stats), ..Pass::new(mask) })?;
    let (config, vars) = (model.config(), params.vars());
    let reads = |&layer: &usize| config.attention(layer).reading_heads() > 0;
    let reading = (0..config.num_hidden_layers).filter(reads);
    for (layer, stats) in reading.zip(stats.take()) {
        let name = format!("model.layers.{layer}.self_attn.gd.threshold");
        let var = vars.iter().find(|(other, _)| *other == name).map(|(_, var)| var);
        if let (Mechanism::Gd, Some(var)) = (config.mechanism(layer), var) {
            let temperature = config.gd.select.gate.temperature().unwrap_or(0.0);
            let heads: Vec<f64> = least_energies(&stats, &config.gd.select)?
                .iter()
                .map(|energies| threshold(energies, temperature))
                .collect();
            var.set(&Tensor::new(heads, &Device::Cpu)?.to_dtype(var.dtype())?.to_device(var.device())?)?;
        }
    }
    Ok(())
}

/// The least energies of the queries of every head, relative to what the threshold of the query has beside that of the head;
/// queries without a candidate, and with the margin gate those without a runner-up, have none.
fn least_energies(stats: &SelectionStats, select: &GdConfig) -> Result<Vec<Vec<f64>>> {
    let Some(selected) = &stats.selected else { return Ok(Vec::new()) };
    // [B, H, N, K] -> [H, B N K]
    let mut energies = match &stats.threshold_shift {
        Some(shift) => selected.compared.broadcast_sub(&shift.detach().unsqueeze(3)?)?,
        None => selected.compared.clone(),
    };
    if let Gate::Margin { .. } = select.gate {
        let none = Tensor::zeros(energies.dim(1)?, energies.dtype(), energies.device())?;
        let runner_up = above_runner_up(&selected.compared, &none, select.picks)?;
        energies = energies.broadcast_sub(&runner_up.unsqueeze(3)?)?;
    }
    let energies = energies.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.transpose(0, 1)?;
    let slots = energies.dim(3)?;
    let rows = energies.contiguous()?.flatten_from(1)?.to_vec2::<f64>()?;
    let least = |row: &[f64]| row.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(rows.iter().map(|row| row.chunks(slots).map(least).filter(|e| e.is_finite()).collect()).collect())
}

/// The threshold at which the mean of `sigmoid((tau - eps) / T)` is 1/2; the median at T = 0. 0 without energies.
fn threshold(energies: &[f64], temperature: f64) -> f64 {
    let gate = |tau: f64, e: f64| match temperature {
        0.0 => f64::from(u8::from(e <= tau)),
        t => 1.0 / (1.0 + ((e - tau) / t).exp()),
    };
    let mut low = energies.iter().copied().fold(f64::INFINITY, f64::min);
    let mut high = energies.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if energies.is_empty() {
        return 0.0;
    }
    for _ in 0..HALVINGS {
        let middle = (low + high) / 2.0;
        let mean = energies.iter().map(|&e| gate(middle, e)).sum::<f64>() / energies.len() as f64;
        if mean < 0.5 { low = middle } else { high = middle }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Recipe;

    #[test]
    fn thresholds_start_where_the_mean_gate_is_one_half() {
        for gate in [Gate::Energy { temperature: 0.8 }, Gate::Margin { temperature: 0.8 }] {
            mean_gate_is_one_half(gate);
        }
    }

    /// With thresholds that follow the length.
    fn mean_gate_is_one_half(gate: Gate) {
        let mut config = Recipe::load("tiny").unwrap().model;
        config.num_hidden_layers = 1;
        (config.gd.beacon, config.gd.selecting_heads) = (None, Vec::new());
        config.gd.select = GdConfig {
            gate,
            exclude_below: 0.0,
            threshold: Some(0.5),
            threshold_by_length: true,
            ..GdConfig::default()
        };
        let params = Params::new(3, DType::F32, &Device::Cpu);
        let model = Transformer::new(&config, params.builder()).unwrap();
        let slopes: Vec<_> =
            params.vars().into_iter().filter(|(name, _)| name.ends_with(".threshold_slope")).collect();
        let [(_, slope)] = &slopes[..] else { panic!("{} slopes", slopes.len()) };
        slope
            .set(&Tensor::new(&[-2f32, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0], &Device::Cpu).unwrap())
            .unwrap();
        let ids: Vec<u32> = (0..48).map(|i| i * i * 7 % 256).collect();
        let ids = Tensor::from_vec(ids, (2, 24), &Device::Cpu).unwrap();
        let mask = Mask::causal(0).packed(vec![vec![0, 5, 24], vec![0, 1, 24]]);
        let forward = |pass: &Pass| Ok(model.forward(&ids, pass, None).map(drop)?);
        calibrate_thresholds(&model, &params, forward, &mask).unwrap();
        let stats = RefCell::new(Vec::new());
        forward(&Pass { stats: Some(&stats), ..Pass::new(&mask) }).unwrap();
        let selected = stats.take().remove(0).selected.unwrap();
        // A query without a runner-up has no margin: its gate is 1, and it does not count.
        let counted =
            |rho: f32, margin: f32| matches!(gate, Gate::Energy { .. }) || margin.is_finite() || rho < 1.0;
        let [rho, margin] = [selected.gate, selected.margin].map(|t| {
            t.transpose(0, 1)
                .unwrap()
                .contiguous()
                .unwrap()
                .flatten_from(1)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap()
        });
        assert_eq!(rho.len(), 8);
        for (rho, margin) in rho.iter().zip(&margin) {
            let rho: Vec<f32> = rho
                .iter()
                .zip(margin)
                .filter(|(rho, margin)| counted(**rho, **margin))
                .map(|(rho, _)| *rho)
                .collect();
            let mean = rho.iter().sum::<f32>() / rho.len() as f32;
            assert!(rho.len() > 40 && (mean - 0.5).abs() < 1e-4, "{gate:?}: {mean} over {}", rho.len());
        }
    }

    #[test]
    fn the_mean_gate_at_the_threshold_is_one_half() {
        let energies: Vec<f64> = (0..101).map(|i| (f64::from(i) / 10.0).powi(2)).collect();
        for temperature in [0.5, 3.0] {
            let tau = threshold(&energies, temperature);
            let gate = |e: &f64| 1.0 / (1.0 + ((e - tau) / temperature).exp());
            let mean = energies.iter().map(gate).sum::<f64>() / 101.0;
            assert!((mean - 0.5).abs() < 1e-6, "{mean} at {tau}");
        }
        assert!((threshold(&energies, 0.0) - 25.0).abs() < 1e-6, "the median");
        assert_eq!(threshold(&[], 1.0), 0.0);
    }
}
