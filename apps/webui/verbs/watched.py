"""A pattern on the seam that remembers which tiles every layer visited in the last sparse step."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genattn import Pattern
from genattn.errors import GenAttnError
from genattn.planning.show import plan_codes
from genattn.seam.named import named_plugin
from genattn.seam.plugin import AttentionCall, Inner
from genattn.seam.schedule import Schedule
from genattn.seam.sites import denoisers
from genattn.seam.sparse_plugin import SparsePlugin


class WatchedSparse(SparsePlugin):
    """As SparsePlugin, and `visited` after a run: layer -> share of its heads that visited each pair of tiles."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.visited: dict[int, npt.NDArray[np.floating[Any]] | float] = {}

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """The same answer."""
        out = super().attention(call, inner)
        last = call.run.num_steps is None or call.run.step == call.run.num_steps - 1
        if call.record.sparse and last and call.layout is not None and call.site.depth not in self.visited:
            self.visited[call.site.depth] = self._tiles(call)
        return out

    def _tiles(self, call: AttentionCall) -> npt.NDArray[np.floating[Any]] | float:
        try:
            plan = self.plan_at(call)
        except GenAttnError:  # clusters differ by head and have no place
            return float(call.record.density)
        heads = plan.row_ptr.shape[0]
        return np.mean([plan_codes(plan, head) > 0 for head in range(heads)], axis=0)

    def describe(self) -> dict[str, Any]:
        """Under the name by which reports know patterns."""
        return {**super().describe(), "plugin": SparsePlugin.__name__}

    def pictured(self) -> dict[str, npt.NDArray[np.floating[Any]] | float]:
        """`visited` with names for people, in order."""
        return {f"layer {layer}": self.visited[layer] for layer in sorted(self.visited)}


def watched_sparse(pipe: Any, pattern: Pattern | str, schedule: dict[str, Any]) -> WatchedSparse:
    """The pattern, or what its name stands for on this pipeline's model, watched. Raises GenAttnError for an unknown name."""
    if not isinstance(pattern, str):
        return WatchedSparse(pattern, Schedule(**schedule))
    found = named_plugin(pattern, denoisers(pipe), tuple(pipe.components), None, schedule, "auto")
    watched = WatchedSparse(found.pattern, found.schedule)
    watched.origin = found.origin
    return watched
