//! Projections to and from heads as one operator each, for trainings in f32 and f64 on the CPU.
//!
//! Rows are processed in blocks, so that the products stay in the cache; a backward pass computes them again where it needs
//! them.

mod from_heads;
mod to_heads;

use crate::backend::cpu::parallel::par_items;
use crate::backend::cpu::product::TASK_ROWS;

pub(super) use from_heads::project_from_heads;
pub(super) use to_heads::project_to_heads;

/// The sizes of heads `[B, H, N, D]`.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    rows: usize,
    head_dim: usize,
}

/// The rows of a task within one batch entry: its index, the first row, and these rows of every head `[rows, D]`.
type HeadRows<'a, T> = (usize, usize, Vec<&'a mut [T]>);

impl Sizes {
    /// The number of elements.
    fn len(self) -> usize {
        self.batch * self.heads * self.rows * self.head_dim
    }

    /// The elements of a position in all heads.
    fn width(self) -> usize {
        self.heads * self.head_dim
    }

    /// Of row `m` of `[B N, H D]` and a head, the row of `[B, H, N, D]`.
    #[inline(always)]
    fn row(self, m: usize, head: usize) -> usize {
        (m / self.rows * self.heads + head) * self.rows + m % self.rows
    }

    /// Calls `f` for the rows of all tasks of `out` `[B, H, N, D]`, on all threads.
    fn for_head_rows<T: Send>(self, out: &mut [T], f: &(dyn Fn(HeadRows<'_, T>) + Sync)) {
        let mut tasks = Vec::new();
        for (b, entry) in out.chunks_mut(self.rows * self.width()).enumerate() {
            let heads = entry.chunks_mut(self.rows * self.head_dim);
            let mut heads: Vec<_> = heads.map(|head| head.chunks_mut(TASK_ROWS * self.head_dim)).collect();
            for first in (0..self.rows).step_by(TASK_ROWS) {
                tasks.push((b, first, heads.iter_mut().filter_map(Iterator::next).collect()));
            }
        }
        par_items(tasks, &|_, task| f(task));
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Result, Tensor};

    use crate::ops::agreement::{agree, noise};
    use crate::{HeadProjection, Rotation, project_from_heads, project_to_heads, rms_norm, rotary};

    #[test]
    fn projections_to_heads_agree_with_their_composition() -> Result<()> {
        let dtype = DType::F64;
        let (b, n, c, h, d) = (2, 19, 10, 3, 8);
        let (cos, sin) = (noise(7, &[40, 4], dtype)?, noise(8, &[40, 4], dtype)?);
        let inputs = [noise(1, &[b, n, c], dtype)?, noise(2, &[h * d, c], dtype)?, noise(3, &[d], dtype)?];
        let mut cases = 0;
        for with_norm in [false, true] {
            for offsets in [None, Some(&[3][..]), Some(&[5, 0])] {
                let inputs = if with_norm { &inputs[..] } else { &inputs[..2] };
                let fused = |t: &[Tensor]| {
                    let rotation = offsets.map(|offsets| Rotation { cos: &cos, sin: &sin, offsets });
                    let heads = HeadProjection {
                        head_dim: d,
                        bias: None,
                        norm: t.get(2).map(|w| (w, 1e-3)),
                        rotation,
                    };
                    Ok(project_to_heads(&t[0], &t[1], &heads)?)
                };
                agree(inputs, fused, |t| {
                    let y = t[0].broadcast_matmul(&t[1].t()?)?.reshape((b, n, h, d))?;
                    let y = match t.get(2) {
                        Some(weight) => rms_norm(&y, weight, 1e-3)?,
                        None => y,
                    };
                    let y = y.transpose(1, 2)?;
                    Ok(match offsets {
                        Some(offsets) => rotary(&y, &cos, &sin, offsets)?,
                        None => y,
                    })
                })?;
                cases += 1;
            }
        }
        assert_eq!(cases, 6);
        Ok(())
    }

    #[test]
    fn projections_from_heads_agree_with_their_composition() -> Result<()> {
        let (b, n, c, h, d) = (2, 19, 10, 3, 8);
        let inputs = [noise(1, &[b, n, h, d], DType::F64)?, noise(2, &[c, h * d], DType::F64)?];
        agree(
            &inputs,
            |t| Ok(project_from_heads(&t[0].transpose(1, 2)?, &t[1], None)?),
            |t| t[0].reshape((b, n, h * d))?.broadcast_matmul(&t[1].t()?),
        )
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() -> Result<()> {
        let t = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
        let heads = HeadProjection { head_dim: 5, bias: None, norm: None, rotation: None };
        let error = project_to_heads(&t(&[1, 40, 4])?, &t(&[12, 4])?, &heads).unwrap_err().to_string();
        assert!(error.contains("[12, 4]") && error.contains("dimension of 5"), "{error}");
        let error = project_from_heads(&t(&[1, 3, 40, 4])?, &t(&[8, 13])?, None).unwrap_err().to_string();
        assert!(error.contains("[8, 13]"), "{error}");
        Ok(())
    }
}
