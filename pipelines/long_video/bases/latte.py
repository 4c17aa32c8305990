"""Latte: one modulation per clip by design. Spatial blocks run on frames laid out in the batch, so theirs is swapped in a
pre-hook; temporal blocks hold all frames of a place in one sequence and get a forward with a modulation per frame; so does
the last layer, before `proj_out`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, Pass, Prompt
from genattn.pipelines.long_video.bases.per_frame_modulation import forwards_replaced
from genattn.pipelines.long_video.bases.unet import UNetFrames


class LatteFrames(UNetFrames):
    """LattePipeline."""

    family: ClassVar[str] = "Latte"
    pipelines: ClassVar[tuple[str, ...]] = ("LattePipeline",)
    route: ClassVar[str] = "hooks, temporal blocks patched on the instance"
    note: ClassVar[str] = "set a DDIM scheduler; windows of the model's own clip length only"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._modulation: torch.Tensor | None = None  # [B, F, 6 D]
        self._embedded: torch.Tensor | None = None  # [B, F, D]
        self._normed: torch.Tensor | None = None

    def limits(self, window: int) -> str | None:
        """See FrameDenoiser.limits."""
        own = self.pipe.transformer.config.video_length
        return None if window == own else f"window must be {own}, the length of the model's frame positions, got {window}"

    def default_window(self) -> int:
        """See FrameDenoiser.default_window."""
        return int(self.pipe.transformer.config.video_length)

    def encode_prompt(self, prompt: str, negative_prompt: str | None, guided: bool) -> Prompt:
        """See FrameDenoiser.encode_prompt."""
        cond, uncond = self.pipe.encode_prompt(prompt, guided, negative_prompt=negative_prompt or "", device=self.device)
        # each prompt is cut to its own length by mask_feature; prompts of one schedule must be alike
        return Prompt({"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond} if guided else None)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """See FrameDenoiser.installed."""
        model = self.pipe.transformer
        handles = [block.register_forward_pre_hook(self._spatial) for block in model.transformer_blocks]
        handles.append(model.norm_out.register_forward_hook(self._keep_normed))
        handles.append(model.proj_out.register_forward_pre_hook(self._last))
        try:
            with forwards_replaced([(block, self._temporal) for block in model.temporal_transformer_blocks]):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _spatial(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._modulation is None:
            return None
        return (*args[:4], self._modulation.flatten(0, 1), *args[5:])

    def _temporal(self, block: Any, stock: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        if self._modulation is None:
            return stock(hidden, *rest)
        batch, frames, _ = self._modulation.shape
        places = hidden.shape[0] // batch
        table = block.scale_shift_table + self._modulation.reshape(batch, frames, 6, -1)
        parts = table.repeat_interleave(places, 0).unbind(2)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = parts
        hidden = hidden + gate * block.attn1(block.norm1(hidden) * (1 + scale) + shift)
        return hidden + ff_gate * block.ff(block.norm2(hidden) * (1 + ff_scale) + ff_shift)

    def _keep_normed(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self._normed = output if self._embedded is not None else None

    def _last(self, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._embedded is None or self._normed is None:
            return None
        model = self.pipe.transformer
        shift, scale = (model.scale_shift_table[None] + self._embedded.flatten(0, 1)[:, None]).chunk(2, 1)
        return (self._normed * (1 + scale) + shift,)

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        model = self.pipe.transformer
        times = timesteps.to(latents.device)
        batch, channels, frames = latents.shape[:3]
        if not bool((times == times[:, :1]).all()):
            nothing = {"resolution": None, "aspect_ratio": None}
            own = model.adaln_single(
                times.reshape(-1), added_cond_kwargs=nothing, batch_size=batch * frames, hidden_dtype=model.dtype
            )
            self._modulation, self._embedded = (part.reshape(batch, frames, -1) for part in own)
        try:
            with where.context(model):
                answer = model(latents.to(model.dtype), timestep=times[:, 0], return_dict=False, **embeds)[0]
        finally:
            self._modulation = self._embedded = self._normed = None
        # the model answers a variance too, which no solver of a queue reads
        return answer[:, :channels].float()
