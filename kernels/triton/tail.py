"""Host side of the tail in the Triton kernels: pseudo-keys of one call as arguments, and the gradient that comes back.

The means are made by tensor operations once per call (`kernels/reference/tail.py`, the definition) and rounded to the type of
the keys, as a kernel multiplies them; their weights stay in float32.
"""

from dataclasses import replace

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.reference.tail import TailKeys, spread_over_tokens, tail_keys
from genattn.kernels.triton.config import arch_of, launch_of
from genattn.kernels.triton.fade import fade_arguments
from genattn.kernels.triton.launch import Arguments, alignment, is_wide, launch, padded, strides_of
from genattn.kernels.triton.tables import triton_tables


def pseudo_keys(key: torch.Tensor, value: torch.Tensor, plan: BlockPlan, key_mask: torch.Tensor | None) -> TailKeys | None:
    """The pseudo-keys of one call, rows in the type of `key`; None without a tail."""
    if plan.tail is None:
        return None
    with torch.no_grad():
        made = tail_keys(key, value, plan.tail, key_mask)
    return replace(made, key=made.key.to(key.dtype), value=made.value.to(key.dtype), log_count=made.log_count.float())


def tail_arguments(pseudo: TailKeys | None, plan: BlockPlan, scale: float, unused: torch.Tensor) -> Arguments:
    """What the forward and dq kernels take for the tail; `unused` stands where there is none."""
    if pseudo is None or plan.tail is None:
        none = dict.fromkeys(("TAIL_K", "TAIL_V", "TAIL_BIAS", "SKIPPED"), unused)
        return {**none, "t_b": 0, "t_s": 0, "t_h": 0, "pseudo": 0, "tail_words": 0, "TAIL": 0}
    return {
        "TAIL_K": pseudo.key,
        "TAIL_V": pseudo.value,
        # the kernel multiplies a whole score by the scale
        "TAIL_BIAS": (pseudo.log_count / scale).expand(-1, pseudo.key.shape[2], -1).contiguous(),
        "SKIPPED": plan.tail.skipped,
        **strides_of("t", pseudo.key),
        "pseudo": plan.tail.pseudo_keys,
        "tail_words": plan.tail.skipped.shape[2],
        "TAIL": plan.tail.parts,
    }


def add_tail_gradients(
    grads: list[torch.Tensor],
    grad_out: torch.Tensor,
    query: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    pseudo: TailKeys,
    plan: BlockPlan,
    scale: float,
    key_mask: torch.Tensor | None,
    precision: str,
) -> None:
    """Add to the gradients of key and value, grads[1] and grads[2], what reaches them through the means."""
    from genattn.kernels.triton.backward_kernel import tail_dkv_kernel

    assert plan.tail is not None
    found = [torch.empty(pseudo.key.shape, dtype=torch.float32, device=query.device) for _ in range(2)]
    arguments = tail_dkv_arguments(grad_out, query, lse, delta, pseudo, found, plan, scale, precision)
    blocks = -(-plan.tail.pseudo_keys // int(arguments["BLOCK_P"]))  # type: ignore[call-overload]
    launch(tail_dkv_kernel, (blocks, query.shape[0] * pseudo.key.shape[2]), arguments, query)
    for grad, mean in zip(grads[1:], found):
        grad += spread_over_tokens(mean, pseudo, grad.shape[1]).to(grad.dtype)


def tail_dkv_arguments(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    pseudo: TailKeys,
    found: list[torch.Tensor],
    plan: BlockPlan,
    scale: float,
    precision: str,
    arch: str | None = None,
) -> Arguments:
    """Every argument of `tail_dkv_kernel`; found: float32 [B, P, Hk, D] for the gradients of keys and values."""
    tables, dim = triton_tables(plan), query.shape[-1]
    tail = tail_arguments(pseudo, plan, scale, query)
    name = arch or arch_of(query.device)
    setting = launch_of("tail dkv", name, dim, plan.block_q, plan.block_k, query.dtype)
    return {
        **{"Q": query, "DO": grad_out, "LSE": lse, "DELTA": delta, "DK": found[0], "DV": found[1]},
        **tail,
        "QUERY_TILES": tables.query_lanes,
        "scale": scale,
        **strides_of("q", query),
        **strides_of("d", grad_out),
        **strides_of("g", found[0]),
        "seqlen_q": query.shape[1],
        "heads": query.shape[2],
        "group": query.shape[2] // pseudo.key.shape[2],
        "tiles_q": plan.query_tiles.shape[0],
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "BLOCK_Q": plan.block_q,
        "BLOCK_P": plan.block_k,
        "SPLIT": setting.split,
        "LISTS": plan.num_heads,
        "RUNS_Q": tables.runs_q,
        "WIDE": is_wide(query, grad_out),
        "ALIGN": alignment(query, grad_out, pseudo.key, found[0]),
        "PRECISION": precision,
        **fade_arguments(plan),
        "num_warps": setting.warps,
        "num_stages": setting.stages,
    }
