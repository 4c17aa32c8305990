"""TAG as a plugin: every answer of the denoiser with its tangential part amplified (arXiv 2510.04533).

The amplification is linear in the prediction and the same for all answers of a step, so whatever the pipeline combines with
coefficients that are the same for all of its entries (CFG, true CFG, SoftPAG's delta) hands it on unchanged: no role of a
pass has to be known, and nothing runs twice.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.guidance.passes.delta import Window
from genattn.guidance.passes.made import made_part
from genattn.guidance.passes.prediction import batch_of, leaves, with_leaves
from genattn.guidance.tag.tangential import amplified
from genattn.seam.plugin import Plugin, Run


class TAG(Plugin):
    """Tangential amplifying guidance on any denoiser.

    Args:
        eta: factor of the tangential part, >= 0 and finite; 1 changes nothing, the paper uses 1.05 to 1.25.
        start: first moment, fraction of the steps in [0, 1].
        stop: last moment, included.
    """

    option_names: ClassVar[frozenset[str]] = frozenset(("tag_eta",))

    def __init__(self, eta: float = 1.15, start: float = 0.0, stop: float = 1.0) -> None:
        self.eta, self.window = _checked(eta), Window(start, stop)
        self.count = 0

    def attach(self, model: nn.Module, sites: Any) -> None:
        """Any denoiser will do; its answers are looked at when they come."""

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise GenAttnError for a factor out of range."""
        if "tag_eta" in options:
            _checked(options["tag_eta"])

    def why_idle(self, run: Run) -> str:
        """See Plugin.why_idle."""
        return self.window.why_idle(run)

    def forward(self, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], inner: Any) -> Any:
        """The pipeline's forward, its predictions amplified."""
        out = inner(*args, **kwargs)
        eta = _checked(run.options_of(self).get("tag_eta", self.eta))
        if eta == 1 or not self.window.contains(run):
            return out
        found = leaves(out)
        bases: list[Any] = [batch_of(args, kwargs)[0], kwargs.get("audio_hidden_states")][: len(found)]
        if len(bases) < len(found) or any(base is None for base in bases):
            raise GenAttnError(
                f"TAG needs latents for every prediction, got {len(found)} predictions of {type(run.model).__name__} and "
                f"{sum(base is not None for base in bases)} inputs that could be theirs"
            )
        self.count += 1
        pairs = enumerate(zip(found, bases, strict=True))
        return with_leaves(out, [amplified(p, x, eta, made_part(run, p, kwargs, number)) for number, (p, x) in pairs])

    def settings(self) -> dict[str, Any]:
        """See Plugin.settings."""
        return {"eta": self.eta, "start": self.window.start, "stop": self.window.stop}

    def describe(self) -> dict[str, Any]:
        """Settings and what happened so far, JSON-ready."""
        return {"plugin": "TAG", "eta": self.eta, "window": self.window.describe(), "amplified_forwards": self.count}


def _checked(eta: Any) -> float:
    number = isinstance(eta, int | float) and not isinstance(eta, bool)
    if not number or not torch.isfinite(torch.tensor(float(eta))) or eta < 0:
        raise GenAttnError(f"eta must be a finite number >= 0, got {eta!r}; the usual range is 1.05 to 1.25")
    return float(eta)
