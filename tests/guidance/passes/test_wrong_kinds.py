"""Every setting of every guidance plugin: refused for values of the wrong kind, never taken for true and never a bare error."""

import inspect
from typing import Any

import numpy as np
import pytest
from wrong_kinds import NEVER

from genattn import RadialPattern
from genattn.errors import GenAttnError
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.nag.nag import NAG
from genattn.guidance.passes.delta import DeltaRule, Projection, Window
from genattn.guidance.s2.s2_guidance import S2Guidance
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.guidance.tag.tag import TAG
from genattn.seam.settings_file import MODULES
from genattn.seam.sparse_plugin import SparsePlugin

NEEDED: dict[Any, dict[str, Any]] = {
    **{kind: {} for kind in (BroadWay, DeltaRule, EnhanceAVideo, Projection, S2Guidance, TAG, Window)},
    HeadSet: {"heads": {(0, 1): 0.5}, "layer_map": {0: 4}},
    NAG: {"negative_prompt": "red"},
    SoftPAG: {"heads": "L0H1"},
    SparsePlugin: {"pattern": RadialPattern()},
}
TEXTS, DICTS = {"model", "model_id", "target", "objective"}, {"encode", "versions", "notes", "negative_embeds"}
FLAGS = {"keep_energy", "keep_first_frame", "share", "reuse_prefix"}
FIELDS = [(kind, name) for kind in NEEDED for name in inspect.signature(kind).parameters if name != "negative_embeds"]


def test_every_plugin_that_is_saved_is_tried() -> None:
    assert {kind.__name__ for kind in NEEDED} >= set(MODULES)


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS])
def test_a_value_of_the_wrong_kind_is_refused(kind: Any, name: str) -> None:
    kind(**NEEDED[kind])
    tried = dict(NEVER)
    if kind is HeadSet and name in TEXTS:
        del tried["a text"]
    if name in DICTS:
        del tried["a dict"]
    if name not in FLAGS:
        tried["true"] = True
    for what, value in tried.items():
        with pytest.raises(GenAttnError, match=r"(?s)\b(must|needs?|takes?)\b.*\bgot\b"):
            print(what, kind(**{**NEEDED[kind], name: value}))


@pytest.mark.parametrize("name", ["norm_cap", "adaptive"])
def test_what_multiplies_is_finite(name: str) -> None:
    """inf * 0 and inf / inf are NaN, which would end in the picture."""
    with pytest.raises(GenAttnError, match=f"{name} must be a number"):
        (Projection if name == "norm_cap" else DeltaRule)(**{name: float("inf")})


def test_numbers_of_numpy_are_numbers() -> None:
    assert SoftPAG("L0", scale=np.float32(2)).settings() == SoftPAG("L0", scale=2.0).settings()  # type: ignore[arg-type]
    assert SoftPAG([(np.int64(0), np.int64(1))]).settings()["heads"] == ["L0H1"]  # type: ignore[list-item]
    assert BroadWay(blocks=np.arange(2)).blocks == (0, 1)  # type: ignore[arg-type]


def test_heads_that_can_be_read_once_are_kept() -> None:
    plugin = SoftPAG((0, head) for head in range(2))
    assert plugin.settings()["heads"] == plugin.settings()["heads"] == ["L0H0", "L0H1"]
