"""Windows, decay, rescale and APG of the difference."""

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg

from genattn.errors import GenAttnError
from genattn.guidance.passes.delta import DeltaRule, Projection, Window
from genattn.seam.plugin import Run


def test_window_counts_both_ends() -> None:
    assert Window(0.2, 0.5).steps(10) == [2, 3, 4, 5]
    assert Window(0.01, 0.2).steps(10) == [1, 2]
    assert Window().steps(3) == [0, 1, 2]
    for steps in (1, 3, 7, 50):
        for window in (Window(0.3, 0.6), Window(0.0, 0.0), Window(1 / 3, 1.0)):
            inside = [s for s in range(steps) if window.contains(Run(step=s, num_steps=steps))]
            assert inside == window.steps(steps)


def test_noise_window() -> None:
    window = Window(sigma_start=0.8, sigma_stop=0.2)
    assert [window.contains(Run(sigma=s)) for s in (0.9, 0.8, 0.5, 0.2, 0.1)] == [False, True, True, True, False]
    assert Window(sigma_start=2.0).contains(Run(sigma=0.0))
    assert not Window(sigma_stop=1.0).contains(Run(sigma=0.5))
    assert Window().always
    assert not window.always
    assert "sigma 0.8 down to 0.2" in window.describe()


def test_window_refusals() -> None:
    with pytest.raises(GenAttnError, match="start must be a number"):
        Window(-0.1)
    with pytest.raises(GenAttnError, match=r"stop must be a number in \[0.5, 1\], got 0.2"):
        Window(0.5, 0.2)
    with pytest.raises(GenAttnError, match="sigma_start must be a number"):
        Window(sigma_start=math.nan)
    with pytest.raises(GenAttnError, match="noise falls"):
        Window(sigma_start=0.1, sigma_stop=0.5)
    with pytest.raises(GenAttnError, match="need the number of steps, got none"):
        Window(0.0, 0.5).contains(Run(step=3))
    with pytest.raises(GenAttnError, match="needs the noise level, got none"):
        Window(sigma_start=0.5).contains(Run(step=3, num_steps=5))


def test_plain_delta_and_decay() -> None:
    clean, perturbed = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    rule = DeltaRule(3.0)
    delta, kept = rule.delta(clean, perturbed, rule.weight(Run()))
    torch.testing.assert_close(delta, 3.0 * (clean - perturbed))
    assert kept is None
    falling = DeltaRule(4.0, adaptive=2.0)
    assert [falling.weight(Run(step=s, num_steps=4)) for s in range(4)] == [4.0, 2.0, 0.0, 0.0]
    with pytest.raises(GenAttnError, match="needs the number of steps, got adaptive=2"):
        falling.weight(Run())


def test_rescale_is_that_of_diffusers() -> None:
    clean, perturbed = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    delta, _ = DeltaRule(3.0, rescale=0.7).delta(clean, perturbed, 3.0)
    expected = rescale_noise_cfg(clean + 3.0 * (clean - perturbed), clean, 0.7)
    torch.testing.assert_close(clean + delta, expected)


def test_projection_is_that_of_diffusers() -> None:
    rule = DeltaRule(2.0, projection=Projection(eta=0.3, norm_cap=4.0, momentum=-0.5))
    buffer, previous = MomentumBuffer(-0.5), None
    for _ in range(3):
        clean, perturbed = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
        delta, previous = rule.delta(clean, perturbed, 2.0, previous)
        expected = normalized_guidance(clean, perturbed, 2.0, buffer, 0.3, 4.0, use_original_formulation=True) - clean
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": math.nan}, "scale must be a finite number, got nan"),
        ({"scale": True}, "scale must be a finite number"),
        ({"scale": "3"}, "scale must be a finite number"),
        ({"adaptive": -1.0}, "adaptive"),
        ({"rescale": 1.5}, "rescale"),
    ],
)
def test_rule_refusals(settings: dict, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        DeltaRule(**settings)


@pytest.mark.parametrize("settings", [{"eta": 2.0}, {"norm_cap": -1.0}, {"momentum": 2.0}])
def test_projection_refusals(settings: dict) -> None:
    with pytest.raises(GenAttnError, match=next(iter(settings))):
        Projection(**settings)
