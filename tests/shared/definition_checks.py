"""Drawn inputs of a plan, and a backend's answer against the definition in float64."""

import torch

from genattn.kernels.reference.attention import reference_attention

BOUNDS = {torch.float32: 3e-6, torch.float16: 1.2e-3, torch.bfloat16: 6e-3}


def drawn_inputs(plan, heads, kv_heads, dim, batch, dtype, seed):
    """query, key and value [B, S, H, D] for a plan, from a seed."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [(batch, plan.seqlen_q, heads, dim)] + [(batch, plan.seqlen_k, kv_heads, dim)] * 2
    return [torch.randn(s, generator=draw).to(dtype) for s in shapes]


def assert_near_definition(got, inputs, plan, dtype, key_mask=None):
    """(out, lse) against the float64 reference, within what the type allows."""
    out, lse = reference_attention(*(x.double() for x in inputs), plan, key_mask=key_mask)
    assert not got[0].isnan().any()
    assert (got[0].double() - out).norm() <= BOUNDS[dtype] * out.norm().clamp_min(1e-30)
    assert torch.equal(torch.isneginf(got[1]), torch.isneginf(lse))
    finite = torch.isfinite(lse)
    assert not finite.any() or (got[1].double() - lse)[finite].abs().max() <= (2e-5 if dtype == torch.float32 else 2e-2)
