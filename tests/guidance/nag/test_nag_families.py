"""NAG on every family that has text: one guided forward equals the long way in float64, and leaves nothing behind."""

from typing import Any

import explicit_nag
import pytest
import torch
from torch import nn

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.nag import NAG
from genattn.guidance.nag.formula import Strength
from genattn.guidance.nag.streams import NOT_CARRIED, WAYS, way_of
from genattn.guidance.passes.prediction import leaves
from genattn.layouts.families import family_of
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families
from genattn.pipelines.tiny.random.models import MODELS
from genattn.seam.sites import find_sites

# the text of these is as long as the model says
FIXED = {"cogvideox", "wan-i2v", "consisid"}
KEPT_KEYS = "flux2-kv"  # the same class as FLUX.2, with keys of its references kept from the first step
CARRIED = [family for family in families() if MODELS[family].model in WAYS and family != KEPT_KEYS]
# these models' own code demands float32 inside
SINGLE = {"mochi", "cosmos"}
# its rotary embedding is computed in float32
LOOSE = {"z-image": 1e-6}
STRENGTH = Strength(scale=4.0, tau=1.3, alpha=0.6)
PER_LAYER = {"encoder_hidden_states_llama3"}  # layers before samples
pytestmark = [pytest.mark.filterwarnings("ignore:In CPU autocast"), pytest.mark.filterwarnings("ignore:CPU Autocast")]


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
        if isinstance(value, list):
            found[name] = [torch.randn(13, value[0].shape[1], generator=generator) for _ in range(texts)]
        elif isinstance(value, torch.Tensor) and "mask" not in name and name != "txt_ids":
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
            told[name] = value * len(before)
            continue
        axis = int(name in PER_LAYER)
        told[name] = value.repeat_interleave(before.shape[axis], axis)
        mask = {"encoder_hidden_states": ["encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask"]}.get(
            name, []
        )
        mask += [name.replace("hidden_states", "attention_mask")] if "_2" in name or "audio" in name else []
        for other in mask:
            if isinstance(inputs.get(other), torch.Tensor):
                rest = inputs[other].shape[1] - before.shape[axis + 1]
                told[other] = inputs[other].new_ones(len(inputs[other]), told[name].shape[axis + 1] + max(rest, 0))
        if name == "encoder_hidden_states" and "txt_ids" in inputs:
            ids = inputs["txt_ids"]
            told["txt_ids"] = ids.new_zeros(*ids.shape[:-2], value.shape[1], ids.shape[-1])
            if ids.shape[-1] == 4:  # FLUX.2 numbers its text in the last column
                told["txt_ids"][..., 3] = torch.arange(value.shape[1])
    return told


def image_tokens(family: str) -> int | None:
    return {"z-image": 64, "lumina2": 48}.get(family)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "asked twice"])
@pytest.mark.parametrize("family", CARRIED)
def test_equals_the_long_way(family: str, share: bool) -> None:
    model, inputs = build_model(family), build_inputs(family)
    negative = negative_of(family, model, inputs)
    if family not in SINGLE:
        model, inputs, negative = model.double(), doubled(inputs), doubled(negative)
    sites = [site for _, site in find_sites(model, "", family_of(model))]
    joint = [site.name for site in sites if site.kind == "joint" and site.depth >= 0]
    theirs = stock_inputs(family, model, inputs, negative)
    fresh = negative["encoder_hidden_states_llama3"].shape[2] if "encoder_hidden_states_llama3" in negative else 0
    expected = leaves(explicit_nag.guided(model, inputs, theirs, STRENGTH, family, joint, fresh, image_tokens(family)))
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
    assert set(WAYS) - shown <= {"ChronoEditTransformer3DModel"}
    assert not set(WAYS) & set(NOT_CARRIED)


def test_kept_keys_of_references_are_refused() -> None:
    model, inputs = build_model(KEPT_KEYS), build_inputs(KEPT_KEYS)
    negative = negative_of(KEPT_KEYS, model, inputs)
    with (
        torch.no_grad(),
        genattn.apply(model, NAG(negative_embeds=negative, layout="single")),
        pytest.raises(GenAttnError, match="NAG does not carry a negative text beside kept keys of reference images"),
    ):
        model(**inputs)
