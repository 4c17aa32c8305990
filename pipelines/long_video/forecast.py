"""What a long video will cost, counted before it starts: calls of the model, and seconds once one call has been timed."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from genattn.pipelines.long_video.bases.frame_denoisers import frame_denoiser
from genattn.pipelines.long_video.queue.latent_queue import QueueShape
from genattn.pipelines.long_video.settings import LongVideoSettings


@dataclass(frozen=True)
class Forecast:
    """Calls of the model that a film takes. A call is one window through the model, its guidance passes included.

    shape: the queue. clip_latents: latents that the queue begins with. sampled: whether they are sampled first or given.
    frames_per_latent: frames that a latent becomes. latents: length of the film in latents, or None without an end.
    uniform_steps: levels done again by the second stage. processes: how many share the windows of a tick.
    """

    shape: QueueShape
    clip_latents: int
    sampled: bool
    frames_per_latent: int
    latents: int | None = None
    uniform_steps: int = 0
    processes: int = 1

    def calls_for(self, latents: int) -> int:
        """Calls until so many latents have left the queue, the first clip included.

        After t ticks, t * latents_per_level - (working slots - clip_latents) latents have left.
        """
        shape, again = self.shape, 0
        if self.uniform_steps:
            block = shape.window - shape.window // 2
            blocks = -(-latents // block)
            latents, again = blocks * block, blocks * self.uniform_steps
        ticks = -(-(latents + shape.working - self.clip_latents) // shape.latents_per_level)
        first = shape.num_levels if self.sampled else 0
        return first + max(0, ticks) * self._calls_a_tick() + again

    def _calls_a_tick(self) -> int:
        return -(-len(self.shape.windows) // self.processes)

    @property
    def calls_per_frame(self) -> float:
        """Calls for each further frame, in the long run."""
        block = self.shape.window - self.shape.window // 2
        each = self._calls_a_tick() / self.shape.latents_per_level + self.uniform_steps / block
        return each / self.frames_per_latent

    def words(self, seconds_per_call: float | None = None) -> str:
        """The forecast as a line of text: in calls, and in time where the time of a call is known."""
        first, later = self.calls_for(1), self.calls_per_frame
        if seconds_per_call is None:
            total = "" if self.latents is None else f"; {self.calls_for(self.latents)} in all"
            return f"{first} model calls before the first frame, then {later:.3g} a frame{total}"
        total = (
            "" if self.latents is None else f"; the film in about {duration(self.calls_for(self.latents) * seconds_per_call)}"
        )
        each = f"{later * seconds_per_call:.2g} s"
        return f"first frame after about {duration(first * seconds_per_call)}, then {each} a frame{total}"

    def timed(self, tell: Callable[[str], None]) -> Callable[[int], None]:
        """A callback for the steps of the first clip that tells the time once, after the second step.

        The first step is left out: it holds what is done only once.
        """
        times: list[float] = []

        def after_step(done: int) -> None:
            times.append(time.monotonic())
            if len(times) == 2:
                tell(self.words(times[1] - times[0]))

        return after_step


def forecast_video(pipe: Any, settings: LongVideoSettings, given: bool = False) -> Forecast:
    """What a film would cost; no model is called. given: it begins from frames instead of a sampled clip."""
    base = frame_denoiser(pipe)
    shape = settings.queue_shape(base)
    return forecast_of(settings, shape, base.decoder(), shape.working if given else shape.window, not given)


def forecast_of(
    settings: LongVideoSettings, shape: QueueShape, decoder: Any, clip_latents: int, sampled: bool, processes: int = 1
) -> Forecast:
    """The forecast of a film with these settings. decoder: of its denoiser; the rest as in `Forecast`."""
    per_latent = decoder.frames_for(3) - decoder.frames_for(2)
    length = None if settings.num_frames is None else decoder.latents_for(settings.num_frames)
    return Forecast(shape, clip_latents, sampled, per_latent, length, settings.uniform_steps, processes)


def teller(tell: Callable[[str], None] | None, printing: bool) -> Callable[[str], None]:
    """Who is given the forecast: `tell` where there is one, else a line on standard error if `printing`."""

    def write(words: str) -> None:
        if printing:
            tqdm.write(f"long video: {words}", file=sys.stderr)

    return tell or write


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use.

    >>> duration(0.4), duration(75), duration(5400), duration(200000)
    ('1 s', '1 min 15 s', '1.5 h', '2.3 days')
    """
    if seconds < 60:
        return f"{max(1, math.ceil(seconds))} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{seconds / 3600:.1f} h" if seconds < 86400 else f"{seconds / 86400:.1f} days"
