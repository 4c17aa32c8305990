"""Video of any length from a stock text-to-video pipeline, at constant memory.

    long_video(pipe, prompt="a red circle moves right", num_frames=1021, folder="runs/circle")

The pipeline's own clip fills a queue of latents at rising noise levels; from then on frames leave it for as long as anyone
wants (FIFO- Diffusion, arXiv 2405.11473; Ouroboros-Diffusion, arXiv 2501.09019). Nothing of the pipeline is changed for good.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

import genattn
from genattn.errors import GenAttnError
from genattn.fingerprint import pipeline_fingerprint, precision
from genattn.pipelines.long_video.bases.frame_denoisers import FrameDenoiser, frame_denoiser
from genattn.pipelines.long_video.early import check_window, refuse
from genattn.pipelines.long_video.forecast import Forecast, forecast_of, teller
from genattn.pipelines.long_video.identity import plugins_on
from genattn.pipelines.long_video.ouroboros.ouroboros import Ouroboros
from genattn.pipelines.long_video.output.checkpoint import check_same, read_checkpoint, read_record
from genattn.pipelines.long_video.output.film_path import film_path, place_of
from genattn.pipelines.long_video.output.folder_lock import FilmLock, FolderLock, RunLocks
from genattn.pipelines.long_video.output.video_writer import FragmentedMp4Writer, WriterMark
from genattn.pipelines.long_video.quality.drift import DriftCorrection, DriftMonitor
from genattn.pipelines.long_video.queue.fifo import Fifo, sample_clip, start_queue
from genattn.pipelines.long_video.queue.given_frames import GivenFrames
from genattn.pipelines.long_video.queue.latent_queue import LatentQueue, QueueShape
from genattn.pipelines.long_video.queue.prompt_schedule import PromptSchedule
from genattn.pipelines.long_video.queue.prompted_windows import PromptedWindows
from genattn.pipelines.long_video.queue.uniform_stage import UniformStage
from genattn.pipelines.long_video.queue.window_group import WindowGroup
from genattn.pipelines.long_video.run import LongVideo, LongVideoResult, RunParts
from genattn.pipelines.long_video.settings import LongVideoSettings
from genattn.pipelines.long_video.single_step_caches import single_step_caches_off
from genattn.pipelines.long_video.start_frames import StartFrames, clip_from_frames, given_latents
from genattn.reading import whole


def long_video(
    pipe: Any,
    prompt: str | Mapping[int, str] | PromptSchedule = "",
    *,
    negative_prompt: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    partitions: int = 4,
    lookahead: bool = True,
    latents_per_level: int = 1,
    window: int | None = None,
    guidance_scale: float | None = None,
    guidance_scale_2: float | None = None,
    eta: float | None = None,
    seed: int = 0,
    prompt_fade: int = 0,
    prompt_blend: Literal["embeds", "prediction"] = "embeds",
    start: StartFrames | None = None,
    start_as: Literal["renoise", "condition"] | None = None,
    ouroboros: Ouroboros | None = None,
    uniform_steps: int = 0,
    drift_correction: float = 0.0,
    window_batch: int = 1,
    fps: float = 16.0,
    output: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 16,
    resume: str | os.PathLike[str] | None = None,
    stream: bool = False,
    progress: bool = True,
    group: WindowGroup | None = None,
) -> Any:
    """Make a video of `num_frames` frames; None goes on until Ctrl-C, or for as long as the frames are taken.

    prompt: a text, a schedule {frame: prompt} or its text form 0:"..." 120:"..."; prompt_fade: frames over which two prompts
    cross-fade,
    prompt_blend: by mixing their embeddings, or exactly by mixing the model's answers.
    num_inference_steps: noise levels of the queue; partitions * window / latents_per_level when left out. lookahead: every
    latent sees half a window of cleaner ones (twice the work). latents_per_level: 1 is FIFO-Diffusion. window: latents per
    forward, the pipeline's clip when left out. eta: share of fresh noise per step. seed: noise is a function of it and the
    frame number.
    start: an image, or the frames of a video, to begin from. start_as: "condition" keeps them and lets the model continue
    them (image-to-video pipelines do), "renoise" fills the queue with them (all others).
    ouroboros: coherent tail, subject attention, memory, guidance. uniform_steps: last levels that are done once more with half
    a window at one level, 0 is off; costs that many forwards per half window. drift_correction: 0 (off) to 1, pull of the
    latents' statistics to those of the first. window_batch: windows per forward.
    output: an MP4 file that plays while it grows. folder: keeps the film and a checkpoint every `checkpoint_every` latents,
    the warm-up included.
    resume: such a folder, to go on with; only num_frames, stream, progress, window_batch and group may be given with it.
    stream: give a `LongVideo` to iterate for uint8 frames [H, W, 3] instead of running to the end.

    Returns a `LongVideoResult`, or a `LongVideo` with stream=True. Raises GenAttnError before work starts for everything
    that cannot be.
    """
    if resume is not None:
        given = _given_beside_resume(locals())
        if given:
            raise GenAttnError(f"a resumed run keeps its settings, got {', '.join(given)} beside resume; leave them out")
        video = resume_video(pipe, resume, num_frames=num_frames, progress=progress, window_batch=window_batch, group=group)
        return video if stream else video.run()
    settings = LongVideoSettings(
        prompt=PromptSchedule.parse(prompt, prompt_fade).to_text(),
        negative_prompt=negative_prompt,
        num_frames=num_frames,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        partitions=partitions,
        lookahead=lookahead,
        latents_per_level=latents_per_level,
        window=window,
        guidance_scale=guidance_scale,
        guidance_scale_2=guidance_scale_2,
        eta=eta,
        seed=seed,
        prompt_fade=prompt.fade if isinstance(prompt, PromptSchedule) else prompt_fade,
        prompt_blend=prompt_blend,
        ouroboros=None if ouroboros is None else ouroboros.to_json(),
        start_as=start_as,
        uniform_steps=uniform_steps,
        drift_correction=drift_correction,
        window_batch=window_batch,
        fps=fps,
        checkpoint_every=checkpoint_every,
    )
    if num_frames is None and not stream and output is None and folder is None:
        raise GenAttnError("a video without end needs output, folder or stream=True to go to, got none; or give num_frames")
    video = start_video(pipe, settings, start=start, output=output, folder=folder, progress=progress, group=group)
    return video if stream else video.run()


# what may stand beside `resume`, and what long_video fills in for everything else
_BESIDE_RESUME = {"pipe", "resume", "num_frames", "stream", "progress", "window_batch", "group"}


def _given_beside_resume(arguments: dict[str, Any]) -> list[str]:
    defaults = {"prompt": "", **(long_video.__kwdefaults__ or {})}
    return [name for name, value in arguments.items() if name not in _BESIDE_RESUME and value != defaults[name]]


def start_video(
    pipe: Any,
    settings: LongVideoSettings,
    *,
    start: StartFrames | None = None,
    output: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    group: WindowGroup | None = None,
    tell: Callable[[str], None] | None = None,
) -> LongVideo:
    """A `LongVideo` from its beginning; samples the first clip, or encodes `start`. See `long_video`.

    tell: is given the forecast, before the first model call in calls and after the second in time; with `progress` it is
    printed where nothing is given.
    """
    base = frame_denoiser(pipe)
    folder = None if folder is None else Path(folder)
    group = group or WindowGroup.from_torch()
    path = film_path(output, folder) if group.is_main else None
    refuse(base, settings, start)
    with group.preparing(base.device), _held(folder, group) as locks:
        if path is not None:
            locks.add(FilmLock(path))
        # one process looks: by the time the others come here it may have written its first checkpoint
        if folder is not None and group.is_main and (folder / "checkpoint.json").exists():
            raise GenAttnError(f"{folder} already holds a run; pass resume={str(folder)!r} to go on, or another folder")
        build = _Build(base, settings, group)
        if start is not None and build.is_conditioned:
            build.give(start)
        clip = build.first_clip(start, progress, teller(tell, progress and group.is_main))
        fifo = build.fifo(start_queue(build.shape, build.solver, clip, seed=settings.seed))
        writer = None
        if path is not None:
            writer = FragmentedMp4Writer(path, settings.fps, metadata=build.told(), sync=folder is not None)
        return LongVideo(build.parts(fifo, writer, folder, progress, locks))


@contextmanager
def _held(folder: Path | None, group: WindowGroup) -> Iterator[RunLocks]:
    """The folder's lock, of the process that writes, and room for more; let go again if a run cannot begin."""
    locks = RunLocks()
    if folder is not None and group.is_main:
        locks.add(FolderLock(folder))
    try:
        yield locks
    except BaseException:
        locks.withdraw()
        raise


