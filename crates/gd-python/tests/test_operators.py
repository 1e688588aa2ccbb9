"""The operators on arrays of NumPy, compared with plain NumPy."""

import numpy as np
import pytest
import reference

import gd_attention as gd

DTYPES = [np.float64, np.float32, np.float16]
MASKS = {"none": gd.Mask.none(), "causal": gd.Mask.causal(3), "window": gd.Mask.window(4, 3)}


def inputs(rng, dtype=np.float64, b=2, hq=4, hk=2, n=5, m=8, d=16, dv=8):
    shapes = [(b, hq, n, d), (b, hk, m, d), (b, hk, m, dv)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["energy", "dot"])
@pytest.mark.parametrize("mask", MASKS)
def test_scan_finds_the_keys_of_lowest_energy(rng, dtype, score, mask):
    q, k, _ = inputs(rng, dtype)
    prior = rng.standard_normal((1, 2, 8)).astype(dtype)
    found = gd.scan(q, k, beta=0.5, candidates=4, mask=MASKS[mask], prior=prior, score=score)
    energy = reference.energies(q, k, 0.5, reference.visible(MASKS[mask], 5, 8), prior, score == "dot")
    index, least = reference.candidates(energy, 4)
    assert found.index.dtype == np.int32 and np.array_equal(found.index, index)
    assert found.energy.dtype == (np.float64 if dtype == np.float64 else np.float32)
    finite = np.isfinite(least)
    assert np.array_equal(np.isfinite(found.energy), finite)
    np.testing.assert_allclose(found.energy[finite], least[finite], rtol=1e-5, atol=1e-5)
    assert found.protected is None and found.rescored == 1.0


def test_a_certified_scan_gives_the_same_bits(rng):
    q, k, _ = inputs(rng, np.float32, n=40, m=300)
    native = gd.scan(q, k, beta=0.5, candidates=2)
    certified = gd.scan(q, k, beta=0.5, candidates=2, precision="certified")
    assert np.array_equal(native.index, certified.index) and np.array_equal(native.energy, certified.energy)
    assert certified.rescored < 1.0


