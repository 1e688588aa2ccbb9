//! The result of `gd op`: a safetensors file and a summary.

use std::path::Path;

use anyhow::Result;
use candle_core::Tensor;
use gd_kernels::ScanPlan;
use gd_model::io::safetensors::{self, Tensors};
use serde_json::{Map, Value, json};

use crate::context::Context;

/// Writes the tensors and prints a summary. `selected` holds one position per query and head, negative if the head
/// abstains, and comes with the number of candidates whose energy overflowed.
pub(super) fn finish(
    operator: &str,
    path: &Path,
    plan: &ScanPlan,
    out: &Tensors,
    (selected, overflowed): (&Tensor, usize),
    ctx: &Context,
) -> Result<()> {
    let out: Tensors =
        out.iter().map(|(name, t)| Ok((name.clone(), t.detach().contiguous()?))).collect::<Result<_>>()?;
    safetensors::write(path, &out)?;
    let selected = selected.flatten_all()?.to_vec1::<i32>()?;
    let abstained = selected.iter().filter(|&&j| j < 0).count();
    if ctx.json {
        let tensors: Map<String, Value> = out
            .iter()
            .map(|(name, t)| {
                (name.clone(), json!({ "shape": t.dims(), "dtype": format!("{:?}", t.dtype()) }))
            })
            .collect();
        return ctx.print(json!({
            "operator": operator,
            "plan": plan.to_string(),
            "out": path,
            "queries": selected.len(),
            "abstained": abstained,
            "overflowed": overflowed,
            "tensors": tensors,
        }));
    }
    let names: Vec<_> = out.keys().map(String::as_str).collect();
    let overflowed = match overflowed {
        0 => String::new(),
        n => format!(", the energies of {n} candidates overflowed"),
    };
    ctx.print(format_args!(
        "{operator} on {plan}: {abstained} of {} queries abstained{overflowed}; wrote {} to {}",
        selected.len(),
        names.join(", "),
        path.display()
    ))
}
