"""One denoising step of video transformers at real sizes, from plain modules with random weights: what attention saves in all.

    Wan-14B-shaped       40 blocks, width 5120, self-attention + cross-attention to 512 text tokens + MLP
    Hunyuan-shaped       60 blocks, width 3072, joint attention over video and 256 text tokens + MLP

A step is the time of one block times their number: blocks are alike, and embeddings and the last projection are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genattn.apps.bench.timing import interleaved, timed
from genattn.functional.planned import plan_for, planned_attention
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.peers.dense import dense_backends
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern

Core = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_LONG_FLOPS = 1e15  # of one dense attention: seconds, even on the fastest chip


@dataclass(frozen=True)
class StepShape:
    """A transformer by its sizes. text: tokens in the joint sequence; context: tokens of a cross-attention, 0 for none."""

    name: str
    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    hidden: int
    blocks: int
    text: int = 0
    context: int = 0

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    def longer(self, times: int) -> "StepShape":
        """The same model on `times` as long a video."""
        frames = 1 + (self.grid[0] - 1) * times
        return replace(self, name=f"{self.name} {times}x", grid=(frames, *self.grid[1:]))


WAN_14B = StepShape("wan-14b 720p", (21, 45, 80), 40, 128, 13824, 40, context=512)
HUNYUAN = StepShape("hunyuan 720p", (33, 45, 80), 24, 128, 12288, 60, text=256)


class Block(nn.Module):
    """A transformer block with modulation, normalised queries and keys, and rotary position."""

    def __init__(self, shape: StepShape, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        width, options = shape.width, {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(width, 3 * width, **options)  # type: ignore[arg-type]
        self.out = nn.Linear(width, width, **options)  # type: ignore[arg-type]
        self.up = nn.Linear(width, shape.hidden, **options)  # type: ignore[arg-type]
        self.down = nn.Linear(shape.hidden, width, **options)  # type: ignore[arg-type]
        if shape.context:
            self.cross_q, self.cross_out = (nn.Linear(width, width, **options) for _ in range(2))  # type: ignore[arg-type]
            self.cross_kv = nn.Linear(width, 2 * width, **options)  # type: ignore[arg-type]
        self.modulation = nn.Parameter(torch.randn(6, width, **options) * 0.1)  # type: ignore[call-overload]

    def forward(self, hidden: torch.Tensor, context: torch.Tensor, turn: torch.Tensor, core: Core) -> torch.Tensor:
        """hidden [1, S, C], context [1, T, C], turn [S, D / 2] complex; `core` is the attention under test."""
        width, heads = (self.shape.width,), (self.shape.heads, self.shape.head_dim)
        shift, scale, gate, shift2, scale2, gate2 = self.modulation
        query, key, value = self.qkv(F.layer_norm(hidden, width) * (1 + scale) + shift).unflatten(-1, (3, *heads)).unbind(2)
        query, key = (_turned(F.rms_norm(x, heads[1:]), turn) for x in (query, key))
        hidden = hidden + gate * self.out(core(query, key, value).flatten(2))
        if self.shape.context:
            query = self.cross_q(F.layer_norm(hidden, width)).unflatten(-1, heads)
            key, value = self.cross_kv(context).unflatten(-1, (2, *heads)).unbind(2)
            parts = (x.transpose(1, 2) for x in (query, key, value))
            hidden = hidden + self.cross_out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        inner = F.gelu(self.up(F.layer_norm(hidden, width) * (1 + scale2) + shift2), approximate="tanh")
        return hidden + gate2 * self.down(inner)


def _turned(tensor: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(tensor.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn[None, :, None]).flatten(-2).to(tensor.dtype)


def fastest_dense(probe: torch.Tensor, flops: float, device: str) -> tuple[str, Core, float]:
    """(name, call, seconds) of the dense backend that is fastest on `probe` as queries, keys and values.

    Where one call is a matter of seconds, of the first that runs, in the order of what is fastest elsewhere. Raises
    RuntimeError when none runs.
    """
    calls = {name: call for name, call in dense_backends(probe)[0].items() if name not in ("sdpa", "sdpa:math")}
    best: tuple[str, Core, float] | None = None
    for name in sorted(calls, key=lambda name: (name not in ("sdpa:cudnn", "sdpa:flash"), name)):
        try:
            seconds = timed(partial(calls[name], probe, probe, probe), device)
            seconds = seconds if flops > _LONG_FLOPS else timed(partial(calls[name], probe, probe, probe), device)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a backend that took a short probe may refuse this length
            continue
        if best is None or seconds < best[2]:
            best = name, calls[name], seconds
        if flops > _LONG_FLOPS:
            break
    if best is None:
        raise RuntimeError(f"no dense backend serves {tuple(probe.shape)} on {device}, of {', '.join(calls) or 'none'}")
    return best


@torch.no_grad()
def step_row(
    shape: StepShape, device: str = "cuda", rounds: int = 2, impl: str = "auto", pattern: Pattern | None = None
) -> dict[str, Any]:
    """Seconds of a step, dense by the fastest backend against `pattern` (default Radial); random bf16 weights."""
    torch.manual_seed(0)
    layout = TokenLayout.from_grid(shape.grid, text_after=shape.text)
    dtype = torch.bfloat16
    block = Block(shape, device, dtype)
    hidden = torch.randn(1, layout.seqlen, shape.width, device=device, dtype=dtype)
    context = torch.randn(1, max(1, shape.context), shape.width, device=device, dtype=dtype)
    angles = torch.rand(layout.seqlen, shape.head_dim // 2, device=device) * 6.28
    turn = torch.polar(torch.ones_like(angles), angles)
    probe = hidden.unflatten(-1, (shape.heads, shape.head_dim))
    plan = plan_for(probe, probe, pattern or RadialPattern(), layout)
    flops = 4.0 * shape.width * layout.seqlen**2
    fastest, call, seconds = fastest_dense(probe, flops, device)
    rounds = 1 if flops > _LONG_FLOPS else rounds
    cores: dict[str, Core] = {
        "dense": call,
        "sparse": lambda q, k, v: planned_attention(q, k, v, plan, impl=impl),  # type: ignore[dict-item, return-value]
    }
    times = interleaved({n: lambda core=core: block(hidden, context, turn, core) for n, core in cores.items()}, rounds, device)  # type: ignore[misc]
    dense, sparse = (min(times[name]) * shape.blocks for name in ("dense", "sparse"))
    return {
        **{"case": shape.name, "grid": "x".join(map(str, shape.grid)), "seqlen": layout.seqlen, "heads": shape.heads},
        **{"head_dim": shape.head_dim, "blocks": shape.blocks, "density": plan.density, "dense": fastest},
        **{"dense_attention_seconds": seconds * shape.blocks, "dense_seconds": dense, "sparse_seconds": sparse},
        **{"speedup": dense / sparse, "rounds": rounds},
    }
