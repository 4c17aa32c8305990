"""The Triton kernels on a real GPU against the definition: `pytest -m gpu`. Real plans, every head dim that models use."""

import pytest
import torch

from genattn.apps.bench.cases import AttentionCase
from genattn.functional.planned import plan_for
from genattn.kernels.block_sparse import block_sparse_attention
from genattn.kernels.reference.attention import reference_attention
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")]

PATTERNS = {
    "radial": RadialPattern(),
    "strided": NeighborhoodPattern((4, 6, 6), stride=(2, 3, 3)),
    "sliding": NeighborhoodPattern((5, 5, 5)),
}
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-3}  # float32 runs in TF32 where the user allows it


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "key mask"])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 72, 96, 128])
@pytest.mark.parametrize("name", list(PATTERNS))
def test_forward_and_backward_are_those_of_the_definition(name: str, head_dim: int, dtype: torch.dtype, masked: bool) -> None:
    case = AttentionCase(name, (8, 18, 18), PATTERNS[name], text=33, head_dim=head_dim, dtype=dtype)
    tokens = case.layout.seqlen
    query, key, value, grad = (torch.randn(2, tokens, 2, head_dim, device="cuda", dtype=dtype) for _ in range(4))
    mask = torch.rand(2, tokens, device="cuda") < 0.9 if masked else None
    inputs = [x.requires_grad_() for x in (query, key, value)]
    plan = plan_for(query, key, case.pattern, case.layout)
    out, lse = block_sparse_attention(*inputs, plan, key_mask=mask, return_lse=True, impl="triton")
    gradients = torch.autograd.grad(out, inputs, grad)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want, want_lse = reference_attention(*exact, plan, key_mask=mask)
    wanted = torch.autograd.grad(want, exact, grad.double())
    for got, right in zip((out, *gradients), (want, *wanted), strict=True):
        error = (got.double() - right).norm() / right.norm()
        assert error < BOUNDS[dtype], f"relative error {error:.2e}"
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-2, rtol=0)
