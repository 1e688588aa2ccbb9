//! The input tensors of `gd op`, from a file or from the flags that replace them.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use gd_kernels::{CANDIDATES, Mask};
use gd_model::io::safetensors::{self, Tensors};

use super::values::MaskKind;
use crate::context::usage;

/// The names of all input tensors except the upstream gradient.
const NAMES: [&str; 11] =
    ["q", "k", "v", "prior", "beta", "alpha", "threshold", "rounds", "protected", "kv_len", "cu_seqlens"];
/// The name of the upstream gradient, which `--backward` uses.
const DOUT: &str = "dout";

/// The tensors of the input file.
pub(in crate::commands) struct Inputs {
    tensors: Tensors,
    path: String,
}

impl Inputs {
    /// Reads the file, which must contain q and k.
    pub(in crate::commands) fn read(path: &Path, device: &Device) -> Result<Self> {
        let tensors = safetensors::load(path, device)?;
        let inputs = Self { tensors, path: path.display().to_string() };
        inputs.required("q")?;
        inputs.required("k")?;
        let names: BTreeSet<_> = NAMES.into_iter().chain([DOUT]).collect();
        let unused: Vec<_> = inputs.tensors.keys().filter(|name| !names.contains(name.as_str())).collect();
        if !unused.is_empty() {
            tracing::warn!("{}: the tensors {unused:?} are not used", inputs.path);
        }
        Ok(inputs)
    }

    /// A tensor that the file may contain.
    pub(in crate::commands) fn optional(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// A tensor that the file must contain.
    fn required(&self, name: &str) -> Result<&Tensor> {
        self.optional(name).with_context(|| {
            let names: Vec<_> = self.tensors.keys().map(String::as_str).collect();
            format!("{}: no tensor `{name}` (the file contains: {})", self.path, names.join(", "))
        })
    }

    /// q, k or v: a floating-point tensor with four dimensions.
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

    /// A per-head parameter `[Hq]` in `dtype`: the tensor `name`, or the value of the flag for every head.
    pub(in crate::commands) fn per_head(
        &self,
        name: &str,
        flag: Option<f64>,
        heads: usize,
        dtype: DType,
    ) -> Result<Option<Tensor>> {
        let tensor = match (self.optional(name), flag) {
            (Some(_), Some(x)) => {
                return Err(usage(format!("--{name} {x}: {} already contains a tensor `{name}`", self.path)));
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

    /// The weights of the refinement rounds `[Hq, R]`; `None` for one round with weight 1.
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

    /// The protected keys `[B|1, Hq|Hk|1, N|1, P]`. A tensor `[B, P]` applies to all heads and queries.
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

    /// The mask that the flags `--mask` and `--kv-offset` and the tensors `kv_len` and `cu_seqlens` describe.
    pub(in crate::commands) fn mask(&self, kind: MaskKind, kv_offset: i64) -> Result<Mask> {
        let mut mask = match kind {
            // Without a mask the offset has no effect, except that it would shift packed sequences.
            MaskKind::None if kv_offset != 0 && self.optional("cu_seqlens").is_some() => {
                return Err(usage(format!(
                    "--kv-offset {}: packed sequences have an offset only with --mask causal or window:W",
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

    /// The rows of an I32 tensor with one to `rank` dimensions and no negative values.
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
            |x: i32| usize::try_from(x).with_context(|| format!("{}: `{name}` contains {x}", self.path));
        rows.into_iter().map(|row| row.into_iter().map(length).collect()).collect::<Result<_>>().map(Some)
    }

    /// The upstream gradient with the shape and dtype of `out`; ones if the file has none.
    pub(super) fn dout(&self, out: &Tensor) -> Result<Tensor> {
        let Some(t) = self.optional(DOUT) else { return Ok(out.ones_like()?) };
        if t.dims() != out.dims() {
            bail!("{}: `{DOUT}` has shape {:?}, expected {:?} as out", self.path, t.dims(), out.dims());
        }
        Ok(t.to_dtype(out.dtype())?)
    }
}

/// The value of `--k` for a number of keys. Without the flag it is at most 8.
pub(super) fn candidate_count(flag: Option<i64>, keys: usize) -> Result<usize> {
    let Some(k) = flag else {
        return Ok(CANDIDATES.into_iter().filter(|&c| c <= 8 && c <= keys).max().unwrap_or(1));
    };
    match CANDIDATES.into_iter().find(|&c| i64::try_from(c) == Ok(k)) {
        None => Err(usage(format!("--k {k}: expected one of {CANDIDATES:?}"))),
        Some(c) if c > keys => Err(usage(format!("--k {k}: more candidates than the {keys} keys"))),
        Some(c) => Ok(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_number_of_candidates_is_at_most_the_number_of_keys() {
        for (keys, k) in [(0, 1), (1, 1), (3, 2), (7, 4), (8, 8), (1000, 8)] {
            assert_eq!(candidate_count(None, keys).ok(), Some(k), "{keys} keys");
        }
        assert_eq!(candidate_count(Some(64), 64).ok(), Some(64));
        for (flag, keys) in [(3, 9), (0, 9), (-1, 9), (128, 199), (8, 7)] {
            assert!(candidate_count(Some(flag), keys).is_err(), "--k {flag} for {keys} keys was accepted");
        }
    }
}
