"""A kernel that fails when it is launched: "auto" goes on, tells once, remembers; who named it gets the error."""

import warnings

import pytest
import torch

from genattn.kernels import failures, operators
from genattn.kernels.block_sparse import as_autocast, block_sparse_attention, choose_impl, working_dtype
from genattn.kernels.failures import KernelFailure, forget_failures
from genattn.kernels.plan.random_plan import random_plan
from genattn.kernels.reference.attention import reference_attention

PLAN = random_plan(8, (2, 4, 5))


class OutOfResources(Exception):
    """As Triton's own: derived from nothing that says what it is."""


@pytest.fixture(autouse=True)
def _fresh():
    forget_failures()
    yield
    forget_failures()


def _break(monkeypatch, error, backward_error=None):
    calls = {"forward": 0, "backward": 0}

    def fails(*args, **kwargs):
        calls["forward"] += 1
        if error is None:
            return reference_attention(*args, **kwargs)
        raise error

    def backward(*args, **kwargs):
        calls["backward"] += 1
        raise backward_error

    monkeypatch.setattr(operators, "why_not_triton", lambda *_: None)
    monkeypatch.setitem(operators._FORWARD, "triton", fails)
    monkeypatch.setattr(operators, "triton_backward", backward)
    return calls


def _inputs(gradient=False):
    return [torch.randn(1, PLAN.seqlen_q, 2, 16, requires_grad=gradient) for _ in range(3)]


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources("out of resource: shared memory\nmore"),
        RuntimeError("Triton Error [CUDA]: no kernel image"),
        OSError("cc1"),
    ],
)
def test_auto_goes_on_tells_once_and_remembers(error, monkeypatch):
    calls = _break(monkeypatch, error)
    inputs = _inputs()
    want = reference_attention(*inputs, PLAN)[0]
    with pytest.warns(RuntimeWarning, match=f"forward kernel of 'triton' failed on cpu .{type(error).__name__}: .*from now on"):
        out = block_sparse_attention(*inputs, PLAN)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block_sparse_attention(*inputs, PLAN)
    assert calls["forward"] == 1, "a kernel that failed is not tried again"
    chosen, reasons = choose_impl(*inputs, PLAN)
    assert chosen != "triton"
    assert "failed on this device before" in reasons["triton"]


def test_other_calls_still_try(monkeypatch):
    calls = _break(monkeypatch, OutOfResources())
    with pytest.warns(RuntimeWarning, match="no message"):
        block_sparse_attention(*_inputs(), PLAN)
    with pytest.warns(RuntimeWarning, match="OutOfResources"):
        block_sparse_attention(*[x.half() for x in _inputs()], PLAN)
    assert calls["forward"] == 2


def test_who_names_a_kernel_gets_its_error(monkeypatch):
    _break(monkeypatch, OutOfResources("shared memory"))
    with pytest.raises(KernelFailure, match=r"impl='triton' failed on this device: OutOfResources: shared memory"):
        block_sparse_attention(*_inputs(), PLAN, impl="triton")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: an illegal memory access was encountered"),
     ValueError("our own")],
)  # fmt: skip
def test_what_another_kernel_would_not_cure_is_raised(error, monkeypatch):
    _break(monkeypatch, error)
    with pytest.raises(type(error), match=str(error)):
        block_sparse_attention(*_inputs(), PLAN)
    assert failures.failed_before("triton", _inputs()[0], PLAN) is None


def test_a_backward_that_fails_is_made_up_for(monkeypatch):
    calls = _break(monkeypatch, None, OutOfResources("shared memory"))
    inputs = _inputs(gradient=True)
    want = torch.autograd.grad(reference_attention(*inputs, PLAN)[0].square().sum(), inputs)
    with pytest.warns(RuntimeWarning, match="backward kernel of 'triton' failed"):
        got = torch.autograd.grad(block_sparse_attention(*inputs, PLAN).square().sum(), inputs)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.autograd.grad(block_sparse_attention(*inputs, PLAN).sum(), inputs)
    assert calls["backward"] == 1
    with pytest.raises(KernelFailure, match="shared memory"):
        torch.autograd.grad(block_sparse_attention(*inputs, PLAN, impl="triton").sum(), inputs)


def test_inside_a_compiled_graph_the_op_goes_on_alone(monkeypatch):
    _break(monkeypatch, OutOfResources("shared memory"))
    query, key, value = _inputs()
    with pytest.warns(RuntimeWarning, match="the CPU computes instead"):
        out, _ = operators.block_sparse_forward(query, key, value, None, PLAN.handle, 0.25, "auto")
    torch.testing.assert_close(out, reference_attention(query, key, value, PLAN, scale=0.25)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kinds", [(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16), (torch.float64,) * 3])
def test_autocast_casts_as_sdpa_does(kinds):
    query, key, value = (x.to(kind) for x, kind in zip(_inputs(), kinds))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heads = [x.transpose(1, 2) for x in (query, key, value)]
        stock = torch.nn.functional.scaled_dot_product_attention(*heads)
        ours = block_sparse_attention(query, key, value, PLAN, impl="reference")
        assert ours.dtype == stock.dtype == as_autocast(query, key, value)[0].dtype
        assert working_dtype(query) == stock.dtype
    assert as_autocast(query, key, value)[0] is query, "nothing is cast outside"
