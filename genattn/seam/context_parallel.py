"""Plugins under diffusers' context parallelism (Ulysses): tokens are gathered and heads are scattered around the chain.

Each rank then holds all tokens for H / world heads. With several token streams the gathered order is not the model's own:

    model:      text | image                      two ranks:   text[0] | image[0] | text[1] | image[1]

so the layout is cut into pieces. Ring attention sees a part of the keys at a time, and is refused.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout

Chain = Callable[..., torch.Tensor]


def why_not_ulysses(parallel_config: Any) -> str:
    """Why the chain cannot run on gathered tokens; empty when it can."""
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        return "the parallel config is not diffusers' context parallelism"
    if (config.ring_degree or 1) > 1:
        return "ring context parallelism shows a part of the keys at a time, and merging needs LSE; use ulysses_degree"
    if getattr(config, "ulysses_anything", False):
        return "ulysses_anything splits unevenly; use plain Ulysses"
    return "" if _template() is not None else "this diffusers has no templated context-parallel attention"


def ulysses(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], mask: Any, scale: float | None, config: Any, chain: Chain
) -> torch.Tensor:
    """`chain(tensors, mask, world, rank)` on gathered tokens [B, S, H / world, D]; in and out [B, S / world, H, D]."""
    inner = config.context_parallel_config
    world, rank = int(inner.ulysses_degree), int(inner._ulysses_mesh.get_local_rank())

    def forward_op(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: Any, *rest: Any, **named: Any) -> Any:
        ctx.genattn_inputs = (q, k, v, given)
        return chain((q, k, v), given, world, rank)

    def backward_op(ctx: Any, grad_out: torch.Tensor, *rest: Any, **named: Any) -> Any:
        # the template runs without a graph, so the chain is run again with one
        *heads, given = ctx.genattn_inputs
        leaves = [x.detach().requires_grad_() for x in heads]
        with torch.enable_grad():
            again = chain(tuple(leaves), given, world, rank)
        return torch.autograd.grad(again, leaves, grad_out)

    template = _template()
    assert template is not None
    out: torch.Tensor = template(
        *tensors, mask, scale=scale, forward_op=forward_op, backward_op=backward_op, _parallel_config=config
    )
    return out


def enable_ulysses(model: Any, degree: int, tokens: int) -> None:
    """Share the tokens of one clip among `degree` GPUs; nothing for a degree of 1.

    tokens: of the sequence, a multiple of degree; so must be the number of heads. Raises GenAttnError with the reason when
    this process, machine or model cannot.
    """
    if degree == 1:
        return
    reason = why_not_enable(model, degree, tokens)
    if reason:
        raise GenAttnError(f"context_parallel={degree} cannot be served: {reason}")
    from diffusers import ContextParallelConfig

    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree))


def why_not_enable(model: Any, degree: int, tokens: int) -> str:
    """The reason why `enable_ulysses` cannot serve, empty when it can."""
    import torch.distributed as dist

    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    heads = model.config.get("num_attention_heads", 0)
    if _template() is None or getattr(model, "_cp_plan", None) is None:
        return f"diffusers has no context-parallel plan for {type(model).__name__}"
    if heads % degree or tokens % degree:
        return f"{heads} heads and {tokens} tokens must both be multiples of it"
    if torch.cuda.device_count() < degree:
        return f"it needs {degree} CUDA GPUs, this machine has {torch.cuda.device_count()}"
    if world != degree:
        return f"it needs {degree} processes, there are {world}; start with: accelerate launch --num_processes {degree}"
    return ""


@lru_cache(maxsize=1)
def _template() -> Callable[..., Any] | None:
    from diffusers.models import attention_dispatch

    return getattr(attention_dispatch, "_templated_context_parallel_attention", None)


@lru_cache(maxsize=64)
def gathered(layout: TokenLayout, world: int) -> TokenLayout | None:
    """`layout` in the order in which `world` ranks hold it one behind the other; None when a stream does not divide."""
    streams = _streams(layout.segments)
    if len(streams) == 1:
        return layout
    lengths = [sum(s.length for s in stream) for stream in streams]
    if any(length % world for length in lengths):
        return None
    pieces: list[Segment] = []
    for rank in range(world):
        for stream, length in zip(streams, lengths):
            share = length // world
            pieces += _cut(stream, rank * share, (rank + 1) * share)
    return TokenLayout(tuple(pieces))


def _streams(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Runs of segments that enter the model as one tensor: text, and everything else."""
    streams: list[list[Segment]] = []
    for segment in segments:
        if streams and (streams[-1][-1].kind == "text") == (segment.kind == "text"):
            streams[-1].append(segment)
        else:
            streams.append([segment])
    return streams


def _cut(stream: list[Segment], start: int, stop: int) -> list[Segment]:
    """The tokens [start, stop) of a stream."""
    pieces, at = [], 0
    for segment in stream:
        low, high = max(start, at), min(stop, at + segment.length)
        if low < high and segment.kind == "grid":
            pieces.append(Segment("grid", segment.shape, segment.start + low - at, segment.start + high - at))
        elif low < high:
            pieces.append(Segment(segment.kind, (high - low,)))
        at += segment.length
    return pieces
