//! Rows chosen by index: the k largest, rows of a matrix at given positions, and sums of rows at positions. Choices have
//! no gradient.

use candle_core::{D, DType, Device, Result, Tensor, bail};

use super::rows;

/// The softmax of `scores` `[.., N, M]` over the keys with `visible`, u8 of a shape that broadcasts to that of the scores.
pub(super) fn visible_softmax(scores: &Tensor, visible: &Tensor) -> Result<Tensor> {
    rows::softmax(scores, &visible.broadcast_as(scores.shape())?.contiguous()?)
}

/// The positions of the `k` largest entries in every row of `scores` `[.., M]`, u32 `[.., min(k, M)]` in ascending
/// order. Of equal entries, those of least index are taken, on every device.
pub(super) fn top_k_positions(scores: &Tensor, k: usize) -> Result<Tensor> {
    let scores = scores.detach().contiguous()?;
    let m = scores.dim(D::Minus1)?;
    let k = k.min(m);
    if k == 0 {
        bail!("top k: 0 of {m} entries");
    }
    let (sorted, _) = scores.sort_last_dim(false)?;
    let last = sorted.narrow(D::Minus1, k - 1, 1)?;
    // Sorting is not stable on every device, so each entry gets a number of its own: first those above the k-th, then
    // its equals, then the others, each in the order of their positions.
    let position = arange(m, scores.device())?.broadcast_as(scores.shape())?;
    let offset = |by: usize| position.broadcast_add(&Tensor::new(by as u32, scores.device())?);
    let below = scores.broadcast_eq(&last)?.where_cond(&offset(m)?, &offset(2 * m)?)?;
    let rank = scores.broadcast_gt(&last)?.where_cond(&position.contiguous()?, &below)?;
    let positions = rank.arg_sort_last_dim(true)?.narrow(D::Minus1, 0, k)?.contiguous()?;
    Ok(positions.sort_last_dim(true)?.0)
}

/// The numbers 0 .. `n` as u32.
pub(super) fn arange(n: usize, device: &Device) -> Result<Tensor> {
    Tensor::arange(0u32, n as u32, device)
}

/// The rows `index` (u32 `[.., K]`) of `x` `[.., N, D]`, with equal leading dimensions: `[.., K, D]`.
pub(super) fn take_rows(x: &Tensor, index: &Tensor) -> Result<Tensor> {
    let (n, d) = (x.dim(D::Minus2)?, x.dim(D::Minus1)?);
    let shape = [index.dims(), &[d]].concat();
    x.contiguous()?.reshape(((), d))?.index_select(&flat_rows(index, n)?, 0)?.reshape(shape)
}

/// The sum of the rows `x` `[.., K, D]` at their positions `index` (u32 `[.., K]`) among `n` rows: `[.., n, D]`.
pub(super) fn add_rows(x: &Tensor, index: &Tensor, n: usize) -> Result<Tensor> {
    let d = x.dim(D::Minus1)?;
    let leading = &index.dims()[..index.rank() - 1];
    let shape = [leading, &[n, d]].concat();
    let zeros = Tensor::zeros((leading.iter().product::<usize>() * n, d), x.dtype(), x.device())?;
    zeros.index_add(&flat_rows(index, n)?, &x.contiguous()?.reshape(((), d))?, 0)?.reshape(shape)
}

/// Positions `[.., K]` within matrices of `n` rows as rows of all matrices below each other.
fn flat_rows(index: &Tensor, n: usize) -> Result<Tensor> {
    let index = index.contiguous()?.reshape(((), index.dim(D::Minus1)?))?;
    let first = Tensor::arange_step(0u32, (index.dim(0)? * n) as u32, n as u32, index.device())?;
    index.broadcast_add(&first.unsqueeze(1)?)?.flatten_all()
}

/// Where `exists` (u8), `index` (u32) as i64; -1 elsewhere.
pub(super) fn index_or_none(index: &Tensor, exists: &Tensor) -> Result<Tensor> {
    exists.where_cond(&index.to_dtype(DType::I64)?, &Tensor::full(-1i64, index.shape(), index.device())?)
}

/// The products of matrices a `[.., X, Y]` and b `[.., Y, Z]`, whose leading dimensions broadcast. Those of candle have at
/// most two leading dimensions.
pub(super) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let rank = a.rank().max(b.rank());
    let leading = |t: &Tensor| [&vec![1; rank - t.rank()][..], &t.dims()[..t.rank() - 2]].concat();
    let leading: Vec<usize> = leading(a).into_iter().zip(leading(b)).map(|(a, b)| a.max(b)).collect();
    let matrices = |t: &Tensor| {
        let (rows, columns) = (t.dim(D::Minus2)?, t.dim(D::Minus1)?);
        let all = t.broadcast_as([&leading[..], &[rows, columns]].concat())?;
        all.contiguous()?.reshape(((), rows, columns))
    };
    let product = matrices(a)?.matmul(&matrices(b)?)?;
    product.reshape([&leading[..], &[a.dim(D::Minus2)?, b.dim(D::Minus1)?]].concat())
}

/// `x` `[.., D]` with rows of length 1; rows of zeros stay.
pub(super) fn unit_rows(x: &Tensor) -> Result<Tensor> {
    let squared = x.sqr()?.sum_keepdim(D::Minus1)?;
    let zero = squared.eq(0f64)?.to_dtype(x.dtype())?;
    x.broadcast_div(&(squared + zero)?.sqrt()?)
}

/// `x Wᵀ`: x `[.., I]`, w `[O, I]` -> `[.., O]`.
pub(super) fn project(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let (outputs, inputs) = w.dims2()?;
    let shape = [&x.dims()[..x.rank() - 1], &[outputs]].concat();
    x.contiguous()?.reshape(((), inputs))?.matmul(&w.t()?)?.reshape(shape)
}

/// One-hot rows of `index` `[..]` among `n` entries, `[.., n]` in `dtype`; a row of zeros for an index outside.
pub(super) fn one_hot(index: &Tensor, n: usize, dtype: DType) -> Result<Tensor> {
    let index = index.to_dtype(DType::I64)?.unsqueeze(D::Minus1)?;
    index.broadcast_eq(&Tensor::arange(0i64, n as i64, index.device())?)?.to_dtype(dtype)
}

/// The query heads of each key-value head: q `[B, H, N, D]` -> `[B, Hk, H / Hk, N, D]`. Query head h reads key-value
/// head `h / (H / Hk)`.
pub(super) fn grouped(q: &Tensor, kv_heads: usize) -> Result<Tensor> {
    let (b, h, n, d) = q.dims4()?;
    if kv_heads == 0 || h % kv_heads != 0 {
        bail!("{h} query heads over {kv_heads} key-value heads: a multiple is needed");
    }
    q.contiguous()?.reshape((b, kv_heads, h / kv_heads, n, d))
}
