"""The planner's predictions against the plans they stand for, published arithmetic, and the presets against diffusers."""

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.radial import RadialPattern
from genattn.planning.model_preset import ModelPreset
from genattn.planning.planner import nearby_sizes, plan_settings
from genattn.planning.presets import PRESETS, carried_over_decay, preset
from genattn.planning.published_shapes import PUBLISHED


@pytest.mark.parametrize(
    ("model", "size", "frames", "target"),
    [("wan-1.3b", (480, 832), 81, 0.4), ("cogvideox-5b", (480, 720), 49, 0.3), ("flux-dev", (1360, 768), 1, 0.2)],
)
def test_predictions_are_those_of_the_plans(model: str, size: tuple[int, int], frames: int, target: float) -> None:
    """Every proposal reaches its density when its plan is built, and costs what was predicted."""
    planning = plan_settings(model, size, frames, target_density=target)
    made = [s for s in planning.settings if not s.published]
    assert made
    speeds = [s.run_speedup for s in made]
    assert speeds == sorted(speeds, reverse=True)
    for setting in made:
        plan = setting.pattern.plan(planning.layout)
        assert setting.density == pytest.approx(plan.density, abs=0.01), setting.label
        assert setting.mask_free == pytest.approx(plan.full_share, abs=0.02), setting.label
        predicted = 1 / plan.computed_density / (1 + 0.25 * (1 - plan.full_share))
        assert setting.attention_speedup == pytest.approx(predicted, rel=0.03), setting.label
        assert setting.pflops < planning.dense_pflops
        assert 1 < setting.run_speedup < 1 / (1 - planning.attention_share)


def test_published_settings_stand_first_in_the_order_of_the_preset() -> None:
    settings = plan_settings("hunyuan-video", (720, 1280), 129).settings
    shown = [s for s in settings if s.published]
    assert list(settings[: len(shown)]) == shown
    assert [s.pattern for s in shown] == [
        *(p.pattern for p in PRESETS["hunyuan-video"].radial),
        *(p for p, _ in PRESETS["hunyuan-video"].neighborhood),
    ]
    assert shown[0].published.startswith("genattn")
    layout = PRESETS["hunyuan-video"].layout((720, 1280), 129)
    assert shown[3].density == pytest.approx(shown[3].pattern.plan(layout).density, abs=0.01)
    small = plan_settings("flux-dev", (1024, 1024), 1).settings
    assert not any(s.published for s in small), "a window of 80 x 80 does not fit 64 x 64 tokens"


def test_radial_reaches_a_reachable_target() -> None:
    settings = plan_settings("wan-14b", (720, 1280), 81, target_density=0.35).settings
    radial = [s for s in settings if isinstance(s.pattern, RadialPattern) and s.pattern.window == "strip" and not s.published]
    assert radial[0].density == pytest.approx(0.35, abs=0.04)


@pytest.mark.parametrize(("model", "frames", "published"), [("wan-14b", 69, 560), ("hunyuan-video", 117, 612)])
def test_arithmetic_of_the_radial_paper(model: str, frames: int, published: float) -> None:
    """Table 1: PFLOPs of 50 dense steps at 768 x 1280."""
    assert plan_settings(model, (768, 1280), frames, target_density=1.0).dense_pflops == pytest.approx(published, rel=0.08)


def test_nearby_sizes_are_legal_and_say_what_the_released_code_can_run() -> None:
    sizes = nearby_sizes(preset("wan-14b"), (480, 832), 81)
    assert sizes[0].size == (480, 832)
    assert not sizes[0].official
    assert len(sizes) == 6
    for legal in sizes:
        assert math.prod(legal.grid) == legal.tokens
        assert legal.official == (legal.tokens % 128 == 0)
        assert 0.5 < legal.fill <= 1
    runnable = nearby_sizes(preset("wan-14b"), (768, 1280), 69)[0]
    assert runnable.official
    assert runnable.fill == 1.0


