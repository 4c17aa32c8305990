"""The rotary seam: how a plugin changes the temporal columns of a model's rotary tables, for one forward at a time.

    angle of pair j at latent frame f:  f theta_j,   theta_j = base^(-2 j / d),   j = 0 .. d / 2 - 1

Video models make cos and sin tables [tokens, head dim] in a module of their own (Wan, SkyReels-V2, HunyuanVideo) or get them
from the pipeline (CogVideoX). The first d columns, in pairs of two, belong to the frames. A table is changed only after it
was found to hold just these angles; everything else is refused, since a wrong column would spoil a clip without a word.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.seam.processors import set_class, stock_class, swapped_class

# frequencies [d / 2] and frame positions [T], float64 -> those to use
Change = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Tables = tuple[torch.Tensor, torch.Tensor]

_SLOT = "_genattn_rotary"
# class name of the denoiser -> where it gets its tables: a submodule, or a keyword argument of its forward
_MODULES = {
    "WanTransformer3DModel": "rope",
    "WanVACETransformer3DModel": "rope",
    "SkyReelsV2Transformer3DModel": "rope",
    "HunyuanVideoTransformer3DModel": "rope",
    "HunyuanVideo15Transformer3DModel": "rope",
    "MotifVideoTransformer3DModel": "rope",
}
_ARGUMENTS = {"CogVideoXTransformer3DModel": "image_rotary_emb"}


def temporal_frequencies(model: nn.Module) -> torch.Tensor:
    """The frequencies of the frames' axis, float64 [d / 2], falling; raises GenAttnError for a model without known tables."""
    name = model.__class__.__name__
    if name in _ARGUMENTS:
        size = int(model.config.attention_head_dim)  # type: ignore[arg-type,union-attr]
        if not model.config.use_rotary_positional_embeddings:  # type: ignore[union-attr]
            raise GenAttnError(f"this {name} has learned positions, no rotary ones (CogVideoX-2B); take a 5B checkpoint")
        return _frequencies(size // 4, 10000.0)
    if name not in _MODULES:
        served = ", ".join(sorted({*_MODULES, *_ARGUMENTS}))
        raise GenAttnError(f"the rotary tables of {name} are not known here; served are {served}")
    module: Any = getattr(model, _MODULES[name])
    if hasattr(module, "t_dim"):
        return _frequencies(module.t_dim, 10000.0)
    return _frequencies(module.rope_dim[0], float(module.theta))


def _frequencies(size: int, base: float) -> torch.Tensor:
    return base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)


def changed(tables: Tables, frames: int, frequencies: torch.Tensor, changes: Sequence[Change], name: str) -> Tables:
    """Tables [..., S, ..., D] with the temporal columns made anew, each change on top of the one before; S = frames x places,
    raster order. Raises GenAttnError when the columns are not those of `frequencies` at frames 0, 1, 2, ...
    """
    plain = torch.arange(frames, dtype=torch.float64)
    used, positions = frequencies, plain
    for change in changes:
        used, positions = change(used, positions)
    out = []
    for table, function in zip(tables, (torch.cos, torch.sin), strict=True):
        flat = table.reshape(-1, table.shape[-1])
        width, places = 2 * len(frequencies), flat.shape[0] // frames
        before = function(torch.outer(plain, frequencies)).repeat_interleave(2, 1)
        if flat.shape[0] % frames or not _near(flat[::places, :width], before):
            raise GenAttnError(f"the rotary tables of {name} do not hold the frames' angles where they are expected")
        after = function(torch.outer(positions, used)).repeat_interleave(2, 1)
        flat = flat.clone()
        flat[:, :width] = after.repeat_interleave(places, 0).to(flat)
        out.append(flat.reshape(table.shape))
    return out[0], out[1]


def _near(table: torch.Tensor, wanted: torch.Tensor) -> bool:
    # half-precision tables carry three digits
    allowed = 1e-3 if table.dtype in (torch.float32, torch.float64) else 2e-2
    return table.shape == wanted.shape and bool((table.double().cpu() - wanted).abs().max() < allowed)


@dataclass
class _Slot:
    """What hangs on the module that makes the tables (or on the model that is given them) while a plugin is on.

    changes: those of the forward under way, outermost first. told: the tables as the caller gave them.
    """

    users: int = 0
    frames: int = 0
    changes: list[Change] = field(default_factory=list)
    told: Tables | None = None


def _holder(model: nn.Module) -> Any:
    name = _MODULES.get(model.__class__.__name__)
    return model if name is None else getattr(model, name)


def open_tables(model: nn.Module) -> None:
    """Make the model's rotary tables ready for `changing`; raises GenAttnError for a model that cannot be served."""
    frequencies, name, holder = temporal_frequencies(model), model.__class__.__name__, _holder(model)
    slot = holder.__dict__.setdefault(_SLOT, _Slot())
    slot.users += 1
    if holder is model or slot.users > 1:
        return
    stock: Any = type(holder)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tables:
        tables: Tables = stock.forward(self, *args, **kwargs)
        held = self.__dict__[_SLOT]
        return changed(tables, held.frames, frequencies, held.changes, name) if held.changes else tables

    set_class(holder, swapped_class(stock, {"forward": forward}))


def close_tables(model: nn.Module) -> None:
    """Undo one `open_tables`; the last one leaves everything stock."""
    holder = _holder(model)
    slot = holder.__dict__[_SLOT]
    slot.users -= 1
    if not slot.users:
        if holder is not model:
            set_class(holder, stock_class(holder))
        del holder.__dict__[_SLOT]


@contextmanager
def changing(model: nn.Module, frames: int, change: Change, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For one forward with `frames` latent frames: the tables changed; gives the forward's keyword arguments."""
    name, slot = model.__class__.__name__, _holder(model).__dict__[_SLOT]
    argument = _ARGUMENTS.get(name)
    if argument is not None and not slot.changes:
        slot.told = kwargs.get(argument)
        if slot.told is None:
            raise GenAttnError(f"{name} must be given {argument} by keyword, as its pipelines do")
    slot.frames = frames
    slot.changes.append(change)
    try:
        if argument is not None:
            kwargs = {**kwargs, argument: changed(slot.told, frames, temporal_frequencies(model), slot.changes, name)}
        yield kwargs
    finally:
        slot.changes.pop()
