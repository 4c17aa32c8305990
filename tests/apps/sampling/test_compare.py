"""Prompts and seeds are shared between attentions; rows carry intervals and provenance."""

from pathlib import Path

import pytest

from genattn.apps.sampling.compare import compare, parse_attention
from genattn.apps.sampling.run import SamplingSettings
from genattn.errors import GenAttnError


@pytest.mark.filterwarnings("ignore:genattn. .* acts at no step")
def test_rows(random_wan_folder: Path) -> None:
    settings = SamplingSettings(model=str(random_wan_folder), frames=17, height=128, width=128, steps=2, guidance_scale=1.0)
    seen: list[tuple[int, int]] = []
    wanted = [parse_attention("radial@0", dense_layers=0), parse_attention("radial@2")]
    rows = compare(["a cat", "a dog"], wanted, settings, seed=7, on_sample=lambda *at: seen.append(at))
    assert [row["attention"] for row in rows] == ["dense", "radial@0", "radial@2"]
    dense, sparse, kept_dense = rows
    assert seen == [(3, 6), (6, 6)]
    assert dense["density"] == 1
    assert "psnr" not in dense
    assert sparse["density"] < 1
    assert sparse["psnr_low"] <= sparse["psnr"] <= sparse["psnr_high"] < float("inf")
    assert kept_dense["psnr"] == float("inf")  # both steps dense: the stock result to the bit
    assert kept_dense["ssim"] == 1
    assert all(row["n"] == 2 and row["commit"] and row["date"] for row in rows)


def test_what_is_left_out_is_the_presets() -> None:
    assert parse_attention("auto").schedule == {}
    assert parse_attention("auto@0", dense_layers=2).schedule == {"dense_steps": 0, "dense_layers": 2}
    assert parse_attention("radial").schedule == {"dense_steps": 0.25, "dense_layers": 1}


def test_refusals(random_wan_folder: Path) -> None:
    with pytest.raises(GenAttnError, match="at least one prompt"):
        compare([], [], SamplingSettings(model=str(random_wan_folder)))
    with pytest.raises(GenAttnError, match="always samples dense"):
        parse_attention("dense")
    with pytest.raises(GenAttnError, match="NAME or NAME@DENSE_STEPS, got 'radial@x'"):
        parse_attention("radial@x")
