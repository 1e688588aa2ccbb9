//! The checked mode for the tensors that a scan does not read: value rows and the upstream gradient.

use anyhow::{Result, bail};
use candle_core::{DType, Device, Tensor};

/// The values of a tensor in row-major order.
fn values(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// Refuses NaN and infinities in a tensor `[B, H, N, D]`, of which `rows` are looked at, as flat numbers.
fn finite(name: &str, t: &Tensor, rows: impl IntoIterator<Item = usize>) -> Result<()> {
    let ((_, heads, count, dim), values) = (t.dims4()?, values(t)?);
    for row in rows {
        if let Some(d) = values[row * dim..(row + 1) * dim].iter().position(|x| !x.is_finite()) {
            let (b, h, i) = (row / count / heads, row / count % heads, row % count);
            bail!("{name}[{b}, {h}, {i}, {d}] is {}, not finite", values[row * dim + d]);
        }
    }
    Ok(())
}

/// Refuses NaN and infinities in the upstream gradient `[B, Hq, N, Dv]`.
pub(super) fn upstream_gradient(dout: &Tensor) -> Result<()> {
    let (batch, heads, queries, _) = dout.dims4()?;
    finite("dout", dout, 0..batch * heads * queries)
}

/// Refuses NaN and infinities in the rows of v `[B, Hk, M, Dv]` that are read: those of the keys `index`
/// `[B, Hq, N, ..]`, negative where there is none. Other rows never reach the result.
pub(super) fn value_rows(v: &Tensor, index: &Tensor) -> Result<()> {
    let ((_, kv_heads, keys, _), q_heads) = (v.dims4()?, index.dim(1)?);
    let index_of = index.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<i32>()?;
    let per_head = index_of.len() / (index.dim(0)? * q_heads);
    let row = |(at, &j): (usize, &i32)| {
        let (b, h) = (at / per_head / q_heads, at / per_head % q_heads);
        let row = |j| (b * kv_heads + h / (q_heads / kv_heads)) * keys + j;
        usize::try_from(j).ok().map(row)
    };
    finite("v", v, index_of.iter().enumerate().filter_map(row))
}
