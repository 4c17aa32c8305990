"""Which attentions BroadWay guides, and which map each is pulled towards.

    AnimateDiff   up_blocks.1 is the anchor, up_blocks.2 and 3 follow; the i-th module of a block pairs with the i-th of the
                  anchor, or with the one at the same relative place where the counts differ
    video DiTs    the second half of the blocks; anchor: the first of them, their running mean, or a named block

A block is the leading part of a module's path: "up_blocks.2", "blocks.14", "mid_block".
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from genattn.errors import GenAttnError
from genattn.layouts.site import AttentionSite
from genattn.settings import refuse, several, whole_number

FIRST, MEAN = "first", "mean"
MOTION_ANCHOR = "up_blocks.1"


@dataclass(frozen=True)
class GuidedSites:
    """The outcome of the choice.

    Attributes:
        temporal: True for frame-to-frame attentions (motion modules), False for full three-dimensional ones.
        anchor_of: guided site -> site whose map it is pulled to, both by name; itself where it is the anchor. With a running
            mean every site names itself and its map joins the mean.
        block_of: site -> block.
        running_mean: whether the anchor is the mean over the guided sites that ran before.
    """

    temporal: bool
    anchor_of: Mapping[str, str]
    block_of: Mapping[str, str]
    running_mean: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """The guided blocks in the order in which they run."""
        return tuple(dict.fromkeys(self.block_of[name] for name in self.anchor_of))

    @property
    def anchors(self) -> frozenset[str]:
        """Sites whose maps must be kept."""
        return frozenset(self.anchor_of.values())


def block_name(site_name: str) -> str:
    """The block a module belongs to: "up_blocks.2.motion_modules.0..." -> "up_blocks.2", "mid_block.x" -> "mid_block"."""
    match = re.match(r"[^.]+\.\d+|[^.]+", site_name)
    return match[0] if match else site_name


def choose_sites(
    sites: Sequence[AttentionSite], blocks: Sequence[str | int] | None = None, anchor: str | int = "auto"
) -> GuidedSites:
    """Choose from a model's attentions.

    Args:
        sites: all attention sites of the denoiser.
        blocks: block names ("up_blocks.2"), positions among the model's blocks (14), or ranges of positions ("14-20");
            None for the default.
        anchor: "auto", "first" (the first guided block), "mean" (running mean, full attention only), a block name or position.

    Raises:
        GenAttnError: for a model without temporal or full video attention, unknown blocks, or an anchor that runs too late.
    """
    temporal = [s for s in sites if s.kind == "temporal"]
    pool = temporal or [s for s in sites if s.kind in ("self", "joint")]
    if not pool:
        kinds = sorted({s.kind for s in sites})
        raise GenAttnError(
            f"temporal guidance needs temporal, self or joint attention, got a model with {', '.join(kinds) or 'none'}; "
            "apply it to a video model"
        )
    pool = sorted(pool, key=_order)
    by_block: dict[str, list[AttentionSite]] = {}
    for site in pool:
        by_block.setdefault(block_name(site.name), []).append(site)
    names = list(by_block)
    chosen = _default_blocks(names, bool(temporal)) if blocks is None else pick_blocks(blocks, names)
    if anchor == MEAN:
        return _with_mean(bool(temporal), by_block, chosen)
    source = _anchor_block(anchor, names, chosen, bool(temporal))
    pairs = _pairs(by_block, chosen, source)
    return GuidedSites(bool(temporal), pairs, {s.name: block_name(s.name) for s in pool})


def _default_blocks(names: list[str], temporal: bool) -> list[str]:
    if temporal and MOTION_ANCHOR in names:
        return [n for n in names if n.startswith("up_blocks.") and n != "up_blocks.0"]
    return names[len(names) // 2 :]


def _anchor_block(anchor: str | int, names: list[str], chosen: list[str], temporal: bool) -> str:
    if anchor == "auto":
        anchor = MOTION_ANCHOR if temporal and MOTION_ANCHOR in names else FIRST
    source = chosen[0] if anchor == FIRST else pick_blocks([anchor], names)[0]
    late = [n for n in chosen if names.index(n) < names.index(source)]
    if late:
        raise GenAttnError(
            f"the anchor must run before the blocks it guides, got {source!r} after {', '.join(late)}; "
            f"name one of {', '.join(names[: names.index(late[0]) + 1])}, or leave those blocks out"
        )
    return source


def _pairs(by_block: dict[str, list[AttentionSite]], chosen: list[str], source: str) -> dict[str, str]:
    """Guided site -> anchor site; the anchor block's own sites come first, so that their maps are kept."""
    anchors = by_block[source]
    pairs = {s.name: s.name for s in anchors}
    for block in chosen:
        members = by_block[block]
        for i, site in enumerate(members):
            # the same place in the block, relative to its length
            place = i if len(members) == len(anchors) else round(i * (len(anchors) - 1) / max(len(members) - 1, 1))
            pairs[site.name] = anchors[place].name
    return pairs


def _with_mean(temporal: bool, by_block: dict[str, list[AttentionSite]], chosen: list[str]) -> GuidedSites:
    if temporal:
        raise GenAttnError(
            f"anchor must be a block for motion modules, got {MEAN!r}: their maps differ in resolution; "
            f"name e.g. {MOTION_ANCHOR!r}"
        )
    pairs = {s.name: s.name for block in chosen for s in by_block[block]}
    return GuidedSites(temporal, pairs, {n: block_name(n) for n in pairs}, running_mean=True)


def checked_block(name: str, value: object) -> str | int:
    """A block as `pick_blocks` takes it: its name, its position, or a range of positions. Raises GenAttnError."""
    if isinstance(value, str) and value.strip():
        return value
    return whole_number(name, value, 0, "the name of a block such as 'up_blocks.2', or its position")


def checked_blocks(blocks: object) -> tuple[str | int, ...] | None:
    """Several of them, None for the default. Raises GenAttnError."""
    if blocks is None:
        return None
    what = "a list of blocks by name or position such as ['up_blocks.2'] or [14, '16-20'], or None"
    found = tuple(checked_block("a block", each) for each in several("blocks", blocks, what))
    if not found:
        raise refuse("blocks", blocks, what)
    return found


def pick_blocks(wanted: Sequence[str | int], names: list[str]) -> list[str]:
    """The blocks among `names` that are meant by names, positions (14) or ranges of positions ("14-20"), in order.

    Raises:
        GenAttnError: for an unknown block, or none at all.
    """
    found: list[str] = []
    for item in wanted:
        text = str(item)
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if text in names:
            found.append(text)
        elif span and int(span[1]) <= int(span[2] or span[1]) < len(names):
            found += names[int(span[1]) : int(span[2] or span[1]) + 1]
        else:
            raise GenAttnError(
                f"blocks must be names or positions 0 to {len(names) - 1} among {', '.join(names)}, got {item!r}"
            )
    if not found:
        raise GenAttnError(f"blocks must name at least one of {', '.join(names)}, got none")
    return [n for n in names if n in found]


def _order(site: AttentionSite) -> tuple[int, list[int | str]]:
    """Execution order: UNets run down, mid, up, in whatever order they list them; within a block by numbered path."""
    stage = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}.get(site.name.split(".")[0], -1)
    path = [int(p) if p.isdigit() else -1 for p in site.name.split(".")]
    return (stage, [*path, site.name]) if stage >= 0 else (site.depth, [site.name])
