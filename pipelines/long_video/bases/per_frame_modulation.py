"""A modulation per frame for blocks that modulate and gate all tokens with one vector.

Such a block (HunyuanVideo, Mochi, Kandinsky, EasyAnimate, Motif) lays a vector [B, D] over its tokens by `unsqueeze(1)` or
`[:, None]`. The modules that make the vectors are given another forward on the instance; it hands the block a `Spread`, which
answers both with a vector per token. So the block's own arithmetic runs, and only where the vectors come from is changed.

Video tokens take the embedding of their own frame's timestep; text tokens keep that of the forward, whose timestep is the
window's mean.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import Embeds, FrameDenoiser, Pass
from genattn.pipelines.long_video.output.stream_decode import OverlapDecoder, StreamDecoder

Forward = Callable[..., Any]


class Spread:
    """Stands where a block expects a modulation vector [B, D], and gives one per token [B, S, D] where it lays that vector out.

    make: called when the block asks, so that one such tensor is alive at a time.
    """

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        self._make = make

    def unsqueeze(self, dim: int) -> torch.Tensor:
        """What `vector.unsqueeze(1)` is multiplied with."""
        if dim != 1:
            raise GenAttnError(f"a modulation vector must be laid out along axis 1, got {dim}; this block is not known here")
        return self._make()

    def __getitem__(self, index: Any) -> torch.Tensor:
        if index != (slice(None), None):
            raise GenAttnError(f"a modulation vector must be laid out as [:, None], got {index}; this block is not known here")
        return self._make()

    @classmethod
    def __torch_function__(
        cls, function: Forward, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> "Spread":
        # element by element (Mochi's tanh over its gates)
        (spread,) = args
        return cls(lambda: function(spread._make(), **(kwargs or {})))


@dataclass(frozen=True)
class FrameEmbedding:
    """What every frame's own timestep became. frames: [B, F, D]. tokens: of one frame; they stand together, in order."""

    frames: torch.Tensor
    tokens: int

    def spread(self, frames: torch.Tensor, tail: torch.Tensor | None = None, length: int = 0) -> torch.Tensor:
        """Vectors [B, F, C] over the tokens of their frames, then `tail` [B, C] up to `length` tokens: [B, S, C]."""
        video = frames.repeat_interleave(self.tokens, 1)
        rest = length - video.shape[1]
        return video if tail is None or rest <= 0 else torch.cat([video, tail[:, None].expand(-1, rest, -1)], 1)

    def later(self, frames: torch.Tensor, tail: torch.Tensor | None = None, length: int = 0) -> Spread:
        """`spread`, when the block asks for it."""
        return Spread(lambda: self.spread(frames, tail, length))


class ModulatedFrames(FrameDenoiser):
    """What the families with one modulation vector share."""

    route: ClassVar[str] = "modulation per frame, on the instance"
    has_cross_attention: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._own: FrameEmbedding | None = None

    @abstractmethod
    def replaced(self) -> Sequence[tuple[Any, Forward]]:
        """Modules and what is called instead: forward(own, module, stock, *arguments)."""

    def decoder(self) -> StreamDecoder:
        """See FrameDenoiser.decoder."""
        return OverlapDecoder(self.pipe.vae, self.pipe.vae_scale_factor_temporal)

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.to_vae."""
        return latents / self.pipe.vae.config.scaling_factor

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """See FrameDenoiser.encode_frames."""
        vae = self.pipe.vae
        return vae.encode(frames.to(self.device, vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor

    @contextmanager
    def installed(self) -> Iterator[None]:
        """See FrameDenoiser.installed."""
        with forwards_replaced([(module, partial(self._dispatch, forward)) for module, forward in self.replaced()]):
            yield

    def _dispatch(self, forward: Forward, module: Any, stock: Forward, *args: Any, **kwargs: Any) -> Any:
        if self._own is None:
            return stock(*args, **kwargs)
        return forward(self._own, module, stock, *args, **kwargs)

    @abstractmethod
    def embedding(self, times: torch.Tensor, embeds: Embeds) -> torch.Tensor:
        """What the model makes of the timesteps [K, F] of every frame, as it makes it of one: [K, F, D]."""

    @abstractmethod
    def arguments(self, latents: torch.Tensor, embeds: Embeds) -> dict[str, Any]:
        """What the stock pipeline gives its model beside the timestep."""

    @abstractmethod
    def tokens(self, latents: torch.Tensor) -> int:
        """Tokens of one frame."""

    def told_time(self, times: torch.Tensor) -> torch.Tensor:
        """Timesteps in the dtype that the pipeline tells them in."""
        return times

    def from_model(self, answer: torch.Tensor) -> torch.Tensor:
        """The model's answer as [K, C, F, H, W]."""
        return answer

    def predict(self, latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, where: Pass) -> torch.Tensor:
        """See FrameDenoiser.predict."""
        model, times = self.pipe.transformer, timesteps.to(latents.device)
        own, whole = None, times[:, 0]
        if not bool((times == times[:, :1]).all()):
            own, whole = FrameEmbedding(self.embedding(times, embeds), self.tokens(latents)), times.mean(1)
        with where.context(model), self.told(own):
            answer = model(timestep=self.told_time(whole), return_dict=True, **self.arguments(latents, embeds)).sample
        return self.from_model(answer.float())

    @contextmanager
    def told(self, own: FrameEmbedding | None) -> Iterator[None]:
        """One forward with these embeddings; the stock one with None."""
        self._own = own
        try:
            yield
        finally:
            self._own = None


@contextmanager
def forwards_replaced(replaced: Sequence[tuple[Any, Forward]]) -> Iterator[None]:
    """Give modules another forward on the instance, called as forward(module, stock, *arguments); what was there comes back."""
    before = [vars(module).get("forward") for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.forward = partial(forward, module, module.forward)
        yield
    finally:
        for (module, _), own in zip(replaced, before, strict=True):
            if own is not None:
                module.forward = own
            else:
                vars(module).pop("forward", None)


def modulation(module: Any, embedding: torch.Tensor) -> torch.Tensor:
    """The linear layer of an adaptive norm, on embeddings [..., D]."""
    return module.linear(module.silu(embedding))


def norm_zero(own: FrameEmbedding, module: Any, stock: Forward, hidden: torch.Tensor, *, emb: torch.Tensor) -> tuple[Any, ...]:
    """AdaLayerNormZero over video tokens alone."""
    shift, scale, *rest = modulation(module, own.frames).chunk(6, -1)
    hidden = module.norm(hidden) * (1 + own.spread(scale)) + own.spread(shift)
    return hidden, *(own.later(part) for part in rest)


def norm_zero_single(
    own: FrameEmbedding, module: Any, stock: Forward, hidden: torch.Tensor, *, emb: torch.Tensor
) -> tuple[Any, ...]:
    """AdaLayerNormZeroSingle over video tokens, then text."""
    video, text, length = modulation(module, own.frames).chunk(3, -1), modulation(module, emb).chunk(3, -1), hidden.shape[1]
    shift, scale = (own.spread(video[i], text[i], length) for i in (0, 1))
    return module.norm(hidden) * (1 + scale) + shift, own.later(video[2], text[2], length)


def norm_continuous(own: FrameEmbedding, module: Any, stock: Forward, hidden: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    """AdaLayerNormContinuous over video tokens."""
    scale, shift = module.linear(module.silu(own.frames).to(hidden.dtype)).chunk(2, -1)
    return module.norm(hidden) * own.spread(1 + scale) + own.spread(shift)
