"""Windows of one tick shared among processes: each runs its own, one sum puts the answers together.

Every process holds the whole queue (it is small) and takes windows rank, rank + size, ...; what they keep does not overlap,
so a sum of zero-filled answers is exact. A tick is two collective calls whatever the number of windows, hence no way to wait
for a window that nobody was given: a few flags, by which a process tells that it failed, left or wants to stop, and the
answers, when all have them. A process that fails between two ticks sends the flags of the next one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from genattn.errors import GenAttnError


class ProcessLeft(GenAttnError):
    """Another process of the group stopped taking part, without an error."""


class WindowGroup:
    """The processes that share a queue. rank, size: this one's place. reduce: sums a tensor over all, in place."""

    def __init__(self, rank: int, size: int, reduce: Callable[[torch.Tensor], Any] | None) -> None:
        self.rank, self.size, self.reduce = rank, size, reduce
        self.stop_wanted = False
        self.stop_agreed = False
        self._is_over = False

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
        self._is_over = False
        failure: Exception | None = None
        try:
            prediction, push = answer()
        except Exception as error:
            # the others are waiting in the sum; hand them the failure instead of a deadlock
            failure = error
        failed, left = self._tell(like.device, failed=failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise GenAttnError(f"{failed} of {self.size} processes failed; see their output (this is rank {self.rank})")
        if left:
            self.stop_agreed = True
            raise ProcessLeft(f"{left} of {self.size} processes left early (this is rank {self.rank})")
        flat = torch.cat([prediction.flatten(), push.flatten()])
        self.reduce(flat)
        return flat[: prediction.numel()].reshape(like.shape), flat[prediction.numel() :].reshape(like.shape)

    def abandon(self, device: torch.device, *, failed: bool) -> None:
        """Go no further between two ticks: the others hear of it in their next tick, as an error or as a wish to stop.

        Does nothing alone, or when the others know already.
        """
        if self.reduce is not None and not self._is_over:
            self._tell(device, failed=failed, left=not failed)
            self._is_over = True

    @contextmanager
    def preparing(self, device: torch.device) -> Iterator[None]:
        """Around what comes before the first tick: an error in there is told to the others too."""
        try:
            yield
        except Exception:
            self.abandon(device, failed=True)
            raise

    def _tell(self, device: torch.device, *, failed: bool = False, left: bool = False) -> tuple[int, int]:
        """How many processes failed, and how many left; a wish to stop is agreed on in the same call."""
        flags = torch.tensor([float(failed), float(left), float(self.stop_wanted)], device=device)
        if self.reduce is not None:
            self.reduce(flags)
        count = [int(n) for n in flags.tolist()]
        self.stop_agreed = count[2] > 0
        self._is_over = count[0] + count[1] > 0
        return count[0], count[1]
