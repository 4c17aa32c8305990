"""NAG on every family that has text: one guided forward equals the long way in float64, and leaves nothing behind."""

from typing import Any

import explicit_nag
import pytest
import torch
from older_diffusers import ABSENT, needs
from torch import nn

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.nag import NAG
from genattn.guidance.nag.formula import Strength
from genattn.guidance.nag.places import text_sites
from genattn.guidance.nag.sequences import bria_fibo
from genattn.guidance.nag.ways import NOT_CARRIED, WAYS, way_of
from genattn.guidance.passes.prediction import leaves
from genattn.layouts.families import family_of
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families
from genattn.pipelines.tiny.random.models import MODELS
from genattn.seam.plugin import AttentionCall, Inner, Plugin
from genattn.seam.sites import find_sites

# the text of these is as long as the model says
FIXED = {"cogvideox", "wan-i2v", "consisid", "hunyuan-dit", "wan-animate2"}
KEPT_KEYS = "flux2-kv"  # the same class as FLUX.2, with keys of its references kept from the first step
CARRIED = [family for family in families() if MODELS[family].model in WAYS and family != KEPT_KEYS]
# these models' own code demands float32 inside
SINGLE = {"mochi", "cosmos", "kandinsky5", "flux3"}
# their rotary embedding is computed in float32
LOOSE = {"z-image": 1e-6, "minimax-h3": 1e-6, "minimax-h3-reference": 1e-6}
STRENGTH = Strength(scale=4.0, tau=1.3, alpha=0.6)
MASKS = ["encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask", "encoder_mask", "text_embedding_mask"]
PER_LAYER = {"encoder_hidden_states_llama3"}  # layers before samples
# what diffusers and torch say of stock models
SAID = (
    "In CPU autocast",
    "CPU Autocast",
    ".Transformer2DModelOutput",
    "flex_attention called without",
    "Mismatch dtype between",
)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{start}") for start in SAID]


def built(family: str) -> nn.Module:
    """The model; Lumina-Next's gates on the text begin at 0, behind which nothing would be seen."""
    model = build_model(family)
    for name, parameter in model.named_parameters():
        if family == "lumina-next" and name.endswith(".gate"):
            nn.init.constant_(parameter, 0.5)
    return model


def doubled(value: Any) -> Any:
    """float64, through lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(part) for key, part in value.items()}
    return type(value)(doubled(part) for part in value) if isinstance(value, list | tuple) and value else value


def negative_of(family: str, model: nn.Module, inputs: dict[str, Any], texts: int = 1) -> dict[str, Any]:
    """Random encoded texts, three tokens longer than the positive one where the model allows it."""
    generator = torch.Generator().manual_seed(9)
    found: dict[str, Any] = {}
    for name in way_of(model).inputs:  # type: ignore[union-attr]
        value = inputs.get(name)
        if name == "text_encoder_layers":
            width = value[0].shape[2]
            found[name] = [torch.randn(texts, value[0].shape[1] + 3, width, generator=generator) for _ in value]
        elif isinstance(value, list) and value[0].ndim == 2:
            found[name] = [
                torch.randn(len(value[0]) if family in FIXED else 13, value[0].shape[1], generator=generator)
                for _ in range(texts)
            ]
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and "mask" not in name and name != "txt_ids":
            axis = int(name in PER_LAYER)
            shape = list(value.shape)
            shape[axis], shape[axis + 1] = texts, shape[axis + 1] + 3 * (family not in FIXED)
            found[name] = torch.randn(shape, generator=generator)
    return found


def stock_inputs(family: str, model: nn.Module, inputs: dict[str, Any], negative: dict[str, Any]) -> dict[str, Any]:
    """What a stock forward with the negative text is called with: every sample has it, masks let all of it through."""
    told = dict(inputs)
    for name, value in negative.items():
        before = inputs[name]
        if isinstance(value, list):
            per_block = name == "text_encoder_layers"
            told[name] = [v.expand(len(b), -1, -1) for v, b in zip(value, before)] if per_block else value * len(before)
            continue
        axis = int(name in PER_LAYER)
        told[name] = value.repeat_interleave(before.shape[axis], axis)
        mask = MASKS * (name == "encoder_hidden_states") + ["text_embedding_mask_t5"] * (name == "encoder_hidden_states_t5")
        mask += [name.replace("hidden_states", "attention_mask")] if "_2" in name or "audio" in name else []
        for other in mask:
            if isinstance(inputs.get(other), torch.Tensor):
                rest = inputs[other].shape[1] - before.shape[axis + 1]
                told[other] = inputs[other].new_ones(len(inputs[other]), told[name].shape[axis + 1] + max(rest, 0))
        if name == "encoder_hidden_states" and "txt_ids" in inputs:
            ids = inputs["txt_ids"]
            told["txt_ids"] = ids.new_zeros(*ids.shape[:-2], value.shape[1], ids.shape[-1])
            if family.startswith("flux2"):  # which numbers its text in the last column
                told["txt_ids"][..., 3] = torch.arange(value.shape[1])
    return told_of(family, told, inputs)


def told_of(family: str, told: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """What some pipelines say of a text's length, and where they put the image behind it."""
    if "text_rope_pos" in told:
        told["text_rope_pos"] = torch.arange(told["encoder_hidden_states"].shape[1])
    if family == "krea2":
        told["position_ids"] = torch.cat([torch.zeros(3, 3), told["position_ids"]])
    if family.startswith("minimax-h3"):
        words = inputs["encoder_hidden_states"].shape[1]
        for name in ("video_indices", "audio_indices"):
            told[name] = told[name] + 3
        told["text_indices"] = torch.arange(words + 3)
        ids = told["position_ids"].clone()
        ids[:, 0] += 3  # time goes on after the text
        before = torch.zeros(3, 3, dtype=ids.dtype)
        before[:, 0] = torch.arange(3)
        told["position_ids"] = torch.cat([before, ids])
        for name in ("token_tags", "timestep_indices"):
            told[name] = torch.cat([told[name][:1].expand(3), told[name]])
    return told


