//! The checked mode of a scan for tensors on a GPU.

use candle_core::{Device, Tensor};

use crate::backend::check::{head_values, positive};
use crate::backend::cpu::element::{Element, acc_dtype, by_float};
use crate::backend::cpu::view::with_view;
use crate::backend::graph::with_contiguous_rows;
use crate::error::Result;
use crate::ops::scan::cpu::arguments::{Arguments, prior_values, protected_keys};
use crate::ops::scan::cpu::check;
use crate::ops::scan::options::Scan;
use crate::ops::scan::problem::Problem;

/// Copies the arguments of a scan to the host and checks their values there.
pub(crate) fn check_on_host(problem: &Problem, q: &Tensor, k: &Tensor, scan: &Scan) -> Result<()> {
    let host = |t: &Tensor| t.detach().to_device(&Device::Cpu);
    let q = with_contiguous_rows(&host(q)?.to_dtype(acc_dtype(problem.dtype))?)?;
    let k = with_contiguous_rows(&host(k)?)?;
    if let Some(protected) = scan.protected {
        protected_keys(&host(protected)?, problem)?;
    }
    by_float!("scan", problem.key_dtype, T => {
        type A = <T as Element>::Acc;
        let beta = head_values::<A>("beta", &host(scan.beta)?, problem.q_heads)?;
        positive("beta", &beta)?;
        let prior = scan.prior.map(|p| prior_values(&host(p)?, problem)).transpose()?;
        with_view::<A, _>(&q, |q| with_view::<T, _>(&k, |k| {
            let x = Arguments {
                q, k, beta: &beta, prior: prior.as_ref(), protected: None, mask: scan.mask, int8: None,
            };
            check::rows(problem, &x)
        }))
    })
}
