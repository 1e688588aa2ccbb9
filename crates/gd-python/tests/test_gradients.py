"""Gradients of `vjp` in float64, compared with finite differences."""

import numpy as np
import pytest
import reference

import gd_attention as gd

GATE = {"energy": {"temperature": 2.0}}
# Where the gradient is that of the forward pass: a blend, the gate of a fixed winner, and the values of a fixed winner.
SELECT = {
    "blend": ({"estimator": "blend", "temperature": 2.0, "threshold": 9.0}, ["q", "k", "v", "beta", "threshold", "prior"]),
    "blend-dot": ({"estimator": "blend", "score": "dot"}, ["q", "k", "v", "beta"]),
    "winner": ({"estimator": "winner", "threshold": 9.0, "gate": GATE}, ["q", "k", "v", "beta", "threshold"]),
    "coherence": ({"estimator": "winner", "alpha": 0.3, "gate": "coherence"}, ["q", "k", "v", "beta", "alpha"]),
    "candidates": ({"estimator": "candidates"}, ["v"]),
}


def check(function, arrays, wrt, output, **kwargs):
    """Compares the gradients of a weighted sum of one output. `candidates` is a function, called for every evaluation: the
    energies of the candidates are those of the arrays."""

    def options():
        return {key: value() if key == "candidates" else value for key, value in kwargs.items()}

    result, pullback = gd.vjp(function, wrt=wrt, **arrays, **options())
    named = result if isinstance(result, dict) else {output: getattr(result, output, result[0])}
    weights = np.random.default_rng(1).standard_normal(named[output].shape)
    gradients = pullback(**{output: weights})
    assert sorted(gradients) == sorted(wrt)

    def objective():
        result = function(**arrays, **options())
        value = result[output] if isinstance(result, dict) else getattr(result, output, result[0])
        return float((value * weights).sum())

    for name in wrt:
        expected = reference.differences(objective, arrays[name])
        assert gradients[name].shape == arrays[name].shape
        np.testing.assert_allclose(gradients[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)
        assert np.abs(expected).max() > 1e-3, name


@pytest.mark.parametrize("name", SELECT)
def test_select(rng, name):
    options, wrt = SELECT[name]
    options = dict(options)
    arrays = {
        "q": rng.standard_normal((1, 2, 3, 8)),
        "k": rng.standard_normal((1, 1, 6, 8)),
        "v": rng.standard_normal((1, 1, 6, 4)),
        "beta": np.array([0.3, 0.7]),
        "prior": rng.standard_normal((1, 1, 6)),
    }
    for head in ("threshold", "alpha"):
        if head in options:
            arrays[head] = np.full(2, options.pop(head)) + np.array([0.0, 0.1])
    if "score" in options:
        del arrays["prior"]
    scanned = {n: arrays[n] for n in ("q", "k", "beta", "prior") if n in arrays}
    score = options.get("score", "energy")
    check(gd.select, arrays, wrt, "y", candidates=lambda: gd.scan(candidates=4, score=score, **scanned), **options)


def test_a_transposed_argument_gets_its_gradient_in_its_own_shape(rng):
    q, v = rng.standard_normal((1, 2, 3, 8)), rng.standard_normal((1, 2, 6, 4))
    k = np.ascontiguousarray(rng.standard_normal((1, 6, 2, 8))).transpose(0, 2, 1, 3)
    arrays = {"q": q, "k": k, "v": v}
    check(
        gd.select, arrays, ["q", "k", "v"], "y", candidates=lambda: gd.scan(q, k, beta=0.5, candidates=4), beta=0.5,
        estimator="blend",
    )


def test_running_average(rng):
    arrays = {
        "decay": rng.standard_normal((1, 2, 5)),
        "write": rng.standard_normal((1, 2, 5)),
        "v": rng.standard_normal((1, 1, 5, 3)),
    }
    check(gd.running_average, arrays, ["decay", "write", "v"], "m")


@pytest.mark.parametrize("mechanism", ["softmax", "sparsemax", "entmax", "sigmoid", "softmax1", {"name": "topk", "k": 3}])
def test_attend(rng, mechanism):
    arrays = {
        "q": rng.standard_normal((1, 2, 3, 4)),
        "k": rng.standard_normal((1, 2, 5, 4)),
        "v": rng.standard_normal((1, 2, 5, 4)),
    }
    check(gd.attend, arrays, ["q", "k", "v"], "out", mechanism=mechanism)


def test_a_result_without_gradient_is_an_error(rng):
    q, k = rng.standard_normal((1, 1, 2, 8)), rng.standard_normal((1, 1, 4, 8))
    found = gd.scan(q, k, beta=0.5, candidates=2)
    selected, pullback = gd.vjp(gd.select, q, k, k, found, beta=0.5, wrt=["v"])
    with pytest.raises(ValueError, match="energy is not a result with a gradient"):
        pullback(energy=selected.energy)
    with pytest.raises(ValueError, match="no gradient of a result is given"):
        pullback()
    with pytest.raises(ValueError, match="no result depends on"):
        gd.vjp(gd.scan, q, k, beta=0.5, candidates=2, wrt=["q"])
