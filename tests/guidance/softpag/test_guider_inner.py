"""A guider inside: the modular loop gives what both give when run by hand, for every guider of diffusers that can be inside."""

from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import guiders

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.softpag.guider import SoftPAGGuidance
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model

STEPS = 3
HEADS, U, SCALE = "L1", 0.7, 2.0
INNER: dict[str, dict[str, Any]] = {
    "ClassifierFreeGuidance": {"guidance_scale": 4.0, "guidance_rescale": 0.3},
    "ClassifierFreeZeroStarGuidance": {"guidance_scale": 4.0, "zero_init_steps": 1},
    "AdaptiveProjectedGuidance": {"guidance_scale": 4.0, "adaptive_projected_guidance_momentum": -0.5, "eta": 0.3},
    "AdaptiveProjectedMixGuidance": {"guidance_scale": 4.0, "adaptive_projected_guidance_start_step": 1},
    "TangentialClassifierFreeGuidance": {"guidance_scale": 4.0},
    "MagnitudeAwareGuidance": {"guidance_scale": 4.0},
    "FrequencyDecoupledGuidance": {"guidance_scales": [6.0, 3.0]},
    "SkipLayerGuidance": {"guidance_scale": 4.0, "skip_layer_guidance_layers": None, "skip_layer_guidance_start": 0.0},
    "AutoGuidance": {"guidance_scale": 4.0, "dropout": 0.0},
    "PerturbedAttentionGuidance": {"guidance_scale": 4.0, "perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0},
    "SmoothedEnergyGuidance": {"guidance_scale": 4.0, "seg_guidance_start": 0.0, "seg_guidance_stop": 1.0},
}


def made(name: str) -> Any:
    settings = dict(INNER[name])
    if name in ("SkipLayerGuidance", "AutoGuidance"):
        layers = {"skip_attention": True, "skip_ff": False, "skip_attention_scores": False}
        config = diffusers.LayerSkipConfig(indices=[1], fqn="transformer_blocks", **layers)
        if name == "SkipLayerGuidance":
            settings |= {"skip_layer_config": config, "skip_layer_guidance_stop": 1.0}
        else:
            settings |= {"auto_guidance_config": config}
            settings.pop("dropout")
    elif name == "PerturbedAttentionGuidance":
        scores = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True}
        settings["perturbed_guidance_config"] = diffusers.LayerSkipConfig(indices=[1], fqn="transformer_blocks", **scores)
    elif name == "SmoothedEnergyGuidance":
        settings["seg_guidance_config"] = diffusers.SmoothedEnergyGuidanceConfig(indices=[1], fqn="transformer_blocks")
    return getattr(guiders, name)(**settings)