def test_refusals() -> None:
    with pytest.raises(GenAttnError, match=r"width must be a multiple of 16 for wan-14b, got 1281; nearest: 1280 or 1296"):
        plan_settings("wan-14b", (720, 1281))
    with pytest.raises(GenAttnError, match=r"frames must be 4 \* n \+ 1 for wan-14b, got 80; nearest: 77 or 81"):
        plan_settings("wan-14b", (720, 1280), 80)
    with pytest.raises(GenAttnError, match=r"target_density must be in \(0, 1\], got 0"):
        plan_settings("wan-14b", target_density=0)
    with pytest.raises(GenAttnError, match="one of wan-1.3b, wan-14b"):
        plan_settings("sora")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_usable(name: str) -> None:
    """Defaults are legal, patterns serve the model's own layout, and ours never run without dense steps."""
    known = PRESETS[name]
    layout = known.layout(known.size, known.frames)
    for setting in known.radial:
        assert setting.dense_steps > 0
        assert setting.source
        setting.pattern.check(layout)
    assert all(s.dense_layers > 0 for s in known.radial if s.pattern.variant == "genattn")
    for pattern, source in known.neighborhood:
        assert source
        pattern.check(TokenLayout.from_grid({"hunyuan-video": (30, 48, 80), "cosmos-7b": (16, 44, 80)}.get(name, (256, 256))))


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("wan-14b", "WanTransformer3DModel"),
        ("hunyuan-video", "HunyuanVideoTransformer3DModel"),
        ("cogvideox-2b", "CogVideoXTransformer3DModel"),
        ("mochi", "MochiTransformer3DModel"),
        ("ltx-video", "LTXVideoTransformer3DModel"),
        ("cosmos-7b", "CosmosTransformer3DModel"),
        ("flux-dev", "FluxTransformer2DModel"),
        ("minimax-h3", "MiniMaxH3Transformer3DModel"),
        ("ltx-2", "LTX2VideoTransformer3DModel"),
        ("hunyuan-video-1.5", "HunyuanVideo15Transformer3DModel"),
        ("qwen-image", "QwenImageTransformer2DModel"),
        ("flux2-dev", "Flux2Transformer2DModel"),
        ("krea2", "Krea2Transformer2DModel"),
    ],
)
def test_presets_agree_with_diffusers(name: str, cls: str) -> None:
    """Where a model's published config is diffusers' default."""
    import diffusers

    if not hasattr(diffusers, cls):
        pytest.skip(f"diffusers {diffusers.__version__} has no {cls}")
    given = {k: v.default for k, v in inspect.signature(getattr(diffusers, cls).__init__).parameters.items()}
    known = PRESETS[name]
    assert (known.heads, known.head_dim) == (given["num_attention_heads"], given["attention_head_dim"])
    assert known.layers == given["num_layers"] + (given.get("num_single_layers") or 0)


@pytest.mark.parametrize(
    ("name", "size", "frames", "steps", "passes", "text", "grid"),
    [
        ("wan-1.3b", (480, 832), 81, 50, 2, (512, 0), (21, 30, 52)),
        ("wan-14b", (720, 1280), 81, 50, 2, (512, 0), (21, 45, 80)),
        ("wan2.2-14b", (720, 1280), 81, 40, 2, (512, 0), (21, 45, 80)),
        ("wan2.2-5b", (704, 1280), 121, 50, 2, (512, 0), (31, 22, 40)),
        ("hunyuan-video", (720, 1280), 129, 50, 1, (0, 256), (33, 45, 80)),
        ("cogvideox-5b", (480, 720), 49, 50, 2, (0, 226), (13, 30, 45)),
        ("cogvideox-2b", (480, 720), 49, 50, 2, (0, 226), (13, 30, 45)),
        ("mochi", (480, 848), 163, 64, 2, (0, 256), (28, 30, 53)),
        ("ltx-video", (512, 704), 161, 50, 2, (256, 0), (21, 16, 22)),
        ("cosmos-7b", (704, 1280), 121, 35, 2, (512, 0), (16, 44, 80)),
        ("flux-dev", (1024, 1024), 1, 28, 1, (0, 512), (1, 64, 64)),
    ],
)
def test_presets_are_what_the_models_cards_say(
    name: str, size: tuple[int, int], frames: int, steps: int, passes: int, text: tuple[int, int], grid: tuple[int, ...]
) -> None:
    """One pass a step for those distilled from guidance; text as (seen by cross-attention, in the same sequence)."""
    known = PRESETS[name]
    assert (known.size, known.frames, known.steps, known.passes) == (size, frames, steps, passes)
    assert (known.cross_tokens, known.joint_tokens) == text
    layout = known.layout(size, frames)
    assert layout.grid == grid
    assert layout.seqlen == math.prod(grid) + text[1]


