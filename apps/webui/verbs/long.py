"""The app's verbs `long` and `resume`: an endless film whose segments are shown as they are made, stopped and taken up again.

The film and its checkpoint lie in the run's folder; a stop ends after the tick under way and loses nothing. Before the first
frame there is no checkpoint: a stop in the first clip ends the run for good.
"""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from genattn.apps.sampling.output_files import write_json
from genattn.apps.webui.verbs.job import Job, Update
from genattn.apps.webui.verbs.limits import number, read_picture, whole
from genattn.apps.webui.verbs.sampling import ClipForm, read_seed
from genattn.apps.webui.verbs.session import Model, Session
from genattn.errors import GenAttnError

PLOTTED = ("brightness", "contrast", "saturation")
PLOTTED_POINTS = 400
CHECKPOINT_LATENTS = 4
HISTORY = "drift.json"


def long(
    session: Session,
    prompt: str,
    frames: int = 125,
    fade: int = 0,
    partitions: int = 1,
    lookahead: bool = False,
    ouroboros: bool = False,
    drift_correction: float = 0.0,
    start_picture: str | None = None,
    seed: int = 0,
    randomize_seed: bool = False,
    model: str | None = None,
    **form: Any,
) -> Iterator[Update]:
    """Make a long video.

    prompt: a text, or a schedule 0:"..." 60:"...". fade: frames of a cross-fade. start_picture: an uploaded file to begin from.
    form: height, width, guidance_scale, negative_prompt. Updates hold `segment` (MP4 path of at least a second), `drift`
    (rows frame, statistic, change), `run` (for `resume`) and what the film will `cost`; the last one `film`, `seed`, `report`.
    Raises GenAttnError for anything that model or server cannot serve.
    """
    chosen, wanted = session.check_name(model, video=True), ClipForm.read(**form)
    queue = {"partitions": partitions, "lookahead": lookahead, "drift_correction": drift_correction}
    settings = _settings(session, prompt, frames, fade, form.get("negative_prompt"), **queue)
    settings["seed"] = read_seed(seed, randomize_seed)
    picture = None if not start_picture else session.limits.check_upload(start_picture, (".png", ".jpg", ".jpeg", ".webp"))

    def work(job: Job) -> dict[str, Any]:
        return _start(job, session, chosen, wanted, settings, ouroboros, picture)

    yield from Job(work, session.lock).updates()


def long_cost(
    session: Session,
    model: Model,
    form: ClipForm,
    prompt: str,
    frames: int = 125,
    fade: int = 0,
    partitions: int = 1,
    lookahead: bool = False,
    start_picture: str | None = None,
) -> str:
    """One line for people: the model calls of a film. Raises GenAttnError for what model or server cannot serve."""
    from genattn.pipelines.long_video.forecast import forecast_video

    settings = _settings(session, prompt, frames, fade, form.negative_prompt, partitions=partitions, lookahead=lookahead)
    pipe = session.open(model)
    return forecast_video(pipe, _wanted(pipe, form, settings, False), given=bool(start_picture)).words()


def _settings(
    session: Session,
    prompt: str,
    frames: Any,
    fade: Any,
    negative: str | None,
    partitions: Any = 1,
    lookahead: Any = False,
    drift_correction: Any = 0.0,
) -> dict[str, Any]:
    """The form's fields as settings of a film; raises GenAttnError for what they cannot be."""
    from genattn.pipelines.long_video.queue.prompt_schedule import PromptSchedule

    session.limits.check_prompts(prompt, negative)
    found: dict[str, Any] = {
        "prompt": prompt,
        "prompt_fade": whole("fade", fade, 0),
        "num_frames": whole("frames", frames, 1),
        "partitions": whole("partitions", partitions, 1),
        "lookahead": bool(lookahead),
        "drift_correction": number("drift correction", drift_correction),
    }
    session.limits.at_most("frames", found["num_frames"], session.limits.long_frames)
    session.limits.at_most("partitions", found["partitions"], 16)
    PromptSchedule.parse(prompt, found["prompt_fade"])
    return found


def _wanted(pipe: Any, form: ClipForm, settings: dict[str, Any], ouroboros: bool) -> Any:
    """The LongVideoSettings of a form; the model's own values where it says nothing."""
    from genattn.apps.sampling.run import own_defaults
    from genattn.pipelines.long_video.ouroboros.ouroboros import Ouroboros
    from genattn.pipelines.long_video.settings import LongVideoSettings

    own = own_defaults(pipe)
    return LongVideoSettings(
        **settings,
        height=form.height or own.get("height"),
        width=form.width or own.get("width"),
        negative_prompt=form.negative_prompt,
        guidance_scale=own.get("guidance_scale") if form.guidance_scale is None else form.guidance_scale,
        ouroboros=Ouroboros().to_json() if ouroboros else None,
        fps=float(own.get("fps", 16)),
        checkpoint_every=CHECKPOINT_LATENTS,
    )


