"""The tiny world's oracle as an objective of a hunt: `genattn.pipelines.tiny.oracle_objective:caption_match`.

The score of a sample is the share of what its caption asks for that is there: colour, shape and size of each object, for
clips its motion too, the background, and the number of objects.
"""

from collections.abc import Sequence

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.oracle import Verdict, judge
from genattn.pipelines.tiny.world import parse_caption


def caption_match(samples: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[float]:
    """Share of a caption's demands that are met, in [0, 1].

    Args:
        samples: pictures [3, H, W] or clips [T, 3, H, W] in [0, 1].
        prompts: captions of the tiny world.

    Raises:
        GenAttnError: for a prompt that is no caption of the world.
    """
    return [_match(*_verdict(sample, prompt)) for sample, prompt in zip(samples, prompts, strict=True)]


def still_marks(pictures: Sequence[torch.Tensor], prompts: Sequence[str]) -> list[list[float]]:
    """Per picture [3, H, W] in [0, 1]: its caption's match, and the shares of objects right in colour, shape and size.

    Raises:
        GenAttnError: for a prompt that is no caption of the world.
    """
    marks = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        verdict, frames = _verdict(picture, prompt)
        marks.append([_match(verdict, frames), *(verdict.share(name) for name in ("colour", "shape", "size"))])
    return marks


def _verdict(sample: torch.Tensor, prompt: str) -> tuple[Verdict, int]:
    scene = parse_caption(prompt)
    if scene is None:
        raise GenAttnError(f"the oracle judges captions of the tiny world, got {prompt!r}; see genattn.pipelines.tiny.world")
    frames = sample if sample.ndim == 4 else sample[None]
    pixels = (frames.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return judge(pixels, scene), len(pixels)


def _match(verdict: Verdict, frames: int) -> float:
    asked = ("colour", "shape", "size", "motion") if frames >= 3 else ("colour", "shape", "size")
    marks = [verdict.share(attribute) for attribute in asked] + [float(verdict.background), float(verdict.count)]
    return sum(marks) / len(marks)
