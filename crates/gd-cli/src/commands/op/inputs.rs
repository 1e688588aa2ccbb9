//! What `gd op` reads: the input file's tensors, and the flags that stand in for them.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use gd_kernels::{Barrier, CANDIDATES, Mask};
use gd_model::io::safetensors::{self, Tensors};
use serde::Deserialize;
use serde_json::Value;

use super::args::MaskKind;
use crate::commands::usage;

/// Every tensor name that has a meaning.
const KNOWN: [&str; 11] =
    ["q", "k", "v", "prior", "beta", "alpha", "threshold", "rounds", "protected", "kv_len", "cu_seqlens"];
/// The upstream gradient, read with `--backward`.
const DOUT: &str = "dout";

/// The tensors of the input file.
pub(in crate::commands) struct Inputs {
    tensors: Tensors,
    path: String,
}

impl Inputs {
    pub(in crate::commands) fn read(path: &Path, device: &Device) -> Result<Self> {
        let tensors = safetensors::read(path, device)?;
        let inputs = Self { tensors, path: path.display().to_string() };
        inputs.required("q")?;
        inputs.required("k")?;
        let known: BTreeSet<_> = KNOWN.into_iter().chain([DOUT]).collect();
        let unknown: Vec<_> = inputs.tensors.keys().filter(|name| !known.contains(name.as_str())).collect();
        if !unknown.is_empty() {
            tracing::warn!("{}: no use for the tensors {unknown:?}", inputs.path);
        }
        Ok(inputs)
    }

