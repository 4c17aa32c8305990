"""Blocks that are computed again in the backward pass: activation checkpointing of any kind must take the path of its forward.

Recomputation calls the block outside of the denoiser's forward, maybe in another thread and after later forwards. What runs in
the backward pass is a node of the autograd graph, and nodes are numbered in the order in which they were made; so the numbers
that a forward used say to which forward a recomputed call belongs.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.seam.plugin import Run

_FORWARDS_KEPT = 512


class Recorded:
    """The runs of one denoiser's last forwards, by the numbers of the nodes that they made."""

    def __init__(self) -> None:
        self._spans: deque[tuple[int, int, Run]] = deque(maxlen=_FORWARDS_KEPT)

    @contextlib.contextmanager
    def recording(self, run: Run) -> Iterator[None]:
        """Nodes made inside belong to `run`; spans may nest."""
        if not torch.is_grad_enabled():
            yield
            return
        first = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            last = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
            if last > first:
                self._spans.append((first, last, run))

    def run_of_backward(self, known_only: bool = False) -> Run | None:
        """The run whose forward is being computed again on this thread; None outside of a backward pass.

        known_only: None also for a forward that is not known, since a whole denoiser may run anew in a backward pass.
        Raises GenAttnError in the backward pass of a forward that is not known any more.
        """
        node = _node_of_backward()
        if node is None:
            return None
        number = node._sequence_nr()
        inside = [(last - first, place) for place, (first, last, _) in enumerate(self._spans) if first <= number < last]
        if not inside and known_only:
            return None
        if not inside:
            raise GenAttnError(
                "a block is computed again in a backward pass (activation checkpointing), and its forward is not among the "
                f"last {_FORWARDS_KEPT} with these plugins; keep them on from forward to backward"
            )
        return self._spans[min(inside)[1]][2]

    def clear(self) -> None:
        """Forget all forwards."""
        self._spans.clear()


def _node_of_backward() -> Any:
    return torch._C._current_autograd_node()
