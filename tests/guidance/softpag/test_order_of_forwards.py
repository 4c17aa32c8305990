"""Guidance composes in any order: whoever runs passes of its own stands outside, and all others see every pass."""

from typing import Any

import pytest
import torch

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.nag import NAG
from genattn.guidance.passes.prediction import leaves
from genattn.guidance.s2 import S2Guidance
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.guidance.tag import TAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline

MADE = {
    "softpag": lambda: SoftPAG("L1", u=1.0, scale=2.0),
    "s2": lambda: S2Guidance(scale=1.0, start=0.0, stop=1.0),
    "tag": lambda: TAG(1.5),
    "nag": lambda: NAG("red", scale=4.0),
}


def sampled(family: str, plugins: list[Any], **call: Any) -> torch.Tensor:
    pipe, kwargs = build_pipeline(family)
    seeds = range(len(call["prompt"])) if isinstance(call.get("prompt"), list) else (0,)
    kwargs = {**kwargs, "num_inference_steps": 2, "output_type": "latent", **call}
    if isinstance(kwargs["prompt"], list):
        kwargs.pop("negative_prompt", None)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with genattn.apply(pipe, *plugins):
        return pipe(**kwargs, generator=generators if len(generators) > 1 else generators[0])[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("family", "guidance_scale"), [("sd3", 4.0), ("wan", 4.0)])
@pytest.mark.parametrize("order", ["nag softpag", "softpag tag s2", "s2 nag tag softpag"])
def test_the_order_of_application_does_not_matter(family: str, guidance_scale: float, order: str) -> None:
    """Guidance scale above 1 in one batch: passes of the conditional half alone go through NAG too."""
    found = sampled(family, [MADE[name]() for name in order.split()], guidance_scale=guidance_scale)
    names = sorted(order.split(), key=lambda name: name in ("nag", "tag"))
    expected = sampled(family, [MADE[name]() for name in names], guidance_scale=guidance_scale)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("first", ["softpag", "other"])
@pytest.mark.parametrize(
    ("family", "guidance_scale", "make"),
    [
        ("sd3", 1.0, lambda: NAG(["red", "blue and green"], scale=4.0)),
        ("sd3", 4.0, lambda: NAG(["red", "blue and green"], scale=4.0)),
        ("wan", 4.0, lambda: NAG("red", scale=4.0)),
        ("animatediff", 1.0, lambda: BroadWay(stop=1.0)),
        ("animatediff", 4.0, lambda: BroadWay(stop=1.0)),
    ],
)
def test_one_batch_gives_what_a_pass_of_its_own_gives(family: str, guidance_scale: float, make: Any, first: str) -> None:
    """mode='batched' puts copies of the conditional samples behind the batch: others must know whose they are."""
    results = {}
    for mode in ("extra", "batched"):
        plugins = [SoftPAG("L1", u=1.0, scale=2.0, mode=mode), make()]
        texts = {"prompt": ["a cat", "a dog on a hill"], "guidance_scale": guidance_scale}
        results[mode] = sampled(family, plugins if first == "softpag" else plugins[::-1], **texts)
    torch.testing.assert_close(results["batched"], results["extra"], atol=1e-4, rtol=0)


def test_a_term_inside_a_replaced_pass_is_perturbed_by_itself_alone() -> None:
    model, inputs = build_model("sd3"), build_inputs("sd3")  # two samples
    replaced = lambda: SoftPAG("L1", u=1.0, mode="replace_uncond", layout="uncond_cond")  # noqa: E731
    term = lambda: SoftPAG("L2H1", u=1.0, scale=2.0, layout="uncond_cond")  # noqa: E731

    def out(*plugins: Any) -> torch.Tensor:
        with torch.no_grad(), genattn.apply(model, *plugins):
            return leaves(model(**inputs))[0]

    with torch.no_grad():
        clean = leaves(model(**inputs))[0]
    both = out(replaced(), term())
    torch.testing.assert_close(both, out(replaced()) + out(term()) - clean, atol=5e-6, rtol=0)
    assert not torch.allclose(both[1], clean[1])


def test_terms_beside_a_batched_one_are_refused() -> None:
    model, inputs = build_model("sd3"), build_inputs("sd3")
    batched, extra = SoftPAG("L1", mode="batched", layout="single"), SoftPAG("L2", layout="single")
    with genattn.apply(model, batched, extra), pytest.raises(GenAttnError, match="mode='extra', got 'batched'"):
        model(**inputs)
