"""Plugins under diffusers' context parallelism: each process holds some of the tokens, and the chain runs around what is sent.

    Ulysses     all tokens for some of the heads                   the chain sees a whole sequence, and which heads it has
    ring        its own tokens for all heads, and all keys         the chain sees its own queries in front of the sequence
    both        its ring's tokens for some of the heads, all keys

With several token streams the order in which the tokens are joined is not the model's own, so the layout is cut into pieces:

    model:      text | image                      two ranks:   text[0] | image[0] | text[1] | image[1]

diffusers' ring gathers all keys before it begins, and so does this one. With all of them there, one call under a plan for its
own queries is exact: nothing is merged, so any backend serves, with a gradient, also one that tells no log-sum-exp.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from genattn.distributed.exchange import collect, shares, sizes_of_all, swap
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """What of a shared call this process answers.

    Attributes:
        sizes: keys that each process brought, in the order of the ranks.
        first: the rank whose tokens stand first here; those of the following ranks come behind, and then the others'.
        head_offset: the first query head.
        asking: how many processes' queries are here, from `first` on; all of them but in a ring.
    """

    sizes: tuple[int, ...]
    first: int
    head_offset: int
    asking: int

    @property
    def only_first(self) -> bool:
        """Whether the queries are only the first of the tokens."""
        return self.asking < len(self.sizes)


Chain = Callable[[Tensors, Any, Part], torch.Tensor]
Order = Callable[[Part], "torch.Tensor | None"]


def split_of(parallel_config: Any) -> str:
    """How diffusers splits a sequence: "ulysses", "ulysses_anything" (of any length) or "ring"; empty where it does not."""
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        return ""
    if (config.ring_degree or 1) > 1:
        return "ring"
    return "ulysses_anything" if getattr(config, "ulysses_anything", False) else "ulysses"


def shared_attention(tensors: Tensors, mask: Any, config: Any, chain: Chain, order: Order) -> torch.Tensor:
    """`chain` on what this process answers; in and out [B, S of this process, H, D].

    order: for a part, the model's own place of each token there, int64 [S], None where that is not known. A mask over this
    process's own keys is joined as they are, one over all of them is brought into their order. Raises GenAttnError where
    there is not a head for every process.
    """
    inner = config.context_parallel_config
    ulysses, ring = _Group(inner.ulysses_degree, inner._ulysses_mesh), _Group(inner.ring_degree, inner._ring_mesh)
    uneven = getattr(inner, "ulysses_anything", False) or getattr(inner, "ring_anything", False)
    query, key, value = tensors
    kept, heads = _heads_of_each(query.shape[2], key.shape[2], ulysses.size)
    sent = query.shape[1], key.shape[1]
    told = sizes_of_all(sent, max(ulysses, ring).group, query.device) if uneven else [list(sent)] * (ulysses.size * ring.size)
    queries, keys = ([sizes[axis] for sizes in told] for axis in (0, 1))
    part = Part(tuple(keys), ring.rank * ulysses.size, sum(heads[: ulysses.rank]), ulysses.size)
    if ulysses.size > 1:
        query = swap(query, ulysses.group, 2, heads, 1, queries[: ulysses.size])
        key, value = (swap(x, ulysses.group, 2, kept, 1, keys[: ulysses.size]) for x in (key, value))
    if ring.size > 1:
        key, value = (collect(x, ring.group, 1, _rounds(part)) for x in (key, value))
    if isinstance(mask, torch.Tensor):
        joined = mask.shape[-1] == sent[1] < sum(keys)
        mask = _joined(mask, part, ulysses, ring) if joined else _ordered(mask, part, order(part))
    out = chain((query, key, value), mask, part)
    return swap(out, ulysses.group, 1, queries[: ulysses.size], 2, heads) if ulysses.size > 1 else out


class _Group:
    """One axis of the processes; of size 1 it is nobody else."""

    def __init__(self, degree: int | None, mesh: Any) -> None:
        self.size = int(degree or 1)
        self.group = mesh.get_group() if self.size > 1 else None
        self.rank = torch.distributed.get_rank(self.group) if self.size > 1 else 0

    def __lt__(self, other: "_Group") -> bool:
        return self.size < other.size


def _heads_of_each(heads: int, kept: int, processes: int) -> tuple[list[int], list[int]]:
    """(key heads, query heads) by rank; groups of query heads stay with the key head that they share."""
    if kept < processes:
        raise GenAttnError(f"every process needs a head, got {kept} heads for ulysses_degree={processes}; use at most {kept}")
    per_rank = shares(kept, processes)
    return per_rank, [count * (heads // kept) for count in per_rank]


def _rounds(part: Part) -> list[int]:
    """Keys of each place of the ring."""
    return [sum(part.sizes[place : place + part.asking]) for place in range(0, len(part.sizes), part.asking)]


def _joined(mask: torch.Tensor, part: Part, ulysses: _Group, ring: _Group) -> torch.Tensor:
    """Every process's own columns side by side."""
    columns, last = mask.to(torch.uint8) if mask.dtype == torch.bool else mask, mask.ndim - 1
    if ulysses.size > 1:
        columns = collect(columns, ulysses.group, last, part.sizes[: ulysses.size])
        columns = columns.roll(sum(part.sizes[: ulysses.rank]), last)  # one's own stood in front
    if ring.size > 1:
        columns = collect(columns, ring.group, last, _rounds(part))
    return columns.to(mask.dtype)


