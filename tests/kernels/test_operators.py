"""The library ops: opcheck, gradients against the definition, and one compiled graph for every plan."""

import pytest
import torch

from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.operators import NAMED_IMPLS, block_sparse_backward, block_sparse_forward
from genattn.kernels.plan.block_plan import plan_of_handle
from genattn.kernels.plan.random_plan import random_plan
from genattn.kernels.reference.attention import reference_attention


def _inputs(plan, heads=2, kv_heads=1, dim=16, dtype=torch.float32, grad=False):
    shapes = [(1, plan.seqlen_q, heads, dim)] + [(1, plan.seqlen_k, kv_heads, dim)] * 2
    return [torch.randn(s).to(dtype).requires_grad_(grad) for s in shapes]


@pytest.mark.parametrize("impl", ["auto", "cpu", "grouped"])
def test_opcheck(impl):
    plan = random_plan(1, (2, 3, 4))
    inputs = _inputs(plan, grad=True)
    mask = torch.rand(1, plan.seqlen_k) < 0.8
    torch.library.opcheck(block_sparse_forward, (*inputs, mask, plan.handle, 0.3, impl))
    out, lse = block_sparse_forward(*[x.detach() for x in inputs], None, plan.handle, 0.3, impl)
    torch.library.opcheck(
        block_sparse_backward,
        (torch.randn_like(out), torch.randn_like(lse), *[x.detach() for x in inputs], None, out, lse, plan.handle, 0.3, impl),
    )


@pytest.mark.parametrize("impl", ["cpu", "grouped"])
@pytest.mark.parametrize(("seed", "heads", "masked"), [(1, 1, False), (2, 2, True), (3, 1, True)])
def test_gradients_match_the_definition(impl, seed, heads, masked):
    plan = random_plan(seed, (2, 4, 5), heads=heads, padding=2, scattered=seed == 2)
    inputs = _inputs(plan, grad=True)
    mask = torch.rand(1, plan.seqlen_k) < 0.7 if masked else None
    weight = torch.randn(1, plan.seqlen_q, 2, 16)

    def loss(out, lse):
        finite = torch.isfinite(lse)
        return (out * weight).sum() + (lse[finite] * weight[..., 0][finite]).sum()

    got = torch.autograd.grad(loss(*block_sparse_attention(*inputs, plan, impl=impl, key_mask=mask, return_lse=True)), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = torch.autograd.grad(loss(*reference_attention(*exact, plan, key_mask=mask)), exact)
    for a, b in zip(got, want):
        assert (a.double() - b).norm() <= 3e-6 * b.norm()


@pytest.mark.parametrize("impl", ["cpu", "grouped"])
@pytest.mark.parametrize("tail", [None, "mean2"])
def test_a_backward_pass_inside_of_autocast(impl, tail):
    plan = random_plan(2, (2, 4, 5)).with_tail(tail)
    inputs = [x.bfloat16().requires_grad_() for x in _inputs(plan)]
    want = torch.autograd.grad(block_sparse_attention(*inputs, plan, impl=impl).float().square().sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(block_sparse_attention(*inputs, plan, impl=impl).float().square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_pieces_of_a_group_add_up(monkeypatch):
    plan = random_plan(5)
    inputs = _inputs(plan, grad=True)
    whole = torch.autograd.grad(block_sparse_attention(*inputs, plan).square().sum(), inputs)
    monkeypatch.setattr("genattn.kernels.cpu.backward._SCORES_AT_ONCE", plan.seqlen_k * 3)
    for a, b in zip(whole, torch.autograd.grad(block_sparse_attention(*inputs, plan).square().sum(), inputs)):
        torch.testing.assert_close(a, b)


def test_half_precision_gradients_keep_their_type():
    plan = random_plan(5)
    inputs = _inputs(plan, dtype=torch.bfloat16, grad=True)
    block_sparse_attention(*inputs, plan).float().square().sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 and torch.isfinite(x.grad).all() for x in inputs)


def test_one_graph_serves_every_plan():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def model(query, key, value, plan):
        return block_sparse_attention(query * 2, key, value, plan) + 1

    for seed in (1, 2, 3):
        plan = random_plan(seed, (2, 4, 5), scattered=seed == 3)
        inputs = _inputs(plan)
        expected = block_sparse_attention(inputs[0] * 2, *inputs[1:], plan) + 1
        torch.testing.assert_close(model(*inputs, plan), expected)
    assert len(graphs) == 1


def test_compiled_gradients():
    torch._dynamo.reset()
    plan = random_plan(4, (2, 4, 5))
    inputs = _inputs(plan, grad=True)

    def loss(query, key, value):
        return block_sparse_attention(query, key, value, plan).square().sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(got, torch.autograd.grad(loss(*inputs), inputs)):
        torch.testing.assert_close(a, b)


def test_a_lost_plan_is_told():
    handle = random_plan(0).handle.clone()
    with pytest.raises(ValueError, match="must be alive"):
        plan_of_handle(handle)


def test_reasons_reach_the_caller():
    plan = random_plan(0)
    query, key, value = _inputs(plan, dtype=torch.float64)
    with pytest.raises(ValueError, match="dtype must be float32"):
        block_sparse_forward(query, key, value, None, plan.handle, 1.0, "cpu")
    with pytest.raises(ValueError, match="needs a GPU"):
        block_sparse_attention(query.float(), key.float(), value.float(), plan, impl="triton")


def test_a_kernel_without_a_backward_says_so():
    plan = random_plan(0)
    inputs = _inputs(plan)
    out, lse = block_sparse_forward(*inputs, None, plan.handle, 0.3, "grouped")
    for impl in NAMED_IMPLS:
        with pytest.raises(ValueError, match=f"impl='{impl}' has no backward; use impl='triton' where gradients are wanted"):
            block_sparse_backward(out, lse, *inputs, None, out, lse, plan.handle, 0.3, impl)
