"""Plans on another device: every table goes along, nothing is forgotten on the way.

There is one device here. A copy to it must hold all that the plan holds; the parts of a plan go to "meta", where a table that
stayed behind is seen.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch

from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.halo_plan import HaloPlan
from genattn.patterns.combine import PerHead, Union
from genattn.patterns.halo import halo_plan
from genattn.patterns.logit_decayed import LogitDecayed
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern

LAYOUT = TokenLayout((Segment("text", (5,)), Segment("grid", (3, 8, 8)), Segment("padding", (6,))))
WINDOW = NeighborhoodPattern((3, 4, 4))
PATTERNS = {
    "radial": RadialPattern().with_tail(None),
    "window with a tail": WINDOW.with_tail("mean2"),
    "decayed": LogitDecayed(WINDOW, 2),
    "per head": PerHead((RadialPattern(), WINDOW)),
    "union": Union(RadialPattern(), WINDOW),
}


def tables(part: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a plan or a part of it holds as a field."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for each in part:
            yield from tables(each)
    elif is_dataclass(part):
        for field in fields(part):
            if field.name != "handle":  # of the plan itself, not of what it says
                yield from tables(getattr(part, field.name))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        names = [field.name for field in fields(a) if field.name != "handle"]
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in names)
    return bool(a == b)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_copy_holds_all_that_a_plan_holds(pattern: Pattern) -> None:
    plan = pattern.plan(LAYOUT, 16, 16)
    assert isinstance(plan, BlockPlan)
    copy = plan._copy_to(torch.device("cpu"))
    assert copy is not plan
    assert same(copy, plan)
    assert copy.mask_heads == plan.mask_heads
    assert plan.to("cpu") is plan
    for part in (plan.rule, plan.tail, plan.fade):
        assert part is None or {table.device.type for table in tables(part.to("meta"))} == {"meta"}


def test_what_there_is_to_forget() -> None:
    plans = [pattern.plan(LAYOUT, 16, 16) for pattern in PATTERNS.values()]
    assert any(plan.tail is not None for plan in plans)
    assert any(plan.fade is not None for plan in plans)
    assert len({type(plan.rule) for plan in plans}) >= 3


def test_a_halo_plan_goes_with_all_its_tables() -> None:
    plan = halo_plan(NeighborhoodPattern(3), TokenLayout((Segment("text", (3,)), Segment("grid", (3, 4, 5)))))
    assert isinstance(plan, HaloPlan)
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert {table.device.type for table in tables(moved)} == {"meta"}
    assert len(list(tables(moved))) == len(list(tables(plan)))
    assert (moved.extent, moved.seqlen) == (plan.extent, plan.seqlen)
    assert plan.to("meta") is moved
    assert moved.to("meta") is moved
    assert same(plan._copy_to(torch.device("cpu")), plan)