def _ordered(mask: torch.Tensor, part: Part, places: torch.Tensor | None) -> torch.Tensor:
    """A mask over all tokens in the order in which they are joined, and of its rows those that ask."""
    if places is None or mask.shape[-1] != len(places):
        return mask
    if mask.ndim > 2 and mask.shape[-2] == len(places):
        asking = sum((part.sizes * 2)[part.first : part.first + part.asking])
        mask = mask.index_select(-2, places[:asking].to(mask.device))
    return mask.index_select(-1, places.to(mask.device))


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
    if getattr(model, "_cp_plan", None) is None:
        return f"diffusers has no context-parallel plan for {type(model).__name__}"
    if heads % degree or tokens % degree:
        return f"{heads} heads and {tokens} tokens must both be multiples of it"
    if torch.cuda.device_count() < degree:
        return f"it needs {degree} CUDA GPUs, this machine has {torch.cuda.device_count()}"
    if world != degree:
        return f"it needs {degree} processes, there are {world}; start with: accelerate launch --num_processes {degree}"
    return ""


# ---- in which order tokens are joined


def has_text_apart(model: Any) -> bool:
    """Whether context parallelism cuts text and image each by itself, as the plan says under which the model runs.

    Models that pack all tokens before the first block are cut once.
    """
    plans = [
        hook.metadata
        for module in model.modules()
        for name, hook in getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).items()
        if name.startswith("cp_input") and isinstance(hook.metadata, dict)
    ]
    plans = plans or [plan for plan in (getattr(model, "_cp_plan", None) or {}).values() if isinstance(plan, dict)]
    return any("encoder_hidden_states" in plan for plan in plans)


@lru_cache(maxsize=64)
def gathered(layout: TokenLayout, world: int, text_apart: bool = True, first: int = 0) -> TokenLayout:
    """`layout` in the order in which `world` ranks hold it one behind the other, rank `first` in front.

    text_apart: text and the other tokens are cut each by themselves.
    """
    return TokenLayout(tuple(piece for rank in _ranks(world, first) for piece in _held(layout, world, text_apart, rank)))


def held_by_each(layout: TokenLayout, world: int, text_apart: bool = True) -> tuple[int, ...]:
    """Tokens that each rank holds."""
    return tuple(sum(piece.length for piece in _held(layout, world, text_apart, rank)) for rank in range(world))


@lru_cache(maxsize=64)
def places_of(layout: TokenLayout, world: int, text_apart: bool, first: int) -> torch.Tensor:
    """Int64 [S]: the place in `layout` of each token of `gathered`."""
    ends, streams = [0], _streams(layout.segments, text_apart)
    for stream in streams:
        ends.append(ends[-1] + sum(segment.length for segment in stream))
    cuts = [torch.arange(low, high).tensor_split(world) for low, high in itertools.pairwise(ends)]
    return torch.cat([cut[rank] for rank in _ranks(world, first) for cut in cuts])


def _ranks(world: int, first: int) -> list[int]:
    return [*range(first, world), *range(first)]


def _held(layout: TokenLayout, world: int, text_apart: bool, rank: int) -> list[Segment]:
    """What one rank holds of every stream."""
    pieces: list[Segment] = []
    for stream in _streams(layout.segments, text_apart):
        each = shares(sum(segment.length for segment in stream), world)
        pieces += _cut(stream, sum(each[:rank]), sum(each[: rank + 1]))
    return pieces


def _streams(segments: Sequence[Segment], text_apart: bool) -> list[list[Segment]]:
    """Runs of segments that are cut as one tensor: text, and everything else."""
    streams: list[list[Segment]] = []
    for segment in segments:
        if streams and (not text_apart or (streams[-1][-1].kind == "text") == (segment.kind == "text")):
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
