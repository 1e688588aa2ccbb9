"""The operators and the attention mechanisms.

Sizes: B batch entries, Hq query heads, Hk key-value heads (Hq is a multiple of Hk, and query head h reads key-value head
h // (Hq // Hk)), N queries, M keys, D and Dv the dimensions of keys and values, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from . import _native
from ._calls import Array, call, exported_like, given, is_torch, per_head

Score: TypeAlias = Literal["energy", "dot"]
Tie: TypeAlias = Literal["first", "last"]
Precision: TypeAlias = Literal["native", "certified"]
Estimator: TypeAlias = Literal["candidates", "winner", "dense", "reinmax", "blend"]
Gate: TypeAlias = "Literal['none', 'coherence'] | Mapping[str, Mapping[str, float]]"
Coherence: TypeAlias = Literal["global", "passage"]

MECHANISMS: tuple[str, ...] = tuple(_native.mechanisms())
"""The names of the mechanisms that `attend` computes."""


class Candidates(NamedTuple):
    """The candidate keys of every query, sorted by (energy, index)."""

    index: Any
    """Key indices, int32 [B, Hq, N, K]; -1 in unused slots."""
    energy: Any
    """Selection energies, float32 (float64 for float64 arrays) [B, Hq, N, K]; +inf in unused slots."""
    protected: Any = None
    """1 where a candidate is protected, uint8 [B, Hq, N, K]; None without protected keys."""
    rescored: float = 1.0
    """The share of the visible pairs of query and key that was scored in full precision."""


class Round(NamedTuple):
    """A further round of refinement."""

    index: Any
    """The selected key, int32 [B, Hq, N]; -1 where the head abstained in this round or an earlier one."""
    y: Any
    """Its contribution to the output, [B, Hq, N, Dv] in float32 (float64 for float64 arrays), without gradient."""


class Pick(NamedTuple):
    """A row that a query reads besides that of the winner."""

    index: Any
    """Its key, int32 [B, Hq, N]; -1 where the query has no further candidate."""
    weight: Any
    """Its weight [B, Hq, N], without gradient; 0 where it is excluded and not read."""


class Selected(NamedTuple):
    """The result of a selection. All fields but `y` are those of the first round and have no gradient."""

    y: Any
    """The output, [B, Hq, N, Dv] in the dtype of v."""
    index: Any
    """The selected key, int32 [B, Hq, N]; -1 where the head abstained."""
    energy: Any
    """Its energy, float32 (float64 for float64 arrays, as the next three) [B, Hq, N]; +inf where the head abstained."""
    margin: Any
    """The energy of the runner-up that the threshold admits minus that of the winner; +inf without one."""
    gate: Any
    """The factor of the value row; 1 without a gate, 0 where the head abstained."""
    coherence: Any
    """The coherence point u* between query (0) and key (1); None if alpha is not given."""
    compared: Any
    """The energies that the selection compared, those of the scan or after the barrier, [B, Hq, N, K]."""
    rounds: tuple[Round, ...]
    """The further rounds."""
    picks: tuple[Pick, ...]
    """The picks after the winner."""


class AverageState(NamedTuple):
    """The state of a running average after a part of a sequence: float32, or float64 for float64 arrays."""

    mean: Any
    """The last average, [B, H, D]."""
    log_weight: Any
    """The logarithm of the denominator, [B, H]; -inf at the start of a sequence."""


def scan(
    q: Array,
    k: Array,
    *,
    beta: Array | float,
    candidates: int,
    mask: _native.Mask | None = None,
    prior: Array | None = None,
    protected: Array | None = None,
    score: Score = "energy",
    tie: Tie = "first",
    precision: Precision = "native",
    checked: bool = False,
) -> Candidates:
    """The keys of lowest selection energy for every query, without an N x M matrix. The result has no gradient.

    Args:
        q: Queries [B, Hq, N, D] in float64, float32, float16 or bfloat16.
        k: Keys [B, Hk, M, D] of the same dtype.
        beta: Inverse bandwidth of every query head, [Hq], or a number for all heads; finite and > 0.
        candidates: K, the number of keys to return: 1, 2, 4, 8, 16 or 32. It may exceed the number of keys.
        mask: Which keys each query may read; all if None.
        prior: Key prior b, [B or 1, Hq or Hk, M]; -inf excludes a key.
        protected: Keys that are candidates whatever their energy, int32 [B or 1, Hq, Hk or 1, N or 1, P], negative in unused
            slots. They add P slots to the K of the result.
        score: "energy" for beta |q - k|^2 - b, "dot" for -beta <q, k> - b.
        tie: Which of several keys with the same energy comes first.
        precision: "certified" finds the same keys by 8-bit integers with an error bound.
        checked: Raise an error for NaN and infinities in rows that take part, and for energies that overflow.

    Raises:
        ValueError: Shapes, dtypes or values that do not fit, which the text names.
    """
    arrays = given({"q": q, "k": k, "beta": per_head(beta, q), "prior": prior, "protected": protected})
    arrays = {name: array.detach() if is_torch(array) else array for name, array in arrays.items()}
    options = {"candidates": candidates, "score": score, "tie": tie, "precision": precision, "checked": checked}
    results, share = _native.scan(arrays, mask or _native.Mask.none(), options)
    exported = {name: exported_like(arrays, result) for name, result in results.items()}
    return Candidates(exported["index"], exported["energy"], exported.get("protected"), share)


def select(
    q: Array,
    k: Array,
    v: Array,
    candidates: Candidates,
    *,
    beta: Array | float,
    prior: Array | None = None,
    threshold: Array | float | None = None,
    alpha: Array | float | None = None,
    rounds: Array | None = None,
    score: Score = "energy",
    tie: Tie = "first",
    gate: Gate = "none",
    exclude_below: float = 0.5,
    picks: int = 1,
    estimator: Estimator = "candidates",
    temperature: float = 1.0,
    preserve_floor: float = 0.0,
    gradient: Mapping[str, Any] | None = None,
    value_floor: float = 0.0,
    hardness: float = 1.0,
    barrier: Mapping[str, float] | None = None,
    coherence: Coherence = "global",
) -> Selected:
    """Selects one value row for every query and head among its candidates, or abstains (y = 0).

    `y` is differentiable in q, k, v, beta, prior, threshold, alpha and rounds. Forward and backward pass cost O(N K D).

    Args:
        q: Queries [B, Hq, N, D] in float64, float32, float16 or bfloat16.
        k: Keys [B, Hk, M, D] of the same dtype.
        v: Values [B, Hk, M, Dv] of the same dtype.
        candidates: From `scan` of the same q and k.
        beta: Inverse bandwidth of every query head, [Hq], or a number for all heads; > 0.
        prior: The key prior of the scan.
        threshold: tau of every query head, [Hq], or query, [B, Hq, N], or a number: candidates with more energy are
            excluded.
        alpha: Weight of the query's well for every query head, [Hq], or a number; in (0, 1). With it coherence points are
            resolved.
        rounds: Weights of the refinement rounds, [Hq, R]; one round of weight 1 if None.
        score: The score of the scan.
        tie: Which of several candidates with the same energy wins.
        gate: The factor of the selected row: "none", "coherence", {"energy": {"temperature": T}}, or
            {"margin": {"temperature": T}} for a threshold that is relative to the energy of the runner-up.
        exclude_below: Least energy or margin gate in [0, 1) of a candidate that can be selected.
        picks: Rows in 1..=4 that a query reads.
        estimator: The gradient of the hard choice. "blend" makes the forward pass itself the soft mixture.
        temperature: T > 0 of the estimator's softmax.
        preserve_floor: Share in [0, 1] of the estimator's softmax that is spread evenly over the candidates.
        gradient: "temperature_spread", "gate_floor" and "null" of the estimator, those that differ from 0, 0 and true.
        value_floor: Share in [0, 1] of the gradient of the values that is weighted by the softmax.
        hardness: Share h in [0, 1] of the hard forward pass, y = (1 - h) blend + h hard.
        barrier: "floor", "margin", "strength", "entropy_trigger" and "slack" of the conditional protection.
        coherence: Which of two wells the coherence point lies in.

    Raises:
        ValueError: Shapes, dtypes or values that do not fit, which the text names.
    """
    options: dict[str, Any] = {
        "score": score,
        "tie": tie,
        "gate": gate,
        "exclude_below": exclude_below,
        "picks": picks,
        "estimator": estimator,
        "temperature": temperature,
        "preserve_floor": preserve_floor,
        "gradient": gradient or {},
        "value_floor": value_floor,
        "hardness": hardness,
        "barrier": barrier,
        "coherence": coherence,
    }
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "index": candidates.index,
        "energy": candidates.energy,
        "protected": candidates.protected,
        "beta": per_head(beta, q),
        "prior": prior,
        "threshold": per_head(threshold, q),
        "alpha": per_head(alpha, q),
        "rounds": rounds,
    }
    return _selected(call(lambda arrays, wrt: _native.select(arrays, wrt, options), arrays))


def decode(
    q: Array,
    k: Array,
    v: Array,
    *,
    beta: Array | float,
    candidates: int = 1,
    mask: _native.Mask | None = None,
    prior: Array | None = None,
    protected: Array | None = None,
    threshold: Array | float | None = None,
    score: Score = "energy",
    tie: Tie = "first",
    precision: Precision = "native",
    checked: bool = False,
) -> Selected:
    """The key of lowest energy of every query and its value row, for few queries against many keys, without gradient.

    Args:
        q: Queries [B, Hq, N, D] in float64, float32, float16 or bfloat16.
        k: Keys [B, Hk, M, D] of the same dtype.
        v: Values [B, Hk, M, Dv] of the same dtype.
        candidates: K of the scan. With more than one, the margin to the runner-up is computed, and protected keys are read.
        threshold: tau of every query head, [Hq], or query, [B, Hq, N], or a number: a query whose winner has more energy
            abstains.
        beta, mask, prior, protected, score, tie, precision, checked: As in `scan`.

    Raises:
        ValueError: Shapes, dtypes or values that do not fit, which the text names.
    """
    options = {"candidates": candidates, "score": score, "tie": tie, "precision": precision, "checked": checked}
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "beta": per_head(beta, q),
        "prior": prior,
        "protected": protected,
        "threshold": per_head(threshold, q),
    }
    mask = mask or _native.Mask.none()
    return _selected(call(lambda arrays, _: _native.decode(arrays, mask, options), arrays))


def _selected(results: dict[str, Any]) -> Selected:
    later = (n for n in range(len(results)) if f"rounds.{n}.index" in results)
    picks = (n for n in range(len(results)) if f"picks.{n}.index" in results)
    return Selected(
        results["y"],
        results["index"],
        results["energy"],
        results["margin"],
        results["gate"],
        results.get("coherence"),
        results["compared"],
        tuple(Round(results[f"rounds.{n}.index"], results[f"rounds.{n}.y"]) for n in later),
        tuple(Pick(results[f"picks.{n}.index"], results[f"picks.{n}.weight"]) for n in picks),
    )


def running_average(
    decay: Array, write: Array, v: Array, state: AverageState | None = None
) -> tuple[Any, AverageState]:
    """Gated running averages of the values in linear time.

    m_t = n_t / d_t with n_t = a_t n_(t-1) + e^(write_t) v_t, d_t = a_t d_(t-1) + e^(write_t) and a_t = sigmoid(decay_t).
    Differentiable in decay, write and v; states are constants.

    Args:
        decay: Logits [B, H, N]; -inf discards everything before.
        write: Logits [B, H, N]; -inf leaves the average unchanged.
        v: Values [B, Hk, N, D]; average h reads value head h // (H // Hk). All of one dtype.
        state: The state that the call for the preceding part of the sequence returned; None at the start.

    Returns:
        m [B, H, N, D] in the dtype of v, and the state after the last row.

    Raises:
        ValueError: Shapes, dtypes or values that do not fit, which the text names.
    """
    mean, log_weight = state if state else (None, None)
    arrays = {"decay": decay, "write": write, "v": v, "mean": mean, "log_weight": log_weight}
    results = call(_native.running_average, arrays)
    return results["m"], AverageState(results["mean"], results["log_weight"])


def attend(
    q: Array | None = None,
    k: Array | None = None,
    v: Array | None = None,
    *,
    mechanism: str | Mapping[str, Any] = "softmax",
    mask: Array | None = None,
    **inputs: Array,
) -> dict[str, Any]:
    """The outputs of an attention mechanism, differentiable: the reference implementation in O(N M) memory.

    Args:
        q: Queries [B, Hq, N, D].
        k: Keys [B, Hk, M, D].
        v: Values [B, Hk, M, Dv].
        mechanism: A name in `MECHANISMS`, or a mapping with "name" and parameters, such as {"name": "topk", "k": 8}.
        mask: The visible keys, bool or uint8 [N, M], or with leading dimensions; all if None.
        inputs: Further tensors of the mechanism by name, as `gd map` and the page of mechanisms list them.

    Returns:
        The outputs by name: "out" [B, Hq, N, Dv], mostly "weights" and "scores" [B, Hq, N, M], and what is particular to the
        mechanism. "extra_loss" is a term of the loss.

    Raises:
        ValueError: A tensor that is missing or does not fit, or a parameter that cannot be used.
    """
    arrays = {"q": q, "k": k, "v": v, "mask": mask, **inputs}
    return call(lambda arrays, wrt: _native.attend(mechanism, arrays, wrt), arrays)
