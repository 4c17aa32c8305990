"""Target 'skip' on every block of every family: the answer is that of the model without the block, or the reason is told.

What a skipped block hands on is written down here by hand, block by block, and not read from shapes.
"""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.passes.block_swap import BlockOrder, Stand
from genattn.guidance.passes.prediction import leaves
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.layouts.families import family_of
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline, families
from genattn.seam.sites import find_sites

# diffusers' own models import a class of theirs by its old name
OLD_NAME = "ignore:`Transformer2DModelOutput` is deprecated:FutureWarning"
pytestmark = [pytest.mark.filterwarnings(text) for text in ("ignore:In CPU autocast", "ignore:CPU Autocast", OLD_NAME)]
HIDDEN, TEXT = "hidden_states", "encoder_hidden_states"
# per block class, the arguments that its results stand for; a name alone for a bare tensor
GIVES: dict[str, Any] = {
    "JointTransformerBlock": (TEXT, HIDDEN),
    "FluxTransformerBlock": (TEXT, HIDDEN),
    "FluxSingleTransformerBlock": (TEXT, HIDDEN),
    "Flux2TransformerBlock": (TEXT, HIDDEN),
    "Flux2SingleTransformerBlock": HIDDEN,
    "ChromaTransformerBlock": (TEXT, HIDDEN),
    "ChromaSingleTransformerBlock": HIDDEN,
    "QwenImageTransformerBlock": (TEXT, HIDDEN),
    "ZImageTransformerBlock": "x",
    "Lumina2TransformerBlock": HIDDEN,
    "AuraFlowJointTransformerBlock": (TEXT, HIDDEN),
    "AuraFlowSingleTransformerBlock": HIDDEN,
    "HunyuanVideoTransformerBlock": (HIDDEN, TEXT),
    "HunyuanVideoSingleTransformerBlock": (HIDDEN, TEXT),
    "HunyuanVideo15TransformerBlock": (HIDDEN, TEXT),
    "MochiTransformerBlock": (HIDDEN, TEXT),
    "CogVideoXBlock": (HIDDEN, TEXT),
    "LTX2VideoTransformerBlock": (HIDDEN, "audio_hidden_states"),
    "WanTransformerBlock": HIDDEN,
    "SkyReelsV2TransformerBlock": HIDDEN,
    "LTXVideoTransformerBlock": HIDDEN,
    "CosmosTransformerBlock": HIDDEN,
    "BasicTransformerBlock": HIDDEN,
}


class HandsOn(Stand):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block = self.__dict__["block"]
        given = inspect.signature(type(block).forward).bind(None, *args, **kwargs).arguments
        gives = GIVES[type(block).__name__]
        if isinstance(gives, str):
            return given[gives]
        ends_text = getattr(block, "context_pre_only", False) and type(block).__name__ == "JointTransformerBlock"
        return tuple(None if ends_text and name == TEXT else given[name] for name in gives)


def order_of(model: nn.Module) -> BlockOrder:
    return BlockOrder(model, [site for _, site in find_sites(model, "", family_of(model))])


@pytest.mark.parametrize("family", sorted(set(families()) - {"sana", "hidream", "animatediff", "unet", "unet-xl", "latte"}))
def test_every_block_can_be_left_out(family: str) -> None:
    model, inputs = build_model(family), build_inputs(family)
    order = order_of(model)
    for depth, place in sorted(order.places.items()):
        if type(order.block(place)).__name__ not in GIVES:
            continue
        with torch.no_grad():
            clean = leaves(model(**inputs))
            with order.swapped({place: HandsOn(order.block(place))}):
                skipped = leaves(model(**inputs))
            with genattn.apply(model, SoftPAG.stg(f"L{depth}", scale=2.0, layout="single")):
                found = leaves(model(**inputs))
        for f, c, s in zip(found, clean, skipped, strict=True):
            torch.testing.assert_close(f, c + 2.0 * (c - s), atol=2e-5, rtol=0)


@pytest.mark.parametrize("layer", [0, 1, 2])  # the last hands on no text
def test_equals_the_skip_layer_guidance_of_the_stock_pipeline(layer: int) -> None:
    pipe, call = build_pipeline("sd3")

    def latents(**more: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(**{**call, "num_inference_steps": 4, "output_type": "latent", **more}, generator=generator)[0]

    window = {"skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 2.0}  # every step
    stock = latents(skip_guidance_layers=[layer], skip_layer_guidance_scale=2.8, **window)
    with genattn.apply(pipe, SoftPAG.stg(f"L{layer}", scale=2.8)):
        found = latents()
    assert not torch.allclose(found, latents(), atol=1e-3)
    torch.testing.assert_close(found, stock, atol=2e-5, rtol=1e-5)


def test_half_a_skip_of_sd3s_last_block() -> None:
    """Its text is None: there is nothing to mix."""
    model, inputs = build_model("sd3"), build_inputs("sd3")
    with torch.no_grad():
        whole = leaves(model(**inputs))[0]
        with genattn.apply(model, SoftPAG("L2", u=0.0, scale=2.0, target="skip", layout="single")):
            torch.testing.assert_close(leaves(model(**inputs))[0], whole, atol=2e-6, rtol=0)
        with genattn.apply(model, SoftPAG("L2", u=0.5, scale=2.0, target="skip", layout="single")):
            assert not torch.equal(leaves(model(**inputs))[0], whole)


def test_a_control_block_is_refused() -> None:
    """VACE's control blocks give what is added and the control: neither is among the inputs of the block."""
    model, inputs = build_model("wan-vace"), build_inputs("wan-vace")
    order = order_of(model)
    depth = next((d for d, place in order.places.items() if place[0] == "vace_blocks"), None)
    if depth is None:
        with torch.no_grad(), genattn.apply(model, SoftPAG.stg("L0", layout="single")):
            assert np.isfinite(leaves(model(**inputs))[0].numpy()).all()
        return
    with torch.no_grad(), genattn.apply(model, SoftPAG.stg(f"L{depth}", layout="single")):  # noqa: SIM117
        with pytest.raises(GenAttnError, match="must know which result is which"):
            model(**inputs)
