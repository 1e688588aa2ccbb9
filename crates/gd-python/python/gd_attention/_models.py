"""Models and traces."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from . import _native


class Generated(NamedTuple):
    """A continuation of a prompt."""

    text: str
    """The text after the prompt, without the end token or stop string."""
    tokens: list[int]
    """The new tokens."""
    finish_reason: Literal["stop", "eos", "length"]
    """Why it ended: a stop string, an end token, or the maximum number of tokens or of positions."""


class Model:
    """A language model, which computes in float32 on the CPU. `load` returns it."""

    def __init__(self, native: _native.Model) -> None:
        self._native = native
        self.config: dict[str, Any] = json.loads(native.config())
        """The content of its config.json."""

    def __repr__(self) -> str:
        layers, width = self.config.get("num_hidden_layers"), self.config.get("hidden_size")
        return f"Model({layers} layers, hidden size {width})"

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self._native.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self._native.decode(ids)

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int = 128,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Generated:
        """Continues a prompt, with the same tokens as `gd generate`.

        Sampling parameters that are None are those of the model's generation_config.json; without one, temperature 0.8 and no
        filters. Temperature 0 takes the most probable token.

        Raises:
            ValueError: A prompt that is empty or too long, or a parameter that is out of range.
        """
        text, tokens, reason = self._native.generate(
            prompt, max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, list(stop)
        )
        return Generated(text, tokens, cast("Literal['stop', 'eos', 'length']", reason))


def load(path: str | PathLike[str]) -> Model:
    """Loads a model: a checkpoint folder, a safetensors file in one, the folder of a training run, or a GGUF file.

    Raises:
        ValueError: A file that is missing or cannot be used, which the text names.
    """
    return Model(_native.Model(path))


class Trace:
    """A verified trace: which position every head read at every position. `read_trace` returns it."""

    def __init__(self, native: _native.Trace) -> None:
        self._native = native
        self.header: dict[str, Any] = json.loads(native.header())
        """The header: model, layers, sampling and interventions."""
        self.head: str = native.head
        """The head of its hash chain, hexadecimal."""
        self.texts: list[str] = native.texts()
        """The characters that each token completes."""

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The trace as arrays, with P positions, R selecting heads, S softmax heads and W weights of each of these.

        token, generated: int64 [P]. layer, head: int64 [R]. selected: int64 [P, R], -1 for none. energy, margin, coherence, gate,
        share, memory: float32 [P, R]. With recorded weights also blend_layer and blend_head, int64 [S], and blend_key, int64
        [P, S, W], and blend_weight, float32 [P, S, W]. The same arrays as of `gd trace --export FILE.npz`.
        """
        return {name: np.from_dlpack(array) for name, array in self._native.arrays().items()}

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Trace({len(self)} positions, head {self.head})"

    def page(self) -> str:
        """The page of the viewer, a complete HTML document that loads nothing."""
        return self._native.page()

    def _repr_html_(self) -> str:
        page = html.escape(self.page(), quote=True)
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" style="width:100%;height:640px;border:0"></iframe>'


def read_trace(path: str | PathLike[str]) -> Trace:
    """Reads and verifies a trace that `gd trace --out` wrote.

    Raises:
        ValueError: A file that is missing or damaged, which the text names.
    """
    return Trace(_native.Trace(path))
