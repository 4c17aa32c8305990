"""S2-Guidance: away from the same model with some blocks left out, others at every step (arXiv 2508.12880, eq. 4).

    prediction + w (clean - dropped)          m_t drawn anew at step t, about 10 % of the blocks

The no-search rival of HeadHunter: nothing is chosen, chance does it. All else is SoftPAG's `skip` target: the extra pass on
the conditional samples, one delta for every answer of the step, a cache context of its own.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.guidance.heads.names import check_weight
from genattn.guidance.passes.delta import Projection
from genattn.guidance.softpag.softpag import Denoise, SoftPAG
from genattn.guidance.softpag.tap import TappedModel
from genattn.seam.plugin import Run


def drawn_layers(layers: Sequence[int], ratio: float, seed: int, step: int) -> list[int]:
    """The layers that step `step` leaves out, sorted: a share `ratio` of `layers`, at least one.

    The same seed and step give the same layers on every machine and process.
    """
    count = min(len(layers), max(1, round(ratio * len(layers))))
    # Python's generator is the same everywhere; a string seeds it by value
    return sorted(random.Random(f"{seed} {step}").sample(sorted(layers), count))


class S2Guidance(SoftPAG):
    """Guidance away from a sub-network drawn at every step.

    Args:
        ratio: share of the blocks left out, in (0, 1]; the paper's is about 0.1.
        scale: weight w of the difference, any finite number; the paper finds small ones best.
        start: first moment, fraction of the steps in [0, 1].
        stop: last moment, included; the paper acts in the middle 80 %.
        keep: blocks at the beginning that are never left out, >= 0; the paper keeps the first.
        seed: of the draws, whole number.
        layout: see `SoftPAG`.
        sigma_start, sigma_stop, adaptive, rescale, projection, reuse_prefix: see `SoftPAG`.

    Raises:
        GenAttnError: a setting out of its range.
    """

    def __init__(
        self,
        ratio: float = 0.1,
        scale: float = 0.25,
        *,
        start: float = 0.1,
        stop: float = 0.9,
        keep: int = 1,
        seed: int = 0,
        layout: str = "auto",
        sigma_start: float | None = None,
        sigma_stop: float | None = None,
        adaptive: float = 0.0,
        rescale: float = 0.0,
        projection: Projection | None = None,
        reuse_prefix: bool | str = "auto",
    ) -> None:
        super().__init__(
            "L0",
            1.0,
            scale,
            target="skip",
            start=start,
            stop=stop,
            sigma_start=sigma_start,
            sigma_stop=sigma_stop,
            adaptive=adaptive,
            rescale=rescale,
            projection=projection,
            layout=layout,
            reuse_prefix=reuse_prefix,
        )
        self.ratio = check_weight("ratio", ratio)
        if self.ratio == 0:
            raise GenAttnError("ratio must be above 0, got 0: nothing would be left out; use 0.1")
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
            raise GenAttnError(f"keep must be a whole number >= 0, got {keep!r}; 1 keeps the first block")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise GenAttnError(f"seed must be a whole number, got {seed!r}")
        self.keep, self.seed = keep, seed
        self._chosen: WeakKeyDictionary[nn.Module, TappedModel] = WeakKeyDictionary()

    def settings(self) -> dict[str, Any]:
        """See Plugin.settings."""
        names = ("scale", "start", "stop", "sigma_start", "sigma_stop", "adaptive", "rescale", "projection", "layout")
        base = super().settings()
        own = {"ratio": self.ratio, "keep": self.keep, "seed": self.seed, "reuse_prefix": self.reuse_prefix}
        return {**own, **{name: base[name] for name in names}}

    def _weights(self, layers: dict[int, int], model: str) -> dict[int, torch.Tensor]:
        """Every layer that may be left out."""
        candidates = sorted(layers)[self.keep :]
        if not candidates:
            raise GenAttnError(f"keep must leave blocks to drop, got keep={self.keep} for {len(layers)} blocks of {model}")
        return {layer: torch.ones(1, layers[layer]) for layer in candidates}

    def model(self, model: nn.Module | None) -> TappedModel:
        """What is known of a denoiser; during a guided forward, with the layers of its step."""
        found = self._chosen.get(model) if model is not None else None
        return found if found is not None else super().model(model)

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Denoise) -> Any:
        """The pipeline's forward, with the step's delta added."""
        whole = super().model(run.model)
        layers = drawn_layers(list(whole.rows), self.ratio, self.seed, run.step)
        assert run.model is not None
        chosen = replace(whole, rows={layer: whole.rows[layer] for layer in layers}, mixes={})
        self._chosen[run.model] = chosen
        try:
            return super().forward(run, args, kwargs, inner)
        finally:
            del self._chosen[run.model]

    def describe(self) -> dict[str, Any]:
        """Settings and what happened so far, JSON-ready."""
        told = {"plugin": "S2Guidance", "ratio": self.ratio, "keep": self.keep, "seed": self.seed}
        return {**super().describe(), **told}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "S2Guidance":
        """See Plugin.from_settings."""
        found = super().from_settings(settings)
        assert isinstance(found, S2Guidance)
        return found
