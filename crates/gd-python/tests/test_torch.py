"""Tensors of PyTorch: memory, autograd and gradcheck. Run where PyTorch is installed."""

import re
from pathlib import Path

import numpy as np
import pytest
from documents import examples

import gd_attention as gd

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

GATE = {"energy": {"temperature": 2.0}}


def tensors(*shapes, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(26)
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad) for s in shapes]


def qkv(dtype=torch.float64, grad=True):
    return tensors((1, 2, 3, 8), (1, 1, 6, 8), (1, 1, 6, 4), dtype=dtype, grad=grad)


def check(function, inputs):
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "blend", "temperature": 2.0},
        {"estimator": "blend", "score": "dot"},
        {"estimator": "winner", "threshold": 9.0, "gate": GATE},
        {"estimator": "winner", "alpha": 0.3, "gate": "coherence"},
    ],
)
def test_gradcheck_of_select(options):
    q, k, v = qkv()
    beta = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)

    def function(q, k, v, beta):
        # The energies of the candidates are those of the perturbed tensors.
        found = gd.scan(q, k, beta=beta, candidates=4, score=options.get("score", "energy"))
        return gd.select(q, k, v, found, beta=beta, **options).y

    check(function, (q, k, v, beta))


def test_gradcheck_of_the_values_of_a_hard_choice():
    q, k, v = qkv()
    found = gd.scan(q, k, beta=0.5, candidates=4)
    check(lambda v: gd.select(q.detach(), k.detach(), v, found, beta=0.5).y, (v,))


def test_gradcheck_of_per_head_arguments():
    q, k, v = qkv(grad=False)
    prior, beta, threshold = tensors((1, 1, 6), (2,), (2,))
    beta, threshold = (t.detach().abs().add(offset).requires_grad_() for t, offset in [(beta, 0.5), (threshold, 20)])

    def function(prior, beta, threshold):
        found = gd.scan(q, k, beta=beta, candidates=4, prior=prior)
        options = {"estimator": "blend", "temperature": 2.0}
        return gd.select(q, k, v, found, beta=beta, prior=prior, threshold=threshold, **options).y

    check(function, (prior, beta, threshold))


def test_gradcheck_of_running_average():
    decay, write, v = tensors((1, 2, 5), (1, 2, 5), (1, 1, 5, 3))
    check(lambda *inputs: gd.running_average(*inputs)[0], (decay, write, v))


@pytest.mark.parametrize("mechanism", ["softmax", "sparsemax", "entmax", "sigmoid", {"name": "topk", "k": 3}])
def test_gradcheck_of_mechanisms(mechanism):
    q, k, v = tensors((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    check(lambda q, k, v: gd.attend(q, k, v, mechanism=mechanism)["out"], (q, k, v))
    check(lambda q, k, v: gd.attend(q, k, v, mechanism=mechanism)["weights"], (q, k, v))


def test_softmax_attention_equals_that_of_pytorch():
    q, k, v = tensors((2, 4, 7, 16), (2, 4, 7, 16), (2, 4, 7, 16))
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    ours = gd.attend(q, k, v, mask=mask)["out"]
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    q, k, v = qkv(dtype)
    found = gd.scan(q, k, beta=0.5, candidates=4)
    selected = gd.select(q, k, v, found, beta=0.5)
    assert selected.y.dtype == dtype and selected.index.dtype == torch.int32
    selected.y.float().sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.shape == t.shape for t in (q, k, v))
    rows = v.detach().repeat_interleave(2, 1).gather(2, selected.index.long()[..., None].expand(selected.y.shape))
    assert torch.equal(selected.y.detach(), rows)


def test_gradients_equal_those_for_numpy():
    q, k, v = qkv()
    found = gd.scan(q, k, beta=0.5, candidates=4)
    selected = gd.select(q, k, v, found, beta=0.5, threshold=30.0, gate=GATE)
    dy = torch.ones_like(selected.y)
    ours = torch.autograd.grad(selected.y, (q, k, v), dy)
    arrays = [t.detach().numpy() for t in (q, k, v)]
    found = gd.scan(*arrays[:2], beta=0.5, candidates=4)
    _, pullback = gd.vjp(gd.select, *arrays, found, beta=0.5, threshold=30.0, gate=GATE, wrt=["q", "k", "v"])
    theirs = pullback(y=dy.numpy())
    assert all(np.array_equal(t.numpy(), theirs[n]) for t, n in zip(ours, "qkv", strict=True))


def peak_growth(function):
    """The bytes by which the peak of the process's memory exceeds what it used before a call."""
    Path("/proc/self/clear_refs").write_text("5")  # The peak starts again.

    def kib(field):
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    before = kib("VmRSS")
    function()
    return 1024 * (kib("VmHWM") - before)


def test_memory_is_not_copied():
    """A call reads the elements of a tensor where they are."""
    big = torch.randn(1, 1, 1 << 18, 64)
    one = torch.randn(1, 1, 1, 64)
    mask = gd.Mask.none().kv_len([1])
    assert peak_growth(big.clone) > 0.9 * big.nbytes
    assert peak_growth(lambda: gd.decode(one, big, big, beta=0.5, mask=mask)) < 0.1 * big.nbytes


def test_a_call_without_gradients_returns_none():
    q, k, v = qkv(torch.float32, grad=False)
    found = gd.scan(q, k, beta=0.5, candidates=4)
    assert not gd.select(q, k, v, found, beta=0.5).y.requires_grad


def test_a_tensor_that_was_changed_in_place_is_reported():
    q, k, v = qkv()
    v = v * 1
    found = gd.scan(q, k, beta=0.5, candidates=4)
    selected = gd.select(q, k, v, found, beta=0.5)
    v.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        selected.y.sum().backward()


def test_a_layer_trains():
    """A query learns to select the key that holds the value it needs."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 8, 16, generator=generator)
    v = torch.nn.functional.one_hot(torch.arange(8)).float()[None, None]
    q = torch.randn(1, 1, 8, 16, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([q], 0.1)
    losses = []
    for _ in range(60):
        found = gd.scan(q, k, beta=0.5, candidates=8)
        selected = gd.select(q, k, v, found, beta=0.5, temperature=2.0)
        loss = (selected.y - v).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 5 and losses[-1] == 0


def test_a_view_with_the_negative_bit_is_read_as_its_values():
    q, _, _ = qkv(torch.float32, grad=False)
    k = torch.randn(1, 1, 6, 8, dtype=torch.complex64).conj().imag
    assert k.is_neg()
    found, expected = (gd.scan(q, keys, beta=0.5, candidates=4) for keys in (k, k.resolve_neg().contiguous()))
    assert torch.equal(found.index, expected.index) and torch.equal(found.energy, expected.energy)


def test_an_output_that_was_changed_in_place_is_reported():
    q, k, v = qkv()
    weights = gd.attend(q, k, v, mechanism="sigmoid")["weights"]
    loss = weights.square().sum()
    weights.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tensor_without_dense_memory_names_the_argument():
    q, k, _ = qkv(torch.float32, grad=False)
    with pytest.raises((ValueError, RuntimeError), match="k|[Ss]parse"):
        gd.scan(q, k.to_sparse(), beta=0.5, candidates=1)


def test_a_tensor_on_another_device_is_an_error():
    with pytest.raises(ValueError, match="q is on the device meta, not on the CPU"):
        gd.scan(torch.empty(1, 1, 2, 8, device="meta"), torch.empty(1, 1, 2, 8, device="meta"), beta=0.5, candidates=1)


def test_the_guide():
    (code,) = examples("torch")
    exec(compile(code, "python.md", "exec"), {})
