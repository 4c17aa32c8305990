"""The queue of endless video as pure bookkeeping: which frame sits where, at which noise level, in which window. No model.

    slot    0 ... head-1 | head ...                              ... head + working - 1
    level   -1 (clean)   | 0, 0, .. 1, 1, ..                     ... num_levels - 1
            references   | cleanest                                              noisiest

Every tick each working slot goes one level down, the cleanest `latents_per_level` latents leave, everything moves left, and
as many new ones enter at the noisiest level. One family covers FIFO-Diffusion (latents_per_level 1; NeurIPS 2024), zigzag
queues (4 or 7; MIGA, arXiv 2605.18233), few-level rolling windows (3 with five levels) and ordinary clips (latents_per_level
= window).

Windows are laid from the noisy end. With lookahead a window is kept only for its noisier half, so that every latent sees at
least window // 2 cleaner ones. The window at the clean end is filled up with latents that have left already: that is what
the head is, and why any number of levels will do, not only whole multiples of the window.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from genattn.errors import GenAttnError

CLEAN = -1  # the level of a latent that has left


@dataclass(frozen=True)
class Window:
    """One forward of the model: reads slots [read_start, read_stop), keeps what it says on [write_start, write_stop)."""

    read_start: int
    read_stop: int
    write_start: int
    write_stop: int

    @property
    def read(self) -> slice:
        """Slots that the model sees."""
        return slice(self.read_start, self.read_stop)

    @property
    def write(self) -> slice:
        """Slots whose new values are kept."""
        return slice(self.write_start, self.write_stop)

    @property
    def keep(self) -> slice:
        """The kept part, counted from the window's own first slot."""
        return slice(self.write_start - self.read_start, self.write_stop - self.read_start)