    pub(in crate::commands) fn optional(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    pub(super) fn required(&self, name: &str) -> Result<&Tensor> {
        self.optional(name).with_context(|| {
            let held: Vec<_> = self.tensors.keys().map(String::as_str).collect();
            format!("{}: no tensor `{name}` (the file holds: {})", self.path, held.join(", "))
        })
    }

    /// q, k or v: a floating-point tensor of four dimensions, the last of them contiguous.
    pub(in crate::commands) fn operand(&self, name: &str) -> Result<&Tensor> {
        let t = self.required(name)?;
        if t.rank() != 4 || !t.dtype().is_float() {
            bail!(
                "{}: `{name}` is {:?} {:?}, expected four dimensions of F32, F16, BF16 or F64",
                self.path,
                t.dtype(),
                t.dims()
            );
        }
        Ok(t)
    }

    /// A per-head parameter `[Hq]` in `dtype`: the tensor `name`, or `flag` for every head.
    pub(in crate::commands) fn per_head(
        &self,
        name: &str,
        flag: Option<f64>,
        heads: usize,
        dtype: DType,
    ) -> Result<Option<Tensor>> {
        let tensor = match (self.optional(name), flag) {
            (Some(_), Some(x)) => {
                return Err(usage(format!("--{name} {x}: {} holds a tensor `{name}` already", self.path)));
            }
            (None, None) => return Ok(None),
            (Some(t), None) => t.clone(),
            (None, Some(x)) => Tensor::full(x, heads, self.required("q")?.device())?,
        };
        if tensor.dims() != [heads] {
            bail!(
                "{}: `{name}` has shape {:?}, expected [{heads}] for the heads of q",
                self.path,
                tensor.dims()
            );
        }
        Ok(Some(tensor.to_dtype(dtype)?))
    }

    /// The weights of the refinement rounds `[Hq, R]`, or nothing for one round of weight 1.
    pub(super) fn rounds(&self, flag: Option<u64>, heads: usize, dtype: DType) -> Result<Option<Tensor>> {
        match (self.optional("rounds"), flag) {
            (Some(t), Some(r)) if t.dims() != [heads, r as usize] => Err(usage(format!(
                "--refine {r}: the tensor `rounds` has shape {:?}, expected [{heads}, {r}]",
                t.dims()
            ))),
            (Some(t), _) => Ok(Some(t.to_dtype(dtype)?)),
            (None, Some(r)) if r > 1 => {
                Ok(Some(Tensor::ones((heads, r as usize), dtype, self.required("q")?.device())?))
            }
            (None, _) => Ok(None),
        }
    }

    /// The protected keys `[B|1, Hq|Hk|1, N|1, P]`; `[B, P]` stands for all heads and queries.
    pub(super) fn protected(&self) -> Result<Option<Tensor>> {
        let Some(t) = self.optional("protected") else { return Ok(None) };
        if t.dtype() != DType::I32 {
            bail!("{}: `protected` is {:?}, expected I32", self.path, t.dtype());
        }
        match *t.dims() {
            [b, p] => Ok(Some(t.reshape((b, 1, 1, p))?)),
            [_, _, _, _] => Ok(Some(t.clone())),
            ref other => {
                bail!("{}: `protected` has shape {other:?}, expected two or four dimensions", self.path)
            }
        }
    }

    /// The mask of the flags `--mask` and `--kv-offset`, narrowed by `kv_len` and `cu_seqlens`.
    pub(in crate::commands) fn mask(&self, kind: MaskKind, kv_offset: i64) -> Result<Mask> {
        let mut mask = match kind {
            // Without a mask the offset matters only to packed sequences, which it would shift.
            MaskKind::None if kv_offset != 0 && self.optional("cu_seqlens").is_some() => {
                return Err(usage(format!(
                    "--kv-offset {}: packed sequences are shifted only under --mask causal or window:W",
                    kv_offset
                )));
            }
            MaskKind::None => Mask::none(),
            MaskKind::Causal => Mask::causal(kv_offset),
            MaskKind::Window(w) => Mask::window(w, kv_offset),
        };
        if let Some(rows) = self.lengths("kv_len", 1)? {
            mask = mask.kv_len(rows.concat());
        }
        if let Some(rows) = self.lengths("cu_seqlens", 2)? {
            mask = mask.packed(rows);
        }
        Ok(mask)
    }

    /// The rows of an I32 tensor of one to `rank` dimensions, none of whose entries is negative.
    fn lengths(&self, name: &str, rank: usize) -> Result<Option<Vec<Vec<usize>>>> {
        let Some(t) = self.optional(name) else { return Ok(None) };
        if t.dtype() != DType::I32 || t.rank() == 0 || t.rank() > rank {
            bail!(
                "{}: `{name}` is {:?} {:?}, expected I32 of {}",
                self.path,
                t.dtype(),
                t.dims(),
                if rank == 1 { "one dimension" } else { "one or two dimensions" }
            );
        }
        let rows = if t.rank() == 1 { t.unsqueeze(0)? } else { t.clone() }.to_vec2::<i32>()?;
        let length =
            |x: i32| usize::try_from(x).with_context(|| format!("{}: `{name}` holds {x}", self.path));
        rows.into_iter().map(|row| row.into_iter().map(length).collect()).collect::<Result<_>>().map(Some)
    }

    /// The gradient of the output in the shape and dtype of `out`; ones if the file has none.
    pub(super) fn dout(&self, out: &Tensor) -> Result<Tensor> {
        let Some(t) = self.optional(DOUT) else { return Ok(out.ones_like()?) };
        if t.dims() != out.dims() {
            bail!("{}: `{DOUT}` has shape {:?}, expected {:?} as out", self.path, t.dims(), out.dims());
        }
        Ok(t.to_dtype(out.dtype())?)
    }
}

/// The number of candidates for `keys` keys.
pub(super) fn candidates(flag: Option<i64>, keys: usize) -> Result<usize> {
    let Some(k) = flag else {
        return Ok(CANDIDATES.into_iter().filter(|&c| c <= 8 && c <= keys).max().unwrap_or(1));
    };
    match CANDIDATES.into_iter().find(|&c| i64::try_from(c) == Ok(k)) {
        None => Err(usage(format!("--k {k}: expected one of {CANDIDATES:?}"))),
        Some(c) if c > keys => Err(usage(format!("--k {k}: more candidates than the {keys} keys"))),
        Some(c) => Ok(c),
    }
}

/// The barrier's parameters in a JSON file, under the short names or the reference's, at the top
/// or in a `preset` object.
#[derive(Deserialize)]
struct BarrierFile {
    #[serde(alias = "barrier_floor")]
    floor: f64,
    #[serde(alias = "rescue_margin")]
    margin: f64,
    #[serde(alias = "barrier_strength")]
    strength: f64,
    #[serde(alias = "entropy_trigger")]
    entropy: f64,
    #[serde(alias = "trigger_slack")]
    slack: f64,
}

/// Reads `--barrier`: `name=value` pairs, or a file of them.
pub(super) fn barrier(spec: &str) -> Result<Barrier> {
    let at = || format!("--barrier {spec}");
    let tree = if spec.contains('=') {
        let pair = |part: &str| {
            let (name, value) = part.split_once('=')?;
            Some((name.trim().to_owned(), value.trim().parse::<f64>().ok()?.into()))
        };
        let pairs = spec
            .split(',')
            .map(|part| pair(part).ok_or_else(|| usage(format!("{}: `{part}` is not NAME=NUMBER", at()))));
        Value::Object(pairs.collect::<Result<_>>()?)
    } else {
        serde_json::from_str(&std::fs::read_to_string(spec).with_context(at)?).with_context(at)?
    };
    barrier_of(tree).map_err(|e| usage(format!("{}: {e}", at())))
}

/// The barrier of a JSON file that has been read.
pub(in crate::commands) fn barrier_of(mut tree: Value) -> Result<Barrier, serde_json::Error> {
    let tree = tree.get_mut("preset").map(Value::take).unwrap_or(tree);
    let b: BarrierFile = serde_json::from_value(tree)?;
    Ok(Barrier {
        floor: b.floor,
        margin: b.margin,
        strength: b.strength,
        entropy_trigger: b.entropy,
        slack: b.slack,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_candidate_number_fits_the_keys() {
        for (keys, k) in [(0, 1), (1, 1), (3, 2), (7, 4), (8, 8), (1000, 8)] {
            assert_eq!(candidates(None, keys).ok(), Some(k), "{keys} keys");
        }
        assert_eq!(candidates(Some(64), 64).ok(), Some(64));
        for (flag, keys) in [(3, 9), (0, 9), (-1, 9), (128, 199), (8, 7)] {
            assert!(candidates(Some(flag), keys).is_err(), "--k {flag} for {keys} keys was accepted");
        }
    }

    #[test]
    fn barriers_are_read_from_pairs_and_from_the_reference_preset() -> Result<()> {
        let pairs = barrier("floor=0.18,margin=1.45,strength=2.8,entropy=0.63,slack=0.45")?;
        let file = tempfile::NamedTempFile::new()?;
        let preset = r#"{"preset": {"noise_std": 0.42, "barrier_floor": 0.18, "rescue_margin": 1.45,
            "barrier_strength": 2.8, "entropy_trigger": 0.63, "trigger_slack": 0.45}}"#;
        std::fs::write(file.path(), preset)?;
        assert_eq!(barrier(&file.path().display().to_string())?, pairs);
        for bad in ["floor=0.1", "floor=a,margin=1,strength=1,entropy=1,slack=1", "nowhere.json"] {
            assert!(format!("{:#}", barrier(bad).unwrap_err()).contains(bad));
        }
        Ok(())
    }
}
