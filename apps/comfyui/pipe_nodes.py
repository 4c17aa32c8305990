"""Nodes over diffusers: load, apply, sample; for families that ComfyUI does not have, and endless video on any of its bases."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genattn.apps.comfyui.fields import HEAD_SET, HEADS, LATER, SEED, SPARSE, TARGET, check_sparse
from genattn.apps.comfyui.schema import Answer, Field, NodeSpec, Out
from genattn.apps.comfyui.settings import METHODS, first_of, size_multiple

_CATEGORY = "GenAttn/diffusers"
_PIPE = Field("pipe", "GENATTN_PIPE", "A diffusers pipeline from Load Pipeline.")
_PIPE_OUT = Out("PIPE", "GENATTN_PIPE", "The pipeline with its settings; the model itself is untouched between samplings.")
_PROMPT = Field("prompt", "STRING", "What to show.", "a red circle moves right on a dark background", multiline=True)
_NEGATIVE = Field(
    "negative", "STRING", "What to avoid (through NAG if the guidance scale is 1); empty for nothing.", "", multiline=True
)
_SIZES = (
    Field("height", "INT", "Pixels; 0 for what the model was made for.", 0, 0, 8192, 8),
    Field("width", "INT", "Pixels; 0 for what the model was made for.", 0, 0, 8192, 8),
    Field("steps", "INT", "Denoising steps; 0 for the model's.", 0, 0, 1000, 1),
    Field("guidance_scale", "FLOAT", "Classifier-free guidance; 0 for the model's.", 0.0, 0.0, 50.0, 0.1),
)
_FRAMES = Field("frames", "INT", "Frames; 0 for what the model was made for.", 0, 0, 10_000, 1)
_FPS = Field("fps", "FLOAT", "Frames per second; 0 for the model's.", 0.0, 0.0, 240.0, 1.0)
_REPORT_OUT = Out("report", "STRING", "What ran sparse, at what density, and why the rest stayed dense.")


def load_pipeline_node(model: str, dtype: str, device: str, offline: bool) -> tuple[Any, ...]:
    """A pipeline."""
    from genattn.apps.comfyui.pipes import load

    return (load(model, dtype, device, offline),)


def apply_node(
    pipe: Any, method: str, heads: str, u: float, scale: float, target: str, head_set: Any = None, **widgets: Any
) -> tuple[Any, ...]:
    """A pipeline with sparse attention and head guidance."""
    from genattn.apps.comfyui.settings import guidance_of, sparse_of

    plugins: list[Any] = []
    if widgets["pattern"] != "dense":
        plugins.append(sparse_of(pipe.known, **widgets))
    if method != "none":
        plugins.append(guidance_of(method, heads, u, scale, head_set, target=target, reuse_prefix="auto"))
    return (pipe.with_plugins(*plugins),)


def sample_image(pipe: Any, prompt: str, negative: str, seed: int, **sizes: Any) -> tuple[Any, ...]:
    """IMAGE."""
    from genattn.apps.comfyui.pipes import sample

    image, _, told = sample(pipe, prompt, negative, seed, video=False, **sizes)
    return image, told


def sample_video(pipe: Any, prompt: str, negative: str, seed: int, fps: float, **sizes: Any) -> tuple[Any, ...]:
    """IMAGE and VIDEO."""
    from comfy_api.latest import VideoComponents, VideoFromComponents

    from genattn.apps.comfyui.pipes import sample

    images, own, told = sample(pipe, prompt, negative, seed, video=True, **sizes)
    rate = Fraction(fps or own).limit_denominator(1000)
    return images, VideoFromComponents(VideoComponents(images=images, audio=None, frame_rate=rate)), told


def long_video_node(
    pipe: Any,
    prompt: str,
    negative: str,
    seed: int,
    frames: int,
    height: int,
    width: int,
    steps: int,
    guidance_scale: float,
    partitions: int,
    lookahead: bool,
    ouroboros: bool,
    fps: float,
) -> Answer:
    """IMAGE and VIDEO of any length."""
    import folder_paths
    from comfy.utils import ProgressBar
    from comfy_api.latest import VideoFromFile

    from genattn.apps.comfyui.pipes import check_interrupt, endless, fps_of, preview_of
    from genattn.pipelines.long_video.ouroboros.ouroboros import Ouroboros

    folder, name, counter, _, _ = folder_paths.get_save_image_path("genattn_long", folder_paths.get_output_directory())
    path = Path(folder) / f"{name}_{counter:05}_.mp4"
    bar = ProgressBar(frames)

    def show(done: int, frame: np.ndarray) -> None:
        check_interrupt()
        bar.update_absolute(done, frames, preview_of(frame))

    settings = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    made, told = endless(
        pipe, prompt, path, show, negative_prompt=negative or None, num_frames=frames, seed=seed, partitions=partitions,
        lookahead=lookahead, ouroboros=Ouroboros() if ouroboros else None, fps=fps or fps_of(pipe.pipe),
        **{name: value for name, value in settings.items() if value > 0},
    )  # fmt: skip
    images = torch.from_numpy(np.stack(made).astype(np.float32) / 255)
    return Answer((images, VideoFromFile(str(path)), told), f"{path.name}: {len(made)} frames")


def check_sizes(cls: type, height: int, width: int) -> bool | str:
    """At submit time; the pipeline's own rules are checked when it is there."""
    return first_of([size_multiple("height", height), size_multiple("width", width)])


