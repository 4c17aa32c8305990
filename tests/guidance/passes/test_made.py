"""Norms and spreads are those of what the pipeline steps with: references and given frames do not count."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.guidance.passes.delta import DeltaRule, Projection
from genattn.guidance.passes.made import made_part, on_made
from genattn.guidance.tag.tangential import amplified, amplify
from genattn.seam.plugin import Run

KONTEXT = TokenLayout((Segment("text", (3,)), Segment("grid", (1, 2, 2)), Segment("reference", (1, 1, 3))))
KEPT_FIRST = TokenLayout((Segment("text", (3,)), Segment("reference", (1, 1, 3)), Segment("grid", (1, 2, 2))))
PLAIN = TokenLayout((Segment("text", (3,)), Segment("grid", (1, 2, 2))))


@pytest.mark.parametrize(
    ("layout", "tokens", "places"),
    [
        (KONTEXT, 7, [0, 1, 2, 3]),
        (KEPT_FIRST, 7, [3, 4, 5, 6]),
        (KONTEXT, 4, None),  # the references are kept keys, and the answer is the image's
        (PLAIN, 4, None),
        (None, 7, None),
    ],
)
def test_references_are_told_by_the_layout(layout: TokenLayout | None, tokens: int, places: list[int] | None) -> None:
    found = made_part(Run(layout=layout), torch.zeros(2, tokens, 8), {})
    assert (None if found is None else (found[0], found[1].tolist())) == (None if places is None else (1, places))


@pytest.mark.parametrize(("levels", "places"), [([0, 0, 5, 5], [2, 3]), ([5, 5, 5, 5], None), ([0, 0, 0, 0], None)])
def test_given_frames_are_told_by_their_noise_level(levels: list[int], places: list[int] | None) -> None:
    found = made_part(Run(layout=PLAIN), torch.zeros(2, 4, 8), {"timestep": torch.tensor([levels, levels])})
    assert (None if found is None else found[1].tolist()) == places


def test_reference_sound_is_told_by_its_noise_level() -> None:
    """Of the second prediction alone, whose tokens no layout counts."""
    packed = {"audio_indices": torch.tensor([2, 3, 6, 7]), "timestep_indices": torch.tensor([0, 0, 2, 2, 0, 0, 1, 1])}
    found = made_part(Run(layout=PLAIN), torch.zeros(1, 4, 8), packed, 1)
    assert found is not None
    assert found[1].tolist() == [2, 3]
    assert made_part(Run(layout=PLAIN), torch.zeros(1, 4, 8), packed) is None
    assert made_part(Run(layout=KONTEXT), torch.zeros(1, 7, 8), packed, 1) is None
    assert made_part(Run(), torch.zeros(1, 4, 8), {**packed, "timestep_indices": torch.zeros(8, dtype=torch.long)}, 1) is None
    levels = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    found = made_part(Run(), torch.zeros(1, 4, 8), {"audio_timestep": levels, "timestep": levels.flip(1)}, 1)
    assert found is not None
    assert found[1].tolist() == [2, 3]


def test_a_replaced_first_frame_is_told_by_the_model() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(image_condition_type="token_replace"))
    found = made_part(Run(model=model), torch.zeros(1, 4, 3, 2, 2), {})
    assert found is not None
    assert (found[0], found[1].tolist()) == (2, [1, 2])
    assert made_part(Run(), torch.zeros(1, 4, 3, 2, 2), {}) is None


def test_what_is_measured_is_the_made_part_alone() -> None:
    clean, perturbed = torch.randn(2, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    place = made_part(Run(layout=KONTEXT), clean, {})
    rule = DeltaRule(2.0, rescale=0.7, projection=Projection(eta=0.3, norm_cap=1.0, momentum=0.5))
    found, kept = rule.delta(clean, perturbed, 2.0, None, place)
    expected, expected_kept = rule.delta(clean[:, :4], perturbed[:, :4], 2.0)
    assert kept is not None
    assert expected_kept is not None
    torch.testing.assert_close(found[:, :4], expected)
    torch.testing.assert_close(kept, expected_kept)
    assert not found[:, 4:].any()
    changed = amplified(clean, perturbed, 1.5, place)
    torch.testing.assert_close(changed[:, :4], amplify(clean[:, :4], perturbed[:, :4], 1.5))
    assert torch.equal(changed[:, 4:], clean[:, 4:])
    assert torch.equal(on_made(lambda x: x + 1, None, clean), clean + 1)


def test_channels_behind_the_frames() -> None:
    """CogVideoX image-to-video: [B, F, C, H, W], the condition in further channels of the input."""
    latents, prediction = torch.randn(1, 2, 6, 3, 3), torch.randn(1, 2, 4, 3, 3)
    torch.testing.assert_close(amplified(prediction, latents, 1.3), amplify(prediction, latents[:, :, :4], 1.3))
