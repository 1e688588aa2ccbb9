//! Spans around the passes of operators, from which `gd bench step` measures the time of each operator.

use tracing::span::EnteredSpan;

/// A pass of an operator.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pass {
    Forward,
    Backward,
}

/// Enters the span of a pass of the operator `op` until the result is dropped. It costs nothing unless a subscriber of
/// `tracing` asks for the target `gd_kernels::operator` at the level of traces.
pub(crate) fn operator_span(op: &'static str, pass: Pass) -> EnteredSpan {
    let backward = matches!(pass, Pass::Backward);
    tracing::trace_span!(target: "gd_kernels::operator", "operator", op, backward).entered()
}
