"""What a user may set for a long video, checked before any work starts."""

from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import FrameDenoiser
from genattn.pipelines.long_video.queue.latent_queue import QueueShape
from genattn.pipelines.long_video.queue.prompt_schedule import PromptSchedule


@dataclass(frozen=True)
class LongVideoSettings:
    """The settings of `long_video`; None means the pipeline's own default. See there for what each does."""

    prompt: str
    negative_prompt: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    partitions: int = 4
    lookahead: bool = True
    latents_per_level: int = 1
    window: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    eta: float | None = None
    seed: int = 0
    prompt_fade: int = 0
    prompt_blend: str = "embeds"
    ouroboros: dict[str, Any] | None = None
    start_as: str | None = None
    given_latents: int = 0
    uniform_steps: int = 0
    drift_correction: float = 0.0
    window_batch: int = 1
    fps: float = 16.0
    checkpoint_every: int = 16

    def __post_init__(self) -> None:
        for name, low in (("height", 1), ("width", 1), ("num_inference_steps", 1), ("window", 1), ("num_frames", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise GenAttnError(f"{name} must be >= {low}, got {value}")
        for name in ("window_batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise GenAttnError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.uniform_steps < 0:
            raise GenAttnError(f"uniform_steps must be >= 0, got {self.uniform_steps}; 0 leaves the second stage out")
        if not (0 < self.fps <= 240 and Fraction(self.fps).limit_denominator(1001) > 0):
            raise GenAttnError(f"fps must lie in (0, 240], got {self.fps}")
        if not 0 <= self.drift_correction <= 1:
            raise GenAttnError(f"drift_correction must be 0 to 1, got {self.drift_correction}")
        if self.start_as not in (None, "renoise", "condition"):
            raise GenAttnError(f"start_as must be 'renoise' or 'condition', got {self.start_as!r}")
        self.schedule()

    def schedule(self) -> PromptSchedule:
        """The prompts by frame."""
        return PromptSchedule.parse(self.prompt, self.prompt_fade)

    def size(self, base: FrameDenoiser) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.height or base.default_size()[0], self.width or base.default_size()[1]
        if height is None or width is None:
            raise GenAttnError(f"height and width must be given for {type(base.pipe).__name__}, got {height} and {width}")
        return height, width

    def queue_shape(self, base: FrameDenoiser) -> QueueShape:
        """The queue: levels from the number of steps when given, else from the partitions."""
        window = self.window or base.default_window()
        reason = base.limits(window)
        if reason is not None:
            raise GenAttnError(reason)
        if self.num_inference_steps is None:
            return QueueShape.from_partitions(self.partitions, window, self.latents_per_level, self.lookahead)
        return QueueShape(self.num_inference_steps, window, self.latents_per_level, self.lookahead)

    def scale(self, base: FrameDenoiser) -> float:
        """Guidance scale."""
        if self.guidance_scale is not None:
            return float(self.guidance_scale)
        return float(base.shipped().get("guidance_scale") or base.default("guidance_scale") or 1.0)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "LongVideoSettings":
        """From `to_json`; names that this version does not know are refused."""
        unknown = sorted(set(saved) - {field.name for field in fields(cls)})
        if unknown:
            raise GenAttnError(
                f"the checkpoint has settings unknown here: {', '.join(unknown)}; resume with the version that wrote it"
            )
        return cls(**saved)
