"""What endless video needs of a base model: a forward in which every latent frame has its own timestep.

One class per family, each a thin reading of a stock pipeline: how its prompt becomes embeddings, how its denoiser is told a
timestep per frame, how its latents reach the VAE. Some models take per-frame timesteps as they come (Wan, SkyReels-V2, LTX,
Cosmos), some through hooks on the instance (AnimateDiff and UNet3D, CogVideoX, Latte, HunyuanVideo and its kin), and for the
rest `why_no_frames` says what stands in the way.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.output.stream_decode import StreamDecoder
from genattn.pipelines.long_video.solvers.frame_solvers import FrameSolver, solver_from_scheduler
from genattn.reading import read_defaults

Embeds = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Pass:
    """Where one forward stands. name: "cond" or "uncond". step: of its noisiest latent, 0 at pure noise. sigma: that one's
    noise."""

    name: str
    step: int
    num_steps: int
    sigma: float

    def context(self, model: Any) -> AbstractContextManager[Any]:
        """The model's cache context of this pass, told as the stock pipelines tell it; plugins of the seam read it there."""
        if not hasattr(model, "cache_context"):
            return nullcontext()
        told = {"step_index": self.step, "sigma": self.sigma, "num_inference_steps": self.num_steps}
        if len(inspect.signature(model.cache_context).parameters) > 1:
            return model.cache_context(self.name, **told)
        return model.cache_context(self.name)


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model wants it: tensors with a batch axis of 1. uncond: None when the run has no guidance."""

    cond: Embeds
    uncond: Embeds | None = None


class FrameDenoiser(ABC):
    """A stock pipeline as endless video sees it.

    family, route, decode: for the capability table. text_per_frame: whether each latent may have its own prompt within one
    forward.
    has_cross_attention: whether text stands in attention of its own, where subject masks can be read.
    continues: whether the pipeline makes a video from given frames, and has no mode without them.
    tells_guidance: whether the model is told its guidance scale (`guidance_scale`) and makes one pass, being distilled.
    """

    family: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    route: ClassVar[str]
    decode: ClassVar[str]
    note: ClassVar[str] = ""
    text_per_frame: ClassVar[bool] = False
    has_cross_attention: ClassVar[bool] = True
    continues: ClassVar[bool] = False
    tells_guidance: ClassVar[bool] = False

    guidance_scale: float | None = None
    guidance_scale_2: float | None = None

    def __init__(self, pipe: Any) -> None:
        reason = self.why_not(pipe)
        if reason is not None:
            raise GenAttnError(reason)
        self.pipe = pipe

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """The reason why this very pipeline cannot be served, or None."""
        return None

    @property
    def models(self) -> dict[str, Any]:
        """The denoisers, by the pipeline's own names."""
        names = ("transformer", "transformer_2", "unet")
        return {name: getattr(self.pipe, name) for name in names if getattr(self.pipe, name, None) is not None}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the denoiser computes in."""
        return next(iter(self.models.values())).dtype

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(self.pipe._execution_device)

    @property
    def channels(self) -> int:
        """Latent channels."""
        return int(next(iter(self.models.values())).config.in_channels)

    def default(self, name: str) -> Any:
        """Default of an argument of the pipeline's call, or None."""
        parameter = inspect.signature(type(self.pipe).__call__).parameters.get(name)
        return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default

    def shipped(self) -> dict[str, Any]:
        """What a folder says its model was made for (genattn_defaults.json: height, width, frames, guidance_scale), or
        nothing."""
        place = getattr(self.pipe.config, "_name_or_path", None)
        return read_defaults(str(place)) if place else {}

    def default_size(self) -> tuple[int | None, int | None]:
        """Height and width that the pipeline makes by default, None where it tells none."""
        told = self.shipped()
        return told.get("height", self.default("height")), told.get("width", self.default("width"))

    def default_window(self) -> int:
        """Latents of the clip that the pipeline makes by default."""
        frames = self.shipped().get("frames") or self.default("num_frames") or self.default("video_length") or 16
        decoder = self.decoder()
        latents = 1
        while decoder.frames_for(latents + 1) <= frames:
            latents += 1
        return latents

    @abstractmethod
    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent height and width; raises when the picture does not fit the model's patches."""

    @abstractmethod
    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """Embeddings of one prompt, as the stock pipeline makes them."""

    @abstractmethod
    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """One forward: latents [K, C, F, H, W], timesteps [K, F], embeds with batch K -> the model's answer, float32."""

    def solver(self, num_levels: int, latents: tuple[int, int, int], eta: float | None = None) -> FrameSolver:
        """The pipeline's own scheduler, by level. latents: frames, height and width of a window."""
        return solver_from_scheduler(self.pipe.scheduler, num_levels, eta=eta)

    def guide(self, cond: torch.Tensor, uncond: torch.Tensor, scale: float, timesteps: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance as the pipeline does it."""
        return uncond + scale * (cond - uncond)

    @abstractmethod
    def decoder(self) -> StreamDecoder:
        """A fresh streaming decoder."""

    @abstractmethod
    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """Model latents as the VAE wants them."""

    @abstractmethod
    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames [1, 3, T, H, W] in [-1, 1] as clean model latents."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks that the per-frame timestep needs, for the time of a run."""
        yield

    def limits(self, window: int) -> str | None:
        """The reason why a window of that many latents cannot be served, or None."""
        return None


# family -> module and class; a module is loaded when a pipeline of that family comes
_BASES = {
    "Wan": ("genattn.pipelines.long_video.bases.wan", "WanFrames"),
    "Wan TI2V": ("genattn.pipelines.long_video.bases.wan", "WanImageFrames"),
    "SkyReels-V2": ("genattn.pipelines.long_video.bases.skyreels", "SkyReelsFrames"),
    "LTX-Video": ("genattn.pipelines.long_video.bases.ltx", "LTXFrames"),
    "LTX-Video image to video": ("genattn.pipelines.long_video.bases.ltx", "LTXImageFrames"),
    "LTX-2": ("genattn.pipelines.long_video.bases.ltx2", "LTX2Frames"),
    "Cosmos": ("genattn.pipelines.long_video.bases.cosmos", "CosmosFrames"),
    "Cosmos 2.5": ("genattn.pipelines.long_video.bases.cosmos", "Cosmos25Frames"),
    "AnimateDiff": ("genattn.pipelines.long_video.bases.unet", "AnimateDiffFrames"),
    "UNet3D": ("genattn.pipelines.long_video.bases.unet", "UNet3DFrames"),
    "CogVideoX": ("genattn.pipelines.long_video.bases.cogvideox", "CogVideoXFrames"),
    "Latte": ("genattn.pipelines.long_video.bases.latte", "LatteFrames"),
    "HunyuanVideo": ("genattn.pipelines.long_video.bases.hunyuan_video", "HunyuanVideoFrames"),
    "HunyuanVideo-1.5": ("genattn.pipelines.long_video.bases.hunyuan_video", "HunyuanVideo15Frames"),
    "Mochi": ("genattn.pipelines.long_video.bases.mochi", "MochiFrames"),
    "Kandinsky 5": ("genattn.pipelines.long_video.bases.kandinsky", "KandinskyFrames"),
}

# pipeline class name (or its beginning) -> what stands in the way
_REASONS = {
    "WanImageToVideo (2.1, A14B)": "its model reads a clean first frame in extra channels, which no later latent has",
    "WanVACE": "its forward spreads one timestep over the control branch before the blocks",
    "WanAnimate": "its forward spreads one timestep over the face and pose branches before the blocks",
    "HunyuanVideoImageToVideo": "it saw a clean first frame in every clip, and its prompt is read together with it",
    "HunyuanVideo15ImageToVideo": "its model reads a clean first frame in extra channels, which no later latent has",
    "HunyuanSkyreelsImageToVideo": "its model reads a clean first frame in extra channels, which no later latent has",
    "HunyuanVideoFramepack": "it has its own memory for long video; use it as it comes",
    "Allegro": "its autoencoder decodes whole tiles of 24 frames by 320 x 320 only, which latents that leave do not fill",
    "EasyAnimate": "its autoencoder keeps its cache inside its modules, where no checkpoint finds it; not built",
    "Kandinsky5I2V": "its model reads a clean first frame in extra channels, which no later latent has",
    "Kandinsky5T2I": "it makes single pictures",
    "Kandinsky5I2I": "it makes single pictures",
    "Kandinsky6": "it makes sound along with the picture, which the queue does not carry",
    "Cosmos2TextToImage": "it makes single pictures",
    "Cosmos2VideoToWorld": "its given frames come with a mask channel and a noise level of their own, not built here",
    "CosmosVideoToWorld": "its given frames come with a mask channel and a noise level of their own, not built here",
    "Cosmos2_5_Transfer": "a control branch accompanies every frame, which a film without end has no video for",
    "Cosmos3": "it packs text, frames and sound into one sequence, which the queue's windows do not make",
    "StableVideoDiffusion": "it continues one given picture held in extra channels",
    "I2VGenXL": "it continues one given picture held in extra channels",
    "Helios": "it has its own memory for long video; use it as it comes",
    "LTXCondition": "its later conditions need a clip of known length; LTXImageToVideoPipeline takes the same weights",
    "LTX2 (other than LTX2Pipeline)": "conditions, upsampling and references beside the picture need a clip of known length",
    "MiniMaxH3": "its rows would take a timestep each, but it is a modular pipeline that makes sound in the same sequence",
    "MotifVideo": "its decoder blocks read the picture's tokens twice, and a given picture stands in extra channels; not built",
}


def base_classes() -> dict[str, type[FrameDenoiser]]:
    """All families, loaded."""
    return {family: getattr(import_module(module), name) for family, (module, name) in _BASES.items()}


def why_no_frames(pipe: Any) -> str | None:
    """The reason why a pipeline has no per-frame timesteps, or None when it can be served."""
    name = type(pipe).__name__
    for base in base_classes().values():
        if name in base.pipelines:
            return base.why_not(pipe)
    known = next((reason for start, reason in _REASONS.items() if name.startswith(start.split(" ")[0])), None)
    served = ", ".join(sorted(p for base in base_classes().values() for p in base.pipelines))
    return f"{name} cannot give every frame its own timestep: {known or 'it is not known here'}; endless video serves {served}"


def frame_denoiser(pipe: Any) -> FrameDenoiser:
    """The stock pipeline as endless video sees it; raises GenAttnError with the reason when it cannot be served."""
    name = type(pipe).__name__
    for base in base_classes().values():
        if name in base.pipelines:
            return base(pipe)
    raise GenAttnError(why_no_frames(pipe) or name)


def capability_table() -> list[dict[str, str]]:
    """One row per family: what carries the timestep, how frames are decoded, what to know."""
    rows = []
    for family, base in base_classes().items():
        rows.append(
            {
                "family": family,
                "pipelines": ", ".join(base.pipelines),
                "per-frame timestep": base.route,
                "decoding": base.decode,
                "prompt per frame": "yes" if base.text_per_frame else "by window",
                "subject masks": "yes" if base.has_cross_attention else "no",
                "note": base.note,
            }
        )
    return rows


def capability_markdown() -> str:
    """Both tables for the manual, between whose marks a test holds them."""
    parts = []
    for rows in (capability_table(), refusal_table()):
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\nRefused, with the reason:\n\n".join(parts)


def refusal_table() -> list[dict[str, str]]:
    """Families that are refused, with the reason."""
    return [{"pipelines": f"{start}*", "reason": reason} for start, reason in _REASONS.items()]


def why_not_one_latent_a_patch(model: Any) -> str | None:
    """Why a denoiser whose patches span several latents in time cannot serve a queue; None when each holds one."""
    patch = model.config.patch_size
    return None if patch[0] == 1 else f"a queue needs one latent per patch in time, got patch_size={patch}"


def encode_to_length(base: FrameDenoiser, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
    """`encode_prompt` of pipelines that pad a single text encoder's embeddings to a length."""
    length = min(base.default("max_sequence_length") or 512, base.pipe.tokenizer.model_max_length)
    cond, uncond = base.pipe.encode_prompt(
        prompt, negative_prompt, guided, max_sequence_length=length, device=base.device, dtype=base.dtype
    )
    return Prompt({"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond} if guided else None)
