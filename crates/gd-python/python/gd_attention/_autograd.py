"""The functions of this package in the graph of PyTorch's autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ._calls import Native


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, native: Native, names: list[str], results: list[str], *arrays: Any) -> Any:
        wrt = [name for name, needed in zip(names, ctx.needs_input_grad[3:], strict=True) if needed]
        detached = [array.detach() if isinstance(array, torch.Tensor) else array for array in arrays]
        outputs, ctx.gradients = native(dict(zip(names, detached, strict=True)), wrt)
        results.extend(outputs)
        tensors = [torch.from_dlpack(output) for output in outputs.values()]
        constant = [t for t, output in zip(tensors, outputs.values(), strict=True) if not output.differentiable]
        ctx.mark_non_differentiable(*constant)
        # The graph of Rust reads these tensors in the backward pass. Autograd reports one that was changed in place.
        ctx.save_for_backward(*(a for a in arrays if isinstance(a, torch.Tensor)), *tensors)
        ctx.names = names
        ctx.results = [name if output.differentiable else None for name, output in outputs.items()]
        ctx.set_materialize_grads(False)
        return tuple(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        _ = ctx.saved_tensors
        named = zip(ctx.results, gradients, strict=True)
        given = {name: gradient for name, gradient in named if name is not None and gradient is not None}
        computed = ctx.gradients.backward(given) if given and ctx.gradients is not None else {}
        arrays = (torch.from_dlpack(computed[name]) if name in computed else None for name in ctx.names)
        return None, None, None, *arrays


def call(native: Native, arrays: dict[str, Any]) -> dict[str, Any]:
    """The results of a native function by name, with gradients for the arrays that require them."""
    results: list[str] = []
    tensors = _Call.apply(native, list(arrays), results, *arrays.values())
    return dict(zip(results, tensors, strict=True))
