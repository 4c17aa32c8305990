"""The oracle as an objective: a faithful drawing scores 1, a wrong one less."""

import pytest
import torch

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.objectives import load_objective
from genattn.pipelines.tiny.world import caption, parse_caption, render


def drawn(text: str, frames: int) -> torch.Tensor:
    scene = parse_caption(text)
    assert scene is not None
    assert caption(scene) == text
    clip = torch.from_numpy(render(scene, frames)).movedim(-1, 1).float() / 255
    return clip[0] if frames == 1 else clip


def test_scores_what_the_caption_asks() -> None:
    score = load_objective("genattn.pipelines.tiny.oracle_objective:caption_match")
    asked, other = "a red circle moves right on a dark background", "a blue circle moves left on a dark background"
    assert score([drawn(asked, 9), drawn(asked, 1)], [asked, asked]) == [1.0, 1.0]
    clip, still = score([drawn(other, 9), drawn(other, 1)], [asked, asked])
    assert clip == pytest.approx(4 / 6)
    assert still == pytest.approx(4 / 5)
    assert score([torch.rand(3, 64, 64)], [asked])[0] < 0.5
    with pytest.raises(GenAttnError, match="captions of the tiny world, got 'a cat'"):
        score([torch.rand(3, 64, 64)], ["a cat"])
