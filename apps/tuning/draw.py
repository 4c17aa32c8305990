"""The picture of a tuning run: speed against nearness of all that was tried, the front, the goal and the choice.

matplotlib is imported when a figure is drawn, never on import.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from genattn.apps.tuning.goal import Goal, Row, front
from genattn.errors import GenAttnError
from genattn.whole_file import save_figure

# Okabe and Ito's colours, told apart by every eye; the marks tell them apart in grey
_LOOKS = {
    "window": ("#0072B2", "s"),
    "gna": ("#56B4E9", "D"),
    "radial": ("#E69F00", "^"),
    "adaptive": ("#CC79A7", "v"),
    "profiled": ("#009E73", "o"),
}
_TOP_DB = 60.0  # equal to dense, or as good as


def draw_front(rows: Sequence[Row], chosen: Row | None, goal: Goal, path: Path) -> None:
    """Write the picture. Raises GenAttnError without matplotlib, or when there is nothing to draw."""
    if not rows:
        raise GenAttnError("there is nothing to draw: no setting was measured")
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for family, (colour, mark) in _LOOKS.items():
        own = [row for row in rows if row.name.split(" ")[0] == family]
        for started in (False, True):
            part = [row for row in own if row.name.endswith("dense start") == started]
            axes.scatter(
                [row.speedup for row in part],
                [_shown(row) for row in part],
                marker=mark,
                s=38,
                edgecolors=colour,
                facecolors="none" if started else colour,
                label=family if part and not started else None,
            )
    best = front(rows)
    axes.plot([row.speedup for row in best], [_shown(row) for row in best], color="0.6", linewidth=1, zorder=0, label="front")
    for row in best:
        axes.annotate(row.name, (row.speedup, _shown(row)), xytext=(5, 4), textcoords="offset points", fontsize=7)
    if chosen is not None:
        axes.scatter([chosen.speedup], [_shown(chosen)], s=190, facecolors="none", edgecolors="black", label="chosen")
    axes.axvline(goal.budget or 1, color="0.5", linestyle=":" if goal.budget is None else "--", linewidth=1)
    if goal.min_psnr is not None:
        axes.axhline(goal.min_psnr, color="0.5", linestyle="--", linewidth=1)
    axes.set(xlabel="times as fast as dense, whole call", ylabel="PSNR against dense, dB", title=f"wanted: {goal}")
    axes.margins(x=0.14, y=0.08)
    axes.legend(fontsize=8, title="hollow: dense start", title_fontsize=7)
    save_figure(figure, path, 110)


def need_matplotlib() -> None:
    """Raise GenAttnError without it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise GenAttnError("the picture of a tuning run needs matplotlib; pip install 'genattn[plots]'") from None


def _shown(row: Row) -> float:
    return _TOP_DB if math.isinf(row.psnr) else min(row.psnr, _TOP_DB)
