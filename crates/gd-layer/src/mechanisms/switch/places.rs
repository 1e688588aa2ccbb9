//! The slots of the experts of a Switch layer.

use candle_core::{DType, Result, Tensor};

use crate::mechanisms::indices::{arange, index_or_none};

/// Where tokens stand among the slots of the experts.
pub(super) struct Places {
    /// The token in every slot `[E · capacity]`; T in an unused one.
    pub(super) token: Tensor,
    /// The slot of every token among those of all experts `[T]`; E · capacity if it was dropped.
    pub(super) row: Tensor,
    /// Its slot at its expert, i64 `[T]`; −1 if it was dropped.
    pub(super) slot: Tensor,
}

impl Places {
    pub(super) fn new(expert: &Tensor, experts: usize, capacity: usize) -> Result<Self> {
        let (tokens, device) = (expert.dim(0)?, expert.device());
        let constant = |x: usize, like: &Tensor| Tensor::full(x as u32, like.shape(), device);
        let all = arange(experts, device)?.unsqueeze(0)?;
        let count_where = |is: Tensor| is.to_dtype(DType::U32)?.sum(0);
        let start = count_where(expert.unsqueeze(1)?.broadcast_lt(&all)?)?;
        let count = count_where(expert.unsqueeze(1)?.broadcast_eq(&all)?)?;
        // Tokens by expert, and in their order within an expert: numbers that differ, since sorting is not stable on
        // every device.
        let order =
            ((expert * constant(tokens, expert)?)? + arange(tokens, device)?)?.arg_sort_last_dim(true)?;
        let slot = (order.arg_sort_last_dim(true)? - start.index_select(expert, 0)?)?;
        let fits = slot.lt(capacity as u32)?;
        let row = ((expert * constant(capacity, expert)?)? + &slot)?;
        let row = fits.where_cond(&row, &constant(experts * capacity, &row)?)?;
        let slot = index_or_none(&slot, &fits)?;
        // The slots of an expert stand at its part of the order.
        let number = arange(capacity, device)?.unsqueeze(0)?;
        let used = number.broadcast_lt(&count.unsqueeze(1)?)?.flatten_all()?;
        let place = start.unsqueeze(1)?.broadcast_add(&number)?.flatten_all()?;
        let place = used.where_cond(&place, &place.zeros_like()?)?;
        let token = used.where_cond(&order.index_select(&place, 0)?, &constant(tokens, &place)?)?;
        Ok(Self { token, row, slot })
    }
}