PIPE_NODES = (
    NodeSpec(
        "GenAttn_LoadPipeline", "Load Pipeline (GenAttn)", _CATEGORY,
        "A diffusers pipeline from a folder or a hub id; empty for the shipped tiny-wan. Only safetensors, no remote code.",
        ("diffusers", "load", "pipeline", "from_pretrained"),
        (
            Field("model", "STRING", "Folder or hub id; empty for the shipped tiny-wan.", ""),
            Field("dtype", "COMBO", "Number type of the weights.", "auto", options=("auto", "float32", "float16", "bfloat16")),
            Field("device", "COMBO", "Where it runs.", "auto", options=("auto", "cpu", "cuda", "mps")),
            Field("offline", "BOOLEAN", "Use only what is already on this machine; ask no hub.", True),
        ),
        (_PIPE_OUT,), load_pipeline_node, reads=("model",),
    ),
    NodeSpec(
        "GenAttn_ApplyPipeline", "Apply to Pipeline (GenAttn)", _CATEGORY,
        "Sparse attention and head guidance for the samplings after this node.",
        ("radial attention", "neighborhood attention", "softpag", "pag", "seg", "apply"),
        (
            _PIPE, *SPARSE,
            Field("method", "COMBO", "Guidance by disturbed heads or layers.", "none", options=("none", *METHODS)),
            *HEADS, TARGET, HEAD_SET,
            *LATER,
        ),
        (_PIPE_OUT,), apply_node, check=check_sparse, reads=("path",),
    ),
    NodeSpec(
        "GenAttn_SampleImage", "Sample Image (GenAttn)", _CATEGORY,
        "A picture from a diffusers pipeline, with progress, preview and interrupt.",
        ("diffusers", "text to image", "sd3", "flux"),
        (_PIPE, _PROMPT, _NEGATIVE, SEED, *_SIZES), (Out("IMAGE", "IMAGE", "The picture."), _REPORT_OUT), sample_image,
        check=check_sizes,
    ),
    NodeSpec(
        "GenAttn_SampleVideo", "Sample Video (GenAttn)", _CATEGORY,
        "A clip from a diffusers pipeline, with progress, preview and interrupt.",
        ("diffusers", "text to video", "wan", "hunyuan", "cogvideox", "ltx"),
        (_PIPE, _PROMPT, _NEGATIVE, SEED, _FRAMES, *_SIZES, _FPS),
        (Out("IMAGE", "IMAGE", "The frames."), Out("VIDEO", "VIDEO", "For Save Video."), _REPORT_OUT), sample_video,
        check=check_sizes,
    ),
    NodeSpec(
        "GenAttn_LongVideo", "Long Video (GenAttn)", _CATEGORY,
        "Video of any length from a short-clip pipeline (FIFO, Ouroboros); the file in the output folder plays while it grows.",
        ("fifo", "ouroboros", "long video", "endless", "infinite"),
        (
            _PIPE, _PROMPT, _NEGATIVE, SEED,
            Field("frames", "INT", "Frames of the film.", 121, 1, 100_000, 1), *_SIZES,
            Field("partitions", "INT", "Windows in the queue; more mean smaller noise steps and more work.", 4, 1, 64, 1),
            Field("lookahead", "BOOLEAN", "Every latent sees half a window of cleaner ones; twice the work.", True),
            Field("ouroboros", "BOOLEAN", "Coherent tail, subject attention and memory of Ouroboros-Diffusion.", False),
            _FPS,
        ),
        (Out("IMAGE", "IMAGE", "The frames."), Out("VIDEO", "VIDEO", "The film."), _REPORT_OUT), long_video_node,
        check=check_sizes, is_output=True,
    ),
)  # fmt: skip
