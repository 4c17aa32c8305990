"""A long video while it is made: tick, decode, write, watch, checkpoint, and stop cleanly at any moment.

Frames of a tick are written before they are handed on, and a checkpoint is taken only between ticks after the file was
flushed, so film and
checkpoint always fit together: a resumed run cuts the film at the checkpoint and goes on to the same frames.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from genattn.errors import GenAttnError, RunFailed
from genattn.pipelines.long_video.bases.frame_denoisers import FrameDenoiser
from genattn.pipelines.long_video.forecast import duration
from genattn.pipelines.long_video.output.checkpoint import save_checkpoint
from genattn.pipelines.long_video.output.film_path import told_place
from genattn.pipelines.long_video.output.folder_lock import RunLocks
from genattn.pipelines.long_video.output.stream_decode import StreamDecoder
from genattn.pipelines.long_video.output.video_writer import FragmentedMp4Writer, WriterMark
from genattn.pipelines.long_video.quality.drift import DriftMonitor, describe_drift
from genattn.pipelines.long_video.queue.fifo import Fifo
from genattn.pipelines.long_video.queue.window_group import ProcessLeft
from genattn.pipelines.long_video.run_stop import StopRequest
from genattn.pipelines.long_video.settings import LongVideoSettings
from genattn.pipelines.long_video.single_step_caches import single_step_caches_off


@dataclass
class LongVideoResult:
    """What a run came to. frames: in the film so far. drift: change per 100 frames. stopped: why it ended early, or None.

    video: uint8 [T, H, W, 3] when neither a file nor a folder was asked for. seconds: of this session.
    """

    frames: int
    seconds: float
    path: Path | None = None
    folder: Path | None = None
    drift: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None
    video: np.ndarray | None = None

    @property
    def fps(self) -> float:
        """Frames made per second of this session."""
        return self.made / self.seconds if self.seconds > 0 else 0.0

    made: int = 0


@dataclass
class RunParts:
    """Everything that a run is made of; put together by `long_video`.

    pending: latents [1, C, K, h, w] that left the queue and were not asked for yet (a tick may give more than the film's last).
    locks: on the folder and the film, let go when the run ends.
    """

    base: FrameDenoiser
    settings: LongVideoSettings
    fifo: Fifo
    decoder: StreamDecoder
    writer: FragmentedMp4Writer | None
    monitor: DriftMonitor
    folder: Path | None
    identity: dict[str, Any]
    frames: int = 0
    pending: torch.Tensor | None = None
    progress: bool = True
    applied: Callable[[], AbstractContextManager[Any]] = nullcontext
    locks: RunLocks = field(default_factory=RunLocks)


class LongVideo:
    """Iterate for uint8 frames [H, W, 3], or call `run`. Can be iterated once; leaving early closes film and checkpoint."""

    def __init__(self, parts: RunParts) -> None:
        self.parts = parts
        self.stopped: str | None = None
        self.made = 0
        self.seconds = 0.0
        self.caches_off: list[str] = []
        self._total = None if parts.settings.num_frames is None else parts.decoder.latents_for(parts.settings.num_frames)
        self._saved_tick = self._first_tick = parts.fifo.queue.tick
        self._began = 0.0

    @property
    def frames(self) -> int:
        """Frames in the film so far, those before a resume included."""
        return self.parts.frames

    @property
    def drift(self) -> dict[str, float]:
        """Change per 100 frames of every statistic."""
        return self.parts.monitor.slopes()

    def _latents_left(self) -> int:
        return self.parts.fifo.passed_on

    def _decoded(self) -> int:
        pending = self.parts.pending
        return self._latents_left() - (0 if pending is None else pending.shape[2])

    def _finished(self) -> bool:
        return self._total is not None and self._decoded() >= self._total

    def __iter__(self) -> Iterator[np.ndarray]:
        start = self._began = time.monotonic()
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            self.caches_off = stack.enter_context(single_step_caches_off(self.parts.base.models))
            stack.enter_context(self.parts.base.installed())
            stack.enter_context(self.parts.applied())
            bar = stack.enter_context(self._bar())
            try:
                for frames in self._ticks(stop, bar):
                    self.seconds = time.monotonic() - start
                    yield from frames
                self._save()
                # after the checkpoint: a longer film resumes from before the decoder was emptied
                rest = self._rest()
                self._take(rest)
                self._show(bar, len(rest))
                yield from rest
                self._close_film()
            except OSError as error:
                self._leave_group(failed=True)
                self._give_up(error)
            except GeneratorExit:
                self.stopped = "left early"
                self._leave_group(failed=False)
                if not self._finished():
                    self._save()
                self._close_film()
                raise
            except BaseException as error:
                # the film keeps what it has; the last checkpoint stands, and a resume cuts the film back to it
                if isinstance(error, Exception):
                    self._leave_group(failed=True)
                self._close_film()
                raise
            finally:
                self.seconds = time.monotonic() - start
                self.parts.locks.release()
                self.parts.base.pipe.maybe_free_model_hooks()

    def _bar(self) -> Any:
        parts = self.parts
        hidden = None if parts.progress and parts.fifo.group.is_main else True  # None: not in a log
        return tqdm(total=parts.settings.num_frames, initial=parts.frames, unit="frame", desc="long video", disable=hidden)

    def _ticks(self, stop: StopRequest, bar: Any) -> Iterator[list[np.ndarray]]:
        group = self.parts.fifo.group
        if self.parts.fifo.queue.tick == 0:
            # the first clip alone may have taken minutes
            self._save()
        if self.parts.pending is not None and not self._finished():
            numbers = list(range(self._decoded(), self._latents_left()))
            latents, self.parts.pending = self.parts.pending, None
            frames = self._frames(latents, numbers) if group.is_main else []
            self._take(frames)
            yield frames
        while not self._finished() and not group.stop_agreed:
            if stop.asked:
                group.ask_to_stop()
                if group.stop_agreed:
                    break
            try:
                latents, numbers = self.parts.fifo.tick()
            except ProcessLeft:
                break
            frames = self._frames(latents, numbers) if group.is_main else []
            self._take(frames)
            self._show(bar, len(frames))
            if self._is_due():
                self._save()
            yield frames
        if stop.asked or group.stop_agreed:
            self.stopped = "interrupted"

    def _leave_group(self, failed: bool) -> None:
        # after the last tick the others wait for nothing any more
        if not self._finished():
            self.parts.fifo.group.abandon(self.parts.base.device, failed=failed)

    def _frames(self, latents: torch.Tensor, numbers: list[int]) -> list[np.ndarray]:
        wanted = [i for i, n in enumerate(numbers) if self._total is None or n < self._total]
        if len(wanted) < len(numbers):
            self.parts.pending = latents[:, :, len(wanted) :].clone()
        if not wanted:
            return []
        latents = latents[:, :, : len(wanted)]
        if not bool(torch.isfinite(latents).all()):
            raise RunFailed(
                f"the model gave latents that are not finite at latent {numbers[wanted[0]]}; try float32, or less guidance"
            )
        for i, z in zip(wanted, latents.unbind(2)):
            self.parts.monitor.add_latent(self.parts.decoder.frames_for(max(1, numbers[i])), z[0])
        with torch.no_grad():
            return _to_uint8(self.parts.decoder.push(self.parts.base.to_vae(latents)))

    def _rest(self) -> list[np.ndarray]:
        if not self._finished() or not self.parts.fifo.group.is_main:
            return []
        with torch.no_grad():
            rest = self.parts.decoder.finish()
        return [] if rest is None else _to_uint8(rest)

    def _take(self, frames: list[np.ndarray]) -> None:
        for frame in frames:
            self.parts.monitor.add_frame(self.parts.frames, frame)
            self.parts.frames += 1
            self.made += 1
            if self.parts.writer is not None:
                self.parts.writer.write(frame)

    def _show(self, bar: Any, frames: int) -> None:
        bar.update(frames)
        queue = self.parts.fifo.queue
        if queue.tick == self._first_tick:  # stopped before the first one: nothing tells how long one takes
            return
        if queue.first_number + queue.shape.head <= 0:
            latents = -(queue.first_number + queue.shape.head)
            each = (time.monotonic() - self._began) / (queue.tick - self._first_tick) / queue.shape.latents_per_level
            bar.set_postfix_str(f"warming up, first frame in about {duration((latents + 1) * each)}")
        elif frames:
            bar.set_postfix_str(describe_drift(self.drift) + " per 100")

    def _save(self) -> None:
        parts = self.parts
        mark = parts.writer.flush() if parts.writer is not None else None
        if parts.folder is None or not parts.fifo.group.is_main:
            return
        tensors, numbers = {**parts.fifo.queue.to_tensors(), **parts.decoder.to_tensors()}, {}
        if parts.pending is not None:
            tensors["run.pending"] = parts.pending
        for hook in parts.fifo.hooks:
            tensors.update(hook.to_tensors())
            numbers.update(hook.to_numbers())
        record = {
            "tick": parts.fifo.queue.tick,
            "queue": parts.fifo.queue.to_numbers(),
            "decoder": parts.decoder.to_numbers(),
            "hooks": numbers,
            "frames": parts.frames,
            "film": None if parts.writer is None or mark is None else _film_record(parts.writer, mark, parts.folder),
            "drift": parts.monitor.to_numbers(),
            "settings": parts.settings.to_json(),
            "identity": parts.identity,
        }
        save_checkpoint(parts.folder, tensors, record)
        self._saved_tick = parts.fifo.queue.tick

    def _is_due(self) -> bool:
        # counted in ticks, so that a long warm-up is kept too
        queue = self.parts.fifo.queue
        return (queue.tick - self._saved_tick) * queue.shape.latents_per_level >= self.parts.settings.checkpoint_every

    def _close_film(self) -> None:
        if self.parts.writer is not None:
            self.parts.writer.close()

    def _give_up(self, error: OSError) -> None:
        # disk full, or a file taken away: nothing more can be written, what stands on disk is whole
        parts = self.parts
        kept = ""
        if parts.writer is not None:
            parts.writer.abandon()
            kept = f"; {parts.writer.path} plays up to frame {parts.writer.mark.frames}"
        if parts.folder is not None:
            kept += f"; the last checkpoint is kept in {parts.folder}, make room and resume"
        raise GenAttnError(f"the film could not be written ({error}){kept}") from error

    def run(self) -> LongVideoResult:
        """Make the film to its end (or until Ctrl-C); keeps the frames only when there is no file and no folder."""
        keep = self.parts.writer is None and self.parts.fifo.group.is_main
        return self.result([frame for frame in self if keep])

    def result(self, frames: list[np.ndarray] | None = None) -> LongVideoResult:
        """What the run has come to. frames: uint8 [H, W, 3] each, those to keep in it."""
        parts = self.parts
        return LongVideoResult(
            frames=parts.frames,
            seconds=self.seconds,
            path=None if parts.writer is None else parts.writer.path,
            folder=parts.folder,
            drift=self.drift,
            stopped=self.stopped,
            video=np.stack(frames) if frames else None,
            made=self.made,
        )


def _film_record(writer: FragmentedMp4Writer, mark: WriterMark, folder: Path) -> dict[str, Any]:
    return {"frames": mark.frames, "bytes": mark.bytes, "path": told_place(writer.path, folder)}


def _to_uint8(frames: torch.Tensor) -> list[np.ndarray]:
    """Frames [1, 3, T, H, W] in [-1, 1] as T pictures uint8 [H, W, 3]."""
    pixels = ((frames[0].float() + 1) * 127.5).round().clamp(0, 255).byte()
    return list(pixels.permute(1, 2, 3, 0).cpu().numpy())
