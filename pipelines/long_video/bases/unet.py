"""AnimateDiff and UNet3D: one timestep for all by design, one per frame by a hook on the residual blocks.

Only the ResnetBlock2D modules read the time embedding, and they run on frames laid out in the batch. A pre-hook adds the
difference between the embedding of each frame's own timestep and the one the forward was given; where all timesteps are
equal it adds nothing at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers.models.resnet import ResnetBlock2D

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, FrameDenoiser, Pass, Prompt
from genattn.pipelines.long_video.output.stream_decode import PictureDecoder, StreamDecoder


class UNetFrames(FrameDenoiser):
    """What the two UNets share."""

    route: ClassVar[str] = "hook on the residual blocks"
    decode: ClassVar[str] = "frame by frame, exact"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._shift: torch.Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """See FrameDenoiser.installed."""
        blocks = [m for m in self.pipe.unet.modules() if isinstance(m, ResnetBlock2D)]
        handles = [m.register_forward_pre_hook(self._add_shift, with_kwargs=True) for m in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_shift(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._shift is None:
            return None
        if "temb" in kwargs:
            return args, {**kwargs, "temb": kwargs["temb"] + self._shift}
        return (args[0], args[1] + self._shift, *args[2:]), kwargs

    def _embedding(self, times: torch.Tensor) -> torch.Tensor:
        unet = self.pipe.unet
        return unet.time_embedding(unet.time_proj(times).to(unet.dtype))

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        unet, frames = self.pipe.unet, latents.shape[2]
        times = timesteps.to(latents.device)
        if not bool((times == times[:, :1]).all()):
            own = self._embedding(times.reshape(-1))
            self._shift = own - self._embedding(times[:, 0]).repeat_interleave(frames, 0)
        try:
            with where.context(unet):
                return unet(latents.to(unet.dtype), times[:, 0], return_dict=False, **embeds)[0].float()
        finally:
            self._shift = None

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """See FrameDenoiser.latent_size."""
        factor = self.pipe.vae_scale_factor
        if height % factor or width % factor:
            raise GenAttnError(f"height and width must be multiples of {factor} for this model, got {height} x {width}")
        return height // factor, width // factor

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        cond, uncond = self.pipe.encode_prompt(prompt, self.device, 1, guided, negative_prompt)
        return Prompt({"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond} if guided else None)

    def decoder(self) -> StreamDecoder:
        """See FrameDenoiser.decoder."""
        return PictureDecoder(self.pipe.vae)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.to_vae."""
        return 1 / self.pipe.vae.config.scaling_factor * latents

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.encode_frames."""
        vae = self.pipe.vae
        pictures = frames[0].transpose(0, 1).to(self.device, vae.dtype)
        latents = vae.encode(pictures).latent_dist.mode().float() * vae.config.scaling_factor
        return latents.transpose(0, 1)[None]


class AnimateDiffFrames(UNetFrames):
    """AnimateDiffPipeline; the spatial layers read a text per frame, so prompts cross-fade frame by frame."""

    family: ClassVar[str] = "AnimateDiff"
    pipelines: ClassVar[tuple[str, ...]] = ("AnimateDiffPipeline",)
    note: ClassVar[str] = "set a DDIM scheduler; group norms of the motion modules see frames of different noise"
    text_per_frame: ClassVar[bool] = True

    @classmethod
    def why_not(cls, pipe: Any) -> str | None:
        """See FrameDenoiser.why_not."""
        if pipe.free_noise_enabled:
            return "FreeNoise lays its own windows over the frames; call pipe.disable_free_noise() before endless video"
        if pipe.unet.encoder_hid_proj is not None:
            return "an IP-Adapter is loaded, which endless video does not carry; call pipe.unload_ip_adapter()"
        return None

    def limits(self, window: int) -> str | None:
        """See FrameDenoiser.limits."""
        longest = self.pipe.unet.config.motion_max_seq_length
        return f"window must be <= {longest}, the motion modules' longest sequence, got {window}" if window > longest else None


class UNet3DFrames(UNetFrames):
    """TextToVideoSDPipeline (ModelScope, ZeroScope); one text for all frames of a window."""

    family: ClassVar[str] = "UNet3D"
    pipelines: ClassVar[tuple[str, ...]] = ("TextToVideoSDPipeline",)
    note: ClassVar[str] = "set a DDIM scheduler"
