"""The parts of Ouroboros-Diffusion (AAAI 2025, arXiv 2501.09019) on top of FIFO, each its own switch.

present infers future       coherent tail                                   `coherent_tail`
present influences present  subject-aware cross-frame attention             `subject_attention` (UNets, Latte)
past informs present        subject memory and self-recurrent guidance      `self_recurrent`
                            memory frames, for transformers over all frames `memory_frames`
                            a re-sampling check without gradients           `resample_check`
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.ouroboros.coherent_tail import CoherentTail
from genattn.pipelines.long_video.ouroboros.memory_frames import MemoryFrames
from genattn.pipelines.long_video.ouroboros.resample_check import ResampleCheck
from genattn.pipelines.long_video.ouroboros.self_recurrent import GuidanceSettings, SubjectWindows
from genattn.pipelines.long_video.ouroboros.subject_attention import SubjectWatch
from genattn.pipelines.long_video.ouroboros.subject_tokens import subject_tokens
from genattn.pipelines.long_video.queue.fifo import Denoise, GaussianTail, QueueHook
from genattn.pipelines.long_video.queue.latent_queue import QueueShape
from genattn.pipelines.long_video.queue.prompted_windows import PromptedWindows
from genattn.pipelines.long_video.queue.window_group import WindowGroup
from genattn.seam.handle import apply


@dataclass(frozen=True)
class OuroborosParts:
    """What a Fifo takes. applied: puts plugins on the pipeline for the time of a run."""

    denoise: Denoise
    tail: Any
    hooks: Sequence[QueueHook] = ()
    applied: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


@dataclass(frozen=True)
class Ouroboros:
    """Settings; the default is the coherent tail alone, which brings most of the gain in the paper's own table.

    tail: "coherent" (released strength, unit variance), "published" (the released mix, which loses variance) or "gaussian"
    (FIFO). tail_keep: share of the last latent at frequency 0; as released when None. subject: words of the prompt that
    name the subject, or several; the whole prompt when None. subject_attention: append the subject's keys (UNets and Latte).
    guidance: scale of self-recurrent guidance, 0 is off; costs a backward pass in the noisier `guidance_share` of the
    windows every `guidance_every` ticks. memory_frames: clean latents in front of every window. resample: level depth of the
    check, 0 is off.
    """

    tail: Literal["gaussian", "coherent", "published"] = "coherent"
    tail_cutoff: float = 0.25
    tail_filter: Literal["gaussian", "butterworth", "ideal"] = "gaussian"
    tail_keep: float | None = None
    subject: str | tuple[str, ...] | None = None
    subject_attention: bool = False
    mask_threshold: float = 0.5
    guidance: float = 0.0
    guidance_every: int = 1
    guidance_share: float = 0.5
    guidance_scale_by: Literal["relative", "published"] = "relative"
    memory_decay: float = 0.9
    memory_on_switch: Literal["keep", "reset"] = "keep"
    memory_frames: int = 0
    memory_spacing: int = 8
    resample: int = 0
    resample_tolerance: float = 0.01
    resample_candidates: int = 3

    def __post_init__(self) -> None:
        if self.tail not in ("gaussian", "coherent", "published"):
            raise GenAttnError(f"tail must be 'gaussian', 'coherent' or 'published', got {self.tail!r}")
        if self.memory_frames < 0 or self.resample < 0:
            raise GenAttnError(f"memory_frames and resample must be >= 0, got {self.memory_frames} and {self.resample}")
        self._tail()
        self._guidance()
        if self.needs_subject:
            SubjectWatch(self.mask_threshold)

    @property
    def needs_subject(self) -> bool:
        """Whether subject masks are needed."""
        return self.subject_attention or self.guidance > 0

    def _tail(self) -> Any:
        if self.tail == "gaussian":
            return GaussianTail()
        mix: Literal["variance", "published"] = "variance" if self.tail == "coherent" else "published"
        return CoherentTail(self.tail_cutoff, self.tail_filter, mix, self.tail_keep)

    def _guidance(self) -> GuidanceSettings:
        return GuidanceSettings(
            self.guidance,
            self.guidance_every,
            self.guidance_share,
            self.memory_decay,
            self.guidance_scale_by,
            self.memory_on_switch,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, read back by `from_json`."""
        saved = asdict(self)
        saved["subject"] = list(self.subject) if isinstance(self.subject, tuple) else self.subject
        return saved

    @classmethod
    def from_json(cls, saved: dict[str, Any] | None) -> "Ouroboros":
        """From `to_json`; None is plain FIFO."""
        if saved is None:
            return cls(tail="gaussian")
        unknown = sorted(set(saved) - {entry.name for entry in fields(cls)})
        if unknown:
            raise GenAttnError(f"unknown Ouroboros settings: {', '.join(unknown)}; resume with the version that wrote them")
        subject = saved.get("subject")
        return cls(**{**saved, "subject": tuple(subject) if isinstance(subject, list) else subject})

    def build(self, windows: PromptedWindows, shape: QueueShape, group: WindowGroup, seed: int) -> OuroborosParts:
        """The parts for one run; raises when this model or this many processes cannot serve what was asked for."""
        denoise: Denoise = windows
        hooks: list[QueueHook] = []
        applied: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self.needs_subject:
            watched = self._subject(windows, shape, group)
            denoise, hooks = watched, [watched]
            applied = _applied(windows.base.pipe, watched.watch)
        if self.memory_frames:
            reason = windows.base.limits(shape.window + self.memory_frames)
            if reason is not None:
                raise GenAttnError(f"memory_frames make windows longer: {reason}; leave them out")
            anchors = (self.memory_frames + 1) // 2
            memory = MemoryFrames(denoise, shape.head, anchors, self.memory_frames - anchors, self.memory_spacing)
            denoise, hooks = memory, [*hooks, memory]
        if self.resample:
            hooks = [*hooks, ResampleCheck(self.resample, self.resample_tolerance, self.resample_candidates)]
        return OuroborosParts(denoise, self._tail(), hooks, applied)

    def _subject(self, windows: PromptedWindows, shape: QueueShape, group: WindowGroup) -> SubjectWindows:
        base = windows.base
        if not base.has_cross_attention:
            raise GenAttnError(
                f"{base.family} has no cross-attention to read subject masks from; leave subject_attention and guidance off"
            )
        if group.size > 1 and self.guidance > 0:
            raise GenAttnError(
                f"guidance needs the memory of one process, got {group.size}; run it in one, or leave guidance off"
            )
        watch = SubjectWatch(self.mask_threshold, self.subject_attention)
        # asked once now, so that a model that cannot serve is refused before work starts
        apply(base.pipe, watch).remove()
        tokens = [subject_tokens(base.pipe.tokenizer, p, self.subject) for p in windows.schedule.prompts]
        return SubjectWindows(windows, watch, tokens, len(shape.windows), self._guidance())


def _applied(pipe: Any, watch: SubjectWatch) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: apply(pipe, watch)
