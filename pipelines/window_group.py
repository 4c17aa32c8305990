"""Windows of one tick shared among processes: each runs its own, one sum puts the answers together.

Every process holds the whole queue (it is small) and takes windows rank, rank + size, ...; what they keep does not overlap,
so a sum of zero-filled answers is exact. There is one collective call per tick whatever the number of windows, hence no way
to wait for a window that nobody was given; a process that fails, or wants to stop, says so in the same call and all stop
together.
"""

from collections.abc import Callable
from typing import Any

import torch

from genattn.errors import GenAttnError


class WindowGroup:
    """The processes that share a queue. rank, size: this one's place. reduce: sums a tensor over all, in place."""

    def __init__(self, rank: int, size: int, reduce: Callable[[torch.Tensor], Any] | None) -> None:
        self.rank, self.size, self.reduce = rank, size, reduce
        self.stop_wanted = False
        self.stop_agreed = False

    @classmethod
    def alone(cls) -> "WindowGroup":
        """One process."""
        return cls(0, 1, None)

    @classmethod
    def from_torch(cls, group: Any = None) -> "WindowGroup":
        """The processes of torch.distributed (as accelerate or torchrun starts them); one process when it is not
        initialised."""
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()):
            return cls.alone()
        return cls(dist.get_rank(group), dist.get_world_size(group), lambda tensor: dist.all_reduce(tensor, group=group))

    @property
    def is_main(self) -> bool:
        """Whether this process decodes and writes."""
        return self.rank == 0

    def share(self, windows: int) -> range:
        """Indices of this process's windows."""
        return range(self.rank, windows, self.size)

    def ask_to_stop(self) -> None:
        """Tell the others at the next tick; `stop_agreed` is then true everywhere."""
        self.stop_wanted = True
        if self.size == 1:
            self.stop_agreed = True

    def sum(
        self, answer: Callable[[], tuple[torch.Tensor, torch.Tensor]], like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run this process's windows and add up everybody's; raises everywhere if one process failed."""
        if self.reduce is None:
            return answer()
        failure: Exception | None = None
        try:
            prediction, push = answer()
        except Exception as error:
            # the others are waiting in the sum; hand them the failure instead of a deadlock
            failure = error
            prediction, push = torch.zeros_like(like), torch.zeros_like(like)
        flags = torch.tensor([float(failure is not None), float(self.stop_wanted)], device=like.device, dtype=like.dtype)
        flat = torch.cat([prediction.flatten(), push.flatten(), flags])
        self.reduce(flat)
        failed, stop = flat[-2:].tolist()
        self.stop_agreed = stop > 0
        if failure is not None:
            raise failure
        if failed:
            raise GenAttnError(
                f"{failed:.0f} of {self.size} processes failed in their windows; see their output (this is rank {self.rank})"
            )
        count = prediction.numel()
        return flat[:count].reshape(like.shape), flat[count : 2 * count].reshape(like.shape)
