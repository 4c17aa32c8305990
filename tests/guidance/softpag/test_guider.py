"""The modular guider equals the classic route, with CFG on and off, and leaves nothing behind."""

from typing import Any

import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.softpag.guider import SoftPAGGuidance
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.report import GenAttnWarning

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def modular(family: str, drop: tuple[str, ...] = ()) -> tuple[Any, Any, dict[str, Any]]:
    """A stock modular pipeline on the components of the classic one."""
    if family == "sd3":
        from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
            StableDiffusion3AutoBlocks as Blocks,
        )
    else:
        from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks as Blocks
    classic, kwargs = build_pipeline(family)
    blocks = Blocks()
    for name in drop:
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    names = [spec.name for spec in blocks.expected_components]
    pipe.update_components(**{name: getattr(classic, name) for name in names if getattr(classic, name, None) is not None})
    pipe.set_progress_bar_config(disable=True)
    return pipe, classic, {**kwargs, "output_type": "latent"}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("settings", [{}, {"perturb_start": 0.3, "apg_eta": 0.5}, {"rescale": 0.5}])
def test_equals_the_classic_route_on_sd3(guidance_scale: float, settings: dict) -> None:
    from genattn.guidance.passes.delta import Projection

    pipe, classic, kwargs = modular("sd3")
    heads = "L1H1:0.6,L2H3:1.0"
    pipe.update_components(guider=SoftPAGGuidance(heads=heads, scale=3.0, guidance_scale=guidance_scale, **settings))
    names = ("prompt", "height", "width", "num_inference_steps", "max_sequence_length")
    asked = {name: kwargs[name] for name in names}
    found = pipe(**asked, negative_prompt="", generator=generator(), output="latents")
    same = {
        "start": settings.get("perturb_start", 0.0),
        "rescale": settings.get("rescale", 0.0),
        "projection": Projection(0.5) if "apg_eta" in settings else None,
    }
    with genattn.apply(classic, SoftPAG(heads, scale=3.0, **same)):
        expected = classic(**{**kwargs, "guidance_scale": guidance_scale}, generator=generator())[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not pipe.guider._handles
    assert type(pipe.transformer) is type(build_model("sd3"))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_equals_the_classic_route_on_wan(guidance_scale: float) -> None:
    pipe, classic, kwargs = modular("wan", drop=("text_encoder",))
    texts = classic.encode_prompt(kwargs["prompt"], kwargs["negative_prompt"], max_sequence_length=16)
    pipe.update_components(guider=SoftPAGGuidance(heads="L1H1:0.7", scale=3.0, guidance_scale=guidance_scale))
    sizes = {name: kwargs[name] for name in ("height", "width", "num_frames", "num_inference_steps")}
    found = pipe(prompt_embeds=texts[0], negative_prompt_embeds=texts[1], **sizes, generator=generator(), output="latents")
    with genattn.apply(classic, SoftPAG("L1H1:0.7", scale=3.0)):
        expected = classic(**{**kwargs, "guidance_scale": guidance_scale}, generator=generator())[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_window_between_two_steps_is_told() -> None:
    pipe, _, kwargs = modular("sd3")
    names = ("prompt", "height", "width", "max_sequence_length")
    asked = {**{name: kwargs[name] for name in names}, "negative_prompt": "", "output": "latents"}
    idle = SoftPAGGuidance(heads="L1H1", perturb_start=0.6, perturb_stop=0.7)
    pipe.update_components(guider=idle)
    told = "SoftPAGGuidance acts at no step of a run of 2: its window is steps 0.6 to 0.7 of the run; widen it"
    with pytest.warns(GenAttnWarning, match=told) as noticed:
        unguided = pipe(**asked, num_inference_steps=2, generator=generator())
    assert len([w for w in noticed if issubclass(w.category, GenAttnWarning)]) == 1, "once a run"
    pipe.update_components(guider=SoftPAGGuidance(heads="L1H1", scale=0.0))
    assert torch.equal(pipe(**asked, num_inference_steps=2, generator=generator()), unguided)
    pipe.update_components(guider=SoftPAGGuidance(heads="L1H1", perturb_start=0.6, perturb_stop=0.7))
    pipe(**asked, num_inference_steps=3, generator=generator())  # step 2 of 3 lies in it


@pytest.mark.parametrize("family", ["qwen-image", "flux2", "z-image"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_guiders_loop_on_other_denoisers(family: str, guidance_scale: float) -> None:
    """The loop of every modular denoise block, around the denoiser alone."""
    model, inputs = build_model(family), build_inputs(family)
    other = build_inputs(family, seed=1)
    text = next(name for name in ("encoder_hidden_states", "cap_feats") if name in inputs)
    guider = SoftPAGGuidance(heads="L1", u=0.7, scale=2.0, guidance_scale=guidance_scale)
    forwards: list[str] = []

    def predict(text_input: Any) -> torch.Tensor:
        with torch.no_grad():
            out = model(**{**inputs, text: text_input, "return_dict": False})[0]
        return torch.stack(out) if isinstance(out, list) else out

    def step() -> torch.Tensor:
        guider.set_state(0, 1, torch.tensor(1.0))
        batches = guider.prepare_inputs({"text": (inputs[text], other[text])})
        for batch in batches:
            guider.prepare_models(model)
            forwards.append(f"{batch.__guidance_identifier__} {guider.is_conditional}")
            batch.noise_pred = predict(batch.text)
            guider.cleanup_models(model)
        return guider(batches).pred

    found = step()
    cond, uncond = predict(inputs[text]), predict(other[text])
    with genattn.apply(model, SoftPAG("L1", u=0.7, scale=2.0, layout="single")):
        guided = predict(inputs[text])
    expected = guided if guidance_scale == 1.0 else uncond + guidance_scale * (cond - uncond) + (guided - cond)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    middle = [] if guidance_scale == 1.0 else ["pred_uncond False"]
    assert forwards == ["pred_cond True", *middle, "pred_perturbed True"]


def test_settings_survive_a_file(tmp_path: Any) -> None:
    guider = SoftPAGGuidance(heads="L1H1:0.6", scale=2.0, perturb_stop=0.5, apg_eta=0.2)
    guider.save_pretrained(tmp_path)
    again = SoftPAGGuidance.from_pretrained(tmp_path)
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == {
        k: v for k, v in guider.config.items() if not k.startswith("_")
    }
    assert guider.new(scale=4.0).rule.scale == 4.0
    heads = HeadSet.from_names("L1H1:0.6", {0: 4, 1: 4}, scale=5.0, stop=0.4)
    made = SoftPAGGuidance.from_head_set(heads, guidance_scale=2.0)
    assert (made.rule.scale, made.window.stop, made.guidance_scale) == (5.0, 0.4, 2.0)


def test_windows_decide_the_passes() -> None:
    guider = SoftPAGGuidance(heads="L1", guidance_scale=5.0, perturb_start=0.5, stop=0.75)
    labels = []
    for step in range(4):
        guider.set_state(step, 4, torch.tensor(1.0))
        labels.append(guider.labels)
    both = ["pred_cond", "pred_uncond"]
    assert labels == [both, both, [*both, "pred_perturbed"], ["pred_cond", "pred_perturbed"]]
    guider.disable()
    assert guider.labels == ["pred_cond"]


def test_refusals() -> None:
    with pytest.raises(GenAttnError, match="perturbs heads, got target='skip'"):
        SoftPAGGuidance(heads="L1", target="skip")
    with pytest.raises(GenAttnError, match="scale must be a finite number"):
        SoftPAGGuidance(heads="L1", scale=float("nan"))
    with pytest.raises(GenAttnError, match="guidance_scale"):
        SoftPAGGuidance(heads="L1", guidance_scale=-1.0)
    guider, model = SoftPAGGuidance(heads="L9", guidance_scale=1.0), build_model("sd3")
    guider.set_state(0, 1, torch.tensor(1.0))
    guider.prepare_models(model)
    with pytest.raises(GenAttnError, match="got L9; it has L0-2"):
        guider.prepare_models(model)
    guider = SoftPAGGuidance(heads="L1", guidance_scale=1.0)
    guider.set_state(0, 1, torch.tensor(1.0))
    for _ in range(2):
        guider.prepare_models(model)
    with pytest.raises(GenAttnError, match="must come by, got no call"):
        guider.cleanup_models(model)
    guider.release()


def guided_step(guider: SoftPAGGuidance, model: Any, inputs: Any, at: tuple[int, int], broken: int | None = None) -> Any:
    """One step of a modular loop without CFG; `broken`: the pass that Ctrl-C ends."""
    guider.set_state(*at, torch.tensor(1.0))
    batches = guider.prepare_inputs({"text": (inputs["encoder_hidden_states"], inputs["encoder_hidden_states"])})
    for number, batch in enumerate(batches):
        guider.prepare_models(model)
        hook = model.transformer_blocks[2].register_forward_pre_hook(_stop) if number == broken else None
        try:
            with torch.no_grad():
                batch.noise_pred = model(**inputs, return_dict=False)[0]
        finally:
            if hook is not None:
                hook.remove()
        guider.cleanup_models(model)
    return guider(batches).pred


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_run_broken_off_in_its_perturbed_pass_leaves_the_next_one_alone() -> None:
    model, inputs = build_model("sd3"), build_inputs("sd3")
    with torch.no_grad():
        stock = model(**inputs, return_dict=False)[0]
    guider = SoftPAGGuidance(heads="L1", u=1.0, scale=2.0, guidance_scale=1.0)
    expected = guided_step(guider, model, inputs, (0, 1))
    with pytest.raises(KeyboardInterrupt):
        guided_step(guider, model, inputs, (0, 1), broken=1)
    with torch.no_grad():  # the user goes on without the guider
        assert torch.equal(model(**inputs, return_dict=False)[0], stock)
    assert torch.equal(guided_step(guider, model, inputs, (0, 1)), expected)
    # between two passes nobody is asked: the marks of a pass that was prepared and never ran go with the next one
    guider.set_state(0, 2, torch.tensor(1.0))
    for _ in range(2):
        guider.prepare_models(model)
    torch.testing.assert_close(guided_step(guider, model, inputs, (0, 1)), expected, atol=0, rtol=0)


def test_a_head_that_is_never_hit_is_told_where_guidance_begins_late() -> None:
    model = build_model("sd3")
    guider = SoftPAGGuidance(heads="L1", guidance_scale=1.0, perturb_start=0.5)
    guider.set_state(1, 2, torch.tensor(1.0))
    for _ in range(2):
        guider.prepare_models(model)
    with pytest.raises(GenAttnError, match="must come by, got no call"):
        guider.cleanup_models(model)
    assert not guider._handles
