//! Traces in formats of other programs: arrays for NumPy, and lines of JSON.

use std::io::Write;

use candle_core::{Device, Tensor};

use super::file::Trace;
use super::record::Record;
use crate::error::{Error, Result};
use crate::io::files::read_file;

/// A trace as arrays, each with its name. P positions, R selecting heads in the order of the records, S softmax heads whose
/// weights are recorded, and W weights of each of these:
///
/// | name | shape | content |
/// |---|---|---|
/// | `token`, `generated` | `[P]` i64 | the token, and 1 if it was generated |
/// | `layer`, `head` | `[R]` i64 | the place of a selecting head |
/// | `selected` | `[P, R]` i64 | the position that was read; -1: none |
/// | `energy`, `margin`, `coherence`, `gate`, `share`, `memory` | `[P, R]` f32 | as in a [`Row`](super::Row) |
/// | `blend_layer`, `blend_head` | `[S]` i64 | the place of a softmax head |
/// | `blend_key`, `blend_weight` | `[P, S, W]` i64 and f32 | its greatest weights and their keys; -1 and 0: none |
///
/// # Errors
/// As [`Trace::decoded`].
pub fn arrays(trace: &Trace) -> Result<Vec<(&'static str, Tensor)>> {
    let records = trace.decoded()?;
    let header = &trace.header;
    let (positions, rows) = (records.len(), header.rows());
    let places = |layers: Vec<&super::Layer>| -> [Vec<i64>; 2] {
        let all = || layers.iter().flat_map(|layer| (0..layer.heads).map(|head| [layer.layer, head]));
        [0, 1].map(|part| all().map(|place| place[part] as i64).collect())
    };
    let vector = |values: Vec<i64>| Tensor::new(values, &Device::Cpu);
    let [layer, head] = places(header.selecting().collect());
    let mut arrays = vec![
        ("token", vector(records.iter().map(|r| i64::from(r.token)).collect())?),
        ("generated", vector(records.iter().map(|r| i64::from(r.generated)).collect())?),
    ];
    if rows > 0 {
        let table = |of: fn(&super::Row) -> f32| {
            let values: Vec<f32> = records.iter().flat_map(|r| r.rows.iter().map(of)).collect();
            Tensor::from_vec(values, (positions, rows), &Device::Cpu)
        };
        let selected: Vec<i64> =
            records.iter().flat_map(|r| r.rows.iter().map(|row| i64::from(row.selected))).collect();
        arrays.extend([
            ("layer", vector(layer)?),
            ("head", vector(head)?),
            ("selected", Tensor::from_vec(selected, (positions, rows), &Device::Cpu)?),
            ("energy", table(|row| row.energy)?),
            ("margin", table(|row| row.margin)?),
            ("coherence", table(|row| row.coherence)?),
            ("gate", table(|row| row.gate)?),
            ("share", table(|row| row.share)?),
            ("memory", table(|row| row.memory)?),
        ]);
    }
    if let Some(weights) = header.blending().map(|layer| layer.weights).max() {
        arrays.extend(blends(&records, places(header.blending().collect()), weights)?);
    }
    Ok(arrays)
}

/// The arrays of the softmax heads.
fn blends(
    records: &[Record],
    [layer, head]: [Vec<i64>; 2],
    weights: usize,
) -> Result<[(&'static str, Tensor); 4]> {
    let shape = (records.len(), layer.len(), weights);
    let pairs = || {
        records
            .iter()
            .flat_map(|record| &record.blends)
            .flat_map(|blend| blend.iter().copied().chain(std::iter::repeat((-1, 0.0))).take(weights))
    };
    let keys: Vec<i64> = pairs().map(|pair| i64::from(pair.0)).collect();
    Ok([
        ("blend_layer", Tensor::new(layer, &Device::Cpu)?),
        ("blend_head", Tensor::new(head, &Device::Cpu)?),
        ("blend_key", Tensor::from_vec(keys, shape, &Device::Cpu)?),
        ("blend_weight", Tensor::from_vec(pairs().map(|pair| pair.1).collect(), shape, &Device::Cpu)?),
    ])
}

/// The [`arrays`] of a trace as a `.npz` file of NumPy, without compression.
///
/// # Errors
/// As [`arrays`]; a temporary file that cannot be written.
pub fn npz(trace: &Trace) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir().map_err(|e| Error::write(&std::env::temp_dir(), e))?;
    let file = folder.path().join("trace.npz");
    Tensor::write_npz(&arrays(trace)?, &file)?;
    read_file(&file, "archive")
}

/// Writes a trace as lines of JSON: the header, then one record on each line. Numbers that JSON cannot hold, the infinite
/// energy and margin of a head that abstains and a coherence point that is not computed, are `null`.
///
/// # Errors
/// As [`Trace::decoded`]; a number that is no JSON, or `out`.
pub fn json_lines(trace: &Trace, out: &mut dyn Write) -> Result<()> {
    let failed = |e: std::io::Error| Error::write(&trace.path, e);
    let mut line = |text: serde_json::Result<String>| {
        let text = text.map_err(|e| failed(e.into()))?;
        writeln!(out, "{text}").map_err(failed)
    };
    line(serde_json::to_string(&trace.header))?;
    trace.decoded()?.iter().try_for_each(|record| line(serde_json::to_string(record)))
}
