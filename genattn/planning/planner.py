"""Which settings reach a density, how fast they should be, and which sizes suit the model.

    plan_settings("wan-14b", size=(720, 1280), frames=81, target_density=0.25)

Radial settings are found by halving the interval of the decay; neighborhood settings are built from whole tiles (window n t,
stride m t, n - m even), which need no mask. Speed is predicted from work: tile pairs with their unused lanes, a quarter more
for masked pairs, and Amdahl over the rest of the model's arithmetic and the dense steps and layers. On an H100 that ratio of
arithmetic agrees with measured time within a few per cent (Radial paper: Wan 1.73 by arithmetic, 1.77 by the clock).
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from genattn.errors import GenAttnError
from genattn.geometry.tile_choice import MASK_COST
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.planning.model_preset import ModelPreset
from genattn.planning.presets import preset
from genattn.planning.simulate import Simulation, end_to_end, simulate, simulate_pattern


@dataclass(frozen=True)
class Setting:
    """One proposal. attention_speedup: of one sparse call; run_speedup: of a whole run; pflops: of that run.

    published: where the setting comes from, empty for what the planner made up from geometry.
    """

    pattern: Pattern
    label: str
    density: float
    mask_free: float
    attention_speedup: float
    run_speedup: float
    pflops: float
    published: str = ""


@dataclass(frozen=True)
class LegalSize:
    """A size the model can take. fill: used share of frame-aligned tiles; official: whether the released code can run it."""

    size: tuple[int, int]
    frames: int
    grid: tuple[int, int, int]
    tokens: int
    fill: float
    official: bool


@dataclass(frozen=True)
class Planning:
    """Everything `plan_settings` found: dense cost, settings (published ones in the preset's order, then others, fastest
    first), nearby sizes (nearest first)."""

    model: str
    size: tuple[int, int]
    frames: int
    layout: TokenLayout
    steps: int
    dense_steps: int
    dense_layers: int
    attention_share: float
    dense_pflops: float
    settings: tuple[Setting, ...]
    nearby: tuple[LegalSize, ...]


def plan_settings(
    model: str,
    size: Sequence[int] | None = None,
    frames: int | None = None,
    target_density: float = 0.25,
    dense_steps: float = 0.25,
    dense_layers: int = 1,
    steps: int | None = None,
    block: int = 128,
) -> Planning:
    """The model's published settings, then others near `target_density` (share of scores in a sparse call), fastest first.

    model: a preset's name or a local pipeline folder. size: (height, width) pixels. dense_steps: share of the run in [0, 1].
    Raises GenAttnError for sizes the model cannot take (with the nearest) and for a target outside (0, 1].
    """
    if not 0 < target_density <= 1:
        raise GenAttnError(f"target_density must be in (0, 1], got {target_density}; 0.25 is a usual start")
    if not 0 <= dense_steps <= 1:
        raise GenAttnError(f"dense_steps must be a share of the steps in [0, 1], got {dense_steps:g}; 0.25 is a usual start")
    if dense_layers < 0:
        raise GenAttnError(f"dense_layers must be >= 0, got {dense_layers}; 1 is a usual start")
    if steps is not None and steps < 1:
        raise GenAttnError(f"steps must be >= 1, got {steps}; leave it out for the model's own")
    known = preset(model)
    height, width = size or known.size
    count = known.frames if frames is None else frames
    layout, steps = known.layout((height, width), count), steps or known.steps
    found = [*_radial(layout, target_density, block), *_neighborhood(layout, target_density, block)]
    run = _Run(known, layout, steps, math.ceil(dense_steps * steps), min(dense_layers, known.layers))
    made = sorted((run.setting(*option) for option in found), key=lambda s: -s.run_speedup)
    settings = [*_published(run, block), *made]
    attention, rest = known.flops(layout)
    return Planning(
        known.name,
        (height, width),
        count,
        layout,
        steps,
        run.dense_steps,
        run.dense_layers,
        attention / (attention + rest),
        (attention + rest) * steps * known.passes / 1e15,
        tuple(settings),
        tuple(nearby_sizes(known, (height, width), count, block)),
    )


@dataclass(frozen=True)
class _Run:
    model: ModelPreset
    layout: TokenLayout
    steps: int
    dense_steps: int
    dense_layers: int

    def setting(self, pattern: Pattern, label: str, cost: Simulation) -> Setting:
        attention, rest = self.model.flops(self.layout)
        sparse = (1 - self.dense_steps / self.steps) * (1 - self.dense_layers / self.model.layers)
        faster = cost.total_work / (1 + MASK_COST * (1 - cost.mask_free))
        share = attention / (attention + rest) * sparse
        flops = (rest + attention * (1 - sparse + sparse * cost.density)) * self.steps * self.model.passes
        return Setting(pattern, label, cost.density, cost.mask_free, faster, end_to_end(faster, share), flops / 1e15)


def _published(run: _Run, block: int) -> list[Setting]:
    """What the preset holds, in its order (ours, then released scripts and papers); windows that do not fit are left out."""
    options: list[tuple[Pattern, str, str]] = [(p.pattern, f"radial {p.pattern.variant}", p.source) for p in run.model.radial]
    options += [(p, f"neighborhood {p.window_size} stride {p.stride}", source) for p, source in run.model.neighborhood]
    found = []
    for pattern, label, source in options:
        try:
            cost = simulate_pattern(pattern, run.layout, block, block)
        except GenAttnError:  # a window larger than this grid, or a length that the released code cannot cut
            continue
        found.append(replace(run.setting(pattern, label, cost), published=source))
    return found


def _radial(layout: TokenLayout, target: float, block: int) -> Iterator[tuple[Pattern, str, Simulation]]:
    """For strips and boxes the decay whose density is nearest to the target; without a floor only where one is out of reach."""
    if layout.grid3[0] < 3:
        return
    for window in ("strip", "box"):
        found = [_nearest_decay(layout, target, block, RadialPattern(window=window))]  # type: ignore[arg-type]
        if found[0][1].density > 1.1 * target:
            found.append(_nearest_decay(layout, target, block, RadialPattern(window=window, floor=0)))  # type: ignore[arg-type]
        for pattern, cost in found:
            yield pattern, f"radial {window} decay {pattern.decays[0]:g}" + (" floor 0" if pattern.floor == 0 else ""), cost


def _nearest_decay(layout: TokenLayout, target: float, block: int, start: RadialPattern) -> tuple[RadialPattern, Simulation]:
    low, high, tried = 0.02, 4.0, []
    for _ in range(7):
        decay = round(math.sqrt(low * high), 3)
        pattern = replace(start, decay=decay)
        cost = simulate_pattern(pattern, layout, block, block)
        tried.append((pattern, cost))
        low, high = (decay, high) if cost.density < target else (low, decay)
    # between equals the widest windows
    return min(tried, key=lambda t: (abs(t[1].density - target), -t[0].decays[0]))


def _neighborhood(layout: TokenLayout, target: float, block: int) -> Iterator[tuple[Pattern, str, Simulation]]:
    """Windows of whole tiles whose share of the grid is nearest to the target, three shapes per tile: even, long, wide."""
    grid, total = layout.grid3, layout.seqlen
    text = total - math.prod(grid)
    # text is dense, so the windows get what it leaves of the target
    share = (target * total**2 - 2 * text * math.prod(grid) - text**2) / math.prod(grid) ** 2
    found: dict[tuple[object, ...], tuple[Pattern, str, Simulation]] = {}
    for tile in _tiles(grid, block):
        for shape, window in _windows(grid, tile, max(share, 0.01)):
            stride = tuple(_stride(w, t, n) for w, t, n in zip(window, tile, grid))
            if (window, stride) not in found:
                alone = simulate(grid, window, stride, tile_q=tile, tile_k=tile)
                cost = _with_text(alone, math.prod(grid), text, math.prod(tile), block)
                pattern = NeighborhoodPattern(window, stride, tile=tile)
                label = f"neighborhood {_x(window)} stride {_x(stride)} tile {_x(tile)} ({shape})"
                found[window, stride] = pattern, label, cost
    by_distance = sorted(found.values(), key=lambda option: abs(option[2].density - target))
    near = [option for option in by_distance if abs(option[2].density - target) <= 0.3 * target]
    yield from near or by_distance[:3]


def neighborhood_settings(layout: TokenLayout, target: float, block: int = 128) -> list[tuple[NeighborhoodPattern, Simulation]]:
    """Windows of whole tiles near the density `target` on `layout`, with what they cost; block: tokens per tile."""
    found = _neighborhood(layout, target, block)
    return [(pattern, cost) for pattern, _, cost in found if isinstance(pattern, NeighborhoodPattern)]


def _tiles(grid: Sequence[int], block: int) -> list[tuple[int, int, int]]:
    """Boxes that divide the grid and fill at least 3/4 of a block, or else the fullest ones; full and cube-like first."""
    sides = [[t for t in range(1, n + 1) if n % t == 0] for n in grid]
    boxes = [t for t in itertools.product(*sides) if 0.75 * block <= math.prod(t) <= block]
    if not boxes:
        sides = [list(range(1, min(n, 16) + 1)) for n in grid]
        boxes = [t for t in itertools.product(*sides) if 0.9 * block <= math.prod(t) <= block]
        boxes.sort(key=lambda t: math.prod(-(-n // s) for n, s in zip(grid, t)))
        boxes = boxes[:20]
    cost = {t: max(t) / min([s for s, n in zip(t, grid) if n > 1] or [1]) - 40 * math.prod(t) / block for t in boxes}
    return sorted(boxes, key=cost.__getitem__)[:6]  # type: ignore[return-value]


def _windows(grid: Sequence[int], tile: Sequence[int], target: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Per shape the window of whole tiles nearest to the target share: even on all axes, long in time, wide in space."""
    counts = [range(1, n // t + 1) for n, t in zip(grid, tile)]
    options = [tuple(min(c * t, n) for c, t, n in zip(each, tile, grid)) for each in itertools.product(*counts)]
    # a window that ends within a tile of the border may as well be the whole axis
    options += [(grid[0], *o[1:]) for o in options if o[0] != grid[0]]
    for shape, push in (("even", (1, 1, 1)), ("long", (3, 1, 1)), ("wide", (1, 2, 2))):

        def unlike(window: tuple[int, ...], push: tuple[int, ...] = push) -> float:
            share = [math.log(w / n) * p for w, n, p in zip(window, grid, push) if n > 1]
            return 4 * abs(sum(math.log(w / n) for w, n in zip(window, grid)) - math.log(target)) + max(share) - min(share)

        yield shape, min(options, key=unlike)


def _stride(window: int, tile: int, length: int) -> int:
    """The finest stride that keeps tiles free of masks."""
    if window == length:
        return 1
    if window % tile:
        return min(tile, window)
    return min(window, tile if window // tile % 2 else 2 * tile)


def _with_text(cost: Simulation, grid: int, text: int, lanes: int, block: int) -> Simulation:
    """The cost over grid and text: text sees all and is seen by all."""
    if not text and lanes == block:
        return cost
    total = grid + text
    pairs_grid = grid**2 / cost.total_work / lanes**2
    rows, words = math.sqrt(grid**2 / (1 - cost.padding[0]) / (1 - cost.padding[1])) / lanes, -(-text // block)
    pairs = pairs_grid + 2 * rows * words + words**2
    shown = cost.density * grid**2 + 2 * grid * text + text**2
    free = (pairs_grid * cost.mask_free + pairs - pairs_grid) / pairs
    work = total**2 / (pairs * block**2)
    return Simulation(
        cost.grid,
        cost.tile_q,
        cost.tile_k,
        cost.flops,
        cost.worst_tile,
        work,
        free,
        cost.padding,
        shown / total**2,
        cost.end_to_end,
    )


def nearby_sizes(model: ModelPreset, size: Sequence[int], frames: int, block: int = 128, count: int = 6) -> list[LegalSize]:
    """Legal sizes around (height, width), nearest first, with how well they suit tiles of `block` tokens."""
    ranges = [[n + k * m for k in range(-3, 4) if n + k * m >= m] for n, m in zip(size, model.multiples)]
    sizes = sorted(itertools.product(*ranges), key=lambda s: sum(abs(math.log(a / b)) for a, b in zip(s, size)))
    found = []
    for height, width in sizes:
        grid = model.grid((height, width), frames)
        per_frame = grid[1] * grid[2]
        fill = per_frame / (-(-per_frame // block) * block)
        official = grid[0] * per_frame % block == 0
        found.append(LegalSize((height, width), frames, grid, math.prod(grid), fill, official))
    here, rest = found[:1], found[1:]
    better = [s for s in rest if s.official or s.fill > here[0].fill]
    return here + (better + [s for s in rest if s not in better])[: count - 1]


def _x(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
