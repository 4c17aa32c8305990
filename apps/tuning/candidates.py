"""What `genattn tune` tries: the ladder of patterns at a few shares of the scores, each with the tail that measured best.

    window     whole frames around the query's own            gna        windows of whole tiles
    radial     the model's preset, and sparser ones            adaptive   clusters of like tokens, chosen in every call
    profiled   a map of this model, made first

First everything sparse in every step and layer; what survives is tried again with its first steps and first layer dense.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from genattn.apps.sampling.run import AttentionSettings
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.profiled import ProfiledPattern
from genattn.patterns.radial import RadialPattern
from genattn.planning.fitted import FittedNeighborhood
from genattn.planning.ladder import ADAPTIVE, Model, rung
from genattn.selection.rules import TopK

FAMILIES = ("window", "gna", "radial", "adaptive", "profiled")
DENSITIES = (0.15, 0.25, 0.4, 0.6)
DENSE_START = (0.25, 1)  # a quarter of the steps and one layer, as the published settings have it
_SPARSER_RADIAL = ((0.2, 0), (0.1, 0))  # decay, floor


@dataclass(frozen=True)
class Ground:
    """Where the candidates will run: the denoiser, its token grid (frames, height, width), and the map where there is one."""

    model: Model
    grid: tuple[int, int, int]
    profile_map: Path | None = None


def candidates(
    ground: Ground, families: Sequence[str] = FAMILIES, densities: Sequence[float] = DENSITIES
) -> list[AttentionSettings]:
    """One setting per distinct pattern, sparse in every step and layer.

    families: of FAMILIES. densities: shares of the scores in (0, 1), as near as a pattern comes to them.

    Raises GenAttnError for an unknown family, or when nothing is left to try.
    """
    check_wanted(families, densities)
    found: dict[Pattern, AttentionSettings] = {}
    for family in families:
        for name, pattern in _MAKERS[family](ground, densities):
            found.setdefault(pattern, AttentionSettings(name, pattern, 0, 0))
    if not found:
        raise GenAttnError(f"{', '.join(families)} have nothing to try on a grid of {ground.grid}; name other families")
    return list(found.values())


def check_wanted(families: Sequence[str], densities: Sequence[float]) -> None:
    """Raise GenAttnError for an unknown family, for a share that is none, or for an empty list of either."""
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown or not families:
        raise GenAttnError(f"--try must be among {', '.join(FAMILIES)}, got {', '.join(unknown) or 'none'}")
    wrong = [share for share in densities if not 0 < share < 1]
    if wrong or not densities:
        raise GenAttnError(f"--densities must be shares of the scores in (0, 1), got {wrong or 'none'}")


def with_dense_start(setting: AttentionSettings) -> AttentionSettings:
    """The same pattern with the first steps and the first layer dense."""
    steps, layers = DENSE_START
    return replace(setting, name=f"{setting.name}, dense start", dense_steps=steps, dense_layers=layers)


Made = list[tuple[str, Pattern]]


def _window(ground: Ground, densities: Sequence[float]) -> Made:
    """Whole frames: as many as make the share. A picture has one."""
    frames = ground.grid[0]
    spans = sorted({max(1, round(share * frames)) for share in densities})
    return [(f"window {span} of {frames} frames", NeighborhoodPattern((span, -1, -1))) for span in spans if span < frames]


def _gna(ground: Ground, densities: Sequence[float]) -> Made:
    layout = TokenLayout.from_grid(ground.grid if ground.grid[0] > 1 else ground.grid[1:])
    windows: dict[Pattern, tuple[str, Pattern]] = {}
    for share in sorted(densities):
        pattern = FittedNeighborhood(share)
        sizes = pattern.at(layout).window_size
        if not isinstance(sizes, int) and min(sizes) != -1:  # what is left where no window of whole tiles fits
            windows.setdefault(pattern.at(layout), (f"gna {share:g}", pattern))
    return list(windows.values())


def _radial(ground: Ground, densities: Sequence[float]) -> Made:
    """Reach over frames: nothing for a picture."""
    if ground.grid[0] == 1:
        return []
    sparser = [(f"radial {decay:g}", RadialPattern(decay=decay, floor=floor)) for decay, floor in _SPARSER_RADIAL]
    return [("radial", rung("radial", ground.model).pattern), *sparser]


def _adaptive(ground: Ground, densities: Sequence[float]) -> Made:
    """Clusters at about two thirds of the share: a cluster of keys is visited by all tiles that have a query in it."""
    shares = sorted({round(share * 2 / 3, 2) for share in densities})
    return [(f"adaptive {share:g}", replace(ADAPTIVE, selection=TopK(share))) for share in shares]


def _profiled(ground: Ground, densities: Sequence[float]) -> Made:
    if ground.profile_map is None:
        return []
    path = str(ground.profile_map)
    return [
        (f"profiled {share:g} + {tail}", ProfiledPattern(path, density=share, tail=tail))
        for share in sorted(densities)
        for tail in ("mean", "mean2")
    ]  # type: ignore[arg-type]


_MAKERS: dict[str, Callable[[Ground, Sequence[float]], Made]] = {
    "window": _window,
    "gna": _gna,
    "radial": _radial,
    "adaptive": _adaptive,
    "profiled": _profiled,
}
