"""SoftPAG on stock pipelines equals explicit attention maps and the term added after the pipeline's own guidance."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from explicit_guidance import guided_latents, halve

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.passes.delta import Projection
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_model, build_pipeline

first = lambda calls: calls[0]  # noqa: E731
second_half = lambda calls: halve(calls[0])  # noqa: E731
SD3_HEADS = {(1, 1): 0.6, (2, 0): 0.6, (2, 3): 1.0}
CASES: dict[str, tuple[str, dict[str, Any], dict, Callable]] = {
    "sd3 without CFG": ("sd3", {"guidance_scale": 1.0}, SD3_HEADS, first),
    "sd3 with concatenated CFG": ("sd3", {"guidance_scale": 5.0}, SD3_HEADS, second_half),
    "flux distilled, double and single blocks": ("flux", {}, {(1, 0): 0.5, (3, 1): 0.5}, first),
    "flux with true CFG": ("flux", {"true_cfg_scale": 3.0, "negative_prompt": "bad"}, {(0, 1): 0.7}, first),
    "wan with two passes": ("wan", {"guidance_scale": 5.0}, {(1, 1): 0.7, (2, 0): 0.3}, first),
    "wan without CFG": ("wan", {"guidance_scale": 1.0}, {(0, 0): 1.0}, first),
}


def pipeline(family: str, model: dict[str, Any] | None = None, **call: Any) -> tuple[Any, Callable[[], torch.Tensor]]:
    pipe, kwargs = build_pipeline(family, **(model or {}))
    kwargs = {**kwargs, "output_type": "latent", **call}
    return pipe, lambda: pipe(**kwargs, generator=torch.Generator().manual_seed(0))[0]


def rows(pipe: Any, heads: dict[tuple[int, int], float]) -> dict[int, torch.Tensor]:
    count = pipe.transformer.config.num_attention_heads
    found: dict[int, torch.Tensor] = {}
    for (layer, head), u in heads.items():
        found.setdefault(layer, torch.zeros(count))[head] = u
    return found


@pytest.mark.parametrize("mode", ["extra", "batched"])
@pytest.mark.parametrize("name", CASES)
def test_equals_explicit_maps(name: str, mode: str) -> None:
    family, settings, heads, pick = CASES[name]
    pipe, call = pipeline(family, **settings)
    plain = call()
    expected = guided_latents(pipe, call, rows(pipe, heads), 3.0, pick)
    with genattn.apply(pipe, SoftPAG(heads, scale=3.0, mode=mode)):
        found = call()
    assert (expected - plain).abs().max() > 1e-3
    assert (found - expected).abs().max() <= 1e-5
    assert torch.equal(call(), plain)


def test_equals_explicit_maps_with_qk_norm_and_dual_attention() -> None:
    pipe, call = pipeline("sd3", {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, guidance_scale=5.0)
    expected = guided_latents(pipe, call, rows(pipe, SD3_HEADS), 3.0, second_half)
    with genattn.apply(pipe, SoftPAG(SD3_HEADS, scale=3.0)):
        assert (call() - expected).abs().max() <= 1e-5


def test_equals_explicit_maps_with_skip_layer_guidance() -> None:
    settings = {"guidance_scale": 5.0, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    pipe, call = pipeline("sd3", **settings, skip_layer_guidance_start=-1.0)
    expected = guided_latents(pipe, call, rows(pipe, SD3_HEADS), 3.0, second_half)
    with genattn.apply(pipe, SoftPAG(SD3_HEADS, scale=3.0)):
        assert (call() - expected).abs().max() <= 1e-5


def test_equals_explicit_maps_on_two_experts() -> None:
    pipe, call = pipeline("wan", guidance_scale=5.0)
    pipe.register_modules(transformer_2=build_model("wan", seed=1))
    pipe.register_to_config(boundary_ratio=0.9)
    heads = {(1, 1): 0.7}
    expected = guided_latents(pipe, call, rows(pipe, heads), 3.0, first, ("transformer", "transformer_2"))
    with genattn.apply(pipe, SoftPAG(heads, scale=3.0)) as handle:
        assert (call() - expected).abs().max() <= 1e-5
        assert handle.plugins[0].counts["extra_passes"] == 3
    assert len({id(pipe.transformer), id(pipe.transformer_2)}) == 2


def test_acts_only_inside_its_window() -> None:
    pipe, call = pipeline("wan", num_inference_steps=5)
    heads = {(1, 1): 0.7}
    expected = guided_latents(pipe, call, rows(pipe, heads), 3.0, first, steps=range(1, 3))
    with genattn.apply(pipe, SoftPAG(heads, scale=3.0, start=0.1, stop=0.4)) as handle:
        assert (call() - expected).abs().max() <= 1e-5
        assert handle.plugins[0].counts["guided_steps"] == 2
        assert handle.plugins[0].plan(5)["guided_steps"] == [1, 2]
    with genattn.apply(pipe, SoftPAG(heads, scale=3.0, sigma_start=0.98, sigma_stop=0.9)) as handle:
        call()
        sigmas = pipe.scheduler.sigmas[:5]
        assert handle.plugins[0].counts["guided_steps"] == ((sigmas <= 0.98) & (sigmas >= 0.9)).sum() > 0


@pytest.mark.parametrize("settings", [{"u": 0.0}, {"scale": 0.0}])
def test_nothing_asked_is_nothing_done(settings: dict) -> None:
    pipe, call = pipeline("sd3")
    plain = call()
    with genattn.apply(pipe, SoftPAG("L1", **settings)):
        torch.testing.assert_close(call(), plain, atol=2e-6, rtol=0)


def test_one_call_may_set_its_own_scale() -> None:
    pipe, call = pipeline("sd3", joint_attention_kwargs={"genattn": {"softpag_scale": 1.5}})
    with genattn.apply(pipe, SoftPAG("L1", scale=3.0)):
        asked = call()
    other, plain_call = pipeline("sd3")
    with genattn.apply(other, SoftPAG("L1", scale=1.5)):
        assert torch.equal(plain_call(), asked)


def test_batch_of_prompts_equals_prompts_alone() -> None:
    prompts = ["a red cat", "two dogs"]
    pipe, kwargs = build_pipeline("sd3")
    kwargs |= {"output_type": "latent"}
    noise = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(3))
    heads = [{(1, 1): 0.6}, {(2, 0): 1.0}]
    with genattn.apply(pipe, SoftPAG(per_sample=heads)):
        together = pipe(**{**kwargs, "prompt": prompts, "latents": noise[..., :8, :6]})[0]
    for i in range(2):
        with genattn.apply(pipe, SoftPAG(heads[i])):
            alone = pipe(**{**kwargs, "prompt": prompts[i], "latents": noise[i : i + 1, ..., :8, :6]})[0]
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=0)


def test_reports_what_it_did() -> None:
    pipe, call = pipeline("sd3")
    with genattn.apply(pipe, SoftPAG("L1H0,L2H1", scale=3.0)) as handle:
        assert handle.plugins[0].plan(10) == {
            "guided_steps": list(range(10)),
            "share_of_blocks": pytest.approx(2 / 3, abs=1e-4),
            "extra_passes": pytest.approx(20 / 3, abs=1e-3),
        }
        call()
        told = handle.report().to_dict()["plugins"][0]
    assert told["counts"] == {"extra_passes": 3, "guided_steps": 3}
    assert told["models"]["SD3Transformer2DModel"] == {
        "heads": ["L1H0", "L2H1"],
        "hits": {"L1": 3, "L2": 3},
        "blocks_per_extra_pass": pytest.approx(2 / 3, abs=1e-4),
        "why_whole": None,
    }
    assert handle.report().to_dict()["plugins"][0] == told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ""}, "at least one head"),
        ({"heads": None}, "either heads or per_sample"),
        ({"per_sample": []}, "one selection per sample"),
        ({"heads": "L1", "u": 1.5}, "u must be a number"),
        ({"heads": "L1", "u": float("nan")}, "u must be a number"),
        ({"heads": "L1", "scale": float("nan")}, "scale must be a finite number"),
        ({"heads": "L1", "scale": float("inf")}, "scale must be a finite number"),
        ({"heads": "L1", "target": "blur"}, "target must be one of"),
        ({"heads": "L1", "start": 0.8, "stop": 0.5}, "stop must be a number"),
        ({"heads": "L1", "mode": "twice"}, "mode must be one of"),
        ({"heads": "L1", "layout": "pairs"}, "layout must be one of"),
        ({"heads": "L1", "reuse_prefix": "yes"}, "reuse_prefix must be"),
        ({"heads": "L1", "target": "skip", "mode": "batched"}, "needs a pass of its own"),
    ],
)
def test_refuses_settings(settings: dict, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        SoftPAG(**settings)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (SoftPAG("L3H0"), "L0-2 with heads H0-3 each"),
        (SoftPAG("L1H4"), "layer 1 has heads H0-3, got L1H4"),
        (SoftPAG("L1H1", target="skip"), "must leave out whole layers"),
        (SoftPAG(per_sample=["", ""]), "at least one sample must have heads"),
        (SoftPAG("L0H0", reuse_prefix=True), "the first block is perturbed"),
    ],
)
def test_refuses_before_any_step(plugin: SoftPAG, message: str) -> None:
    model = build_model("sd3")
    with pytest.raises(GenAttnError, match=message):
        genattn.apply(model, plugin)
    assert type(model).__name__ == type(build_model("sd3")).__name__


def test_refuses_a_bad_option() -> None:
    pipe, call = pipeline("sd3", joint_attention_kwargs={"genattn": {"softpag_scale": float("nan")}})
    with genattn.apply(pipe, SoftPAG("L1")), pytest.raises(GenAttnError, match="scale must be a finite number"):
        call()
    with pytest.raises(GenAttnError, match="a plan needs the model"):
        SoftPAG("L1").plan(3)


def test_refuses_a_layer_that_never_comes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = pipeline("sd3")
    block = pipe.transformer.transformer_blocks[1]
    monkeypatch.setattr(
        block, "forward", lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    )
    with genattn.apply(pipe, SoftPAG("L1,L2")), pytest.raises(GenAttnError, match=r"no call from layers \[1\]"):
        call()


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_momentum_ends_with_its_run(family: str) -> None:
    """The same seed twice under one handle is the same picture twice."""
    pipe, call = pipeline(family, guidance_scale=1.0)
    with genattn.apply(pipe, SoftPAG("L1H1", u=0.7, scale=3.0)):
        without = call()
    with genattn.apply(pipe, SoftPAG("L1H1", u=0.7, scale=3.0, projection=Projection(momentum=-0.5))):
        first, second = call(), call()
    assert torch.equal(first, second)
    assert not torch.allclose(first, without, atol=1e-4), "momentum did something"
