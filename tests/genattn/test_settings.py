"""Every setting of every pattern, rule, layout and schedule: refused for values of the wrong kind, never a bare TypeError."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from wrong_kinds import NEVER

from genattn import DensePattern, NeighborhoodPattern, RadialPattern, Schedule, TokenLayout
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.combine import PerHead, PerLayer
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.logit_decayed import LogitDecayed
from genattn.patterns.rotating_anchors import RotatingAnchors
from genattn.selection.budget import Budget
from genattn.selection.estimate import PooledScore
from genattn.selection.guards import Similarity
from genattn.selection.rules import ErrorAware, Threshold, TopK, TopP
from genattn.selection.tiling import Boxes, Clusters, Runs

NEEDED: dict[type, dict[str, Any]] = {
    **{key: {} for key in (AdaptivePattern, BlockTopK, DensePattern, RadialPattern, Schedule)},
    **{key: {} for key in (Boxes, Budget, Clusters, ErrorAware, PooledScore, Runs, Similarity, Threshold, TopK, TopP)},
    **{key: {"patterns": (RadialPattern(), DensePattern())} for key in (PerHead, PerLayer)},
    GlobalTokens: {"pattern": RadialPattern(), "frames": (0,)},
    LogitDecayed: {"pattern": RadialPattern(), "trained_frames": 21},
    NeighborhoodPattern: {"window_size": 3},
    RotatingAnchors: {"pattern": RadialPattern(), "stride": 2},
    Segment: {"kind": "text", "shape": (3,)},
    TokenLayout: {"segments": (Segment("grid", (2, 3, 4)),)},
}
FIELDS = [(kind, field.name) for kind in NEEDED for field in dataclasses.fields(kind) if field.init]
FLAGS = {"reach", "weighted", "centred", "queries", "shut", "share_passes", "sink", "half_window", "is_causal", "circular"}


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS])
def test_a_value_of_the_wrong_kind_is_refused(kind: type, name: str) -> None:
    kind(**NEEDED[kind])
    for what, value in NEVER.items():
        with pytest.raises(GenAttnError, match=r"(?s)\b(must|needs?|takes?)\b.*\bgot\b"):
            print(what, kind(**{**NEEDED[kind], name: value}))
    if name not in FLAGS:  # True is no number, no name and no list
        with pytest.raises(GenAttnError, match=r"(?s)\b(must|needs?|takes?)\b.*\bgot\b"):
            print(kind(**{**NEEDED[kind], name: True}))


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (TopK(np.float32(0.25)), TopK(0.25)),  # type: ignore[arg-type]
        (TopK(np.array([0.5, 0.25])), TopK((0.5, 0.25))),  # type: ignore[arg-type]
        (Threshold(np.int64(2)), Threshold(2.0)),
        (PooledScore(np.int64(1)), PooledScore(1)),  # type: ignore[arg-type]
        (Runs(np.int32(32)), Runs((32, 32))),  # type: ignore[arg-type]
        (Budget(np.array([[0.5, 0.25]])), Budget(((0.5, 0.25),))),  # type: ignore[arg-type]
        (RadialPattern(decay=np.float64(0.2), block=np.int64(64)), RadialPattern(decay=0.2, block=64)),  # type: ignore[arg-type]
        (GlobalTokens(DensePattern(), np.arange(2)), GlobalTokens(DensePattern(), (0, 1))),  # type: ignore[arg-type]
        (Schedule(np.int64(2), dense_layers=np.arange(2)), Schedule(2, dense_layers=(0, 1))),  # type: ignore[arg-type]
        (Schedule(np.float32(0.5)), Schedule(0.5)),  # type: ignore[arg-type]
        (TokenLayout.from_grid(np.array([2, 3])), TokenLayout.from_grid((2, 3))),  # type: ignore[arg-type]
    ],
)
def test_numbers_of_numpy_are_numbers(given: Any, plain: Any) -> None:
    assert given == plain
    assert hash(given) == hash(plain)
    assert repr(given) == repr(plain)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Budget(steps=((0.5, float("inf")),)), "factors of steps must be > 0 and finite, got inf"),
        (lambda: Budget(steps=(0.5, 2.0)), r"steps must be pairs \(until, factor\).*got 0.5"),
        (lambda: Budget(layers=((),)), r"layers must be a list with one amount .*got \(\)"),
        (lambda: TopK(share=()), r"share must be a share of the key tiles in \(0, 1\], or one per head, got \(\)"),
        (lambda: Schedule(dense_layers=(1.5,)), "dense_layers must be a number of blocks >= 0, or a list .*got 1.5"),  # type: ignore[arg-type]
        (lambda: Schedule(passes=()), r"passes must be names of guidance passes .*got \(\)"),
        (lambda: PerHead((DensePattern(),), choice=(0.5,)), "choice must be a pattern 0..0 for every head, got 0.5"),  # type: ignore[arg-type]
        (lambda: DensePattern().plan(TokenLayout.from_grid((4,)), 16.5, 16), "block_q must be .*got 16.5"),  # type: ignore[arg-type]
    ],
)
def test_what_is_wrong_is_said(make: Any, says: str) -> None:
    with pytest.raises(GenAttnError, match=says):
        make()
