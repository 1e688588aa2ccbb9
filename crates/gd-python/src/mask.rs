//! Which keys are visible to a query.

use pyo3::prelude::*;

/// Which keys each query may select from. Built by `none`, `causal` or `window`, and narrowed by the methods; the conditions
/// intersect.
#[pyclass(frozen, eq, from_py_object, module = "gd_attention")]
#[derive(Clone, PartialEq)]
pub(crate) struct Mask {
    pub(crate) mask: gd_kernels::Mask,
}

impl From<gd_kernels::Mask> for Mask {
    fn from(mask: gd_kernels::Mask) -> Self {
        Self { mask }
    }
}

#[pymethods]
impl Mask {
    /// Every key is visible to every query.
    #[staticmethod]
    fn none() -> Self {
        gd_kernels::Mask::none().into()
    }

    /// The keys j <= i + offset are visible to query i.
    #[staticmethod]
    #[pyo3(signature = (offset=0))]
    fn causal(offset: i64) -> Self {
        gd_kernels::Mask::causal(offset).into()
    }

    /// The `window` keys with i + offset - window < j <= i + offset are visible to query i.
    #[staticmethod]
    #[pyo3(signature = (window, offset=0))]
    fn window(window: usize, offset: i64) -> Self {
        gd_kernels::Mask::window(window, offset).into()
    }

    /// Sets an offset for every batch entry.
    fn with_offsets(&self, offsets: Vec<i64>) -> Self {
        self.mask.clone().with_offsets(offsets).into()
    }

    /// Restricts each query to its own packed sequence: per batch entry, or once for all, the boundaries [0, e1, .., M] on the
    /// key axis.
    fn packed(&self, cumulative: Vec<Vec<usize>>) -> Self {
        self.mask.clone().packed(cumulative).into()
    }

    /// Limits batch entry b to its first lengths[b] keys; one length may serve all.
    fn kv_len(&self, lengths: Vec<usize>) -> Self {
        self.mask.clone().kv_len(lengths).into()
    }

    /// The range of the keys that query i of batch entry b may see among `keys` keys, as (start, stop).
    fn visible(&self, b: usize, i: usize, keys: usize) -> (usize, usize) {
        let visible = self.mask.visible(b, i, keys);
        (visible.start, visible.end)
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.mask)
    }
}
