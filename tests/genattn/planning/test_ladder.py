"""Names for users: which preset a model gets, what is said where none is known, and lengths below which dense is kept."""

import csv
from pathlib import Path
from typing import Any

import pytest

from genattn.apps.laboratory.break_even import choice_thresholds, thresholds
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.published import PUBLISHED
from genattn.patterns.radial import RadialPattern
from genattn.planning.break_even import MEASURED, MEASURED_CHOICE, break_even
from genattn.planning.fitted import FittedNeighborhood
from genattn.planning.ladder import Model, rung
from genattn.planning.presets import PRESETS
from genattn.planning.recognise import ARCHITECTURES, recognise

WAN = Model("WanTransformer3DModel", 40, 40)
STRANGE = Model("NoSuchModel", 7, 3)
ROOT = Path(__file__).resolve().parents[3]


def test_models_are_recognised() -> None:
    for name, known in ARCHITECTURES.items():
        for preset in known:
            found = recognise(name, PRESETS[preset].heads, PRESETS[preset].layers, ("transformer",))
            assert found is not None
            assert found.heads == PRESETS[preset].heads
    assert recognise("WanTransformer3DModel", 40, 40, ("transformer", "transformer_2")).name == "wan2.2-14b"  # type: ignore[union-attr]
    assert recognise("WanTransformer3DModel", 40, 40).name == "wan-14b"  # type: ignore[union-attr]
    assert recognise("WanTransformer3DModel", 4, 5) is None
    assert recognise("NoSuchModel", 40, 40) is None


def test_radial_takes_the_models_own_preset() -> None:
    found = rung("radial", WAN)
    assert found.pattern == PRESETS["wan-14b"].radial[0].pattern
    assert found.schedule == {"dense_steps": 0.25, "dense_layers": 1}
    assert found.why.startswith("radial preset of wan-14b (")
    other = rung("radial", STRANGE)
    assert other.pattern == RadialPattern()
    assert not other.known
    assert other.why.startswith("no preset is known for NoSuchModel with 3 layers of 7 heads; ")


def test_gna_serves_every_size() -> None:
    hunyuan = Model("HunyuanVideoTransformer3DModel", 24, 60)
    found = rung("gna", hunyuan)
    assert isinstance(found.pattern, FittedNeighborhood)
    preset = PRESETS["hunyuan-video"]
    published = TokenLayout.from_grid(preset.grid(preset.size, preset.frames))
    assert found.pattern.at(published) == preset.neighborhood[0][0]
    assert "gna preset of hunyuan-video" in found.why
    for grid in ((9, 30, 52), (1, 64, 64), (8, 8, 8), (3, 5, 7)):
        layout = TokenLayout.from_grid(grid)
        density = rung("gna", STRANGE).pattern.plan(layout).density
        assert 0.1 < density <= 1
    layout = TokenLayout.from_grid((21, 30, 52))
    fitted = FittedNeighborhood(0.3)
    assert fitted.plan(layout).density == pytest.approx(0.3, abs=0.1)
    small = TokenLayout.from_grid((2, 4, 4))
    assert (fitted.mask(small) == fitted.at(small).mask(small)).all()
    assert rung("gna", WAN).known
    with pytest.raises(GenAttnError, match=r"density must be a share of the scores in \(0, 1\], got 0"):
        FittedNeighborhood(0)
    with pytest.raises(GenAttnError, match="a window needs a grid, got the layout 'text 4'"):
        fitted.check(TokenLayout((Segment("text", (4,)),)))


def test_adaptive_and_auto() -> None:
    assert isinstance(rung("adaptive", STRANGE).pattern, AdaptivePattern)
    assert rung("adaptive", WAN).schedule == {"dense_steps": 0.25, "dense_layers": 1}
    found = rung("auto", WAN)
    assert found.pattern == PRESETS["wan-14b"].radial[0].pattern
    least = break_even("cpu", "cpu", 0.5)
    assert found.schedule["min_tokens"] == least.tokens
    assert f"sparse from {least.tokens} tokens on (measured on cpu, backend cpu)" in found.why
    assert isinstance(rung("auto", STRANGE).pattern, AdaptivePattern)
    gpu = rung("auto", Model("WanTransformer3DModel", 40, 40, device="cuda", backend="triton"))
    assert "cost model for cuda, not measured" in gpu.why
    assert 256 <= gpu.schedule["min_tokens"] <= 16384


def test_published_rules_have_names() -> None:
    for name, make in PUBLISHED.items():
        found = rung(name, WAN)
        assert found.pattern == make()
        assert (found.schedule, found.known) == ({}, True)
        assert found.why == f"{name}: the published rule with its own settings; no preset of the model is used"


def test_a_map_is_known_by_its_ending() -> None:
    path = str(ROOT / "assets" / "maps" / "tiny-wan.safetensors")
    bare, named = rung(path, WAN), rung(f"profile:{path}", WAN)
    assert bare.pattern == named.pattern
    assert bare.why == named.why
    assert f"map {path}: " in bare.why
    with pytest.raises(GenAttnError, match="there is no 'away.safetensors'"):
        rung("away.safetensors", WAN)


def test_names_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="must be one of radial, gna, adaptive, .*, auto, got 'fast'"):
        rung("fast", WAN)
    with pytest.raises(GenAttnError, match="there is no"):
        rung(f"profile:{tmp_path / 'none.safetensors'}", WAN)


def test_break_even_grows_with_what_is_left_and_falls_with_the_model() -> None:
    for device, backend in (("cpu", "cpu"), ("cpu", "grouped"), ("cuda", "triton"), ("mps", "grouped")):
        marks = [break_even(device, backend, d).tokens for d in (0.2, 0.5, 0.75, 0.94)]
        assert marks == sorted(marks)
        assert marks[0] >= 64
    assert break_even("cpu", "cpu", 0.3, chooses=True).tokens > break_even("cpu", "cpu", 0.3).tokens
    assert "with the choice" in break_even("cpu", "cpu", 0.3, chooses=True).source
    once, twice = (break_even("cuda", "triton", 0.5, chooses=chooses).tokens for chooses in (False, True))
    assert twice == pytest.approx(2 * once, abs=64)
    assert break_even("cuda", "triton", 0.5, heads=40).tokens < break_even("cuda", "triton", 0.5, heads=8).tokens
    assert break_even("cuda", "triton", 0.99).tokens > 10**9
    assert break_even("tpu", "x", 0.5).source == "cost model for tpu, not measured"
    # 2e-4 s at 1e14 a second are 2e10 operations; a token pays 4 * 12 * 128 / 2 for each token: sqrt(2e10 / 3072) = 2551.6
    assert break_even("tpu", "x", 0.5).tokens == 2560
    assert break_even("tpu", "x", 0.5, chooses=True).tokens == 5120
    assert break_even("tpu", "x", 0.95).tokens < 1 << 20
    assert break_even("cpu", "cpu", 1.0).tokens == 1 << 62
    with pytest.raises(GenAttnError, match=r"density must be a share of the scores in \(0, 1\], got 0.0"):
        break_even("cpu", "cpu", 0.0)


def test_the_numbers_are_those_of_the_table() -> None:
    with (ROOT / "assets" / "bench" / "break_even.csv").open(newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    assert thresholds(rows) == MEASURED
    assert choice_thresholds(rows) == MEASURED_CHOICE