def resume_video(
    pipe: Any,
    folder: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    window_batch: int = 1,
    progress: bool = True,
    group: WindowGroup | None = None,
) -> LongVideo:
    """A `LongVideo` that goes on where the run in `folder` stopped; refuses another model, other settings, another version.

    num_frames: a new length; the old one when None.
    """
    folder = Path(folder)
    read_record(folder)  # a folder that is no run gets no lock file
    base = frame_denoiser(pipe)
    group = group or WindowGroup.from_torch()
    with group.preparing(base.device), _held(folder, group) as locks:
        # read again under the lock: a run that ended just now may have written another
        record, stored = read_checkpoint(folder)
        with whole(f"the checkpoint in {folder}"):
            settings = _resumed_settings(record, num_frames, window_batch)
        build = _Build(base, settings, group)
        tensors = {name: tensor.to(base.device) for name, tensor in stored.items()}
        with whole(f"the checkpoint in {folder}"):
            fifo = build.fifo(LatentQueue.from_checkpoint(build.shape, tensors, record["queue"]))
            check_same(record["identity"], build.identity(fifo), "settings or another model")
            build.decoder.load(tensors, record["decoder"])
            for hook in fifo.hooks:
                hook.load(tensors, record["hooks"])
            frames, drift = int(record["frames"]), DriftMonitor()
            drift.load(record["drift"])
            pending = tensors.get("run.pending")
            _check_shorter(build, fifo.passed_on - (0 if pending is None else pending.shape[2]))
        writer = None
        if record["film"] is not None and group.is_main:
            with whole(f"the checkpoint in {folder}"):
                film, path = record["film"], place_of(record["film"], folder)
                mark = WriterMark(int(film["frames"]), int(film["bytes"]))
            if path.parent.is_dir():
                locks.add(FilmLock(path))
            writer = FragmentedMp4Writer(path, settings.fps, mark=mark, metadata=build.told(), sync=True)
        parts = build.parts(fifo, writer, folder, progress, locks)
        parts.frames, parts.monitor = frames, drift
        parts.pending = pending
        return LongVideo(parts)


