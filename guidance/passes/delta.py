"""What guidance adds to a prediction: when it acts, how strongly, and how the difference is tamed.

    delta = w(t) (clean - perturbed)          arXiv 2506.10978, eq. 5, without the leading term

`Window` says at which steps. The weight decays over the run if asked (`adaptive`, as the pag_adaptive_scale of
diffusers). The difference can be projected and capped before it is added (APG, arXiv 2410.02416), and the guided
prediction be given the spread of the clean one (`rescale`, arXiv 2305.08891, section 3.4); both stay additive.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from genattn.errors import GenAttnError
from genattn.guidance.heads.names import check_weight
from genattn.guidance.passes.made import Place
from genattn.seam.plugin import Run
from genattn.settings import number, refuse


@dataclass(frozen=True)
class Window:
    """The steps at which guidance acts, both ends included.

    Attributes:
        start: from this fraction of the steps on, in [0, 1]; the first step is at 0.
        stop: up to this fraction, in [start, 1].
        sigma_start: from this noise level down, None for no bound.
        sigma_stop: down to this noise level, None for no bound.
    """

    start: float = 0.0
    stop: float = 1.0
    sigma_start: float | None = None
    sigma_stop: float | None = None

    def __post_init__(self) -> None:
        check_weight("start", self.start)
        check_weight("stop", self.stop, self.start)
        for name in ("sigma_start", "sigma_stop"):
            if getattr(self, name) is not None:
                check_weight(name, getattr(self, name), 0.0, math.inf)
        if self.sigma_start is not None and self.sigma_stop is not None and self.sigma_stop > self.sigma_start:
            raise GenAttnError(
                f"sigma_stop must not be above sigma_start, got {self.sigma_stop} and {self.sigma_start}; noise falls"
            )

    @property
    def always(self) -> bool:
        """Whether every step lies inside."""
        return self.start == 0.0 and self.stop == 1.0 and self.sigma_start is None and self.sigma_stop is None

    def contains(self, run: Run) -> bool:
        """Whether the step of a denoiser forward lies inside.

        Raises:
            GenAttnError: if the window has bounds that this run does not tell.
        """
        if (self.start, self.stop) != (0.0, 1.0):
            fraction = run.fraction
            if fraction is None:
                raise GenAttnError(
                    f"start and stop need the number of steps, got none while the window is {self.describe()}; "
                    "apply to the pipeline instead of the model, or pass num_steps in the options"
                )
            # steps are counted from 0 to n - 1, so a stop of 0.5 in 10 steps keeps steps 0 to 5
            if not self.start - 1e-9 <= fraction <= self.stop + 1e-9:
                return False
        if self.sigma_start is None and self.sigma_stop is None:
            return True
        if run.sigma is None:
            raise GenAttnError(
                f"a noise window needs the noise level, got none while the window is {self.describe()}; "
                "apply to the pipeline instead of the model, or use start and stop"
            )
        low = -math.inf if self.sigma_stop is None else self.sigma_stop
        high = math.inf if self.sigma_start is None else self.sigma_start
        return low <= run.sigma <= high

    def settings(self) -> dict[str, float | None]:
        """The bounds by name, as plugins take them."""
        return asdict(self)

    def steps(self, num_steps: int) -> list[int]:
        """The steps of a run of `num_steps` that the fractions let through."""
        return [s for s in range(num_steps) if self.start - 1e-9 <= s / num_steps <= self.stop + 1e-9]

    def why_idle(self, run: Run) -> str:
        """Why no step of the run that starts with `run` lies inside; empty where one does, or where nobody can tell yet."""
        if run.num_steps is None:
            return ""
        found = [replace(run, step=step) for step in self.steps(run.num_steps)]
        if run.sigmas:
            found = [at for at in found if self.contains(replace(at, sigma=run.sigmas[at.step]))]
        return "" if found else f"its window is {self.describe()}; widen it or take more steps"

    def describe(self) -> str:
        """One line for reports."""
        parts = [f"steps {self.start:g} to {self.stop:g} of the run"]
        if self.sigma_start is not None or self.sigma_stop is not None:
            parts.append(f"sigma {self.sigma_start or 'any'} down to {self.sigma_stop or 0}")
        return " and ".join(parts)


@dataclass(frozen=True)
class Projection:
    """APG's way with a difference: momentum, a cap on its norm, and less of what is parallel to the prediction.

    Attributes:
        eta: share of the parallel part that is kept, in [0, 1].
        norm_cap: largest L2 norm per sample, 0 for none.
        momentum: weight of the running sum of earlier steps, negative to dampen; 0 for none.
    """

    eta: float = 0.0
    norm_cap: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_weight("eta", self.eta)
        check_weight("norm_cap", self.norm_cap, 0.0, sys.float_info.max)
        check_weight("momentum", self.momentum, -1.0, 1.0)

    def apply(
        self, difference: torch.Tensor, prediction: torch.Tensor, previous: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tamed difference, and the running sum to hand in at the next step.

        Args:
            difference: clean - perturbed, [B, ...].
            prediction: clean, the same shape.
            previous: running sum of the step before, None at the first.
        """
        total = difference.double()
        if self.momentum and previous is not None:
            total = total + self.momentum * previous
        kept = total if self.momentum else None
        dims = tuple(range(1, difference.ndim))
        if self.norm_cap:
            norm = torch.linalg.vector_norm(total, dim=dims, keepdim=True)
            total = total * (self.norm_cap / norm.clamp(min=self.norm_cap))
        direction = prediction.double()
        direction = direction / torch.linalg.vector_norm(direction, dim=dims, keepdim=True).clamp(min=1e-12)
        parallel = (total * direction).sum(dims, keepdim=True) * direction
        return (total - (1 - self.eta) * parallel).to(difference.dtype), kept


