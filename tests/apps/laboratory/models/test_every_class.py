"""The script that tries every class: a line each, the end tells whether all hold, and what is wrong is told."""

from typing import Any

import pytest

from genattn.apps.laboratory.models import every_class, stock_testers
from genattn.apps.laboratory.models.stock_testers import Row
from genattn.apps.pages import family_table
from genattn.patterns.dense import DensePattern
from genattn.seam.handle import Handle, apply
from genattn.seam.plugin import AttentionCall, Inner, Plugin

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_line_for_a_class_and_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert every_class.main(["--only", "ChronoEdit"]) == 0
    line, count = told(capsys)
    assert line == (
        "ok  ChronoEditTransformer3DModel (wan-i2v): sites 6, passed on yes, dense yes, radial 0.67, window 0.19, removed yes"
    )
    assert count.startswith("1 of 1 classes hold, 1 of them with a layout: 1 transformers and 0 UNets; diffusers ")
    assert every_class.main(["--only", "Sana"]) == 0
    linear, refiner, count = told(capsys)
    assert "SanaTransformer2DModel (sana)" in linear
    assert "is linear attention" in linear
    assert "SanaWMLTX2RefinerTransformer3DModel (sana-wm-refiner)" in refiner
    assert count.startswith("2 of 2 classes hold, 1 of them")
    assert every_class.main(["--only", "NoSuchClass"]) == 1


class Louder(Plugin):
    """An edit that no dense pattern makes."""

    def attention(self, call: AttentionCall, inner: Inner) -> Any:
        return inner(call) * 1.001


FAULTS: dict[str, Any] = {
    "dense differs": lambda model, pattern, **_: apply(model, pattern, Louder()),
    "window yes": lambda model, plugin, **_: apply(model, DensePattern()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_told(fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stock_testers, "apply", FAULTS[fault])
    assert every_class.main(["--only", "SkyReels"]) == 1
    line, count = told(capsys)
    assert line.startswith("NOT SkyReelsV2Transformer3DModel")
    assert fault in line
    assert count.startswith("0 of 1 classes hold")


def test_a_window_that_stays_on_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Handle, "remove", lambda self: None)
    assert every_class.main(["--only", "SkyReels"]) == 1
    assert "removed differs" in told(capsys)[0]


def test_every_family_of_a_class_must_hold() -> None:
    good = (Row("a", "WanTransformer3DModel", "yes", 3, "yes", "yes", "0.67", "yes"), "0.19")
    assert every_class.holds("WanTransformer3DModel", [good])
    for column, value in [("stock", "differs from run to run"), ("dense", "no attention was called"), ("radial", "dense: why")]:
        bad = Row(**{**vars(good[0]), column: value})
        assert not every_class.holds("WanTransformer3DModel", [good, (bad, "0.19")])
    assert not every_class.holds("WanTransformer3DModel", [good, (good[0], "not finite")])


def test_every_class_with_a_layout_is_tried() -> None:
    here = family_table.attention_models("transformers")
    tried = {name for name in every_class.classes() if every_class.has_layout(name)}
    assert len(tried & here) == family_table.counts()[0]


@pytest.mark.slow
def test_all_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert every_class.main([]) == 0
    assert f": {family_table.counts()[0]} transformers and " in told(capsys)[-1]
