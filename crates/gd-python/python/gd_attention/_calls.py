"""Calls of native functions: arrays of NumPy and PyTorch, and gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from . import _native

if TYPE_CHECKING:
    import torch

Array: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"
Result = TypeVar("Result")
Native: TypeAlias = "Callable[[dict[str, Any], list[str]], tuple[dict[str, _native.Array], _native.Gradients | None]]"


@dataclass
class _Recording:
    """What `vjp` asks of the call that it makes."""

    wrt: tuple[str, ...]
    gradients: _native.Gradients | None = None
    results: dict[str, Any] = field(default_factory=dict)


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


def is_torch(array: object) -> bool:
    """Whether an array is a tensor of PyTorch, which is not imported for that."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def given(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that are not None; what is no array, such as a list or a number, as an array of NumPy, and bool as uint8."""
    arrays = {name: array for name, array in arrays.items() if array is not None}
    return {
        name: _with_bytes(name, array if hasattr(array, "__dlpack__") else np.asarray(array))
        for name, array in arrays.items()
    }


def _with_bytes(name: str, array: Any) -> Any:
    """An array of bool as one of uint8 in the same memory; others as they are. A tensor of a GPU is an error."""
    if is_torch(array):
        import torch

        if array.device.type != "cpu":
            raise ValueError(f"{name} is on the device {array.device}, not on the CPU")
        # The memory of such a view, as the imaginary part of a conjugate is one, holds the values with the other sign.
        array = array.resolve_neg()
        return array.view(torch.uint8) if array.dtype == torch.bool else array
    is_bool = getattr(array, "dtype", None) == np.bool_
    return array.view(np.uint8) if is_bool else array


def per_head(value: Any, like: Any) -> Any:
    """A number as an array [Hq] for queries [B, Hq, N, D]; an array as it is."""
    if not isinstance(value, int | float):
        return value
    heads = like.shape[1] if like.ndim > 1 else 1
    if is_torch(like):
        import torch

        return torch.full((heads,), value, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
    return np.full(heads, value, np.float64 if like.dtype == np.float64 else np.float32)


def call(native: Native, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a native function by name, as arrays of the kind of the first argument."""
    arrays = given(arrays)
    recording = _recording.get()
    if any(map(is_torch, arrays.values())):
        from . import _autograd

        if recording is None:
            return _autograd.call(native, arrays)
        arrays = {name: array.detach() if is_torch(array) else array for name, array in arrays.items()}
    results, gradients = native(arrays, list(recording.wrt) if recording else [])
    exported = {name: exported_like(arrays, result) for name, result in results.items()}
    if recording:
        recording.gradients, recording.results = gradients, exported
    return exported


def exported_like(arrays: Mapping[str, Any], result: _native.Array) -> Any:
    """A native array as one of PyTorch if one of these is, else of NumPy."""
    if any(map(is_torch, arrays.values())):
        import torch

        return torch.from_dlpack(result)
    return np.from_dlpack(result)


def vjp(
    function: Callable[..., Result], *args: Any, wrt: Iterable[str], **kwargs: Any
) -> tuple[Result, Callable[..., dict[str, Any]]]:
    """The result of a function of this package, and a function that returns gradients.

    `function` is `select`, `running_average` or `attend`, called with the other arguments. `wrt` names those of its arrays
    that get gradients. The second value takes the gradients of results as keyword arguments (`y` for `select`, `m` for
    `running_average`, the names of the outputs for `attend`) and returns the gradients of the arrays by name, in their shapes
    and dtypes. The arrays must not change before that.

    Example:
        selected, pullback = vjp(select, q, k, v, candidates, beta=0.5, wrt=["q", "k", "v"])
        gradients = pullback(y=numpy.ones_like(selected.y))
    """
    recording = _Recording(tuple(wrt))
    token = _recording.set(recording)
    try:
        result = function(*args, **kwargs)
    finally:
        _recording.reset(token)
    if recording.gradients is None:
        raise ValueError(f"no result depends on {', '.join(recording.wrt) or 'nothing'} with a gradient")
    native = recording.gradients

    def pullback(**gradients: Any) -> dict[str, Any]:
        like = recording.results
        computed = native.backward({name: _like(like.get(name), g) for name, g in gradients.items()})
        return {name: exported_like(like, g) for name, g in computed.items()}

    return result, pullback


def _like(result: Any, gradient: Any) -> Any:
    """A gradient as an array of the kind and dtype of the result."""
    if is_torch(result):
        import torch

        return torch.as_tensor(gradient, dtype=result.dtype).detach()
    return np.asarray(gradient, None if result is None else result.dtype)
