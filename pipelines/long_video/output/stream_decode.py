"""Latents become frames as they leave the queue, at constant memory.

* CausalCacheDecoder: Wan-type VAEs keep a cache per causal convolution; one latent at a time equals the whole clip to the bit.
* ReturnedCacheDecoder: CogVideoX-type VAEs hand their cache back; first three latents, then two by two, equals the whole clip.
* OverlapDecoder: VAEs without a cache (LTX, HunyuanVideo, Cosmos): overlapping chunks, cross-faded.
* PictureDecoder: image VAEs, one frame per latent.

All take latents [1, C, K, h, w] as the VAE wants them and give frames [1, 3, T, H, W] in [-1, 1]; `finish` gives what was
held back. Their state goes into a checkpoint as flat tensors, so a resumed film has no seam.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from genattn.errors import GenAttnError


class StreamDecoder(ABC):
    """What all decoders have in common. vae: a stock autoencoder, never changed."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    @abstractmethod
    def push(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames that are ready once these latents [1, C, K, h, w] are known; may be none (T = 0)."""

    def finish(self) -> torch.Tensor | None:
        """Frames still held back at the end, or None."""
        return None

    @abstractmethod
    def frames_for(self, latents: int) -> int:
        """Frames in a film of that many latents."""

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """State, flat."""
        return {}

    def to_numbers(self) -> dict[str, Any]:
        """State that is no tensor, JSON-ready."""
        return {}

    def load(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up a state from `to_tensors` and `to_numbers`."""

    def latents_for(self, frames: int) -> int:
        """Latents for a film of that many frames; refuses a number the VAE cannot end on and names the nearest."""
        if frames < 1:
            raise GenAttnError(f"num_frames must be >= 1, got {frames}")
        step = max(1, self.frames_for(3) - self.frames_for(2))
        latents = max(1, (frames - self.frames_for(1)) // step)
        while self.frames_for(latents) < frames:
            latents += 1
        if self.frames_for(latents) != frames:
            below, above = self.frames_for(max(1, latents - 1)), self.frames_for(latents)
            raise _wrong_length(self.vae, frames, below, above)
        return latents


def _wrong_length(vae: Any, frames: int, below: int, above: int) -> GenAttnError:
    name = type(vae).__name__
    return GenAttnError(f"num_frames must be one that {name} can end on, got {frames}; nearest are {below} and {above}")


def _no_frames(latents: torch.Tensor) -> torch.Tensor:
    return latents.new_zeros(latents.shape[0], 3, 0, 1, 1)


class CausalCacheDecoder(StreamDecoder):
    """AutoencoderKLWan and its kin: the VAE's own decoder with a cache that belongs to this film, one latent at a time."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.cache: list[Any] = [None] * vae._cached_conv_counts["decoder"]
        self.started = False

    def frames_for(self, latents: int) -> int:
        """See StreamDecoder.frames_for."""
        return 1 + (latents - 1) * self._ratio()

    def _ratio(self) -> int:
        ratio = getattr(self.vae.config, "scale_factor_temporal", None)
        return int(ratio or 2 ** sum(self.vae.temperal_downsample))

    def push(self, latents: torch.Tensor) -> torch.Tensor:
        """See StreamDecoder.push."""
        vae = self.vae
        hidden = vae.post_quant_conv(latents.to(vae.dtype))
        out = []
        for i in range(hidden.shape[2]):
            first = {} if self.started else {"first_chunk": True}
            out.append(vae.decoder(hidden[:, :, i : i + 1], feat_cache=self.cache, feat_idx=[0], **first))
            self.started = True
        frames = torch.cat(out, 2) if out else _no_frames(latents)
        if out and vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            frames = unpatchify(frames, patch_size=vae.config.patch_size)
        return frames.clamp(-1, 1)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """See StreamDecoder.to_tensors."""
        return {f"decoder.{i}": entry for i, entry in enumerate(self.cache) if isinstance(entry, torch.Tensor)}

    def to_numbers(self) -> dict[str, Any]:
        """See StreamDecoder.to_numbers: words such as "Rep" that the VAE leaves in its cache."""
        return {
            "started": self.started,
            "words": {str(i): entry for i, entry in enumerate(self.cache) if isinstance(entry, str)},
        }

    def load(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """See StreamDecoder.load."""
        self.started = bool(numbers["started"])
        self.cache = [numbers["words"].get(str(i), tensors.get(f"decoder.{i}")) for i in range(len(self.cache))]


class ReturnedCacheDecoder(StreamDecoder):
    """AutoencoderKLCogVideoX: chunks of 3, 2, 2, ... latents, the convolution cache handed from chunk to chunk.

    Other chunkings have the right length but other pixels, since the normalisation sees the chunk.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        self.cache: Any = None
        self.held: torch.Tensor | None = None
        self.started = False

    def frames_for(self, latents: int) -> int:
        """See StreamDecoder.frames_for; a film of an even number of latents has no extra first frame, as in the stock
        decode."""
        ratio = 2 ** sum(
            1 for block in self.vae.decoder.up_blocks if getattr(block, "upsamplers", None) and _compresses_time(block)
        )
        return 1 + (latents - 1) * ratio

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.vae
        hidden = latents.to(vae.dtype)
        hidden = hidden if vae.post_quant_conv is None else vae.post_quant_conv(hidden)
        frames, self.cache = vae.decoder(hidden, conv_cache=self.cache)
        self.started = True
        return frames

    def push(self, latents: torch.Tensor) -> torch.Tensor:
        """See StreamDecoder.push."""
        held = latents if self.held is None else torch.cat([self.held, latents], 2)
        out = []
        while held.shape[2] >= (2 if self.started else 3):
            size = 2 if self.started else 3
            out.append(self._decode(held[:, :, :size]))
            held = held[:, :, size:]
        self.held = held
        return torch.cat(out, 2) if out else _no_frames(latents)

    def finish(self) -> torch.Tensor | None:
        """See StreamDecoder.finish; a rest of one latent loses the temporal upsampling, so lengths are checked before."""
        if self.held is None or self.held.shape[2] == 0:
            return None
        rest, self.held = self.held, None
        return self._decode(rest)

    def latents_for(self, frames: int) -> int:
        """See StreamDecoder.latents_for; the last chunk must be whole, so the number of latents is odd."""
        if frames < 1:
            raise GenAttnError(f"num_frames must be >= 1, got {frames}")
        latents = 1
        while self.frames_for(latents) < frames:
            latents += 2
        if self.frames_for(latents) != frames:
            raise _wrong_length(self.vae, frames, self.frames_for(latents - 2), self.frames_for(latents))
        return latents

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """See StreamDecoder.to_tensors."""
        out = dict(_flatten(self.cache, "decoder.cache"))
        if self.held is not None:
            out["decoder.held"] = self.held
        return out

    def to_numbers(self) -> dict[str, Any]:
        """See StreamDecoder.to_numbers: the cache's shape, with None where it holds nothing."""
        return {"started": self.started, "tree": _outline(self.cache)}

    def load(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """See StreamDecoder.load."""
        self.started, self.held = bool(numbers["started"]), tensors.get("decoder.held")
        self.cache = _rebuild(numbers["tree"], tensors, "decoder.cache")


class OverlapDecoder(StreamDecoder):
    """VAEs without a cache: chunks of `chunk` latents that share `overlap` latents, cross-faded over the shared frames.

    ratio: frames per latent. causal_first: whether the first latent of a decode stands for one frame only.
    """

    def __init__(
        self, vae: Any, ratio: int, chunk: int = 8, overlap: int = 2, causal_first: bool = True, **decode: Any
    ) -> None:
        super().__init__(vae)
        if not 0 < overlap < chunk:
            raise GenAttnError(f"overlap must be 1 to chunk - 1 = {chunk - 1} latents, got {overlap}")
        self.ratio, self.chunk, self.overlap, self.causal_first, self.decode = ratio, chunk, overlap, causal_first, decode
        self.held: torch.Tensor | None = None
        self.fading: torch.Tensor | None = None
        self.started = False

    def frames_for(self, latents: int) -> int:
        """See StreamDecoder.frames_for."""
        return 1 + (latents - 1) * self.ratio if self.causal_first else latents * self.ratio

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        # a later chunk starts with a latent that its decode would take for the single first frame: it is only context
        frames = self.vae.decode(latents.to(self.vae.dtype), return_dict=False, **self.decode)[0]
        if self.started and self.causal_first:
            frames = frames[:, :, 1:]
        return frames.clamp(-1, 1)

    def _fade(self, frames: torch.Tensor, last: bool) -> torch.Tensor:
        if self.fading is not None:
            shared = self.fading.shape[2]
            weight = (torch.arange(shared, device=frames.device) + 1).to(frames) / (shared + 1)
            weight = weight.reshape(1, 1, -1, 1, 1)
            mixed = (1 - weight) * self.fading + weight * frames[:, :, :shared]
            frames = torch.cat([mixed, frames[:, :, shared:]], 2)
        # the context latent gives no frames of its own when the first of a chunk stands for one
        keep = 0 if last else (self.overlap - (1 if self.causal_first else 0)) * self.ratio
        self.fading = frames[:, :, frames.shape[2] - keep :] if keep else None
        return frames[:, :, : frames.shape[2] - keep]

    def push(self, latents: torch.Tensor) -> torch.Tensor:
        """See StreamDecoder.push."""
        self.held = latents if self.held is None else torch.cat([self.held, latents], 2)
        out = []
        while self.held.shape[2] > self.chunk:
            out.append(self._fade(self._decode(self.held[:, :, : self.chunk]), last=False))
            self.started = True
            self.held = self.held[:, :, self.chunk - self.overlap :]
        return torch.cat(out, 2) if out else _no_frames(latents)

    def finish(self) -> torch.Tensor | None:
        """See StreamDecoder.finish."""
        if self.held is None:
            return None
        rest, self.held = self.held, None
        return self._fade(self._decode(rest), last=True)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """See StreamDecoder.to_tensors."""
        entries = {"decoder.held": self.held, "decoder.fading": self.fading}
        return {name: tensor for name, tensor in entries.items() if tensor is not None}

    def to_numbers(self) -> dict[str, Any]:
        """See StreamDecoder.to_numbers."""
        return {"started": self.started}

    def load(self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
        """See StreamDecoder.load."""
        self.held, self.fading, self.started = (
            tensors.get("decoder.held"),
            tensors.get("decoder.fading"),
            bool(numbers["started"]),
        )


class PictureDecoder(StreamDecoder):
    """Image VAEs (AnimateDiff, ModelScope, Latte): every latent is a frame."""

    def frames_for(self, latents: int) -> int:
        """See StreamDecoder.frames_for."""
        return latents

    def push(self, latents: torch.Tensor) -> torch.Tensor:
        """See StreamDecoder.push."""
        frames = [self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0] for z in latents.unbind(2)]
        return torch.stack(frames, 2).clamp(-1, 1) if frames else _no_frames(latents)


def _compresses_time(block: Any) -> bool:
    return any(getattr(upsampler, "compress_time", False) for upsampler in block.upsamplers)


def _flatten(tree: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        return [(name, tree)]
    if isinstance(tree, dict):
        return [entry for key, value in tree.items() for entry in _flatten(value, f"{name}.{key}")]
    return []


def _outline(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _outline(value) for key, value in tree.items()}
    return "tensor" if isinstance(tree, torch.Tensor) else None


def _rebuild(outline: Any, tensors: Mapping[str, torch.Tensor], name: str) -> Any:
    if isinstance(outline, dict):
        return {key: _rebuild(value, tensors, f"{name}.{key}") for key, value in outline.items()}
    return tensors[name] if outline == "tensor" else None