@dataclass(frozen=True)
class QueueShape:
    """The four numbers that fix a queue.

    num_levels: steps of the sampler, >= 1. window: latents per forward of the model, >= 1.
    latents_per_level: latents that share a level, 1 to window. lookahead: keep only the noisier half of each window.
    """

    num_levels: int
    window: int
    latents_per_level: int = 1
    lookahead: bool = True

    def __post_init__(self) -> None:
        if self.num_levels < 1:
            raise GenAttnError(f"num_levels must be >= 1, got {self.num_levels}; it is the number of denoising steps")
        if self.window < 1:
            raise GenAttnError(f"window must be >= 1 latent, got {self.window}; it is the model's clip length in latents")
        if not 1 <= self.latents_per_level <= self.window:
            raise GenAttnError(f"latents_per_level must be 1 to window = {self.window}, got {self.latents_per_level}")
        if self.lookahead and self.window < 2:
            raise GenAttnError(f"lookahead needs a window of >= 2 latents, got {self.window}; pass lookahead=False")

    @classmethod
    def from_partitions(cls, partitions: int, window: int, latents_per_level: int = 1, lookahead: bool = True) -> "QueueShape":
        """As the papers count: `partitions` windows in a row, partitions * window / latents_per_level levels (rounded up).

        >>> QueueShape.from_partitions(4, 16).num_levels
        64
        """
        if partitions < 1:
            raise GenAttnError(f"partitions must be >= 1, got {partitions}")
        if latents_per_level < 1:
            raise GenAttnError(f"latents_per_level must be 1 to window = {window}, got {latents_per_level}")
        return cls(-(-partitions * window // latents_per_level), window, latents_per_level, lookahead)

    @property
    def working(self) -> int:
        """Slots that hold latents still to be cleaned."""
        return self.num_levels * self.latents_per_level

    @property
    def stride(self) -> int:
        """Latents kept per window."""
        return self.window - self.window // 2 if self.lookahead else self.window

    @property
    def head(self) -> int:
        """Clean latents kept in front as references."""
        return self.window - (self.working % self.stride or self.stride)

    @property
    def slots(self) -> int:
        """All slots, head included."""
        return self.head + self.working

    @property
    def partitions(self) -> float:
        """Working slots over the window."""
        return self.working / self.window

    @cached_property
    def levels(self) -> torch.Tensor:
        """Level of every slot, int64 [slots]; CLEAN in the head."""
        working = torch.arange(self.num_levels).repeat_interleave(self.latents_per_level)
        return torch.cat([torch.full((self.head,), CLEAN), working])

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The windows of one tick, noisiest first; what they keep covers each working slot exactly once."""
        out = []
        for stop in range(self.slots, self.head, -self.stride):
            out.append(Window(stop - self.window, stop, max(stop - self.stride, self.head), stop))
        return tuple(out)

    def warm_up_ticks(self, clip_latents: int) -> int:
        """Ticks before the first latent of the starting clip leaves."""
        return max(0, self.working - clip_latents) // self.latents_per_level

    def settings(self) -> dict[str, Any]:
        """JSON-ready, and accepted by the constructor."""
        return {name: getattr(self, name) for name in ("num_levels", "window", "latents_per_level", "lookahead")}


@dataclass
class LatentQueue:
    """What stands in the queue now.

    latents: [B, C, slots, H, W]. first_number: frame number of slot 0; numbers run on by one per slot, and latents below 0
    are copies that only warm the queue up. state: tensors of the solver that ride along, [.., .., slots, .., ..], zero for a
    new latent.
    """

    shape: QueueShape
    latents: torch.Tensor
    first_number: int
    tick: int = 0
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.latents.ndim != 5 or self.latents.shape[2] != self.shape.slots:
            raise GenAttnError(
                f"latents must be [B, C, {self.shape.slots}, H, W] for this queue, got {tuple(self.latents.shape)}"
            )
        for name, tensor in self.state.items():
            if tensor.ndim != 5 or tensor.shape[2] != self.shape.slots:
                raise GenAttnError(f"state {name!r} must have {self.shape.slots} slots on axis 2, got {tuple(tensor.shape)}")

    @classmethod
    def start(
        cls,
        shape: QueueShape,
        clip: torch.Tensor,
        noise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        state: Callable[[torch.Tensor], dict[str, torch.Tensor]] | None = None,
    ) -> "LatentQueue":
        """Fill a queue from a clean clip [B, C, K, H, W], 1 <= K <= working slots.

        The clip's last latent goes to the noisiest slot, the first is repeated towards the clean end.
        noise(clean, levels, numbers) brings latents to their levels; state(latents) makes the solver's empty state.
        """
        length = clip.shape[2]
        if not 1 <= length <= shape.working:
            raise GenAttnError(f"the starting clip must hold 1 to {shape.working} latents for this queue, got {length}")
        source = (torch.arange(shape.slots) - (shape.slots - length)).clamp(min=0)
        first = length - shape.slots
        latents = noise(clip[:, :, source], shape.levels, torch.arange(shape.slots) + first)
        return cls(shape, latents, first, 0, {} if state is None else state(latents))

    @property
    def numbers(self) -> torch.Tensor:
        """Frame number of every slot, int64 [slots]."""
        return torch.arange(self.first_number, self.first_number + self.shape.slots)

    @property
    def next_number(self) -> int:
        """Frame number that the next new latent gets."""
        return self.first_number + self.shape.slots

    @property
    def working(self) -> slice:
        """Slots still to be cleaned."""
        return slice(self.shape.head, self.shape.slots)

    @property
    def leaving(self) -> slice:
        """Slots that leave at the end of this tick."""
        return slice(self.shape.head, self.shape.head + self.shape.latents_per_level)

    def advance(
        self, stepped: torch.Tensor, state: Mapping[str, torch.Tensor], tail: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        """End a tick: take the stepped latents of all slots, push `tail`, and give what left, with its frame numbers.

        stepped: [B, C, slots, H, W], the head unchanged. tail: [B, C, latents_per_level, H, W] at the noisiest level.
        Copies from the warm-up (numbers below 0) are dropped, so the first ticks may give no latents at all.
        """
        width = self.shape.latents_per_level
        if stepped.shape != self.latents.shape:
            raise GenAttnError(f"stepped must be {tuple(self.latents.shape)} like the queue, got {tuple(stepped.shape)}")
        if tail.shape[2] != width:
            raise GenAttnError(f"tail must hold {width} latents, got {tail.shape[2]}")
        start = self.first_number + self.shape.head
        fresh = max(0, min(width, -start))
        emitted = stepped[:, :, self.leaving][:, :, fresh:].clone()
        self.latents = torch.cat([stepped[:, :, width:], tail.to(stepped)], 2)
        self.state = {name: _shift_state(tensor, width) for name, tensor in state.items()}
        self.first_number += width
        self.tick += 1
        return emitted, list(range(start + fresh, start + width))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is a tensor, flat, for a checkpoint."""
        return {"queue.latents": self.latents, **{f"queue.state.{name}": tensor for name, tensor in self.state.items()}}

    def to_numbers(self) -> dict[str, int]:
        """Everything that is a number, for a checkpoint."""
        return {"first_number": self.first_number, "tick": self.tick}

    @classmethod
    def from_checkpoint(
        cls, shape: QueueShape, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, int]
    ) -> "LatentQueue":
        """The queue that `to_tensors` and `to_numbers` described."""
        prefix = "queue.state."
        if "queue.latents" not in tensors:
            raise GenAttnError(f"the checkpoint holds no queue.latents, only {', '.join(sorted(tensors)) or 'nothing'}")
        state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return cls(shape, tensors["queue.latents"], int(numbers["first_number"]), int(numbers["tick"]), state)


def _shift_state(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return torch.cat([tensor[:, :, width:], torch.zeros_like(tensor[:, :, :width])], 2)
