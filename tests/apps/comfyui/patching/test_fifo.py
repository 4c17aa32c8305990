"""What the FIFO sampler and the Profile node refuse before any forward, on stand-ins; the live tests sample with them."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genattn.apps.comfyui.patching.fifo import FifoSampling, FifoSettings
from genattn.apps.comfyui.profiling import output_place
from genattn.errors import GenAttnError


class WanModel:
    patch_embedding = SimpleNamespace(weight=torch.zeros(8, 16, 1, 2, 2))


class OtherModel:
    """Any other network."""


FALLING = torch.linspace(1, 0, 9)
LATENTS = torch.zeros(1, 16, 12, 4, 4)


def check(base: Any = None, x: torch.Tensor = LATENTS, sigmas: torch.Tensor = FALLING, **given: Any) -> None:
    inner = SimpleNamespace(diffusion_model=WanModel() if base is None else base)
    FifoSampling(FifoSettings(window=5)).check(inner, x, sigmas, given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base": OtherModel()}, "needs a model with one timestep per frame, which Wan is, got OtherModel"),
        (
            {"x": torch.zeros(1, 36, 12, 4, 4)},
            r"needs a text-to-video Wan, got 16 input channels for latents \(1, 36, 12, 4, 4\)",
        ),
        ({"x": torch.zeros(1, 16, 4, 4)}, "needs a text-to-video Wan"),
        ({"x": LATENTS.expand(2, -1, -1, -1, -1)}, "makes one video at a time, got a batch of 2; set batch_size to 1"),
        ({"x": LATENTS[:, :, :5]}, "longer than the window of 5 latent frames, got 5; raise the length of the latent"),
        ({"sigmas": torch.linspace(1, 0, 3)}, r"as many steps as the window has latent frames \(5\) .*, got 2 steps"),
        ({"sigmas": torch.linspace(1, 0.1, 9)}, r"sigmas must fall to 0, got \[1.0, .*; use denoise 1 and all steps"),
        ({"sigmas": torch.tensor([1, 0.8, 0.9, 0.7, 0.6, 0.5, 0.4, 0])}, "sigmas must fall to 0"),
        ({"denoise_mask": torch.ones(1)}, "takes no noise mask and no context windows; it has windows of its own"),
        ({"model_options": {"context_handler": object()}}, "takes no noise mask and no context windows"),
    ],
)
def test_what_a_queue_cannot_serve(changes: dict[str, Any], says: str) -> None:
    check()
    with pytest.raises(GenAttnError, match=says):
        check(**changes)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_settings(eta: float) -> None:
    with pytest.raises(GenAttnError, match="eta must be 0 .deterministic. to 1 .all noise fresh., got"):
        FifoSettings(eta=eta)
    with pytest.raises(GenAttnError, match="window_batch must be >= 1, got 0"):
        FifoSettings(window_batch=0)


def test_a_map_stays_in_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SimpleNamespace(get_output_directory=lambda: str(tmp_path / "output"))
    monkeypatch.setitem(sys.modules, "folder_paths", folder)  # type: ignore[arg-type]
    assert output_place("maps/mine ") == (tmp_path / "output" / "maps" / "mine.safetensors").resolve()
    for name in ("", "  ", "../mine", "/mine", "maps/../../mine"):
        with pytest.raises(GenAttnError, match="name must be that of a file in the output folder, got"):
            output_place(name)
