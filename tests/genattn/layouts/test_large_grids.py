"""On rasters large enough for tiles to be left out: Radial on video, a window on pictures and sound, SoftPAG with either."""

import copy
from typing import Any

import pytest
import torch

from genattn import NeighborhoodPattern, RadialPattern
from genattn.layouts.families import family_of
from genattn.patterns.pattern import Pattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families
from genattn.pipelines.tiny.random.models import MODELS
from genattn.seam.handle import apply

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
    pytest.mark.filterwarnings("ignore:CPU Autocast"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]
NAMES = [name for name in families() if name != "sana" and MODELS[name].large is not None]


def window(grid: tuple[int, ...]) -> Pattern:
    return NeighborhoodPattern(tuple(max(3, n // 6) if n > 3 else -1 for n in grid))


def runs(name: str, pattern: Pattern) -> Any:
    model, inputs = build_model(name), build_inputs(name, grid=MODELS[name].large)
    with torch.no_grad(), apply(model, pattern, dense_steps=0, dense_layers=0) as handle:
        out = model(**copy.deepcopy(inputs), return_dict=False)
        while isinstance(out, (list, tuple)):
            out = out[0]
        assert out.isfinite().all()
        return handle.report()


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_left_out(name: str) -> None:
    """The density of the sparse calls, as the report tells it, is below 0.8 for every family."""
    large = MODELS[name].large
    assert large is not None
    per_frame = family_of(build_model(name)).site_layout is not None and name in ("latte", "animatediff")  # type: ignore[union-attr]
    video = len(large) == 3 and not per_frame
    pattern = RadialPattern() if video else window(large[-2:] if per_frame else large)
    report = runs(name, pattern)
    assert report.sparse_calls > 0, report.dense_reasons
    assert report.density < 0.8, (name, report.density)
