"""The rotary seam: how a plugin changes the temporal columns of a model's rotary tables, for one forward at a time.

    angle of pair j at latent frame f:  f theta_j,   theta_j = base^(-2 j / d),   j = 0 .. d / 2 - 1

Video models make cos and sin tables [tokens, head dim] in a module of their own (Wan, SkyReels-V2, HunyuanVideo) or get them
from the pipeline (CogVideoX). The first d columns, in pairs of two, belong to the frames. A table is changed only after it
was found to hold just these angles; everything else is refused, since a wrong column would spoil a clip without a word.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def changed(tables: Tables, frames: int, frequencies: torch.Tensor, change: Change, name: str) -> Tables:
    """Tables [..., S, ..., D] with the temporal columns made anew; S = frames x places, raster order.

    Raises GenAttnError when the columns are not those of `frequencies` at frames 0, 1, 2, ...
    """
    plain = torch.arange(frames, dtype=torch.float64)
    used, positions = change(frequencies, plain)
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


def open_tables(model: nn.Module) -> None:
    """Make the model's rotary module ready for `changing`; raises GenAttnError for a model that cannot be served."""
    temporal_frequencies(model)
    name = _MODULES.get(model.__class__.__name__)
    if name is None:
        return
    module: Any = getattr(model, name)
    slot = module.__dict__.setdefault(_SLOT, {"users": 0, "edits": []})
    slot["users"] += 1
    if slot["users"] == 1:
        stock: Any = type(module)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Tables:
            tables: Tables = stock.forward(self, *args, **kwargs)
            for edit in self.__dict__[_SLOT]["edits"]:
                tables = edit(tables)
            return tables

        set_class(module, swapped_class(stock, {"forward": forward}))


def close_tables(model: nn.Module) -> None:
    """Undo one `open_tables`; the last one leaves the stock module."""
    name = _MODULES.get(model.__class__.__name__)
    if name is None:
        return
    module: Any = getattr(model, name)
    slot = module.__dict__[_SLOT]
    slot["users"] -= 1
    if not slot["users"]:
        set_class(module, stock_class(module))
        del module.__dict__[_SLOT]


@contextmanager
def changing(model: nn.Module, frames: int, change: Change, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """For one forward with `frames` latent frames: the tables changed; gives the forward's keyword arguments."""
    frequencies, name = temporal_frequencies(model), model.__class__.__name__

    def edit(tables: Tables) -> Tables:
        return changed(tables, frames, frequencies, change, name)

    if name in _ARGUMENTS:
        told = kwargs.get(_ARGUMENTS[name])
        if told is None:
            raise GenAttnError(f"{name} must be given {_ARGUMENTS[name]} by keyword, as its pipelines do")
        yield {**kwargs, _ARGUMENTS[name]: edit(told)}
        return
    edits: list[Any] = getattr(model, _MODULES[name]).__dict__[_SLOT]["edits"]
    edits.append(edit)
    try:
        yield kwargs
    finally:
        edits.remove(edit)
