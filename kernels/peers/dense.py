"""Dense attention by capability: every backend that can serve, and why not the rest.

The denominator of every speed-up: each SDPA backend is forced in turn, because the default choice need not be the fastest.
xformers joins when it is installed; FlashInfer, SpargeAttn and NATTEN are only looked for, and reported.
"""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_SDPA = {
    "sdpa:flash": SDPBackend.FLASH_ATTENTION,
    "sdpa:cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa:efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa:math": SDPBackend.MATH,
}
OPTIONAL_PEERS = {"xformers": "xformers", "flash_attn": "flash-attn", "flashinfer": "flashinfer-python",
                  "spas_sage_attn": "spas_sage_attn", "natten": "natten"}  # fmt: skip
_MATH_SCORES = 1 << 30
DenseCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense_backends(query: torch.Tensor) -> tuple[dict[str, DenseCall], dict[str, str]]:
    """({name: call on [B, S, H, D] tensors}, {name: why not}) for tensors like `query`."""
    calls: dict[str, DenseCall] = {"sdpa": _sdpa}
    reasons: dict[str, str] = {}
    for name, backend in _SDPA.items():
        reason = _why_not_sdpa(name, backend, query)
        if reason is None:
            calls[name] = _forced(backend)
        else:
            reasons[name] = reason
    reason = why_not_xformers(query)
    if reason is None:
        calls["xformers"] = _xformers
    else:
        reasons["xformers"] = reason
    return calls, reasons


def why_not_xformers(query: torch.Tensor) -> str | None:
    """The reason why xformers cannot serve tensors like `query`, or None."""
    if importlib.util.find_spec("xformers") is None:
        return "not installed (pip install xformers)"
    if query.device.type != "cuda":
        return f"it needs a GPU, got {query.device.type}"
    return None


def missing_peers() -> dict[str, str]:
    """{peer: how to get it} for the optional packages that are not installed."""
    return {name: f"not installed (pip install {wheel})" for name, wheel in OPTIONAL_PEERS.items()
            if importlib.util.find_spec(name) is None}  # fmt: skip


def dense_attention_with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, S, H, D], lse [B, S, H] float32, natural log) by a dense kernel that returns its log-sum-exp.

    Raises ValueError when the device has none.
    """
    inputs = (query.transpose(1, 2), *(_grouped(x, query) for x in (key, value)))
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, scale=scale)
    elif query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(*inputs, scale=scale)[:2]
    elif query.device.type == "cuda":
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(*inputs, None, True, scale=scale)[:2]
        lse = lse[..., : query.shape[1]]
    else:
        raise ValueError(f"dense attention with log-sum-exp must run on cpu or cuda, got {query.device.type}")
    return out.transpose(1, 2), lse.transpose(1, 2).float()


def _grouped(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).repeat_interleave(query.shape[2] // tensor.shape[2], 1)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=query.shape[2] != key.shape[2]).transpose(1, 2)


def _forced(backend: SDPBackend) -> DenseCall:
    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return _sdpa(query, key, value)

    return call


def _why_not_sdpa(name: str, backend: SDPBackend, query: torch.Tensor) -> str | None:
    batch, seqlen, heads, _ = query.shape
    if backend == SDPBackend.MATH and batch * heads * seqlen * seqlen > _MATH_SCORES:
        return f"its score matrix must stay under {_MATH_SCORES} elements, got {batch * heads * seqlen * seqlen}"
    probe = torch.zeros(1, 64, 1, query.shape[-1], dtype=query.dtype, device=query.device)
    try:
        _forced(backend)(probe, probe, probe)
    except (RuntimeError, NotImplementedError) as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None


def _xformers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)