def resume(session: Session, run: str, frames: int | None = None) -> Iterator[Update]:
    """Go on with a stopped long run; frames: a new length, 0 for the old one.

    Updates as those of `long`; the plot goes on from the film's beginning.
    Raises GenAttnError for a run that is not there, cannot go on, or is of another model.
    """
    folder = session.run_folder(run)
    if not (folder / "checkpoint.json").is_file():
        raise GenAttnError(f"run {run!r} cannot go on: it was stopped before its first frame, or is no long video; start again")
    wished = None if not frames else whole("frames", frames, 1)
    session.limits.at_most("frames", wished or 1, session.limits.long_frames)
    chosen = session.check_name((folder / "model.txt").read_text(), video=True)

    def work(job: Job) -> dict[str, Any]:
        from genattn.pipelines.long_video.generate import resume_video
        from genattn.pipelines.long_video.queue.window_group import WindowGroup

        job.tell("opening the model", run=run)
        pipe, group = session.open(chosen), WindowGroup.alone()
        video = resume_video(pipe, folder, num_frames=wished, progress=False, group=group)
        return _go_on(job, session, chosen, folder, video, group)

    yield from Job(work, session.lock).updates()


def _start(
    job: Job, session: Session, model: Model, form: ClipForm, settings: dict[str, Any], ouroboros: bool, picture: Path | None
) -> dict[str, Any]:
    from genattn.pipelines.long_video.bases.frame_denoisers import frame_denoiser
    from genattn.pipelines.long_video.generate import start_video
    from genattn.pipelines.long_video.queue.window_group import WindowGroup
    from genattn.seam.sites import denoisers

    job.tell("opening the model")
    pipe = session.open(model)
    wanted = _wanted(pipe, form, settings, ouroboros)
    height, width = wanted.size(frame_denoiser(pipe))
    session.limits.check_clip(height, width, None, 1)
    start = None if picture is None else read_picture(picture, session.limits, (height, width))
    run, group = session.new_run("long"), WindowGroup.alone()
    (run / "model.txt").write_text(model.name)
    job.tell("sampling the first clip", run=run.name)
    with job.watching(*denoisers(pipe).values()):

        def tell(forecast: str) -> None:
            job.tell(f"sampling the first clip: {forecast}", run=run.name, cost=forecast)

        video = start_video(pipe, wanted, start=start, folder=run, progress=False, group=group, tell=tell)
    return _go_on(job, session, model, run, video, group)


def _go_on(job: Job, session: Session, model: Model, run: Path, video: Any, group: Any) -> dict[str, Any]:
    """Iterate a film to its end or to a stop, showing every second of it."""
    settings = video.parts.settings
    watch = _Watch(job, run, video)
    with job.finishing():
        job.on_stop.append(group.ask_to_stop)
        if job.stop_asked.is_set():  # between the first clip and here
            group.ask_to_stop()
        watch.tell()
        with closing(iter(video)) as frames:
            for frame in frames:
                watch.take(frame)
        watch.show()
    report = {
        "verb": "long",
        "model": model.name,
        "pipeline": type(video.parts.base.pipe).__name__,
        **settings.to_json(),
        "frames": video.frames,
        "seconds": round(video.seconds, 2),
        "frames_per_second": round(video.made / max(video.seconds, 1e-6), 2),
        "stopped": video.stopped,
        "drift_per_100_frames": {name: round(value, 4) for name, value in video.drift.items()},
        "files": [video.parts.writer.path.name],
    }
    report = session.write_report(run, report)
    film = str(video.parts.writer.path)
    return {"film": film, **watch.drift(), "run": run.name, "seed": settings.seed, "report": report}


def _shown(history: Path, frames: int) -> list[tuple[int, dict[str, float]]]:
    """The points of a plot up to a frame; none from a file that is damaged, for the film goes on without them."""
    try:
        return [(at, found) for at, found in json.loads(history.read_text(encoding="utf-8"))["points"] if at <= frames]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return []


class _Watch:
    """Cuts a film into segments of a second and keeps the points of the drift plot."""

    def __init__(self, job: Job, run: Path, video: Any) -> None:
        self.job, self.run, self.video = job, run, video
        self.total = video.parts.settings.num_frames
        self.fps = video.parts.settings.fps
        self.frames: list[Any] = []
        self.segments = 0
        self.history = run / HISTORY
        # what a film that is taken up again has already shown; the checkpoint may lie before its last points
        self.points: list[tuple[int, dict[str, float]]] = _shown(self.history, video.frames)

    def take(self, frame: Any) -> None:
        """One more frame, uint8 [H, W, 3]."""
        self.frames.append(frame)
        if len(self.frames) >= math.ceil(self.fps):
            self.show()

    def show(self) -> None:
        """Hand over what has gathered, a segment and a point of the plot."""
        from genattn.pipelines.long_video.output.video_writer import FragmentedMp4Writer
        from genattn.pipelines.long_video.quality.drift import frame_statistics

        if not self.frames:
            return
        # a few names in turn: the page has its copy long before a name comes back
        path = self.run / f"segment-{self.segments % 8}.mp4"
        with FragmentedMp4Writer(path, self.fps) as writer:
            for frame in self.frames:
                writer.write(frame)
        self.segments += 1
        found = frame_statistics(self.frames[-1])
        self.points.append((self.video.frames, {name: found[name] for name in PLOTTED}))
        if len(self.points) > PLOTTED_POINTS:
            del self.points[1:-1:2]
        write_json(self.history, {"points": self.points})
        self.frames = []
        self.tell(segment=str(path))

    def tell(self, **values: Any) -> None:
        """Where the film is."""
        self.job.tell("frames", self.video.frames, self.total, run=self.run.name, **self.drift(), **values)

    def drift(self) -> dict[str, Any]:
        """The plot's points as `drift`: change since the first one, in levels of 0 to 255; nothing before that."""
        rows = [
            {"frame": frame, "statistic": name, "change": values[name] - self.points[0][1][name]}
            for frame, values in self.points
            for name in PLOTTED
        ]
        return {"drift": rows} if rows else {}
