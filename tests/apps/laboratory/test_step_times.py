"""Predicted step times: the formula by hand, what they refuse, and that the page is what the generator writes."""

from dataclasses import replace
from pathlib import Path

import pytest

from genattn.apps.laboratory.step_times import MACHINES, MEASURED, RUNS, predict, predictions, step_seconds, work
from genattn.apps.pages import evidence, scale_page
from genattn.apps.pages.evidence_tables import Tables
from genattn.errors import GenAttnError
from genattn.planning.scale import weights_bytes

WAN, FLUX = RUNS[0], RUNS[-1]
H100, CARD = MACHINES[0], MACHINES[-1]


def test_a_step_by_hand() -> None:
    tokens, dim, ffn, layers, text = 21 * 45 * 80, 5120, 13824, 40, 512
    attention = 4 * layers * dim * tokens**2
    rest = layers * tokens * (8 * dim**2 + 4 * dim * ffn + 4 * dim**2 + 4 * text * dim)
    assert step_seconds(WAN, 1.0, H100) == (pytest.approx(2 * (attention + rest) / 350e12), False)
    assert step_seconds(WAN, 0.0, H100)[0] == pytest.approx(2 * rest / 350e12)
    assert WAN.attention_share == pytest.approx(attention / (attention + rest))


def test_weights_that_do_not_fit_are_waited_for_where_that_is_longer() -> None:
    small = replace(FLUX, size=(256, 256))
    seconds, waits = step_seconds(small, 1.0, CARD)
    assert waits
    assert seconds == pytest.approx(weights_bytes(FLUX.model) / 25e9)
    assert not step_seconds(small, 1.0, H100)[1]
    assert "RTX 5090" in predict(small, "dense").streamed


def test_fewer_scores_are_faster_and_half_the_rate_is_slower() -> None:
    found = {(p.name, p.pattern): p for p in predictions()}
    for run in RUNS:
        dense, adaptive = found[run.name, "dense"], found[run.name, "adaptive"]
        assert dense.faster == (1, 1)
        assert adaptive.faster[0] > adaptive.faster[1] > 1
        assert all(a <= d for a, d in zip(adaptive.seconds, dense.seconds))
        assert ((run.name, "radial") in found) == bool(run.model.radial)
    assert 0.2 < found["Wan 2.2 14B", "radial"].scores < 0.6


def test_ratios_of_measured_runs_lie_near_the_half_rate() -> None:
    for dense, sparse in ((MEASURED[1], MEASURED[2]), (MEASURED[4], MEASURED[5])):
        got = dense.seconds / sparse.seconds
        assert 1.2 < got < dense.predicted / sparse.predicted


def test_what_is_refused() -> None:
    with pytest.raises(
        GenAttnError, match="pattern must be dense, adaptive or, where the model has a preset, radial; got 'radial'"
    ):
        work(FLUX, "radial")
    with pytest.raises(GenAttnError, match="got 'window'"):
        work(WAN, "window")
    with pytest.raises(GenAttnError, match=r"scores must be a share of a dense call's work, at least 0, got -0\.1"):
        step_seconds(WAN, -0.1, H100)


def test_the_page_is_what_the_generator_writes() -> None:
    root = Path(evidence.ROOT)
    text = (root / "docs" / "scale.md").read_text(encoding="utf-8")
    assert text == scale_page.page(Tables(root / "assets" / "bench")), "run: genattn evidence"
    section = text.split("## Predicted step times")[1].split("### ")[0]
    rows = [line for line in section.splitlines() if line.endswith("x |") or line.endswith("- |")]
    assert rows
    assert all(line.startswith("| predicted: ") for line in rows), "every predicted row says that it is one"
