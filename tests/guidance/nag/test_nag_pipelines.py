"""NAG in whole stock pipelines: the text that it is given, batches, guidance, caches, patterns, company."""

from collections.abc import Callable
from typing import Any

import older_diffusers
import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.nag import NAG
from genattn.guidance.nag.carriers import Carried, _with_tokens
from genattn.guidance.nag.encode import encode
from genattn.guidance.nag.ways import WAYS
from genattn.guidance.passes.prediction import leaves
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.layouts.site import AttentionSite
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline, pipeline_families
from genattn.seam.plugin import AttentionCall, Inner, Plugin
from genattn.seam.report import GenAttnWarning

TEMPLATE = {"prompt_template": {"template": "{}", "crop_start": 0}}
STRONG = {"scale": 4.0, "alpha": 0.6, "tau": 1.3}
pytestmark = [pytest.mark.filterwarnings("ignore:In CPU autocast"), pytest.mark.filterwarnings("ignore:CPU Autocast")]


def unguided(family: str, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline without classifier-free guidance."""
    pipe, call = build_pipeline(family, **config)
    if family == "qwen-image":
        return pipe, {**call, "true_cfg_scale": 1.0, "negative_prompt": None, "output_type": "latent"}
    scale = {} if family in ("flux", "hunyuan-video") else {"guidance_scale": 1.0}
    return pipe, {**call, **scale, "output_type": "latent"}


def sampled(pipe: Any, call: dict[str, Any], **more: Any) -> torch.Tensor:
    seeds = more.pop("seeds", None)
    generator = torch.Generator().manual_seed(0) if seeds is None else [torch.Generator().manual_seed(s) for s in seeds]
    out: torch.Tensor = pipe(**{**call, **more}, generator=generator)[0]
    return out


def nag(family: str, text: Any = "red dog", **settings: Any) -> NAG:
    extra = {"encode": TEMPLATE} if family == "hunyuan-video" else {}
    return NAG(text, **{**STRONG, **extra, **settings})


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


class Stop(Exception):
    """The denoiser has been told."""


def told(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline hands to its denoiser first."""
    model, seen = denoiser(pipe), {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        names = ("sample", "timestep", "encoder_hidden_states")
        seen.update(dict(zip(names, args)) | kwargs)
        raise Stop

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with pytest.raises(Stop):
            sampled(pipe, call)
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", pipeline_families())
def test_the_negative_is_what_the_pipeline_would_say_of_it(family: str) -> None:
    pipe, call = unguided(family)
    negative, positive = told(pipe, {**call, "prompt": "red dog"}), told(pipe, call)
    found = encode(pipe, denoiser(pipe), ["red dog"], positive, TEMPLATE if family == "hunyuan-video" else {})
    assert found
    for name, value in found.items():
        expected = negative[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.to(expected).expand_as(expected), expected), name
        elif value is not None:
            assert all(torch.equal(a, b) for a, b in zip(value, expected, strict=True)), name


@pytest.mark.parametrize("family", pipeline_families())
def test_guides_and_leaves_without_trace(family: str) -> None:
    pipe, call = unguided(family)
    stock = sampled(pipe, call)
    with genattn.apply(pipe, nag(family)) as handle:
        guided = sampled(pipe, call)
        counts = handle.report().plugins[0]["counts"]
    assert torch.isfinite(guided).all()
    assert (guided - stock).abs().max() > 1e-4
    assert counts["guided_forwards"] == call["num_inference_steps"]
    assert counts["encoded"] == 1
    assert torch.equal(sampled(pipe, call), stock)
    with genattn.apply(pipe, nag(family, scale=1.0)) as handle:
        assert torch.equal(sampled(pipe, call), stock)


@pytest.mark.parametrize("family", ["sd3", "wan", "unet", "flux"])
def test_a_negative_per_prompt_and_several_images(family: str) -> None:
    """Each sample is guided as if it were alone."""
    pipe, call = unguided(family)
    texts, prompts = ["red dog", "blue sky and more"], ["a cat", "two cats"]
    count = {"num_videos_per_prompt" if family == "wan" else "num_images_per_prompt": 2}
    with genattn.apply(pipe, nag(family, texts)):
        together = sampled(pipe, call, prompt=prompts, seeds=[1, 2, 3, 4], **count)
    for index, seed in enumerate([1, 2, 3, 4]):
        with genattn.apply(pipe, nag(family, texts[index // 2])):
            alone = sampled(pipe, call, prompt=prompts[index // 2], seeds=[seed])
        torch.testing.assert_close(together[index], alone[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("texts", [["a", "b", "c"], ["a", "b"]])
def test_refuses_a_list_of_another_length(texts: list[str]) -> None:
    pipe, call = unguided("sd3")
    prompts = ["x", "y"] if len(texts) == 3 else ["w", "x", "y", "z"]
    calls: list[int] = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with genattn.apply(pipe, nag("sd3", texts)), pytest.raises(GenAttnError, match="one text or one per prompt"):
        sampled(pipe, call, prompt=prompts)
    hook.remove()
    assert not calls


def test_conditional_samples_alone_are_guided() -> None:
    model, inputs = build_model("sd3"), build_inputs("sd3")
    text = torch.randn(1, 11, 32)
    one = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with torch.no_grad():
        stock = leaves(model(**inputs))[0]
        with genattn.apply(model, NAG(negative_embeds=text, **STRONG, layout="uncond_cond")):
            both = leaves(model(**inputs))[0]
        with genattn.apply(model, NAG(negative_embeds=text, **STRONG, layout="single")):
            alone = leaves(model(**one))[0]
    torch.testing.assert_close(both[0], stock[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(both[1], alone[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_beside_classifier_free_guidance(family: str) -> None:
    """One batch or two calls: the pipeline's own guidance goes on, and only its conditional half is guided."""
    pipe, call = build_pipeline(family)
    call = {**call, "output_type": "latent", "negative_prompt": "bad"}
    stock = sampled(pipe, call)
    with genattn.apply(pipe, nag(family)) as handle:
        guided = sampled(pipe, call)
        assert handle.report().plugins[0]["counts"]["guided_forwards"] == call["num_inference_steps"]
    assert (guided - stock).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_tells_when_guidance_has_the_same_negative(family: str) -> None:
    pipe, call = build_pipeline(family)
    with genattn.apply(pipe, nag(family, "red dog")), pytest.warns(GenAttnWarning, match="with NAG it acts twice"):
        sampled(pipe, {**call, "output_type": "latent"}, negative_prompt="red dog")


@pytest.mark.parametrize("family", ["flux", "hunyuan-video", "sd3", "wan", "cogvideox"])
def test_a_pattern_that_lets_all_through_changes_nothing(family: str) -> None:
    pipe, call = unguided(family)
    with genattn.apply(pipe, nag(family)):
        dense = sampled(pipe, call)
    with genattn.apply(pipe, NeighborhoodPattern(-1), nag(family)) as handle:
        sparse = sampled(pipe, call)
        rows = [row for row in handle.report().sites if row["sparse"]]
    torch.testing.assert_close(sparse, dense, atol=2e-4, rtol=0)
    assert rows


@pytest.mark.parametrize("family", ["flux", "hunyuan-video"])
def test_a_sparse_pattern_acts_on_both_answers(family: str) -> None:
    """The image's part is sparse beside either text: the long way with the same pattern."""
    pipe, call = unguided(family)
    pattern = NeighborhoodPattern(3)
    with genattn.apply(pipe, nag(family)):
        dense = sampled(pipe, call)
    with genattn.apply(pipe, pattern, nag(family)):
        first = sampled(pipe, call)
    with genattn.apply(pipe, nag(family), pattern):
        second = sampled(pipe, call)
    assert (first - dense).abs().max() > 1e-4
    assert torch.equal(first, second)


def cached(model: Any, threshold: float) -> None:
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))


@pytest.mark.parametrize("window", [{}, {"start": 0.4}, {"stop": 0.3}], ids=str)
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_cache_that_never_skips_changes_nothing(family: str, window: dict[str, float]) -> None:
    pipe, call = unguided(family)
    with genattn.apply(pipe, nag(family, **window)):
        expected = sampled(pipe, call)
    pipe, call = unguided(family)  # before 0.40 a cache that is put on after a call of the pipeline is told no context
    cached(pipe.transformer, 0.0)
    with genattn.apply(pipe, nag(family, **window)):
        found = sampled(pipe, call)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_a_cache_that_skips_keeps_guiding(family: str) -> None:
    pipe, call = unguided(family)
    cached(pipe.transformer, 100.0)
    stock = sampled(pipe, call)
    with genattn.apply(pipe, nag(family)):
        guided = sampled(pipe, call)
    assert torch.isfinite(guided).all()
    assert (guided - stock).abs().max() > 1e-4


def test_window_and_option() -> None:
    pipe, call = unguided("sd3")
    with genattn.apply(pipe, nag("sd3", start=0.5)) as handle:
        sampled(pipe, call)
        assert handle.report().plugins[0]["counts"]["guided_forwards"] == 1
        assert handle.report().plugins[0]["window"] == "steps 0.5 to 1 of the run"
    with genattn.apply(pipe, nag("sd3")) as handle:
        stock = sampled(pipe, call, joint_attention_kwargs={"genattn": {"nag_scale": 1.0}})
        weak = sampled(pipe, call, joint_attention_kwargs={"genattn": {"nag_scale": 2.0}})
        with pytest.raises(GenAttnError, match="scale must be a finite number of at least 1"):
            handle.set(nag_scale=0.5)
    assert torch.equal(stock, sampled(pipe, call))
    assert not torch.equal(stock, weak)


def test_heads_that_are_not_named_keep_their_answer() -> None:
    model, inputs = build_model("sd3"), build_inputs("sd3")
    text = torch.randn(1, 11, 32)
    answers = {}
    with torch.no_grad():
        for heads in (None, "L0-2", "L1H1", "L2"):
            with genattn.apply(model, NAG(negative_embeds=text, heads=heads, **STRONG, layout="single")):
                answers[heads] = leaves(model(**inputs))[0]
        stock = leaves(model(**inputs))[0]
    assert torch.equal(answers[None], answers["L0-2"])
    distance = {heads: float((answer - stock).abs().mean()) for heads, answer in answers.items()}
    assert 0 < distance["L1H1"] < distance[None]
    assert 0 < distance["L2"] < distance[None]


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("family", ["sd3", "wan", "flux"])
def test_with_softpag_in_either_order(family: str, reuse: bool) -> None:
    """Both passes of SoftPAG are guided, so the push is that of the heads alone."""
    pipe, call = unguided(family)
    heads = "L2H1"
    # without the cap NAG is linear, and it does not matter whether heads are drawn to the identity before or after
    uncapped = {"tau": 1e6}
    with genattn.apply(pipe, SoftPAG(heads, reuse_prefix=False), nag(family, **uncapped)):
        expected = sampled(pipe, call)
    settings = {"reuse_prefix": "auto" if reuse else False}
    with genattn.apply(pipe, SoftPAG(heads, **settings), nag(family, **uncapped)) as handle:
        torch.testing.assert_close(sampled(pipe, call), expected, atol=1e-5, rtol=0)
        assert handle.plugins[0].counts["extra_passes"] == call["num_inference_steps"]
    with genattn.apply(pipe, nag(family, **uncapped), SoftPAG(heads, **settings)):
        torch.testing.assert_close(sampled(pipe, call), expected, atol=2e-5, rtol=0)


def compiled_regionally(pipe: Any) -> None:
    torch._dynamo.reset()
    stack = pipe.transformer.transformer_blocks if hasattr(pipe.transformer, "transformer_blocks") else pipe.transformer.blocks
    for block in stack:
        block.compile(backend="eager", fullgraph=True)


def group_offload(pipe: Any) -> None:
    older_diffusers.offload_layers(pipe.transformer)


def model_offload(pipe: Any) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")


def lora(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    targets = ["to_k", "add_k_proj"] if hasattr(pipe.transformer, "transformer_blocks") else ["to_k"]
    torch.manual_seed(3)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.compiled
@pytest.mark.parametrize("put", [compiled_regionally, group_offload, model_offload], ids=lambda put: put.__name__)
@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_beside_compilation_and_offload(family: str, put: Callable[[Any], Any]) -> None:
    pipe, call = unguided(family)
    with genattn.apply(pipe, nag(family)):
        expected = sampled(pipe, call)
    pipe, call = unguided(family)
    put(pipe)
    with genattn.apply(pipe, nag(family)):
        torch.testing.assert_close(sampled(pipe, call), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_a_lora_on_the_text_keys_counts_for_both_texts(family: str) -> None:
    """With its scale at 0 the adapter is as good as absent, for the negative text too."""
    pipe, call = unguided(family)
    with genattn.apply(pipe, nag(family)):
        expected = sampled(pipe, call)
    lora(pipe)
    key = "joint_attention_kwargs" if family == "sd3" else "attention_kwargs"
    with genattn.apply(pipe, nag(family)):
        torch.testing.assert_close(sampled(pipe, call, **{key: {"scale": 0.0}}), expected, atol=1e-5, rtol=0)
        assert (sampled(pipe, call, **{key: {"scale": 1.0}}) - expected).abs().max() > 1e-4
        torch.testing.assert_close(sampled(pipe, call, **{key: {"scale": 0.0}}), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["sd3", "wan"])
def test_a_lora_scale_reaches_the_blocks_that_softpag_remembers(family: str) -> None:
    pipe, call = unguided(family)
    with genattn.apply(pipe, SoftPAG("L2H1")):
        expected = sampled(pipe, call)
    lora(pipe)
    key = "joint_attention_kwargs" if family == "sd3" else "attention_kwargs"
    with genattn.apply(pipe, SoftPAG("L2H1")):
        torch.testing.assert_close(sampled(pipe, call, **{key: {"scale": 0.0}}), expected, atol=1e-5, rtol=0)


def test_embeds_instead_of_prompts() -> None:
    pipe, call = unguided("sd3")
    with genattn.apply(pipe, nag("sd3")):
        expected = sampled(pipe, call)
    embeds = pipe.encode_prompt(["red dog"] * 1, None, None, do_classifier_free_guidance=False, max_sequence_length=16)[0]
    mine = pipe.encode_prompt(["a cat"], None, None, do_classifier_free_guidance=False, max_sequence_length=16)
    pipe.text_encoder = pipe.text_encoder_2 = pipe.text_encoder_3 = None
    texts = {"prompt": None, "prompt_embeds": mine[0], "pooled_prompt_embeds": mine[2]}
    with genattn.apply(pipe, NAG(negative_embeds=embeds, **STRONG)):
        torch.testing.assert_close(sampled(pipe, call, **texts), expected, atol=1e-5, rtol=0)
    with genattn.apply(pipe, nag("sd3")), pytest.raises(GenAttnError, match="needs the text encoder"):
        sampled(pipe, call, **texts)


def test_both_experts_are_guided() -> None:
    """Wan 2.2: where one of them alone is guided, another clip comes out."""
    pipe, call = unguided("wan-experts")
    stock = sampled(pipe, call)
    found = []
    for target in (pipe, pipe.transformer, pipe.transformer_2):
        negative = pipe.encode_prompt("red dog", do_classifier_free_guidance=False, max_sequence_length=16)[0]
        with genattn.apply(target, NAG(negative_embeds=negative, **STRONG)) as handle:
            found.append((sampled(pipe, call), handle.report().plugins[0]["counts"]["guided_forwards"]))
    assert found[0][1] == found[1][1] + found[2][1] == call["num_inference_steps"]
    assert min(found[1][1], found[2][1]) > 0
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(found[one][0], found[other][0], atol=1e-4)
    assert torch.equal(sampled(pipe, call), stock)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"negative_prompt": "x", "tau": 0.5}, "tau must be a finite number of at least 1, got 0.5"),
        ({"negative_prompt": "x", "scale": float("nan")}, "scale must be a finite number of at least 1, got nan"),
        ({"negative_prompt": "x", "scale": 0.5}, "scale must be a finite number of at least 1"),
        ({"negative_prompt": "x", "alpha": 1.5}, r"alpha must be a number in \[0, 1\], got 1.5"),
        ({"negative_prompt": "x", "tau": float("nan")}, "tau must be a finite number of at least 1, got nan"),
        ({"negative_prompt": "x", "alpha": float("nan")}, r"alpha must be a number in \[0, 1\], got nan"),
        ({"negative_prompt": "x", "alpha": -0.1}, r"alpha must be a number in \[0, 1\]"),
        ({"negative_prompt": "x", "start": 0.8, "stop": 0.2}, "stop must be a number in"),
        ({"negative_prompt": "x", "layout": "both"}, "layout must be one of"),
        ({"negative_prompt": ""}, "must say something, got ''"),
        ({"negative_prompt": ["x", " "]}, "must say something"),
        ({"negative_prompt": []}, "must be a text or a list of texts"),
        ({"negative_prompt": [3]}, "must be a text or a list of texts"),
        ({}, "either negative_prompt or negative_embeds must be given"),
        ({"negative_prompt": "x", "negative_embeds": torch.zeros(1, 2, 3)}, "either negative_prompt or negative_embeds"),
    ],
)
def test_refuses_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(GenAttnError, match=match):
        NAG(**settings)


def test_refuses_models_and_company_before_any_step() -> None:
    pipe, call = unguided("sd3")
    with pytest.raises(GenAttnError, match="it has L0-2 with heads"):
        genattn.apply(pipe, nag("sd3", heads="L7"))
    with pytest.raises(GenAttnError, match="negative_embeds must name inputs of SD3Transformer2DModel, got .'nonsense'."):
        genattn.apply(pipe, NAG(negative_embeds={"nonsense": torch.zeros(1)}))
    with genattn.apply(pipe, SoftPAG("L1H1", mode="replace_uncond"), nag("sd3")):  # noqa: SIM117
        with pytest.raises(GenAttnError, match="must not be combined with SoftPAG.mode='replace_uncond'"):
            sampled(pipe, call)
    with (
        genattn.apply(pipe, nag("sd3"), nag("sd3", "other")),
        pytest.raises(GenAttnError, match="a model takes one NAG, got two"),
    ):
        sampled(pipe, call)
    with genattn.apply(pipe, nag("sd3", encode={"nonsense": 1})), pytest.raises(GenAttnError, match=r"got \['nonsense'\]"):
        sampled(pipe, call)
    with torch.no_grad(), genattn.apply(pipe.transformer, nag("sd3", layout="single")):  # noqa: SIM117
        with pytest.raises(GenAttnError, match="needs a pipeline with encode_prompt, got NoneType"):
            pipe.transformer(**build_inputs("sd3"))


def test_refuses_a_model_whose_image_sees_no_text() -> None:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8
    )
    with pytest.raises(GenAttnError, match="NAG needs a model whose image looks at text, got DiTTransformer2DModel"):
        genattn.apply(model, NAG("x"))


def test_settings_survive_a_file() -> None:
    plugin = nag("sd3", ["a", "b"], heads=[(1, 2)], start=0.25)
    again = NAG.from_settings(plugin.settings())
    assert again.settings() == plugin.settings()
    with pytest.raises(GenAttnError, match="cannot be saved"):
        NAG(negative_embeds=torch.zeros(1, 2, 3)).settings()


def test_released_strengths() -> None:
    from genattn.guidance.nag.defaults import strength_for

    given: dict[str, Any] = {"scale": None, "tau": None, "alpha": None}
    assert vars(strength_for("WanTransformer3DModel", given)) == {"scale": 9.0, "tau": 2.5, "alpha": 0.25}
    assert vars(strength_for("FluxTransformer2DModel", given)) == {"scale": 5.0, "tau": 2.5, "alpha": 0.25}
    assert vars(strength_for("UNet2DConditionModel", {**given, "tau": 2.0})) == {"scale": 3.0, "tau": 2.0, "alpha": 0.5}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_modular_pipelines(guidance_scale: float) -> None:
    """The text step of the modular pipeline encodes the negative; its loop runs as the classic one."""
    from diffusers import ClassifierFreeGuidance
    from test_guider import modular

    pipe, classic, call = modular("sd3")
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
    names = ("prompt", "height", "width", "num_inference_steps", "max_sequence_length")
    asked = {name: call[name] for name in names}
    with genattn.apply(classic, nag("sd3")):
        expected = sampled(classic, {**call, "guidance_scale": guidance_scale})
    with genattn.apply(pipe, nag("sd3")) as handle:
        found = pipe(**asked, negative_prompt="", generator=torch.Generator().manual_seed(0), output="latents")
        assert handle.report().plugins[0]["counts"]["guided_forwards"] == call["num_inference_steps"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    stock = pipe(**asked, negative_prompt="", generator=torch.Generator().manual_seed(0), output="latents")
    assert (found - stock).abs().max() > 1e-4


def test_the_length_of_clip_is_the_pipelines_own() -> None:
    """SD3's text is CLIP's tokens and then T5's; a tokenizer of another length must not shorten the negative's T5 part."""
    pipe, call = unguided("sd3")
    pipe.tokenizer.model_max_length = pipe.tokenizer_2.model_max_length = pipe.tokenizer_max_length = 24
    positive = told(pipe, call)
    found = encode(pipe, pipe.transformer, ["red dog"], positive, {})
    assert found["encoder_hidden_states"].shape[1] == positive["encoder_hidden_states"].shape[1] == 24 + 16


def test_refuses_an_input_that_the_modular_text_step_does_not_have() -> None:
    from test_guider import modular

    pipe, _, call = modular("sd3")
    asked = {name: call[name] for name in ("prompt", "height", "width", "num_inference_steps", "max_sequence_length")}
    with genattn.apply(pipe, NAG("red dog", encode={"nonsense": 1})):  # noqa: SIM117
        with pytest.raises(GenAttnError, match=r"encode settings must be inputs of the text step \(.*\), got \['nonsense'\]"):
            pipe(**asked, negative_prompt="", output="latents")


class Swallows(Plugin):
    """Answers every call by itself, as a processor of another kind would."""

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        return torch.zeros_like(call.query)


def test_refuses_where_no_attention_over_text_comes_by() -> None:
    pipe, call = unguided("sd3")
    with genattn.apply(pipe, Swallows(), nag("sd3")):  # noqa: SIM117
        with pytest.raises(GenAttnError, match="NAG must reach attention over text, got no such call in SD3Transformer2DModel"):
            sampled(pipe, call)


def test_refuses_text_that_is_out_of_reach() -> None:
    model = build_model("sd3")
    site = AttentionSite("blocks.0.attn", "blocks", 0, 0, "joint", 2, unreachable="an old processor computes it")
    with pytest.raises(GenAttnError, match="NAG cannot reach the text of SD3Transformer2DModel: an old processor computes it"):
        nag("sd3").attach(model, [site])


def test_texts_of_two_lengths_cannot_be_further_samples() -> None:
    mine, theirs = torch.zeros(1, 512, 4), torch.zeros(1, 100, 4)
    carried = Carried(WAYS["WanTransformer3DModel"], torch.tensor([True]), {}, {}, doubled=True)
    with pytest.raises(GenAttnError, match="got a negative text of 100 tokens beside 512; encode both to the same length"):
        _with_tokens(mine, theirs, carried, carried.way.streams[0])