def test_minimax_h3_counts_frames_in_clips_of_seventeen() -> None:
    known = PRESETS["minimax-h3"]
    assert known.grid((768, 1344), 124) == (37, 24, 42)
    with pytest.raises(GenAttnError, match=r"frames must be 17 \* n \+ 5 for minimax-h3, got 121; nearest: 107 or 124"):
        known.grid((768, 1344), 121)


@pytest.mark.parametrize("shape", PUBLISHED, ids=lambda shape: shape.name)
def test_published_shapes_name_their_source(shape: ModelPreset) -> None:
    assert shape.source
    assert PRESETS[shape.name].flops(shape.layout(shape.size, shape.frames))[1] > 0


def test_grouped_keys_and_a_narrow_width_cost_less() -> None:
    layout = TokenLayout.from_grid((64, 64))
    whole, known = PRESETS["krea2"], PRESETS["minimax-h3"]
    assert whole.flops(layout)[1] < replace(whole, kv_heads=0).flops(layout)[1]
    assert known.flops(layout)[1] < replace(known, width=0).flops(layout)[1]
    assert whole.flops(layout)[0] == replace(whole, kv_heads=0).flops(layout)[0]


def test_local_folder(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "num_layers": 6,
        "ffn_dim": 256,
        "patch_size": [1, 2, 2],
    }
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"scale_factor_spatial": 4, "scale_factor_temporal": 4}))
    planning = plan_settings(str(tmp_path), (64, 64), 29, target_density=0.9)
    assert planning.layout.grid == (8, 8, 8)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**config, "_class_name": "Other"}))
    with pytest.raises(GenAttnError, match="must hold a WanTransformer3DModel"):
        plan_settings(str(tmp_path))


def test_carried_over_decay_gives_the_released_window() -> None:
    assert carried_over_decay(1.0, 4096) == 1.0
    assert carried_over_decay(0.95, 3600) == pytest.approx(0.95 * 2048 / 3600)
    hunyuan = PRESETS["hunyuan-video"].radial
    ours, official = hunyuan[0].pattern, replace(hunyuan[1].pattern, sink=True)
    layout = TokenLayout.from_grid((32, 45, 80))
    assert ours.plan(layout).density == pytest.approx(official.plan(layout).density, rel=0.1)


def test_a_local_folder_is_planned_as_stock_wan_runs_it(random_wan_folder: Path) -> None:
    import diffusers

    found = preset(str(random_wan_folder))
    config = json.loads((random_wan_folder / "transformer" / "config.json").read_text())
    assert (found.heads, found.head_dim, found.layers) == (
        config["num_attention_heads"],
        config["attention_head_dim"],
        config["num_layers"],
    )
    stock = inspect.signature(diffusers.WanPipeline.__call__).parameters
    assert found.cross_tokens == stock["max_sequence_length"].default
    assert (found.steps, found.frames, found.passes) == (20, 29, 2)
    # 16 x 16 tokens
    assert found.layout(found.size, found.frames).grid[1:] == (16, 16)