def image_tokens(family: str) -> int | None:
    known = {"z-image": 64, "lumina2": 48, "krea2": 48, "minimax-h3": 200, "minimax-h3-reference": 218}
    return known.get(family)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "asked twice"])
@pytest.mark.parametrize("family", CARRIED)
def test_equals_the_long_way(family: str, share: bool) -> None:
    model, inputs = built(family), build_inputs(family)
    negative = negative_of(family, model, inputs)
    if family not in SINGLE:
        model, inputs, negative = model.double(), doubled(inputs), doubled(negative)
    sites = [site for _, site in find_sites(model, "", family_of(model))]
    joint = [site.name for site in text_sites(sites) if site.kind == "joint"]
    looking = [site.name for site in text_sites(sites) if site.kind == "cross" or way_of(model).streams[0].keys_only]
    joint = joint if looking != joint else []
    theirs = stock_inputs(family, model, inputs, negative)
    fresh = negative["encoder_hidden_states_llama3"].shape[2] if "encoder_hidden_states_llama3" in negative else 0
    expected = leaves(explicit_nag.guided(model, inputs, theirs, STRENGTH, family, joint, looking, fresh, image_tokens(family)))
    with torch.no_grad():
        stock = leaves(model(**inputs))
        plugin = NAG(negative_embeds=negative, **vars(STRENGTH), layout="single", share=share)
        with genattn.apply(model, plugin):
            answer = leaves(model(**inputs))
            asked_twice = plugin.describe()["image_asked_twice_at"]
        after = leaves(model(**inputs))
    assert max((e - s).abs().max() for e, s in zip(expected, stock, strict=True)) > 1e-5
    assert max((e - a).abs().max() for e, a in zip(expected, answer, strict=True)) <= (
        1e-5 if family in SINGLE else LOOSE.get(family, 1e-10)
    )
    assert all(torch.equal(a, s) for a, s in zip(after, stock, strict=True))
    if joint and family != "mochi":
        assert sorted(asked_twice) == ([] if share else sorted(joint))


@pytest.mark.parametrize("off", [{"scale": 1.0}, {"alpha": 0.0}], ids=str)
@pytest.mark.parametrize("family", CARRIED)
def test_scale_1_and_alpha_0_are_stock_to_the_bit(family: str, off: dict[str, float]) -> None:
    model, inputs = build_model(family), build_inputs(family)
    with torch.no_grad():
        stock = leaves(model(**inputs))
        with genattn.apply(model, NAG(negative_embeds=negative_of(family, model, inputs), **off, layout="single")):
            answer = leaves(model(**inputs))
    assert all(torch.equal(a, s) for a, s in zip(answer, stock, strict=True))


@pytest.mark.parametrize("family", sorted(set(families()) - {*CARRIED, KEPT_KEYS}))
def test_every_other_family_has_a_written_reason(family: str) -> None:
    model = build_model(family)
    reason = next(NOT_CARRIED[base.__name__] for base in type(model).__mro__ if base.__name__ in NOT_CARRIED)
    with pytest.raises(GenAttnError, match=f"NAG needs a model whose image looks at text.*{reason}"):
        genattn.apply(model, NAG("x"))


def test_every_known_way_is_shown() -> None:
    shown = {base.__name__ for family in CARRIED for base in type(build_model(family)).__mro__}
    # ChronoEdit is Wan's blocks under another pipeline
    assert set(WAYS) - shown <= {"ChronoEditTransformer3DModel"} | ABSENT
    assert not set(WAYS) & set(NOT_CARRIED)


