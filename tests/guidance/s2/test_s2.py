"""S2-Guidance: the draws, the formula against blocks left out by hand, and what is refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.passes.prediction import leaves
from genattn.guidance.s2 import S2Guidance
from genattn.guidance.s2.s2_guidance import drawn_layers
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 5), st.integers(0, 50))
@settings(max_examples=80, deadline=None)
def test_draws(count: int, ratio: float, seed: int, step: int) -> None:
    layers = list(range(1, count + 1))
    drawn = drawn_layers(layers, ratio, seed, step)
    assert drawn == sorted(set(drawn)) == drawn_layers(layers[::-1], ratio, seed, step)
    assert set(drawn) <= set(layers)
    assert len(drawn) == min(count, max(1, round(ratio * count)))


def test_steps_draw_differently() -> None:
    layers = list(range(20))
    assert len({tuple(drawn_layers(layers, 0.1, 0, step)) for step in range(20)}) > 10
    counts = [sum(layer in drawn_layers(layers, 0.1, 0, step) for step in range(2000)) for layer in layers]
    assert 140 < min(counts) <= max(counts) < 260
    assert any(drawn_layers(layers, 0.1, 0, step) != drawn_layers(layers, 0.1, 1, step) for step in range(5))


def run(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    out: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    return out


@pytest.mark.parametrize("reuse", ["auto", False])
@pytest.mark.parametrize(("family", "guidance_scale"), [("sd3", 1.0), ("sd3", 5.0), ("wan", 6.0), ("flux", 3.5)])
def test_equals_blocks_left_out_by_hand(family: str, guidance_scale: float, reuse: Any) -> None:
    """cond + CFG - w (dropped - cond), eq. 4, the dropped pass made by blocks that hand their input on."""
    pipe, call = build_pipeline(family, num_layers=4)
    call = {**call, "guidance_scale": guidance_scale, "output_type": "latent", "num_inference_steps": 4}
    model = pipe.transformer
    blocks = model.transformer_blocks if hasattr(model, "transformer_blocks") else model.blocks
    total = len(blocks) + len(getattr(model, "single_transformer_blocks", []))
    weight, seed = 0.7, 3
    with genattn.apply(pipe, S2Guidance(0.4, weight, start=0, stop=1, seed=seed, reuse_prefix=reuse)) as handle:
        found = run(pipe, call)
        counts = handle.report().plugins[0]["counts"]
    assert counts["extra_passes"] == 4

    chosen = [drawn_layers(list(range(1, total)), 0.4, seed, step) for step in range(4)]
    assert len(set(map(tuple, chosen))) > 1
    # what a user could do by hand: a fixed skip for every step
    plugins = [
        SoftPAG.stg(",".join(f"L{layer}" for layer in layers), scale=weight, start=step / 4, stop=step / 4)
        for step, layers in enumerate(chosen)
    ]
    with genattn.apply(pipe, *plugins):
        expected = run(pipe, call)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_formula_on_one_forward() -> None:
    model, inputs = build_model("sd3", num_layers=4), build_inputs("sd3")
    layers = drawn_layers([1, 2, 3], 0.1, 5, 0)
    block = model.transformer_blocks[layers[0]]
    with torch.no_grad():
        clean = leaves(model(**inputs))[0]
        stock = block.forward
        ends = layers[0] == 3
        block.forward = lambda hidden_states, encoder_hidden_states, **_: (
            None if ends else encoder_hidden_states,
            hidden_states,
        )
        dropped = leaves(model(**inputs))[0]
        block.forward = stock
        plugin = S2Guidance(0.1, 0.5, seed=5, layout="single", start=0, stop=1)
        with genattn.apply(model, plugin):
            found = leaves(model(**inputs))[0]
    torch.testing.assert_close(found, clean - 0.5 * (dropped - clean), atol=2e-6, rtol=0)


def test_settings_survive_a_file_and_are_told() -> None:
    plugin = S2Guidance(0.2, 0.3, keep=2, seed=7, stop=0.8)
    again = S2Guidance.from_settings(plugin.settings())
    assert again.settings() == plugin.settings()
    assert isinstance(again, S2Guidance)
    assert plugin.describe()["plugin"] == "S2Guidance"


@pytest.mark.parametrize(
    ("given_", "match"),
    [
        ({"ratio": 0.0}, "ratio must be above 0"),
        ({"ratio": 1.2}, r"ratio must be a number in \[0, 1\]"),
        ({"keep": -1}, "keep must be a whole number >= 0"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"scale": float("nan")}, "scale must be a finite number"),
    ],
)
def test_refuses(given_: dict[str, Any], match: str) -> None:
    with pytest.raises(GenAttnError, match=match):
        S2Guidance(**given_)


def test_refuses_to_keep_everything() -> None:
    with pytest.raises(GenAttnError, match="keep must leave blocks to drop, got keep=3 for 3 blocks"):
        genattn.apply(build_model("sd3"), S2Guidance(keep=3))