def pyramids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Laplacian pyramid in the place of kornia's, which is not needed to add two things up."""
    from diffusers.guiders import frequency_decoupled_guidance as module

    def up(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear")

    def build(x: torch.Tensor, levels: int) -> list[torch.Tensor]:
        parts = []
        for _ in range(levels - 1):
            low = F.avg_pool2d(x, 2)
            parts.append(x - up(low))
            x = low
        return [*parts, x]

    monkeypatch.setattr(module, "_CAN_USE_KORNIA", True)
    monkeypatch.setattr(module, "build_laplacian_pyramid_func", build)
    monkeypatch.setattr(module, "upsample_and_blur_func", up)
    monkeypatch.setattr(module, "is_kornia_available", lambda: True)


class Loop:
    """The loop of a modular denoise block around the denoiser alone."""

    def __init__(self, flat: bool = False) -> None:
        self.flat = flat
        self.model, self.inputs, self.other = build_model("pixart"), build_inputs("pixart"), build_inputs("pixart", seed=1)
        self.calls = 0

    def predict(self, text: torch.Tensor, step: int) -> torch.Tensor:
        self.calls += 1
        latents = self.inputs["hidden_states"] * (1 + 0.1 * step)
        with torch.no_grad():
            inputs = {**self.inputs, "hidden_states": latents, "encoder_hidden_states": text, "return_dict": False}
            found = self.model(**inputs)[0][:, :4]
        return found.flatten(2) if self.flat else found

    def run(self, guider: Any) -> list[torch.Tensor]:
        found = []
        for step in range(STEPS):
            guider.set_state(step, STEPS, torch.tensor(1.0))
            batches = guider.prepare_inputs(
                {"text": (self.inputs["encoder_hidden_states"], self.other["encoder_hidden_states"])}
            )
            for batch in batches:
                guider.prepare_models(self.model)
                batch.noise_pred = self.predict(batch.text, step)
                guider.cleanup_models(self.model)
            found.append(guider(batches).pred)
        return found

    def deltas(self) -> list[torch.Tensor]:
        text = self.inputs["encoder_hidden_states"]
        with genattn.apply(self.model, SoftPAG(HEADS, u=U, scale=SCALE, layout="single")):
            pushed = [self.predict(text, step) for step in range(STEPS)]
        return [p - self.predict(text, step) for step, p in enumerate(pushed)]


def test_no_guider_of_diffusers_is_left_out() -> None:
    known = {name for name, kind in vars(guiders).items() if isinstance(kind, type) and issubclass(kind, guiders.BaseGuidance)}
    assert "ClassifierFreeGuidance" in known
    assert known - {"BaseGuidance", "LTX2Guidance"} <= set(INNER)


@pytest.mark.parametrize("name", INNER)
def test_equals_both_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(guiders, name):
        pytest.skip(f"this diffusers has no {name}")
    if name == "FrequencyDecoupledGuidance":
        pyramids(monkeypatch)
    # the stock guider takes norms over two axes at most, as packed predictions have them
    loop = Loop(flat=name == "MagnitudeAwareGuidance")
    alone, deltas = loop.run(made(name)), loop.deltas()
    zero = INNER[name].get("zero_init_steps", 0)
    expected = [a + (0 if step < zero else d) for step, (a, d) in enumerate(zip(alone, deltas, strict=True))]
    assert max(float(d.abs().max()) for d in deltas) > 1e-3
    found = loop.run(SoftPAGGuidance(heads=HEADS, u=U, scale=SCALE, inner=made(name)))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, atol=2e-5, rtol=0)


def test_a_window_of_the_inner_guider_is_its_own() -> None:
    loop = Loop()
    inner = diffusers.ClassifierFreeGuidance(guidance_scale=4.0, stop=0.5)
    guider = SoftPAGGuidance(heads=HEADS, scale=SCALE, inner=inner, perturb_start=0.5)
    labels = []
    for step in range(4):
        guider.set_state(step, 4, torch.tensor(1.0))
        labels.append(guider.labels)
    both = ["pred_cond", "pred_uncond"]
    assert labels == [both, both, ["pred_cond", "pred_perturbed"], ["pred_cond", "pred_perturbed"]]
    guider.disable()
    guider.set_state(0, 4, torch.tensor(1.0))
    assert guider.labels == ["pred_cond"]
    guider.enable()
    assert guider.labels == both
    assert loop.model is not None


def test_settings_survive_a_file(tmp_path: Any) -> None:
    guider = SoftPAGGuidance(heads="L1", inner=diffusers.AdaptiveProjectedGuidance(guidance_scale=3.0, eta=0.2))
    guider.save_pretrained(tmp_path)
    again = SoftPAGGuidance.from_pretrained(tmp_path)
    assert type(again.inner) is diffusers.AdaptiveProjectedGuidance
    assert (again.inner.guidance_scale, again.inner.eta) == (3.0, 0.2)
    assert guider.new(scale=1.0).inner.eta == 0.2


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"inner": "cfg"}, "must be a guider of diffusers, got str"),
        ({"inner": {"_class_name": "Nothing"}}, "must name a guider of diffusers, got 'Nothing'"),
        (
            {"inner": {"_class_name": "ClassifierFreeGuidance"}, "guidance_scale": 3.0},
            "guidance_scale must be its own settings",
        ),
        ({"inner": {"_class_name": "ClassifierFreeGuidance"}, "stop": 0.5}, "stop must be its own settings"),
    ],
)
def test_refusals(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(GenAttnError, match=match):
        SoftPAGGuidance(heads="L1", **settings)


def test_guiders_that_cannot_be_inside() -> None:
    with pytest.raises(GenAttnError, match="must be another guider, got a SoftPAGGuidance"):
        SoftPAGGuidance(heads="L1", inner=SoftPAGGuidance(heads="L0"))
    if hasattr(diffusers, "LTX2Guidance"):
        with pytest.raises(GenAttnError, match="must combine predictions of one space, got LTX2Guidance"):
            SoftPAGGuidance(heads="L1", inner=diffusers.LTX2Guidance())