def test_protected_keys_are_candidates(rng):
    q, k, _ = inputs(rng)
    protected = np.full((1, 1, 1, 1), 6, np.int32)
    found = gd.scan(q, k, beta=0.5, candidates=1, protected=protected)
    assert found.index.shape[-1] == 2
    assert ((found.index == 6) == (found.protected == 1)).all() and (found.protected.sum(-1) == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_returns_the_row_of_the_winner(rng, dtype):
    q, k, v = inputs(rng, dtype)
    found = gd.scan(q, k, beta=0.5, candidates=4)
    selected = gd.select(q, k, v, found, beta=0.5)
    rows = np.take_along_axis(np.repeat(v, 2, 1), found.index[..., :1].astype(np.int64), 2)
    assert selected.y.dtype == dtype and np.array_equal(selected.y, rows)
    assert np.array_equal(selected.index, found.index[..., 0])
    np.testing.assert_allclose(selected.margin, found.energy[..., 1] - found.energy[..., 0], rtol=1e-5)
    assert (selected.gate == 1).all() and selected.coherence is None and selected.rounds == selected.picks == ()


def test_threshold_gate_and_coherence(rng):
    q, k, v = inputs(rng)
    found = gd.scan(q, k, beta=0.5, candidates=4)
    threshold = float(np.median(found.energy[..., 0]))
    gate = {"energy": {"temperature": 2.0}}
    selected = gd.select(q, k, v, found, beta=0.5, threshold=threshold, alpha=0.3, gate=gate)
    admitted = found.energy[..., 0] <= threshold
    assert 0 < admitted.sum() < admitted.size
    assert np.array_equal(selected.index >= 0, admitted) and (selected.y[~admitted] == 0).all()
    rho = 1 / (1 + np.exp(-(threshold - found.energy[..., 0]) / 2))
    np.testing.assert_allclose(selected.gate[admitted], rho[admitted], rtol=1e-12)
    t = 0.5 * found.energy[..., 0] / 0.5
    u = selected.coherence[admitted]
    np.testing.assert_allclose(u, 1 / (1 + np.exp(-(np.log(0.7 / 0.3) + t[admitted] * (2 * u - 1)))), rtol=1e-9)


def test_rounds_and_picks_are_named(rng):
    q, k, v = inputs(rng)
    found = gd.scan(q, k, beta=0.5, candidates=4)
    rounds = gd.select(q, k, v, found, beta=0.5, rounds=np.ones((4, 3)))
    assert len(rounds.rounds) == 2 and (rounds.rounds[0].index != rounds.index).all()
    gate = {"energy": {"temperature": 1.0}}
    picks = gd.select(q, k, v, found, beta=0.5, picks=3, threshold=50.0, gate=gate)
    assert [np.array_equal(p.index, found.index[..., n + 1]) for n, p in enumerate(picks.picks)] == [True, True]
    total = picks.gate + sum(p.weight for p in picks.picks)
    assert (total < 1 + 1e-12).all() and (total > 0.99).all()


def test_decode_equals_scan_and_select(rng):
    q, k, v = inputs(rng, np.float32, n=1, m=500)
    found = gd.scan(q, k, beta=0.5, candidates=2)
    selected = gd.select(q, k, v, found, beta=0.5)
    for candidates in (1, 2):
        decoded = gd.decode(q, k, v, beta=0.5, candidates=candidates)
        assert np.array_equal(decoded.y, selected.y) and np.array_equal(decoded.index, selected.index)
    assert np.array_equal(decoded.margin, selected.margin)
    assert (gd.decode(q, k, v, beta=0.5, threshold=0.0).index == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_running_average_follows_the_recurrence(rng, dtype):
    decay, write = (rng.standard_normal((2, 4, 30)).astype(dtype) for _ in range(2))
    v = rng.standard_normal((2, 2, 30, 8)).astype(dtype)
    m, state = gd.running_average(decay, write, v)
    tolerance = {np.float64: 1e-12, np.float32: 1e-5, np.float16: 5e-3}[dtype]
    np.testing.assert_allclose(m, reference.running_average(decay, write, v), rtol=tolerance, atol=tolerance)
    half, state = gd.running_average(decay[..., :12], write[..., :12], v[:, :, :12])
    rest, _ = gd.running_average(decay[..., 12:], write[..., 12:], v[:, :, 12:], state)
    np.testing.assert_allclose(np.concatenate([half, rest], 2), m, rtol=tolerance, atol=tolerance)


def test_softmax_attention(rng):
    q, k, v = inputs(rng)
    mask = reference.visible(gd.Mask.causal(3), 5, 8)
    assert mask.dtype == np.bool_
    outputs = gd.attend(q, k, v, mechanism="softmax", mask=mask)
    scores = q @ np.repeat(k, 2, 1).swapaxes(-1, -2) / 4
    weights = np.where(mask, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(outputs["weights"], weights, rtol=1e-12)
    np.testing.assert_allclose(outputs["out"], weights @ np.repeat(v, 2, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "sparsemax", "sigmoid", "softmax1", "ssmax", "hopfield"])
def test_mechanisms_by_name(rng, name):
    assert name in gd.MECHANISMS
    q, k, v = inputs(rng)
    learned = {"s": np.full(4, 0.5)} if name == "ssmax" else {}
    assert gd.attend(q, k, v, mechanism=name, **learned)["out"].shape == (2, 4, 5, 8)


def test_a_mechanism_with_parameters(rng):
    q, k, v = inputs(rng)
    weights = gd.attend(q, k, v, mechanism={"name": "topk", "k": 3})["weights"]
    assert ((weights > 0).sum(-1) == 3).all()


def test_memory_is_shared_in_both_directions(rng):
    q, k, v = inputs(rng, m=16)
    # A transposed array and one in Fortran order are read in place; gaps, repeats and reversed rows are copied.
    same = [
        np.ascontiguousarray(k.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3),
        np.asfortranarray(k),
        np.repeat(k, 2, 2)[:, :, ::2],
        k[:, :, ::-1].copy()[:, :, ::-1],
    ]
    expected = gd.scan(q, k, beta=0.5, candidates=2)
    for other in same:
        found = gd.scan(q, other, beta=0.5, candidates=2)
        assert np.array_equal(found.index, expected.index) and np.array_equal(found.energy, expected.energy)
    k.flags.writeable = False
    assert np.array_equal(gd.scan(q, k, beta=0.5, candidates=2).index, expected.index)
    # Results are arrays of their own, which can be changed.
    expected.energy[:] = 0
    broadcast = np.broadcast_to(v[:1, :1], v.shape)
    assert np.array_equal(gd.select(q, k, broadcast, expected, beta=0.5).y[1], gd.select(q, k, broadcast, expected, beta=0.5).y[1])


def test_inputs_stay_as_they_are_and_are_released(rng):
    import sys

    q, k, v = inputs(rng)
    before = [a.copy() for a in (q, k, v)]
    counts = [sys.getrefcount(a) for a in (q, k, v)]
    for _ in range(10):
        found = gd.scan(q, k, beta=0.5, candidates=2)
        selected, pullback = gd.vjp(gd.select, q, k, v, found, beta=0.5, wrt=["q", "k", "v"])
        pullback(y=selected.y)
    del selected, pullback
    assert [sys.getrefcount(a) for a in (q, k, v)] == counts
    assert all(np.array_equal(a, b) for a, b in zip((q, k, v), before, strict=True))


def test_an_output_never_shares_the_memory_of_an_input(rng):
    q, k, v = inputs(rng)
    for name in gd.MECHANISMS:
        try:
            outputs = gd.attend(q, k, v, mechanism=name)
        except ValueError:
            continue
        for output in outputs.values():
            assert not any(np.may_share_memory(output, a) for a in (q, k, v)), name


def test_errors_have_the_text_of_rust(rng):
    q, k, v = inputs(rng)
    found = gd.scan(q, k, beta=0.5, candidates=2)
    cases = [
        (lambda: gd.scan(q, k[..., :8], beta=0.5, candidates=1), "q [2, 4, 5, 16] and k [2, 2, 8, 8] differ in batch or head_dim"),
        (lambda: gd.scan(q, k.astype(np.float32), beta=0.5, candidates=1), "q is F64, k is F32"),
        (lambda: gd.scan(q, k, beta=-1.0, candidates=1), "beta"),
        (lambda: gd.scan(q, k, beta=0.5, candidates=3), "unsupported: "),
        (lambda: gd.scan(q, k, beta=0.5, candidates=1, score="cosine"), "score: unknown variant `cosine`"),
        (lambda: gd.scan(q, k, beta=0.5, candidates=1, mask=gd.Mask.window(0)), "a window of 0 keys selects nothing"),
        (lambda: gd.scan(q.astype(complex), k, beta=0.5, candidates=1), "q has the DLPack dtype (code 5, 128 bits"),
        (lambda: gd.select(q, k, v, found, beta=0.5, temperature=0.0), "temperature 0 is not finite and > 0"),
        (lambda: gd.select(q, k, v, found, beta=0.5, gate="coherence"), "the coherence gate needs alpha"),
        (lambda: gd.select(q, k, v, found, beta=0.5, gradient={"spread": 1}), "gradient: unknown field `spread`"),
        (lambda: gd.attend(q, k, mechanism="softmax"), "the tensor `v` is missing; given are k, q"),
        (lambda: gd.attend(q, k, v, mechanism="hardmax"), 'mechanism "hardmax" is not one of softmax, '),
        (lambda: gd.attend(q, k, v, mechanism={"name": "topk", "k": 0}), "k"),
        (lambda: gd.vjp(gd.select, q, k, v, found, beta=0.5, wrt=["w"]), "a gradient of w was asked for"),
        (lambda: gd.load("no/such/model"), "no/such/model"),
        (lambda: gd.read_trace("no/such.trace"), "no/such.trace"),
    ]
    for call, text in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert text in str(error.value), (text, error.value)


def test_defaults_are_those_of_rust():
    import inspect
    import json

    for name, options in json.loads(gd._native.defaults()).items():
        parameters = inspect.signature(getattr(gd, name)).parameters
        for option, value in options.items():
            default = parameters[option].default
            # None stands for the default of Rust.
            assert default == value or (default is None and option == "gradient"), (name, option)


def test_threads_run_at_the_same_time(rng):
    """While one thread computes, another one runs Python."""
    import threading

    q, k, _ = inputs(rng, np.float32, b=1, n=2048, m=8192, d=64)
    steps, done = 0, threading.Event()
    thread = threading.Thread(target=lambda: (gd.scan(q, k, beta=0.5, candidates=8), done.set()))
    thread.start()
    while not done.is_set():
        steps += 1
    thread.join()
    assert steps > 1000


def test_masks(rng):
    mask = gd.Mask.causal().packed([[0, 4, 8]]).kv_len([6])
    assert mask.visible(0, 5, 8) == (4, 6) and mask == gd.Mask.causal().packed([[0, 4, 8]]).kv_len([6])
    assert mask != gd.Mask.none() and "causal: true" in repr(mask)
    assert gd.Mask.none().with_offsets([1, 2]) != gd.Mask.none()
