"""Other pipelines made around an applied denoiser, by `AutoPipeline...from_pipe` and a class's own, run end to end."""

import inspect
import types
from typing import Any

import diffusers
import pytest
import torch

from genattn import DensePattern, NeighborhoodPattern
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.seam.handle import Handle, apply

FAMILIES = ("flux", "sd3", "unet", "qwen-image")
OTHERS = [
    *((family, "AutoPipelineForText2Image") for family in FAMILIES),
    *((family, "AutoPipelineForImage2Image") for family in FAMILIES),
    *((family, "AutoPipelineForInpainting") for family in FAMILIES if family != "sd3"),  # wants 16 or 33 channels
    ("wan", "WanVideoToVideoPipeline"),
    ("ltx", "LTXImageToVideoPipeline"),
]
STEPS, STRENGTH = 4, 0.75  # of 4 steps an image to begin with leaves 3
SPARSE: dict[str, Any] = {"dense_steps": 1, "dense_layers": 0}


def other(pipe: Any, name: str) -> Any:
    """The pipeline that `name` makes around the components of `pipe`."""
    made = getattr(diffusers, name).from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(autouse=True)
def _prompts_are_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's pipelines clean prompts with ftfy and do not ask whether it is there."""
    from diffusers.pipelines.wan import pipeline_wan_video2video

    monkeypatch.setattr(pipeline_wan_video2video, "ftfy", types.SimpleNamespace(fix_text=str), raising=False)


def sampled(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    """Latents of one call, of the keywords that this class takes; those it must have beside a prompt are drawn."""
    takes, size = inspect.signature(type(pipe).__call__).parameters, (call["height"], call["width"])
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    given = {"image": picture[None], "mask_image": (picture[None, :1] > 0.5).float(), "video": [picture] * 9}
    more = {"num_inference_steps": STEPS, "output_type": "latent", "strength": STRENGTH}
    call = {name: value for name, value in {**given, **call, **more}.items() if name in takes}
    out: torch.Tensor = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    return out


def steps_of(pipe: Any, name: str) -> int:
    """How many of `STEPS` a call runs."""
    begins = "strength" in inspect.signature(type(pipe).__call__).parameters
    return int(STEPS * STRENGTH) if begins else STEPS


def sparse_share(handle: Handle) -> float:
    """Of the calls over the whole image, per site; small sites of a UNet stay dense."""
    rows = [row for row in handle.report().sites if row["sparse"]]
    assert rows
    return min(row["sparse"] / row["calls"] for row in rows)


@pytest.mark.parametrize(("family", "name"), OTHERS)
def test_a_pipeline_made_of_an_applied_one(family: str, name: str) -> None:
    pipe, call = build_pipeline(family)
    stock = sampled(other(pipe, name), call)
    with apply(pipe, DensePattern()) as handle:
        made = other(pipe, name)
        assert torch.equal(sampled(made, call), stock)
        assert handle.report().calls > 0
    assert torch.equal(sampled(made, call), stock)
    handle = apply(pipe, NeighborhoodPattern(3), **SPARSE)
    made = other(pipe, name)
    sparse = sampled(made, call)
    steps = steps_of(made, name)
    assert sparse_share(handle) == pytest.approx((steps - 1) / steps)  # it counts the other pipeline's steps
    assert (sparse - stock).abs().max() > 1e-5
    handle.remove()
    assert torch.equal(sampled(made, call), stock)
    assert torch.equal(sampled(other(made, name), call), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_applied_to_the_made_pipeline_acts_in_the_first(family: str) -> None:
    """They have one denoiser; back from image to image, the class is that of the first."""
    first, call = build_pipeline(family)
    stock = sampled(first, call)
    made = other(first, "AutoPipelineForImage2Image")
    handle = apply(made, NeighborhoodPattern(3), **SPARSE)
    back = other(made, "AutoPipelineForText2Image")
    assert type(back) is type(first)
    sparse = sampled(first, call)
    assert sparse_share(handle) == pytest.approx((STEPS - 1) / STEPS)
    assert torch.equal(sampled(back, call), sparse)
    assert (sparse - stock).abs().max() > 1e-5
    handle.remove()
    for pipe in (first, back):
        assert torch.equal(sampled(pipe, call), stock)