def test_kept_keys_of_references_are_refused() -> None:
    model, inputs = build_model(KEPT_KEYS), build_inputs(KEPT_KEYS)
    negative = negative_of(KEPT_KEYS, model, inputs)
    with (
        torch.no_grad(),
        genattn.apply(model, NAG(negative_embeds=negative, layout="single")),
        pytest.raises(
            GenAttnError,
            match="NAG cannot carry a second text through Flux2Transformer2DModel here: keys of its reference images are kept",
        ),
    ):
        model(**inputs)


def test_refuses_forwards_of_minimax_h3_that_have_no_place_for_a_second_text() -> None:
    needs("minimax-h3")
    model, inputs = build_model("minimax-h3"), build_inputs("minimax-h3")
    negative = negative_of("minimax-h3", model, inputs)
    behind = {**inputs, "text_indices": inputs["text_indices"] + 1}
    mixed = {**inputs, "token_tags": inputs["token_tags"].index_fill(0, torch.tensor([2]), 0)}
    with torch.no_grad(), genattn.apply(model, NAG(negative_embeds=negative, layout="single")):
        with pytest.raises(GenAttnError, match="its text does not stand at the sequence's beginning"):
            model(**behind)
        with pytest.raises(GenAttnError, match="pictures stand among its text"):
            model(**mixed)


def test_refuses_forwards_that_have_no_place_for_a_second_text() -> None:
    local = build_model("longcat-audio", adaln_type="local", adaln_use_text_cond=True)
    told = build_inputs("longcat-audio")
    with (
        torch.no_grad(),
        genattn.apply(local, NAG(negative_embeds=negative_of("longcat-audio", local, told), layout="single")),
        pytest.raises(GenAttnError, match="its blocks are modulated by the mean of all text"),
    ):
        local(**told)
    fibo, asked = build_model("bria-fibo"), build_inputs("bria-fibo")
    with (
        torch.no_grad(),
        genattn.apply(fibo, NAG(negative_embeds=torch.randn(1, 5, 32), layout="single")),
        pytest.raises(GenAttnError, match="negative_embeds must hold text_encoder_layers"),
    ):
        fibo(**asked)


def test_bria_fibo_hides_the_padding_of_either_text() -> None:
    model, inputs = build_model("bria-fibo"), build_inputs("bria-fibo")
    negative = negative_of("bria-fibo", model, inputs)
    words, image = inputs["encoder_hidden_states"].shape[1], inputs["hidden_states"].shape[1]
    padded = {name: negative[name] for name in negative}
    padded["encoder_hidden_states"] = torch.cat([negative["encoder_hidden_states"], torch.randn(1, 2, 32)], 1)
    padded["text_encoder_layers"] = [torch.cat([t, torch.randn(1, 2, t.shape[2])], 1) for t in negative["text_encoder_layers"]]
    mask = torch.ones(1, 1, 1, words + image, dtype=torch.bool)
    asked = {**inputs, "joint_attention_kwargs": {"attention_mask": mask}}
    hidden = torch.cat([torch.ones(1, words + 3), torch.zeros(1, 2)], 1)
    found = bria_fibo(model, asked, {**padded, "attention_mask": hidden})["joint_attention_kwargs"]["attention_mask"]
    assert torch.equal(found[0, 0, 0, : words + 5], hidden[0].bool())
    with torch.no_grad():
        with genattn.apply(model, NAG(negative_embeds=negative, layout="single")):
            whole = model(**asked)[0]
        with genattn.apply(model, NAG(negative_embeds=padded, layout="single")):
            seen = model(**asked)[0]
    assert float((whole - seen).abs().max()) > 1e-4


def test_both_texts_of_mochi_are_told_with_the_picture_in_front() -> None:
    """Sparse patterns stand on what a call says of its tokens: each text has the picture, and its own length."""

    class Notes(Plugin):
        def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
            told.append((call.layout.describe() if call.layout else "", call.query.shape[1]))
            return inner(call)

    told: list[tuple[str, int]] = []
    model, inputs = built("mochi"), build_inputs("mochi")
    nag = NAG(negative_embeds=negative_of("mochi", model, inputs), **vars(STRENGTH), layout="single")
    with torch.no_grad(), genattn.apply(model, nag, Notes()):
        model(**inputs)
    kept = inputs["encoder_attention_mask"].sum(1).tolist()
    assert kept == [9, 5]
    expected = [(f"grid 3x8x6 + text {text}", 144 + text) for text in (9, 12, 5, 12)]
    assert told == expected * (len(told) // 4)
    assert told
