"""Collectives with gradients for parts of any length: what attention over a shared sequence sends.

    swap      every process has its tokens and all heads          ->  all tokens and its heads       (and back)
    collect   every process has its tokens                        ->  all tokens, its own in front

Lengths may differ from process to process. The gradient of a swap is the swap back; that of a collect is the sum of what all
processes have to say about one's own tokens, always in the order of the ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def shares(total: int, parts: int) -> list[int]:
    """`total` cut into `parts` as torch.tensor_split cuts: the first ones are longer by one where it does not divide."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def sizes_of_all(sizes: Sequence[int], group: Any, device: torch.device) -> list[list[int]]:
    """What every process of the group has for `sizes`, in the order of the ranks. Waits for the device."""
    named = str(dist.get_backend(group))
    where = torch.device("cpu") if "gloo" in named or "cpu" in named else device
    mine = torch.tensor(list(sizes), dtype=torch.int64, device=where)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return [one.tolist() for one in found]


def swap(
    tensor: torch.Tensor, group: Any, split_dim: int, split: Sequence[int], join_dim: int, join: Sequence[int]
) -> torch.Tensor:
    """Cut along `split_dim` into pieces of `split`, one for each process; what the others send is joined along `join_dim`.

    Args:
        tensor: of any shape; its length along split_dim is sum(split), along join_dim this process's own of `join`.
        group: the process group.
        split_dim: the axis that is handed out.
        split: lengths by rank.
        join_dim: the axis that becomes whole.
        join: lengths by rank.
    """
    out: torch.Tensor = _Swap.apply(tensor, group, split_dim, tuple(split), join_dim, tuple(join))
    return out


def collect(tensor: torch.Tensor, group: Any, dim: int, sizes: Sequence[int]) -> torch.Tensor:
    """Every process's `tensor` along `dim`, one's own first, then those of the following ranks.

    sizes: lengths along dim by rank; all other axes agree.
    """
    out: torch.Tensor = _Collect.apply(tensor, group, dim, tuple(sizes))
    return out


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any, *cut: Any) -> torch.Tensor:
        ctx.group, ctx.cut = group, cut
        return _swapped(tensor, group, *cut)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        split_dim, split, join_dim, join = ctx.cut
        return _swapped(grad, ctx.group, join_dim, join, split_dim, split), None, None, None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        longest = max(sizes)
        found = [torch.empty_like(_filled(tensor, dim, longest)) for _ in sizes]
        dist.all_gather(found, _filled(tensor, dim, longest), group=group)
        parts = [part.narrow(dim, 0, size) for part, size in zip(found, sizes)]
        own = dist.get_rank(group)
        return torch.cat(parts[own:] + parts[:own], dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        own, world = dist.get_rank(ctx.group), len(ctx.sizes)
        order = [*range(own, world), *range(own)]
        parts = dict(zip(order, grad.split([ctx.sizes[rank] for rank in order], ctx.dim)))
        sent = torch.cat([parts[rank] for rank in range(world)], ctx.dim)
        mine = ctx.sizes[own]
        stacked = _swapped(sent.unsqueeze(0), ctx.group, ctx.dim + 1, ctx.sizes, 0, (1,) * world)
        assert stacked.shape[ctx.dim + 1] == mine
        return stacked.sum(0), None, None, None


def _swapped(
    tensor: torch.Tensor, group: Any, split_dim: int, split: Sequence[int], join_dim: int, join: Sequence[int]
) -> torch.Tensor:
    own = dist.get_rank(group)
    pieces = [piece.contiguous() for piece in tensor.split(list(split), split_dim)]
    shapes = [_with_length(_with_length(tensor.shape, split_dim, split[own]), join_dim, length) for length in join]
    lengths = [shape.numel() for shape in shapes]
    received = tensor.new_empty(sum(lengths))
    sent = torch.cat([piece.flatten() for piece in pieces])
    dist.all_to_all_single(received, sent, lengths, [piece.numel() for piece in pieces], group=group)
    return torch.cat([part.view(shape) for part, shape in zip(received.split(lengths), shapes)], join_dim)


def _with_length(shape: torch.Size, dim: int, length: int) -> torch.Size:
    return torch.Size((*shape[:dim], length, *shape[dim + 1 :]))


def _filled(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """The tensor with zeros behind it along `dim`: the gather wants equal lengths."""
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(_with_length(tensor.shape, dim, missing))], dim)
