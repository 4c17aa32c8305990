"""Reading one forward: the latents' shape, and which part of the batch is conditional."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError


@dataclass(frozen=True)
class ClipShape:
    """Samples, height and width of the latents [B, C, F, H, W] a denoiser was given."""

    batch: int
    height: int
    width: int

    def places(self, sequences: int) -> tuple[int, int]:
        """(h, w) of the resolution level at which there are `sequences` = B * h * w places; levels halve, rounding up.

        An extra pass may run one half of a batch, so B may be half of `batch`.

        Raises:
            GenAttnError: where no level has that many places.
        """
        height, width = self.height, self.width
        while True:
            if height * width * self.batch in (sequences, 2 * sequences):
                return height, width
            if height * width == 1:
                raise GenAttnError(
                    f"a temporal attention must have one sequence per place of a {self.height}x{self.width} latent "
                    f"or of a halved one, for {self.batch} samples; got {sequences} sequences"
                )
            height, width = -(-height // 2), -(-width // 2)


def clip_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ClipShape | None:
    """The latents' shape from a denoiser's arguments; None where no 5-D tensor stands first or under its usual name."""
    for value in (*args[:1], kwargs.get("sample"), kwargs.get("hidden_states")):
        if isinstance(value, torch.Tensor) and value.ndim == 5:
            return ClipShape(value.shape[0], value.shape[3], value.shape[4])
    return None


def conditional_part(
    setting: str | tuple[float, float],
    pass_name: str | None,
    batch: int | None,
    model: nn.Module | None = None,
    copied: tuple[int, ...] = (),
) -> tuple[float, float]:
    """The conditional part of a batch as fractions.

    "auto": all of a pass of its own; the second half of [uncond; cond]; the middle third of diffusers' PAG pipelines'
    [uncond; cond; perturbed]; where the pass is unknown, the second half of an even batch, as published, and all of an odd one.

    Args:
        setting: "auto", "all" or (first, last). pass_name: as `Run` has it. batch: samples in this forward, if known.
        model: the denoiser, whose processors tell of PAG. copied: as `Run` has it; "auto" then leaves the copies out.
    """
    if setting == "all":
        return 0.0, 1.0
    if not isinstance(setting, str):
        return setting
    if copied and batch:
        return copied[0] / batch, (copied[-1] + 1) / batch
    perturbed = _pag_processor(model)
    if perturbed:
        return (1 / 3, 2 / 3) if perturbed.startswith("PAGCFG") else (0.0, 0.5)
    if pass_name == "cond_uncond" or (pass_name is None and batch is not None and batch % 2 == 0):
        return 0.5, 1.0
    return 0.0, 1.0


def _pag_processor(model: nn.Module | None) -> str:
    """Class of the processors by which a diffusers pipeline perturbs a part of the batch; empty when it does not."""
    processors = getattr(model, "attn_processors", None) or {}
    names = {processor.__class__.__name__ for processor in processors.values()}
    return next((name for name in sorted(names) if name.startswith("PAG")), "")


def samples_in(part: tuple[float, float], pass_name: str | None, batch: int) -> int:
    """Samples of a forward before guidance multiplied them: entries i, i + n, i + 2n ... belong to sample i of n."""
    count = batch // 2 if pass_name == "cond_uncond" and batch % 2 == 0 else round((part[1] - part[0]) * batch)
    return count if count > 0 and batch % count == 0 else 1


def sample_groups(samples: int, batch: int, device: torch.device) -> list[torch.Tensor | None]:
    """The entries of each sample, int64; None for all of them where there is one sample, or where they do not divide."""
    if samples < 2 or batch % samples:
        return [None]
    return list(torch.arange(batch, device=device).view(-1, samples).unbind(1))


def picked(tensor: torch.Tensor | None, group: torch.Tensor | None) -> torch.Tensor | None:
    """The entries of one sample; everything for None."""
    return tensor if tensor is None or group is None else tensor.index_select(0, group)


def put_together(parts: list[torch.Tensor], groups: list[torch.Tensor | None]) -> torch.Tensor:
    """The batch from what `picked` took apart."""
    if len(parts) == 1:
        return parts[0]
    order = torch.cat([group for group in groups if group is not None])
    return torch.cat(parts).index_select(0, order.argsort())


def entries(part: tuple[float, float], length: int) -> slice:
    """The part of an axis whose outermost index is the sample.

    Raises:
        GenAttnError: where the part is empty.
    """
    first, last = round(part[0] * length), round(part[1] * length)
    if first >= last:
        raise GenAttnError(f"the conditional part must hold at least one sample, got {part} of {length}; widen it or use 'all'")
    return slice(first, last)
