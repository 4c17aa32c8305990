"""A tail on a stock model: on by default where it measured better, shown in the report, one backend as good as another."""

import logging

import pytest
import torch

import genattn
from genattn.functional.planned import tile_size, why_no_tail
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.patterns.combine import PerHead, PerLayer
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.seam.plugin import Plugin
from genattn.seam.report import Report
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin

WIDE = {"num_frames": 17, "height": 128, "width": 128, "num_inference_steps": 2, "output_type": "latent"}
WINDOW = genattn.NeighborhoodPattern((3, 4, 4))
GRID = genattn.TokenLayout.from_grid((5, 8, 8))


def _run(*plugins: genattn.Pattern | Plugin, **settings: object) -> tuple[torch.Tensor, Report]:
    pipe, call = build_pipeline("wan")
    pipe.set_progress_bar_config(disable=True)
    always = {"dense_steps": 0, "dense_layers": 0} if any(isinstance(p, genattn.Pattern) for p in plugins) else {}
    with genattn.apply(pipe, *plugins, **{**always, **settings}) as handle:
        out = pipe(**{**call, **WIDE, "generator": torch.Generator().manual_seed(0)}).frames
        return out, handle.report()


def test_the_report_says_what_stands_in() -> None:
    _, report = _run(WINDOW)
    assert {row["tail"] for row in report.sites if row["sparse"]} == {WINDOW.measured_tail or "none"}
    assert report.plugins[0]["pattern"]["tail"] == WINDOW.measured_tail
    _, report = _run(WINDOW.with_tail("mean2"))
    assert {row["tail"] for row in report.sites if row["sparse"]} == {"mean2"}
    assert "mean2" in report.table()
    _, report = _run(WINDOW.with_tail(None))
    assert {row["tail"] for row in report.sites if row["sparse"]} == {"none"}


def test_a_default_is_the_measured_tail() -> None:
    default, _ = _run(WINDOW)
    named, _ = _run(WINDOW.with_tail(WINDOW.measured_tail))
    assert torch.equal(default, named)


def test_dense_backends_and_layers_of_their_own() -> None:
    layers = PerLayer((WINDOW.with_tail("mean"), WINDOW.with_tail(None), genattn.DensePattern()), (0, 1, 2))
    _, report = _run(layers)
    assert {row["depth"]: row["tail"] for row in report.sites if row["sparse"]} == {0: "mean", 1: "none", 2: "none"}


def test_every_backend_gives_the_same() -> None:
    heads = PerHead((WINDOW.with_tail("mean"), genattn.RadialPattern(decay=0.1, floor=0, tail=None)), (0, 1))
    for pattern in (WINDOW.with_tail("mean2"), heads):
        wanted, report = _run(pattern, impl="reference")
        assert report.sparse_calls == report.calls
        for impl in ("cpu", "grouped", "sdpa"):
            torch.testing.assert_close(_run(pattern, impl=impl)[0], wanted, atol=1e-4, rtol=1e-4)


def test_softpag_mixes_what_the_tail_answered() -> None:
    plugins = [SoftPAG("L1H0", u=0.7, scale=2.0, layout="single") for _ in range(2)]
    wanted, _ = _run(WINDOW.with_tail("mean"), plugins[0], impl="reference")
    got, _ = _run(WINDOW.with_tail("mean"), plugins[1], impl="cpu")
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    without, _ = _run(WINDOW.with_tail("mean"), impl="cpu")
    assert not torch.allclose(got, without, atol=1e-3)


def test_a_named_backend_without_tails_is_not_refused_for_a_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="genattn"):
        _, report = _run(WINDOW, impl="halo")
    assert report.sparse_calls == report.calls > 0
    assert {row["tail"] for row in report.sites if row["sparse"]} == {"none"}
    with pytest.raises(genattn.GenAttnError, match="tail='mean'.*use tail=None"):
        _run(WINDOW.with_tail("mean"), impl="halo")


def test_where_tails_are_served() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert all(why_no_tail(impl, cpu) is None for impl in ("auto", "cpu", "grouped", "reference", "flex", "sdpa"))
    assert "has no stand-in" in (why_no_tail("natten", cpu) or "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("genattn.functional.planned.SERVES_TAIL", False)
        assert "Triton" in (why_no_tail("auto", cuda) or "")
        patch.setattr("genattn.functional.planned.SERVES_TAIL", True)
        assert why_no_tail("auto", cuda) is None


def test_settings_files_keep_auto() -> None:
    plugin = SparsePlugin(WINDOW)
    again = SparsePlugin.from_settings(plugin.settings())
    assert again.pattern == WINDOW
    assert again.pattern.tail == "auto"


def test_the_plan_of_a_call_has_the_tail() -> None:
    """What BroadWay takes over is what would have run."""
    seen: list[object] = []

    class Spy(Plugin):
        def attention(self, call, inner):  # type: ignore[no-untyped-def]
            seen.append(sparse.plan_at(call).tail)
            return inner(call)

    sparse = SparsePlugin(WINDOW.with_tail("mean"), Schedule(dense_steps=0, dense_layers=0))
    _run(Spy(), sparse)
    assert seen
    assert all(tail is not None for tail in seen)
    block = tile_size(GRID.seqlen, "cpu")
    assert WINDOW.with_tail("mean").plan(GRID, block, block).tail is not None
