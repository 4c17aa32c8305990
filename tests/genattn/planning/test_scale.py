"""The cost model: against its definition, against published arithmetic and times, and what it refuses."""

import multiprocessing
from dataclasses import replace
from typing import Any

import pytest

from genattn.apps.pages.scale_page import duration
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.radial import RadialPattern
from genattn.planning.presets import preset
from genattn.planning.scale import (
    Machine,
    ScaleSettings,
    activation_bytes,
    balance_tokens,
    cost,
    longest_frames,
    radial_density,
    usable_gpus,
    wire_bites_below,
)

WAN = preset("wan-14b")


@pytest.mark.parametrize(("frames", "shape"), [(1, (2, 3)), (5, (2, 4)), (9, (3, 3)), (20, (1, 5)), (17, (2, 2))])
def test_density_is_that_of_the_mask(frames: int, shape: tuple[int, int]) -> None:
    mask = RadialPattern(variant="paper").mask(TokenLayout.from_grid((frames, *shape)))
    assert radial_density(frames, shape[0] * shape[1]) == pytest.approx(float(mask.double().mean()))


def test_published_arithmetic_and_time() -> None:
    found = cost(replace(WAN, size=(768, 1280)), 69, "dense")
    assert found.flops / 1e15 == pytest.approx(560, rel=0.02)
    assert found.seconds == pytest.approx(1630, rel=0.1)
    assert cost(WAN, 161, "dense").seconds == pytest.approx(5735, rel=0.1)


def test_growth_with_length() -> None:
    dense, radial, fifo = (
        [cost(WAN, n, method).flops for n in (961, 1921, 3841)]
        for method in ("dense", "radial", "fifo")  # type: ignore[arg-type]
    )
    assert dense[2] / dense[1] > 3.5
    assert radial[2] < 0.6 * dense[2]
    assert (fifo[2] - fifo[1]) == pytest.approx(2 * (fifo[1] - fifo[0]))


def test_what_stands_in_the_way() -> None:
    hour = cost(WAN, 57601, "radial", 64)
    assert hour.gpus == usable_gpus(WAN, 64) == 40
    assert any("Ulysses uses 40 of 64" in b for b in hour.bounds)
    assert any("position table ends at 1024" in b for b in hour.bounds)
    assert any(b.startswith("memory") for b in hour.bounds)
    assert any("noise levels" in b for b in cost(WAN, 57601, "fifo", 8).bounds)
    slow = Machine(link=1e6)
    assert "wire" in cost(WAN, 81, "dense", 8, machine=slow).bounds
    assert wire_bites_below(WAN, 8, slow) > 1e6
    assert wire_bites_below(WAN, 8) == 0


def test_bounds_agree_with_the_costs() -> None:
    frames = longest_frames(WAN, 8)
    assert cost(WAN, frames, "dense", 8).memory <= Machine().memory
    assert cost(WAN, frames + 8, "dense", 8).memory > Machine().memory
    tokens = balance_tokens(WAN)
    attention, rest = WAN.flops(TokenLayout.from_grid((round(tokens),)))
    assert attention == pytest.approx(rest, rel=1e-3)


def test_refusals_and_words() -> None:
    with pytest.raises(GenAttnError, match="method must be"):
        cost(WAN, 81, "sliding")  # type: ignore[arg-type]
    with pytest.raises(GenAttnError, match="tile_overhead >= 1"):
        ScaleSettings(tile_overhead=0.5)
    with pytest.raises(GenAttnError, match="frames and tokens must be >= 1"):
        radial_density(0, 5)
    assert [duration(s) for s in (5, 90, 7200, 200000, 1e9)] == ["5.0 s", "1.5 min", "2.0 h", "2.3 days", "31.7 years"]


def _counted(gpus: int) -> dict[str, Any]:
    from concurrent.futures import ProcessPoolExecutor

    from genattn.apps.laboratory.scale import check

    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(check, WAN, 81, gpus).result()


@pytest.mark.parametrize("gpus", [1, 8])
def test_memory_and_traffic_are_those_of_the_stock_model(gpus: int) -> None:
    pytest.importorskip("diffusers", minversion="0.42", reason="the counts hold for the model of this version")
    row = _counted(gpus)
    assert row["activation_bytes"] == pytest.approx(row["activation_model"], rel=0.1)
    assert row["exchanged_bytes"] == pytest.approx(row["exchanged_model"])
    assert row["linear_flops"] == pytest.approx(row["linear_model"], rel=0.1)
    assert (row["exchanged_bytes"] > 0) == (gpus > 1)


def test_more_gpus_save_memory_only_so_far() -> None:
    few, many = (activation_bytes(WAN, 1000, gpus) for gpus in (8, 40))
    assert many == 2 * 2 * 1000 * 5120 < few
