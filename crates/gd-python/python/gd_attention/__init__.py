"""Selection attention for NumPy and PyTorch.

Arrays are NumPy arrays or PyTorch tensors on the CPU. They are read without a copy (an array with gaps or repeated elements
is copied), and results are of the same kind, again without a copy. Functions are differentiable for PyTorch by autograd, and
for every kind of array by `vjp`. Errors of arguments, files and models are `ValueError`.
"""

from ._calls import Array, vjp
from ._models import Generated, Model, Trace, load, read_trace
from ._native import Mask, __version__
from ._operators import (
    MECHANISMS,
    AverageState,
    Candidates,
    Pick,
    Round,
    Selected,
    attend,
    decode,
    running_average,
    scan,
    select,
)

__all__ = [
    "MECHANISMS",
    "Array",
    "AverageState",
    "Candidates",
    "Generated",
    "Mask",
    "Model",
    "Pick",
    "Round",
    "Selected",
    "Trace",
    "__version__",
    "attend",
    "decode",
    "load",
    "read_trace",
    "running_average",
    "scan",
    "select",
    "vjp",
]
