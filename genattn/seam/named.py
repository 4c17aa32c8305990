"""A pattern from a name such as "auto": what the model is, which preset it gets, and how that is told."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from genattn.errors import GenAttnError
from genattn.layouts.families import family_of
from genattn.planning.ladder import Model, rung
from genattn.seam.schedule import Schedule
from genattn.seam.sites import find_sites, head_dims
from genattn.seam.sparse_plugin import SparsePlugin

_LOG = logging.getLogger("genattn")
_SAID: set[str] = set()


def named_plugin(
    name: str,
    models: Mapping[str, nn.Module],
    components: Sequence[str],
    schedule: Schedule | None,
    settings: Mapping[str, Any],
    impl: str,
) -> SparsePlugin:
    """The plugin that `name` stands for on these denoisers of one pipeline. settings win over the preset's schedule.

    Says once per model where no preset is known. Raises GenAttnError for an unknown name.
    """
    component, model = next(iter(models.items()))
    found = rung(name, describe_model(component, model, components, impl))
    if not found.known and found.why not in _SAID:
        _SAID.add(found.why)
        _LOG.warning("%s: %s", name, found.why)
    plan = schedule or Schedule(**{**found.schedule, **settings})
    if schedule is not None and not schedule.min_tokens:
        plan = replace(schedule, min_tokens=found.schedule.get("min_tokens", 0))
    plugin = SparsePlugin(found.pattern, plan, impl)
    plugin.origin = f"{name!r}: {found.why}"
    return plugin


def describe_model(component: str, model: nn.Module, components: Sequence[str], impl: str = "auto") -> Model:
    """What the planner asks of a denoiser. Raises GenAttnError when it has no attention for a pattern."""
    sites = find_sites(model, component, family_of(model))
    inside = [site for _, site in sites if site.kind in ("self", "joint") and site.depth >= 0]
    if not inside:
        raise GenAttnError(f"{model.__class__.__name__} has no self or joint attention for a pattern")
    dims = head_dims(sites)
    device = next(model.parameters()).device.type
    return Model(
        model.__class__.__name__,
        inside[0].heads,
        1 + max(site.depth for site in inside),
        dims.get(inside[0].name, 128),
        tuple(components),
        device,
        backend_of(device, impl),
    )


def backend_of(device: str, impl: str) -> str:
    """The backend that will answer sparse calls: the named one, or the first for the device."""
    if impl != "auto":
        return impl
    if device != "cpu":
        return "triton"
    from genattn.kernels.cpu.native_build import native_library

    return "grouped" if isinstance(native_library(), str) else "cpu"
