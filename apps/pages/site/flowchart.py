"""Mermaid flow charts as pictures of the site: a forge draws them itself, a site would have to load a program from elsewhere.

Only what `apps/pages/rooms.py` writes is understood: subgraphs of `id[label]`, arrows `a --> b`, and one class of dashed nodes.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError

_BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_HALF_WIDTH = 0.06  # of a node, as a share of the picture
_CAPTION = "Arrows lead down, from a room that imports to one that is imported; they run behind rooms that they do not mean"


@dataclass
class Chart:
    """groups: label -> its nodes' ids, the upper ones first. labels: id -> words. arrows: (from, to). dashed: ids."""

    groups: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    arrows: list[tuple[str, str]] = field(default_factory=list)
    dashed: set[str] = field(default_factory=set)


def read(text: str) -> Chart:
    """A flow chart from Mermaid's lines. Raises GenAttnError for a line of another kind."""
    chart, group = Chart(), ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if opened := re.fullmatch(r"subgraph \w+ \[(.+)\]", line):
            group = opened[1]
            chart.groups[group] = []
        elif node := re.fullmatch(r"(\w+)\[(.+)\]", line):
            chart.groups[group].append(node[1])
            chart.labels[node[1]] = node[2]
        elif arrow := re.fullmatch(r"(\w+) --> (\w+)", line):
            chart.arrows.append((arrow[1], arrow[2]))
        elif dashed := re.fullmatch(r"class ([\w,]+) \w+", line):
            chart.dashed |= set(dashed[1].split(","))
        elif line not in ("flowchart TB", "end") and not line.startswith("classDef "):
            raise GenAttnError(f"a flow chart of the site has groups, nodes and arrows, got {line!r}; draw it otherwise")
    return chart


def places(chart: Chart, tries: int = 400) -> dict[str, tuple[float, float]]:
    """Where each node stands: groups below each other, in a group what imports above what it imports; y grows upwards.

    Of `tries` drawn shifts of the rows, the one whose arrows run behind the fewest nodes that they do not mean.
    """
    return min((_rows(chart, random.Random(seed)) for seed in range(tries)), key=lambda at: _hidden(chart, at))


def _rows(chart: Chart, drawn: random.Random) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    below = 0.0
    for nodes in reversed(chart.groups.values()):
        inside = {node: [to for start, to in chart.arrows if start == node and to in nodes] for node in nodes}
        level: dict[str, int] = {}
        for node in nodes:
            _height(node, inside, level)
        for height in range(max(level.values(), default=0) + 1):
            row = sorted((n for n in nodes if level[n] == height), key=_over(chart, found))
            shift = drawn.uniform(0.25, 0.75)
            found |= {node: ((i + shift) / len(row), below + height) for i, node in enumerate(row)}
        below += max(level.values(), default=0) + 1.6
    return found


def _hidden(chart: Chart, at: Mapping[str, tuple[float, float]]) -> int:
    """Number of nodes that arrows of others run behind."""
    count = 0
    for start, to in chart.arrows:
        (x, y), (far, low) = at[start], at[to]
        between = [(left, level) for left, level in at.values() if low < level < y]
        count += sum(abs(x + (far - x) * (y - level) / (y - low) - left) < _HALF_WIDTH for left, level in between)
    return count


def _height(node: str, inside: Mapping[str, list[str]], level: dict[str, int]) -> int:
    """Longest chain of arrows down from a node, written into `level`."""
    if node not in level:
        level[node] = max((1 + _height(to, inside, level) for to in inside[node]), default=0)
    return level[node]


def _over(chart: Chart, found: Mapping[str, tuple[float, float]]) -> Callable[[str], float]:
    """A key that puts a node above the middle of what it points at, as far as that stands already."""

    def middle(node: str) -> float:
        under = [found[to][0] for start, to in chart.arrows if start == node and to in found]
        return sum(under) / len(under) if under else 0.5

    return middle


def draw(chart: Chart, path: Path) -> None:
    """Write the chart as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    at = places(chart)
    top = max(y for _, y in at.values())
    figure = Figure(figsize=(9.5, 0.52 * (top + 1.5)))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(-0.08, 1), ylim=(-0.7, top + 0.7))
    axes.axis("off")
    for label, nodes in chart.groups.items():
        low, high = min(at[n][1] for n in nodes), max(at[n][1] for n in nodes)
        axes.axhspan(low - 0.6, high + 0.6, color="#eef2f7", zorder=0)
        axes.text(-0.07, (low + high) / 2, label, weight="bold", va="center")
    for start, to in chart.arrows:
        _arrow(axes, at[start], at[to])
    for node, (x, y) in at.items():
        style = {"boxstyle": "round,pad=0.3", "fc": "white", "ec": "#475569", "ls": "--" if node in chart.dashed else "-"}
        axes.text(x, y, chart.labels[node], ha="center", va="center", fontsize=8, bbox=style, zorder=3)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "genattn", "font.family": "sans-serif"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _arrow(axes: Any, start: tuple[float, float], to: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": "#64748b", "alpha": 0.55, "lw": 0.8, "shrinkA": 8, "shrinkB": 8}
    axes.annotate("", xy=to, xytext=start, arrowprops=style, zorder=1)


def as_pictures(text: str, page: str, pictures: Path) -> str:
    """A page's text with each chart as a picture, which is written into the folder `pictures`."""

    def one(match: re.Match[str]) -> str:
        name = f"{page}-{match.start()}.svg"
        draw(read(match[1]), pictures / name)
        return f"![{_CAPTION}]({pictures.name}/{name})"

    return _BLOCK.sub(one, text)
