"""Where a negative prompt goes: to guidance where the call runs it, else to NAG; all commands share the function."""

from typing import Any

import numpy as np
import pytest
import torch

import genattn
from genattn.apps.sampling.negative import runs_guidance, split_negative
from genattn.apps.sampling.run import DENSE, SamplingSettings, call_arguments, run_once
from genattn.errors import GenAttnError
from genattn.guidance.nag import NAG
from genattn.pipelines.tiny.random.build import build_pipeline


@pytest.mark.parametrize(
    ("family", "call", "expected"),
    [
        ("sd3", {"guidance_scale": 1.0}, False),
        ("sd3", {"guidance_scale": 0.0}, False),
        ("sd3", {"guidance_scale": 5.0}, True),
        ("sd3", {}, True),
        ("wan", {"guidance_scale": 1.0}, False),
        ("flux", {"guidance_scale": 3.5}, False),
        ("flux", {"guidance_scale": 3.5, "true_cfg_scale": 2.0}, True),
        ("hunyuan-video", {"guidance_scale": 6.0}, False),
        ("hunyuan-video", {"true_cfg_scale": 6.0}, True),
    ],
)
def test_which_calls_run_guidance(family: str, call: dict[str, Any], expected: bool) -> None:
    pipe, _ = build_pipeline(family)
    assert runs_guidance(pipe, call) is expected
    rest, plugin = split_negative(pipe, {**call, "negative_prompt": "red"})
    assert (plugin is None) is expected
    assert ("negative_prompt" in rest) is expected
    assert split_negative(pipe, call) == (call, None)


def test_a_pipeline_without_a_place_for_it() -> None:
    class Distilled:
        def __call__(self, prompt: str, guidance_scale: float = 4.0) -> None: ...

    rest, plugin = split_negative(Distilled(), {"guidance_scale": 4.0, "negative_prompt": "red"})
    assert rest == {"guidance_scale": 4.0}
    assert isinstance(plugin, NAG)
    assert plugin.prompts == ("red",)
    with pytest.raises(GenAttnError, match="must say something"):
        split_negative(Distilled(), {"negative_prompt": " "})


def test_a_run_at_guidance_scale_1_is_guided_by_nag() -> None:
    pipe, own = build_pipeline("sd3")
    sizes = {"height": 16, "width": 16, "steps": 2}
    calls = {
        name: call_arguments(pipe, SamplingSettings(guidance_scale=scale, negative_prompt=negative, **sizes))
        for name, scale, negative in (("plain", 1.0, None), ("nag", 1.0, "red dog"), ("cfg", 5.0, "red dog"))
    }
    assert own["num_inference_steps"]
    frames = {name: run_once(pipe, call, "a cat", 3, DENSE, name).frames for name, call in calls.items()}
    assert not np.array_equal(frames["plain"], frames["nag"])

    def by_hand(**more: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        common = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
        return (pipe(prompt="a cat", generator=generator, **common, **more).images * 255).round().astype(np.uint8)

    with genattn.apply(pipe, NAG("red dog")):
        assert np.array_equal(by_hand(guidance_scale=1.0), frames["nag"])
    assert np.array_equal(by_hand(guidance_scale=5.0, negative_prompt="red dog"), frames["cfg"])
    assert np.array_equal(by_hand(guidance_scale=1.0), frames["plain"])
