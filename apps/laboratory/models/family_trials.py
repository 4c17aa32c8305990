"""What holds for one family of models, tried out on its tiny model: a row of the table of families."""

import copy
import platform
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from genattn.apps.laboratory.models.before_and_after import changed, identities
from genattn.errors import kind_and_line
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.layouts.families import family_of
from genattn.layouts.site import AttentionSite
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.pipelines.tiny.random.models import MODELS
from genattn.seam.handle import apply
from genattn.seam.plugin import AttentionCall, Inner, Plugin
from genattn.seam.sites import find_sites

BY_FRAME = ("latte", "animatediff")
"""Families that look at one frame at a time."""


class _Layouts(Plugin):
    """Notes at every site whether the layout has the sequence's length."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.described = ""

    def wants(self, site: AttentionSite) -> bool:
        return site.kind in ("self", "joint", "spatial", "temporal")

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        if call.run.layout is not None:
            self.described = call.run.layout.describe()
        if call.layout is None and call.run.layout is not None and call.key.shape[1] < call.run.layout.seqlen:
            return inner(call)  # over a part of the sequence by a rule of the model's own
        if call.layout is None or call.layout.seqlen != call.query.shape[1]:
            self.wrong.append(f"{call.site.name}: {call.query.shape[1]} tokens")
        return inner(call)


def try_family(family: str) -> dict[str, str]:
    """Columns of the row, all but those of compiling. A column that fails says why."""
    model, inputs = build_model(family), build_inputs(family)
    known = family_of(model)
    row = {"family": family, "model": type(model).__name__, "note": known.note if known else "no layout known"}
    row |= {"diffusers": diffusers.__version__, "torch": torch.__version__, "device": platform.machine() + " CPU"}
    first, stock = identities(model), forward(model, inputs)
    before = identities(model)
    own = set(changed(first, before))  # what stock code makes anew in a forward
    layouts = _Layouts()
    handle = apply(model, layouts)
    row["sites"] = str(len([site for site in handle.sites if not site.unreachable]))
    same = torch.equal(forward(model, inputs), stock)
    handle.remove()
    row["layout"] = layouts.described
    row["layout_exact"] = "; ".join(layouts.wrong) or ("yes" if layouts.described else "no attention reached")
    row["dense_bit_exact"] = "yes" if same else "output differs"
    left = [name for name in changed(before, identities(model)) if name not in own]
    row["removed_exactly"] = f"left behind at {', '.join(left[:3])}" if left else "yes"
    row["radial_runs"] = attempt(lambda: _runs(model, inputs, RadialPattern()))
    _more(family, row, model, inputs)
    return row


def forward(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's first output."""
    with torch.no_grad():
        out = model(**copy.deepcopy(inputs), return_dict=False)  # caches among the inputs are written to
    while isinstance(out, list | tuple):
        out = out[0]
    return out


def _sparse(model: Any, inputs: dict[str, Any], pattern: Pattern) -> str:
    """Density of the sparse calls, with what stays dense by a rule of the model's own."""
    with apply(model, pattern, dense_steps=0, dense_layers=0) as handle:
        out = forward(model, inputs)
        report = handle.report()
    if not bool(out.isfinite().all()):
        return "not finite"
    return f"{report.density:.2f}" if report.sparse_calls else "; ".join(report.dense_reasons)


def _runs(model: Any, inputs: dict[str, Any], pattern: Pattern) -> str:
    """Whether the pattern acts and the answer is finite."""
    found = _sparse(model, inputs, pattern)
    return "yes" if found[:1].isdigit() else found


def window(shape: tuple[int, ...], **settings: Any) -> NeighborhoodPattern:
    """A window of a sixth of each axis of a raster, at least 3; short axes whole."""
    return NeighborhoodPattern(tuple(max(3, n // 6) if n > 3 else -1 for n in shape), **settings)


def _softpag(model: Any, inputs: dict[str, Any]) -> str:
    """A guided forward, its last layer's first head perturbed: finite, and not the clean answer."""
    clean = forward(model, inputs)
    depth = max(site.depth for site in apply_sites(model))
    with apply(model, SoftPAG({(depth, 0): 1.0}, layout="single")):
        out = forward(model, inputs)
    return "yes" if bool(out.isfinite().all()) and not torch.equal(out, clean) else "no difference"


def apply_sites(model: Any) -> list[AttentionSite]:
    """Sites at which a pattern or head guidance may act."""
    sites = [site for _, site in find_sites(model, "", family_of(model))]
    return [site for site in sites if site.kind in ("self", "joint", "spatial") and site.depth >= 0]


def _more(family: str, row: dict[str, str], model: Any, inputs: dict[str, Any]) -> None:
    """The columns that need a raster large enough for tiles to be left out, and those of guidance."""
    large = MODELS[family].large
    if large is not None:
        wide = build_inputs(family, grid=large)
        by_frame = family in BY_FRAME
        thinned = "picture" if len(large) < 3 else "1 frame" if by_frame else ""
        row["radial_density"] = thinned or attempt(lambda: _sparse(model, wide, RadialPattern(tail=None)))
        shape = large[-2:] if by_frame else large
        row["gna_density"] = attempt(lambda: _sparse(model, wide, window(shape, tail=None)))
        row["tail_runs"] = attempt(lambda: _runs(model, wide, window(shape, tail="mean")))
    row["softpag_runs"] = attempt(lambda: _softpag(model, inputs))
    row["nag_runs"] = attempt(lambda: _nag(model))


def _nag(model: Any) -> str:
    """Whether a negative prompt can act inside this model's attention: the plugin says so when it is put on."""
    from genattn.guidance.nag import NAG

    apply(model, NAG("blurry")).remove()
    return "yes"


def attempt(try_out: Callable[[], str]) -> str:
    try:
        return try_out()
    except Exception as error:  # a table of what fails must not fail
        return kind_and_line(error)[:300]
