"""What a sample becomes does not depend on the others of its batch."""

from typing import Any

import pytest
import torch

import genattn
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.broadway.calls import picked, put_together, sample_groups, samples_in
from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo
from genattn.pipelines.tiny.random.build import build_pipeline

PROMPTS, SEEDS = ["a cat", "a dog on a hill"], (1, 2)


@pytest.mark.parametrize("family", ["wan", "cogvideox", pytest.param("animatediff", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [lambda: BroadWay(alpha=0.6, energy="+20%", stop=1.0), lambda: EnhanceAVideo(4.0)])
def test_batch_is_as_alone(family: str, make: Any) -> None:
    if family == "animatediff" and isinstance(make(), EnhanceAVideo):
        return  # refused there
    pipe, call = build_pipeline(family)
    rest = {k: v for k, v in call.items() if k not in ("prompt", "negative_prompt", "output_type")}

    def run(prompts: list[str], seeds: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        out: torch.Tensor = pipe(prompt=prompts, generator=generators, output_type="latent", **rest)[0]
        return out

    stock = run(PROMPTS, SEEDS)
    with genattn.apply(pipe, make()):
        both = run(PROMPTS, SEEDS)
        alone = torch.cat([run([prompt], [seed]) for prompt, seed in zip(PROMPTS, SEEDS)])
    effect, off = float((both - stock).abs().max()), float((both - alone).abs().max())
    assert effect > 0
    assert off <= 1e-3 * effect


@pytest.mark.parametrize(
    ("part", "name", "batch", "samples"),
    [((0.5, 1.0), "cond_uncond", 4, 2), ((0.0, 1.0), "cond", 3, 3), ((1 / 3, 2 / 3), None, 6, 2), ((0.0, 0.4), None, 7, 1)],
)
def test_samples_of_a_batch(part: tuple[float, float], name: str | None, batch: int, samples: int) -> None:
    assert samples_in(part, name, batch) == samples
    groups = sample_groups(samples, batch, torch.device("cpu"))
    rows = torch.arange(batch)
    parts = [picked(rows, group) for group in groups]
    assert torch.equal(put_together(parts, groups), rows)  # type: ignore[arg-type]
    if samples > 1:
        assert all((p % samples == n).all() for n, p in enumerate(parts))  # type: ignore[operator,union-attr]