def _resumed_settings(record: dict[str, Any], num_frames: int | None, window_batch: int) -> LongVideoSettings:
    saved = LongVideoSettings.from_json(record["settings"])
    if num_frames is not None and 0 < num_frames < int(record["frames"]):
        raise GenAttnError(
            f"the film already holds {record['frames']} frames and cannot become shorter, got num_frames={num_frames}"
        )
    return replace(saved, num_frames=saved.num_frames if num_frames is None else num_frames, window_batch=window_batch)


def _check_shorter(build: "_Build", decoded: int) -> None:
    """Refuse a length that the decoder is past already: some hold frames back that the film does not show yet."""
    wanted = build.settings.num_frames
    if wanted is not None and build.decoder.latents_for(wanted) < decoded:
        raise GenAttnError(
            f"the film already holds {build.decoder.frames_for(decoded)} frames, those in the decoder included, and cannot "
            f"become shorter, got num_frames={wanted}"
        )


class _Build:
    """Everything that follows from a pipeline and its settings; the same for a new run and a resumed one."""

    def __init__(self, base: FrameDenoiser, settings: LongVideoSettings, group: WindowGroup) -> None:
        self.base, self.settings, self.group = base, settings, group
        base.guidance_scale_2 = settings.guidance_scale_2
        self.shape: QueueShape = settings.queue_shape(base)
        self.height, self.width = settings.size(base)
        places = base.latent_size(self.height, self.width)
        self.solver = base.solver(self.shape.num_levels, (self.shape.window, *places), settings.eta)
        self.decoder = base.decoder()
        self.windows = PromptedWindows(
            base,
            self.solver.grid,
            settings.schedule(),
            negative_prompt=settings.negative_prompt,
            guidance_scale=settings.scale(base),
            blend=settings.prompt_blend,  # type: ignore[arg-type]
        )

        self.ouroboros = Ouroboros.from_json(settings.ouroboros).build(self.windows, self.shape, self.group, settings.seed)
        self.uniform: list[UniformStage] = []
        if settings.uniform_steps:
            stage = UniformStage(self.windows, self.shape.window, settings.uniform_steps, self.shape.num_levels)
            self.uniform.append(stage)
        self.given: GivenFrames | None = None
        if settings.given_latents:
            # a resumed run: the latents come with the checkpoint
            blank = torch.zeros(1, base.channels, settings.given_latents, *places, device=base.device)
            self.given = GivenFrames(self.ouroboros.denoise, blank, self.shape.window)

    @property
    def is_conditioned(self) -> bool:
        """Whether given frames are a condition rather than re-noised."""
        return self.settings.start_as == "condition" or (self.settings.start_as is None and self.base.continues)

    def give(self, start: StartFrames) -> None:
        """Take given frames as the film's clean beginning."""
        with self.base.installed(), torch.no_grad():
            latents = given_latents(self.base, start, (self.height, self.width))
        self.given = GivenFrames(self.ouroboros.denoise, latents, self.shape.window)
        self.settings = replace(self.settings, given_latents=latents.shape[2])

    def forecast(self, clip_latents: int, sampled: bool) -> Forecast:
        """What the film will cost."""
        return forecast_of(self.settings, self.shape, self.decoder, clip_latents, sampled, self.group.size)

    def first_clip(self, start: StartFrames | None, progress: bool, tell: Callable[[str], None]) -> torch.Tensor:
        """Clean latents [1, C, K, h, w] that the queue begins with: a sampled clip, or the given frames."""
        base, shape = self.base, self.shape
        with base.installed(), single_step_caches_off(base.models, tell=False), torch.no_grad():
            if start is not None and self.given is None:
                given = clip_from_frames(base, start, (self.height, self.width), shape.working)
                tell(self.forecast(given.shape[2], sampled=False).words())
                return given
            check_window(shape)
            places = base.latent_size(self.height, self.width)
            like = torch.zeros(1, base.channels, shape.window, *places, device=base.device)
            forecast = self.forecast(shape.window, sampled=True)
            tell(forecast.words())
            told: dict[str, Any] = {"seed": self.settings.seed, "progress": progress, "after_step": forecast.timed(tell)}
            if self.given is None:
                return sample_clip(self.windows, self.solver, like, **told)
            alone = GivenFrames(self.windows, self.given.given, shape.window)
            clip = sample_clip(alone, self.solver, like, **told)
            return alone.placed(clip, torch.arange(shape.window))

    def fifo(self, queue: LatentQueue) -> Fifo:
        """The queue's engine, with the parts of Ouroboros that were asked for."""
        settings = self.settings
        parts = self.ouroboros
        correction = [DriftCorrection(settings.drift_correction)] if settings.drift_correction > 0 else []
        given = [] if self.given is None else [self.given]
        for stage in self.uniform:
            stage.given = self.given
        return Fifo(
            self.given or parts.denoise,
            self.solver,
            queue,
            seed=settings.seed,
            window_batch=settings.window_batch,
            tail=parts.tail,
            hooks=[*parts.hooks, *correction, *given, *self.uniform],
            group=self.group,
        )

    def identity(self, fifo: Fifo) -> dict[str, Any]:
        """What must not change between the sessions of one run."""
        return {
            "pipeline": type(self.base.pipe).__name__,
            "model": pipeline_fingerprint(self.base.pipe),
            "precision": precision(self.base.pipe),
            "size": [self.height, self.width],
            **plugins_on(self.base.models),
            **fifo.settings(),
            **self.windows.settings(),
        }

    def told(self) -> dict[str, Any]:
        """What the film's own metadata says: pipeline, prompt, seed and every setting that was given."""
        given = {name: value for name, value in self.settings.to_json().items() if value is not None}
        return {"pipeline": type(self.base.pipe).__name__, **given, "genattn": genattn.__version__}

    def parts(
        self, fifo: Fifo, writer: FragmentedMp4Writer | None, folder: Path | None, progress: bool, locks: RunLocks
    ) -> RunParts:
        """The run's parts, at frame 0."""
        monitor = DriftMonitor()
        return RunParts(
            self.base,
            self.settings,
            fifo,
            self.decoder,
            writer,
            monitor,
            folder,
            self.identity(fifo),
            progress=progress,
            applied=self.ouroboros.applied,
            locks=locks,
        )


__all__ = ["LongVideo", "LongVideoResult", "long_video", "resume_video", "start_video"]
