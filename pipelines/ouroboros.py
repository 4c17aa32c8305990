"""The parts of Ouroboros-Diffusion (AAAI 2025, arXiv 2501.09019) on top of FIFO, each its own switch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from genattn.errors import GenAttnError
from genattn.pipelines.coherent_tail import CoherentTail
from genattn.pipelines.fifo import Denoise, GaussianTail, QueueHook
from genattn.pipelines.latent_queue import QueueShape
from genattn.pipelines.prompted_windows import PromptedWindows
from genattn.pipelines.window_group import WindowGroup


@dataclass(frozen=True)
class OuroborosParts:
    """What a Fifo takes."""

    denoise: Denoise
    tail: Any
    hooks: Sequence[QueueHook] = ()


@dataclass(frozen=True)
class Ouroboros:
    """Settings. tail: "coherent" (variance kept), "published" (the released mix) or "gaussian" (FIFO)."""

    tail: Literal["gaussian", "coherent", "published"] = "coherent"
    tail_cutoff: float = 0.25
    tail_filter: Literal["gaussian", "butterworth", "ideal"] = "gaussian"
    tail_keep: float = 0.86

    def __post_init__(self) -> None:
        if self.tail not in ("gaussian", "coherent", "published"):
            raise GenAttnError(f"tail must be 'gaussian', 'coherent' or 'published', got {self.tail!r}")
        self._tail()

    def _tail(self) -> Any:
        if self.tail == "gaussian":
            return GaussianTail()
        mix: Literal["variance", "published"] = "variance" if self.tail == "coherent" else "published"
        return CoherentTail(self.tail_cutoff, self.tail_filter, mix, self.tail_keep)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any] | None) -> "Ouroboros":
        """From `to_json`; None is plain FIFO."""
        if saved is None:
            return cls(tail="gaussian")
        unknown = sorted(set(saved) - {field.name for field in fields(cls)})
        if unknown:
            raise GenAttnError(f"unknown Ouroboros settings: {', '.join(unknown)}")
        return cls(**saved)

    def build(self, windows: PromptedWindows, shape: QueueShape, group: WindowGroup, seed: int) -> OuroborosParts:
        """The parts for one run."""
        return OuroborosParts(windows, self._tail())