def projection_from(settings: Mapping[str, Any]) -> Projection:
    """A projection from its settings by name; raises GenAttnError for others."""
    known = [f.name for f in fields(Projection)]
    if set(settings) - set(known):
        raise GenAttnError(f"a projection has {', '.join(known)}, got {sorted(settings)}; drop the others")
    return Projection(**settings)


@dataclass(frozen=True)
class DeltaRule:
    """From the clean and the perturbed prediction to what is added.

    Attributes:
        scale: weight w, any finite number; negative steers towards the perturbed model.
        adaptive: how fast the weight falls over the run: w max(0, 1 - adaptive * fraction); 0 for constant. The
            pag_adaptive_scale a of diffusers is adaptive = 1000 a / w.
        rescale: how far the guided prediction is given the clean one's standard deviation, in [0, 1].
        projection: APG, None for the plain difference.
    """

    scale: float = 3.0
    adaptive: float = 0.0
    rescale: float = 0.0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        most = sys.float_info.max
        number("scale", self.scale, -most, most, "a finite number; the usual range is 1 to 8")
        check_weight("adaptive", self.adaptive, 0.0, most)
        check_weight("rescale", self.rescale)
        if self.projection is not None and not isinstance(self.projection, Projection):
            raise refuse("projection", self.projection, "a Projection or None; e.g. Projection(eta=0.0)")

    @property
    def measures(self) -> bool:
        """Whether what is added depends on norms or spreads of whole predictions."""
        return bool(self.rescale) or self.projection is not None

    def weight(self, run: Run) -> float:
        """The weight at a step; raises GenAttnError if it decays and the run does not tell its length."""
        if not self.adaptive:
            return self.scale
        if run.fraction is None:
            raise GenAttnError(
                f"an adaptive scale needs the number of steps, got adaptive={self.adaptive:g} and none; "
                "apply to the pipeline instead of the model, or pass num_steps in the options"
            )
        return self.scale * max(0.0, 1.0 - self.adaptive * run.fraction)

    def delta(
        self,
        clean: torch.Tensor,
        perturbed: torch.Tensor,
        weight: float,
        previous: torch.Tensor | None = None,
        place: Place | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What to add to every prediction of the step, and APG's running sum for the next.

        Args:
            clean: [B, ...].
            perturbed: the same shape.
            weight: from `weight`.
            previous: running sum of the step before.
            place: the part that the pipeline steps with, see `made_part`; nothing is added to the rest.
        """
        if place is not None:
            axis, rows = place[0], place[1].to(clean.device)
            mine, theirs = clean.index_select(axis, rows), perturbed.index_select(axis, rows)
            some, kept = self.delta(mine, theirs, weight, previous)
            return torch.zeros_like(clean).index_copy(axis, rows, some), kept
        difference, kept = clean - perturbed, None
        if self.projection is not None:
            difference, kept = self.projection.apply(difference, clean, previous)
        delta = weight * difference
        if self.rescale:
            guided = clean + delta
            dims = tuple(range(1, clean.ndim))
            spread = clean.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=1e-12)
            delta = self.rescale * guided * spread + (1 - self.rescale) * guided - clean
        return delta, kept
