"""Samples of a batch that differ in where their tokens stand: each is attended under its own layout, as when it is alone."""

from typing import Any

import pytest
import torch

from genattn import NeighborhoodPattern, apply
from genattn.pipelines.tiny.random.build import build_inputs, build_model


def ideogram4(words: int) -> dict[str, Any]:
    """One sample of so many words behind its padding, all ten tokens of it."""
    sample, pad = build_inputs("ideogram4", seed=words), 10 - words
    for name, value in {"encoder_hidden_states": 0, "indicator": 0, "segment_ids": -1, "position_ids": 0}.items():
        sample[name][:, :pad] = value
    sample["indicator"][:, pad:10] = 3
    sample["segment_ids"][:, pad:10] = 1
    sample["position_ids"][0, pad:10] = torch.arange(words)[:, None]
    return sample


def lumina2(words: int) -> dict[str, Any]:
    """One sample of so many words."""
    drawn = build_inputs("lumina2", seed=words)
    sample = {name: value[:1] for name, value in drawn.items()}
    sample["encoder_attention_mask"] = (torch.arange(sample["encoder_attention_mask"].shape[1]) < words)[None].long()
    return sample


def ltx(turned: bool) -> dict[str, Any]:
    """One sample whose coordinates are those of a grid, or of the grid on its side."""
    drawn = build_inputs("ltx-condition", seed=int(turned))
    sample = {name: value[:1] for name, value in drawn.items()}
    if turned:
        places = sample["video_coords"][0, [0, 2, 1]].T
        frame = places[:, 1].unique().numel() * places[:, 2].unique().numel()
        frames = [sorted(part.tolist(), key=lambda place: place[1:]) for part in places.split(frame)]
        sample["video_coords"] = torch.tensor([place for part in frames for place in part]).T[None]
    return sample


@pytest.mark.parametrize(
    ("family", "samples"),
    [
        ("ideogram4", [ideogram4(7), ideogram4(4)]),
        ("lumina2", [lumina2(16), lumina2(5)]),
        ("ltx-condition", [ltx(False), ltx(True)]),
    ],
)
def test_each_as_when_alone(family: str, samples: list[dict[str, Any]]) -> None:
    model = build_model(family)
    batch = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}

    def forward(inputs: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]

    def alone() -> torch.Tensor:
        return torch.cat([forward(sample) for sample in samples])

    stock = forward(batch)
    torch.testing.assert_close(stock, alone(), atol=1e-5, rtol=1e-4)
    with apply(model, NeighborhoodPattern((-1, 2, 2)), dense_steps=0, dense_layers=0) as handle:
        found = forward(batch)
        assert handle.report().sparse_calls == handle.report().calls
        torch.testing.assert_close(found, alone(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, stock, atol=1e-3)
