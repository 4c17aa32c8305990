"""Normalized attention guidance of one attention output (arXiv 2505.21179, section 4, and the authors' released code).

    Z~ = s Z+ - (s - 1) Z-            away from what the negative text brings
    r  = |Z~|_1 / |Z+|_1              per token, over the channels of all heads
    Z^ = Z~ min(r, tau) / r           never more than tau times as large
    Z  = a Z^ + (1 - a) Z+

`guide` is what runs; `guide_reference` is the same in float64, channel by channel joined as the formula says.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from genattn.guidance.heads.names import check_weight
from genattn.settings import number

Total = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Strength:
    """How strongly NAG pushes.

    Attributes:
        scale: s, at least 1; 1 changes nothing.
        tau: the most by which a token's L1 norm may grow, at least 1.
        alpha: share of the guided output, in [0, 1]; 0 changes nothing.
    """

    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        for name in ("scale", "tau"):
            what = "a finite number of at least 1; usual are 3 to 11 and 2.5"
            number(name, getattr(self, name), 1.0, sys.float_info.max, what)
        check_weight("alpha", self.alpha)

    @property
    def is_off(self) -> bool:
        """Whether the formula gives Z+ back."""
        return self.scale == 1 or self.alpha == 0


def guide(positive: torch.Tensor, negative: torch.Tensor, strength: Strength, total: Total | None = None) -> torch.Tensor:
    """Z of the formula.

    Args:
        positive: Z+, [B, S, H, D], floating point.
        negative: Z-, the same shape.
        strength: s, tau and alpha.
        total: sums the norms [B, S, 1, 1] over the processes that share the heads; None when all heads are here.

    Returns:
        The same shape and dtype, computed in at least float32.
    """
    wide = torch.promote_types(positive.dtype, torch.float32)
    kept, pushed = positive.to(wide), negative.to(wide)
    pushed = torch.lerp(pushed, kept, strength.scale)
    size, limit = (t.abs().sum((2, 3), keepdim=True) for t in (pushed, kept))
    if total is not None:
        size, limit = total(size), total(limit)
    limit = strength.tau * limit
    # where nothing is over the limit the quotient may be 0 / 0
    factor = torch.where(size > limit, limit / size, torch.ones_like(size))
    return torch.lerp(kept, pushed * factor, strength.alpha).to(positive.dtype)


def guide_reference(positive: torch.Tensor, negative: torch.Tensor, strength: Strength) -> torch.Tensor:
    """The definition, float64, one token at a time: [B, S, H, D] in and out."""
    answer = torch.zeros_like(positive, dtype=torch.float64)
    for sample in range(positive.shape[0]):
        for token in range(positive.shape[1]):
            plus, minus = positive[sample, token].double(), negative[sample, token].double()
            pushed = strength.scale * plus - (strength.scale - 1) * minus
            norm, before = float(pushed.abs().sum()), float(plus.abs().sum())
            if norm > 0 and before > 0:
                ratio = norm / before
                pushed = pushed * min(ratio, strength.tau) / ratio
            elif before == 0:
                pushed = torch.zeros_like(pushed)
            answer[sample, token] = strength.alpha * pushed + (1 - strength.alpha) * plus
    return answer
