"""What the planner asks of ComfyUI's MODEL: class, blocks, heads, device; and its sampling as noise levels."""

import math
from typing import Any

from genattn.apps.comfyui.hosts.families import host_of
from genattn.planning.ladder import Model
from genattn.seam.named import backend_of


def known_model(model: Any) -> Model:
    """The MODEL as `genattn.planning` knows it, under the name of the diffusers class that holds the same weights."""
    inner = model.model.diffusion_model
    host = host_of(inner)
    sites = host.sites(inner)
    device = getattr(getattr(model, "load_device", None), "type", "cpu")
    width = next((int(getattr(inner, name)) for name in _WIDTHS if isinstance(getattr(inner, name, None), int)), 0)
    heads = sites[0].heads
    blocks = 1 + max(site.depth for site in sites)
    return Model(host.diffusers, heads, blocks, width // heads or 128, (), device, backend_of(device, "auto"))


_WIDTHS = ("dim", "hidden_size", "inner_dim", "model_dim", "model_channels")


def percents_as_sigmas(model: Any, start: float | None, end: float | None) -> tuple[float, float]:
    """(highest, lowest) noise level of a share of the sampling, infinity and 0 for all of it.

    A step that begins at `start` belongs to it and one that begins at `end` does not, however the sampler rounded its level.
    """
    sampling = model.get_model_object("model_sampling") if start or (end is not None and end < 1) else None
    high = float(sampling.percent_to_sigma(start)) * _ABOVE if sampling is not None and start else math.inf
    low = float(sampling.percent_to_sigma(end)) * _ABOVE if sampling is not None and end is not None and end < 1 else 0.0
    return high, low


_ABOVE = 1 + 1e-4
