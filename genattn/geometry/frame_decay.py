"""Frames beyond the trained window: which they are for a query, and what becomes of logits to their keys.

    logit(q, k) <- decay * logit(q, k) - penalty        for keys outside the trained window of frames around the query

Only tokens of the grid stand in a frame; text, references and registers are inside for all. Of a plan, tile pairs are lowered
(kernels/plan/fade.py): exact where tiles keep to frames; a tile that straddles frames has the windows of all of them together.
"""

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.fade import fade_of_tokens, without_outside
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.kernels.plan.lasting import lasting
from genattn.settings import number, whole_number

Plan = TypeVar("Plan", bound=BlockPlan | HeadTiles)


@dataclass(frozen=True)
class FrameDecay:
    """Settings of the decay, checked.

    trained_frames: latent frames of the clip that the model learned, >= 2; that many frames nearest to a query are inside.
    decay: factor on the logits outside, [0, 1]; 1 leaves them. penalty: taken off the logits outside, >= 0, infinite drops the
    frames. At least one of both must do something.
    """

    trained_frames: int
    decay: float = 0.9
    penalty: float = 0.0

    def __post_init__(self) -> None:
        frames = whole_number("trained_frames", self.trained_frames, 2, ">= 2 latent frames; Wan 21, HunyuanVideo 33")
        object.__setattr__(self, "trained_frames", frames)
        for name, most, what in (("decay", 1, "0 to 1; the method uses about 0.9"), ("penalty", math.inf, ">= 0; 0 for none")):
            object.__setattr__(self, name, number(name, getattr(self, name), 0, most, what))
        if self.decay == 1 and self.penalty == 0:
            raise GenAttnError("decay=1 and penalty=0 change nothing; give decay below 1 or a penalty")

    def acts_on(self, layout: TokenLayout) -> bool:
        """Whether the clip is longer than trained."""
        return layout.grid is not None and layout.grid3[0] > self.trained_frames


def windows(frames: int, trained: int) -> list[tuple[int, range]]:
    """(first frame of the window, query frames that share it): the `trained` frames nearest to each, pushed inwards at both
    ends, so that the trained clip's own ends come back there.

    >>> windows(6, 4)
    [(0, range(0, 3)), (1, range(3, 4)), (2, range(4, 6))]
    """
    first = [min(max(frame - trained // 2, 0), frames - trained) for frame in range(frames)]
    starts = [f for f in range(frames) if f == 0 or first[f] != first[f - 1]]
    return [(first[a], range(a, b)) for a, b in zip(starts, [*starts[1:], frames], strict=True)]


def decayed(plan: Plan, layout: TokenLayout, decay: FrameDecay) -> Plan:
    """The plan with its logits outside lowered, kept in the plan; as it is where the clip is no longer than trained."""
    if not decay.acts_on(layout):
        return plan
    if isinstance(plan, HeadTiles):
        folded = _kept(plan.folded, layout, decay, plan.heads)
        return plan if folded is plan.folded else replace(plan, folded=folded)
    assert isinstance(plan, BlockPlan)
    return _kept(plan, layout, decay, 1)  # type: ignore[return-value]


def _kept(plan: BlockPlan, layout: TokenLayout, decay: FrameDecay, heads: int) -> BlockPlan:
    key = ("decayed", layout, decay)
    if key not in plan.cache:
        found = _lowered(plan, layout, decay, heads)
        if found is plan:  # a plan that held itself would not be freed when it is dropped
            return plan
        plan.cache[key] = found
    return plan.cache[key]  # type: ignore[return-value]


@lasting
def _lowered(plan: BlockPlan, layout: TokenLayout, decay: FrameDecay, heads: int) -> BlockPlan:
    frames, height, width = layout.grid3
    index = layout.raster_index
    frame = torch.where(index >= 0, index // (height * width), index).repeat_interleave(heads).to(plan.device)
    ends = torch.empty(frames, 2, dtype=torch.int64)
    for first, queries in windows(frames, decay.trained_frames):
        ends[queries.start : queries.stop] = torch.tensor([first, first + decay.trained_frames - 1])
    drops = decay.penalty == math.inf
    tiles = plan.query_tiles, plan.key_tiles
    fade = fade_of_tokens(*tiles, frame, ends.to(plan.device), decay.decay, 0.0 if drops else decay.penalty)
    return without_outside(plan, fade) if drops else plan.with_fade(fade)
