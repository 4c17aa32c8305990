"""A diffusers pipeline inside ComfyUI: loaded offline, patched for the time of a call, with progress, preview and interrupt."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import genattn
from genattn.apps.sampling.load_pipeline import load_pipeline
from genattn.apps.sampling.negative import split_negative
from genattn.apps.sampling.pipeline_calls import sample_frames, taken_arguments
from genattn.apps.sampling.preview import clean_estimate, first_frame
from genattn.apps.sampling.run import SamplingSettings, call_arguments, makes_video, own_defaults
from genattn.errors import GenAttnError
from genattn.planning.ladder import Model as Known
from genattn.seam.named import describe_model
from genattn.seam.plugin import Plugin
from genattn.seam.sites import denoisers


@dataclass(frozen=True)
class Pipe:
    """A pipeline and the plugins that its next calls run with; the pipeline itself is stock between the calls."""

    pipe: Any
    plugins: tuple[Plugin, ...] = ()

    def with_plugins(self, *plugins: Plugin) -> "Pipe":
        """The same pipeline with more plugins; raises GenAttnError when they do not fit it."""
        if plugins:
            genattn.apply(self.pipe, *plugins).remove()
        return replace(self, plugins=(*self.plugins, *plugins))

    @property
    def known(self) -> Known:
        """What the planner asks of its (first) denoiser."""
        name, model = next(iter(denoisers(self.pipe).items()))
        return describe_model(name, model, tuple(getattr(self.pipe, "components", ())))

    @contextlib.contextmanager
    def applied(self) -> Iterator[Any]:
        """The pipeline with its plugins on; gives the handle, None without plugins."""
        # ComfyUI runs nodes in inference mode, whose tensors other code may not keep
        with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as stack:
            yield stack.enter_context(genattn.apply(self.pipe, *self.plugins)) if self.plugins else None


def load(model: str, dtype: str, device: str, offline: bool) -> Pipe:
    """A pipeline from a folder, a hub id or ("") the shipped tiny-wan. offline: ids only from what is on this machine.

    Raises GenAttnError with what is missing.
    """
    source: str | None = model.strip() or None
    if source is not None and offline and not _is_folder(source):
        source = _snapshot(source)
    with torch.inference_mode(False):  # weights are to outlive this workflow and be usable in any other
        return Pipe(load_pipeline(source, dtype, None if device == "auto" else device))


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # longer than a file's name may be
        return False


def _snapshot(name: str) -> str:
    """The folder of a hub id on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise GenAttnError(
            f"{name!r} is neither a folder nor a model on this machine; give a folder, or switch offline off to download it"
        ) from None


class Steps:
    """A pipeline's `callback_on_step_end`: ComfyUI's bar, a preview of the first frame, and the user's interrupt."""

    def __init__(self, total: int) -> None:
        from comfy.utils import ProgressBar

        self.bar, self.total = ProgressBar(total), total
        self._before: torch.Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline after every step."""
        check_interrupt()
        latents = values.get("latents")
        self.bar.update_absolute(step + 1, self.total, self._preview(pipe, step, latents))
        self._before = latents
        return values

    def _preview(self, pipe: Any, step: int, latents: Any) -> Any:
        # a VAE costs about as much as a step at full size, so only some steps are shown
        if latents is None or latents.ndim not in (4, 5) or (step + 1) % max(1, self.total // 4):
            return None
        with torch.no_grad():
            picture = first_frame(pipe, clean_estimate(pipe.scheduler, step, self._before, latents))
        return preview_of(picture)


def preview_of(frame: np.ndarray) -> Any:
    """A frame uint8 [H, W, 3] as ComfyUI's preview."""
    from PIL import Image

    return ("JPEG", Image.fromarray(frame), 512)


def check_interrupt() -> None:
    """Raise ComfyUI's interrupt when the user asked for it."""
    from comfy.model_management import throw_exception_if_processing_interrupted

    throw_exception_if_processing_interrupted()


def make_room(pipe: Any) -> None:
    """Take ComfyUI's own models off the device that the pipeline is about to use."""
    import comfy.model_management

    if torch.device(pipe.device).type != "cpu":
        comfy.model_management.unload_all_models()


def sample(holder: Pipe, prompt: str, negative: str, seed: int, video: bool, **sizes: Any) -> tuple[torch.Tensor, float, str]:
    """(IMAGE [T, H, W, 3], frames a second, report). sizes: of `SamplingSettings`, 0 or below for the model's own.

    Raises GenAttnError when the pipeline makes the other kind, or cannot take a size.
    """
    pipe = holder.pipe
    if makes_video(pipe) != video:
        kind = "Sample Video" if makes_video(pipe) else "Sample Image"
        raise GenAttnError(f"{type(pipe).__name__} needs the node {kind} (GenAttn)")
    own = {name: value for name, value in sizes.items() if value > 0}
    call = call_arguments(pipe, SamplingSettings(negative_prompt=negative or None, **own))
    make_room(pipe)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    call, instead = split_negative(pipe, call)
    if "callback_on_step_end" in taken_arguments(pipe):  # modular pipelines have none: no bar, no interrupt
        call = {**call, "callback_on_step_end": Steps(call["num_inference_steps"])}
    with holder.applied() as handle, contextlib.nullcontext() if instead is None else genattn.apply(pipe, instead):
        frames = sample_frames(pipe, **call, prompt=prompt, generator=generator)
        told = "no plugins: stock" if handle is None else handle.report().table()
    return torch.from_numpy(np.asarray(frames, np.float32)), fps_of(pipe), told


def fps_of(pipe: Any) -> float:
    """Frames a second that the model was made for, 16 when it does not tell."""
    return float(own_defaults(pipe).get("fps", 16))


def endless(holder: Pipe, prompt: str, path: Path, show: Callable[[int, np.ndarray], None], **settings: Any) -> tuple[Any, str]:
    """(frames uint8 as a list, report) of a long video, written to `path` while it is made. settings: of `long_video`."""
    from genattn.pipelines.long_video.generate import long_video

    make_room(holder.pipe)
    frames: list[np.ndarray] = []
    with holder.applied() as handle:
        film = long_video(holder.pipe, prompt, output=path, stream=True, progress=False, **settings)
        with contextlib.closing(iter(film)) as made:
            for frame in made:
                frames.append(frame)
                show(len(frames), frame)
        told = "no plugins: stock" if handle is None else handle.report().table()
    return frames, told
