"""What a denoiser's inputs tell: per-call options, the timestep, the layout of the tokens, the pass."""

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.layouts.family import Family, MixedGrids
from genattn.seam.processors import signature_of

OPTION_KEY = "genattn"
CARRIERS = ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")


class RootInputs:
    """Reader of the arguments of one class of denoisers."""

    def __init__(self, stock: type, family: Family | None) -> None:
        self.names = tuple(signature_of(stock).parameters)[1:]
        self.family = family
        self._memo: tuple[Any, TokenLayout | None, str] | None = None
        self.of_samples: tuple[TokenLayout, ...] = ()

    def take_options(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(kwargs without our key, the options that were under it); the pipeline's own dict is left as it is."""
        told: dict[str, Any] = {}
        for name in CARRIERS:
            carried = kwargs.get(name)
            if carried and isinstance(carried, Mapping) and OPTION_KEY in carried:
                rest = dict(carried)
                options = rest.pop(OPTION_KEY)
                if not isinstance(options, Mapping):
                    raise GenAttnError(
                        f"{name}['{OPTION_KEY}'] must be a dict of options, got {type(options).__name__}: {options!r}"
                    )
                told.update(options)
                kwargs = {**kwargs, name: rest or None}
        return kwargs, told

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name; where they do not fit, the stock forward will say so itself."""
        return {**dict(zip(self.names, args)), **kwargs}

    def timestep(self, bound: Mapping[str, Any]) -> float | None:
        """The noisiest entry of a scalar, per-sample, per-frame or per-token timestep, or of a list of the distinct ones."""
        value = bound.get(self.family.timestep if self.family else "timestep")
        if value is None:
            return None
        if isinstance(value, torch.Tensor) and value.numel() > 1:
            value = value.min() if self.family is not None and self.family.rising else value.max()
        return float(value)

    def layout(self, model: nn.Module, bound: Mapping[str, Any]) -> tuple[TokenLayout | None, str]:
        """(layout of the self or joint attention, "") or (None, why there is none).

        Where the grids of a batch differ in size there is none, and `of_samples` has one for each sample.
        """
        if self.family is None:
            return None, f"no layout is known for {model.__class__.__name__}"
        key = _shape_key(bound, self.family.reads_values)
        if self._memo is not None and _same(self._memo[0], key):
            return self._memo[1], self._memo[2]
        self.of_samples = ()
        try:
            layout, why = self.family.layout(model, bound), ""
        except MixedGrids as error:
            layout, why = None, str(error)
            self.of_samples = self._of_samples(model, bound)
        except GenAttnError as error:
            layout, why = None, str(error)
        except (KeyError, AttributeError, TypeError, IndexError, ValueError) as error:
            layout, why = None, f"the layout of {model.__class__.__name__} could not be read ({type(error).__name__}: {error})"
        if layout is None and not why:
            why = f"these inputs of {model.__class__.__name__} have no known layout"
        self._memo = (key, layout, why)
        return layout, why

    def _of_samples(self, model: nn.Module, bound: Mapping[str, Any]) -> tuple[TokenLayout, ...]:
        assert self.family is not None
        lists = [name for name in self.family.lists if name in bound]
        found = []
        for place in range(len(bound[lists[0]])):
            found.append(self.family.layout(model, {**bound, **{name: bound[name][place : place + 1] for name in lists}}))
        return tuple(layout for layout in found if layout is not None) if None not in found else ()


def _shape_key(bound: Mapping[str, Any], reads_values: tuple[str, ...]) -> list[Any]:
    """What the layout depends on: shapes, plain values, and the identity of the tensors whose values are read."""
    key: list[Any] = []
    for name, value in bound.items():
        if isinstance(value, torch.Tensor):
            # an inference tensor counts no changes, so it is never taken for the one before
            version = math.nan if value.is_inference() else value._version
            key.append((name, tuple(value.shape), weakref.ref(value) if name in reads_values else None, version))
        elif name in reads_values and isinstance(value, tuple) and all(isinstance(v, torch.Tensor) for v in value):
            key += _shape_key({f"{name}.{i}": v for i, v in enumerate(value)}, tuple(f"{name}.{i}" for i in range(len(value))))
        elif name in reads_values and value is not None:  # a cache, or a table of positions: it may change inside
            key.append((name, None, _gone, 0))
        elif isinstance(value, (int, float, str, tuple, list)):
            key.append((name, _frozen(value), None, 0))
    return key


def _gone() -> None:
    """Stands for an input that is read anew in every forward."""


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return value if isinstance(value, (int, float, str, type(None))) else type(value).__name__


def _same(old: list[Any], new: list[Any]) -> bool:
    """Equal keys; a value-read tensor must be the very same object, unchanged."""
    if len(old) != len(new):
        return False
    for a, b in zip(old, new):
        if a[:2] != b[:2] or (a[2] is None) != (b[2] is None):
            return False
        if a[2] is not None and (a[2]() is None or a[2]() is not b[2]() or a[3] != b[3]):
            return False
    return True
