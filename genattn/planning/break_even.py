"""From how many tokens on a sparse call is no slower than a dense one, by device, backend and share of the scores.

    CPU    measured by `python -m genattn.apps.laboratory.break_even`, rows in assets/bench/break_even.csv
    GPU    by the cost model below, not measured: what a sparse call adds is a fixed time, what it saves grows with S^2

A sparse call adds the launch of its kernel on gathered tiles and, where tiles are chosen by content, the choice. With H heads
of D channels and a share d of the scores it saves 4 S^2 H D (1 - d) / peak, so that S = sqrt(added peak / (4 H D (1 - d))).
"""

import math
from dataclasses import dataclass

from genattn.errors import GenAttnError

# (device, backend) -> (share of the scores, tokens), measured; the smallest length from which all longer ones were faster too
MEASURED: dict[tuple[str, str], tuple[tuple[float, int], ...]] = {
    ("cpu", "cpu"): ((0.25, 256), (0.5, 256), (0.75, 512)),
    ("cpu", "grouped"): ((0.25, 2048), (0.5, 8192), (0.75, 16384)),
}
# the same for the pattern behind "adaptive", its choice in every call included
MEASURED_CHOICE: dict[tuple[str, str], int] = {("cpu", "cpu"): 2048, ("cpu", "grouped"): 8192}
ADDED_SECONDS = {"cuda": 1.2e-4, "xpu": 2e-4, "mps": 4e-4}
PEAK = {"cuda": 3.5e14, "xpu": 1e14, "mps": 1e13}


@dataclass(frozen=True)
class BreakEven:
    """tokens: from here on sparse. source: where the number comes from."""

    tokens: int
    source: str


def break_even(
    device: str, backend: str, density: float, heads: int = 12, head_dim: int = 128, chooses: bool = False
) -> BreakEven:
    """The least sequence length worth a sparse call.

    device: a torch device type. backend: "cpu" (compiled), "grouped", "triton", ... density: share of the scores in (0, 1].
    chooses: whether tiles are chosen in every call, as by the pattern behind "adaptive"; where that was not measured the length
    is doubled.

    Raises GenAttnError for a density outside that.
    """
    if not 0 < density <= 1:
        raise GenAttnError(f"density must be a share of the scores in (0, 1], got {density}")
    if density > 0.95:
        return BreakEven(1 << 62, "a pattern that computes nearly all scores saves nothing")
    known = MEASURED.get((device, backend))
    if known is not None and chooses and (device, backend) in MEASURED_CHOICE:
        return BreakEven(MEASURED_CHOICE[device, backend], f"measured with the choice on {device}, backend {backend}")
    if known is not None:
        least = next((n for share, n in known if density <= share), 2 * known[-1][1])
        return BreakEven(least, f"measured on {device}, backend {backend}")
    added, peak = ADDED_SECONDS.get(device, 2e-4), PEAK.get(device, 1e14)
    tokens = math.sqrt(added * peak / (4 * heads * head_dim * (1 - density))) * (2 if chooses else 1)
    return BreakEven(-(-math.ceil(tokens) // 64) * 64, f"cost model for {device}, not measured")
