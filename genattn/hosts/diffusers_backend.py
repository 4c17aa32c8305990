"""`model.set_attention_backend("genattn")`: a pattern switched on and off by the name of a backend.

    register_backend("radial", dense_steps=4)                    once per process
    pipe.transformer.set_attention_backend("genattn")            on
    pipe.transformer.set_attention_backend("native")             off again, as reset_attention_backend() is

diffusers keeps its backends in a closed enum, and a backend function sees tensors only: neither the model, the layout nor the
step. So registering does two things, and `unregister_backend` undoes both: it adds the name to the enum and to the registry,
and it puts itself before the two methods of ModelMixin that choose a backend. Chosen by name, the model gets what
`genattn.apply(model, pattern)` gives it; its own backend stays and serves the calls that remain dense.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from genattn.errors import GenAttnError
from genattn.patterns.pattern import Pattern
from genattn.seam.handle import Handle, apply
from genattn.seam.plugin import Plugin
from genattn.seam.sites import unwrapped

NAME = "genattn"
_METHODS = ("set_attention_backend", "reset_attention_backend")


class _Registration:
    """What is registered in this process: what to apply, the handles by model, the methods that stood there."""

    def __init__(self, make: Callable[[nn.Module], Handle]) -> None:
        self.make = make
        # a handle holds its model, and the model's injection holds the handle
        self.handles: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
        self.made_by: dict[int, Callable[[nn.Module], Handle]] = {}
        self.stock = {name: ModelMixin.__dict__[name] for name in _METHODS}
        self.ours = {name: _before(self, name, method) for name, method in self.stock.items()}

    def handle_of(self, model: nn.Module) -> Handle | None:
        """The handle by which `model` was switched on, None where it is off."""
        handle = self.handles.get(id(model))
        return handle if handle is not None and handle.active and handle.target is model else None

    def switch_on(self, model: nn.Module) -> None:
        """Apply what is registered, in the place of what was registered before."""
        if self.handle_of(model) is not None and self.made_by.get(id(model)) is self.make:
            return
        self.switch_off(model)
        self.handles[id(model)], self.made_by[id(model)] = self.make(model), self.make

    def switch_off(self, model: nn.Module) -> None:
        """Take our handle off; others stay."""
        handle = self.handle_of(model)
        self.made_by.pop(id(model), None)
        if handle is not None:
            handle.remove()


_REGISTERED: list[_Registration] = []


def register_backend(*plugins: Plugin | Pattern | str, impl: str = "auto", **settings: Any) -> None:
    """Make "genattn" a name that `set_attention_backend` takes, for all models of this process.

    plugins, impl and settings are those of `genattn.apply`: a name such as "radial" or "auto" (the default), a Pattern with
    settings of its schedule, or any plugins. They are checked when a model is switched on; where they cannot serve it,
    GenAttnError comes from there and the model stays dense. A bare model does not tell its number of steps: give `dense_steps`
    as a count, or `num_steps` by `backend_handle(model).set(num_steps=...)`; `genattn.apply(pipe, ...)` needs neither.

    Registering again replaces what models will get from then on; models that are switched on keep what they have.
    """
    given = plugins or ("auto",)

    def make(model: nn.Module) -> Handle:
        return apply(model, *given, impl=impl, **settings)

    if _REGISTERED:
        _REGISTERED[0].make = make
        return
    registration = _Registration(make)
    _REGISTERED.append(registration)
    for name, method in registration.ours.items():
        setattr(ModelMixin, name, method)
    member = _add_member(NAME)
    _AttentionBackendRegistry.register(member, supports_context_parallel=True)(_without_a_pattern)


def unregister_backend() -> None:
    """Switch every model off and take the name away; a second call does nothing.

    Where another package has put its own method over ours since, that one stays, and ours below it only hands on.
    """
    if not _REGISTERED:
        return
    registration = _REGISTERED.pop()
    for handle in list(registration.handles.values()):
        handle.remove()
    for name, method in registration.ours.items():
        if ModelMixin.__dict__[name] is method:
            setattr(ModelMixin, name, registration.stock[name])
    _drop_member(NAME)


def backend_handle(model: Any) -> Handle:
    """The handle of a model that was switched on by name, for its report and options.

    Raises GenAttnError for a model that was not.
    """
    registration = _REGISTERED[0] if _REGISTERED else None
    handle = None if registration is None else registration.handle_of(unwrapped(model))
    if handle is None:
        raise GenAttnError(
            f'{type(model).__name__} must have been switched on, and is not; call model.set_attention_backend("{NAME}")'
        )
    return handle


def _before(registration: _Registration, name: str, stock: Callable[..., None]) -> Callable[..., None]:
    """`stock` of ModelMixin with our name taken out of it."""

    @functools.wraps(stock)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        asked = kwargs.get("backend", args[0] if args else None)
        if registration not in _REGISTERED:
            return stock(self, *args, **kwargs)
        if name == _METHODS[0] and str(getattr(asked, "value", asked)).lower() == NAME:
            return registration.switch_on(self)
        registration.switch_off(self)
        return stock(self, *args, **kwargs)

    return method


def _without_a_pattern(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """What the registry holds: reached by a name that was given past `set_attention_backend`, where no pattern is known."""
    raise GenAttnError(
        f"the backend {NAME!r} acts through a model, and this call came without one (attention_backend(...) or a single "
        f'module\'s processor was given the name); call model.set_attention_backend("{NAME}") or genattn.apply(pipe, ...)'
    )


def _add_member(name: str) -> AttentionBackendName:
    """The enum has no door for further names: this is what its own class body would have left behind."""
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name.upper(), name
    AttentionBackendName._member_map_[name.upper()] = member
    AttentionBackendName._member_names_.append(name.upper())
    AttentionBackendName._value2member_map_[name] = member
    return member


def _drop_member(name: str) -> None:
    member = AttentionBackendName._member_map_.pop(name.upper())
    AttentionBackendName._member_names_.remove(name.upper())
    AttentionBackendName._value2member_map_.pop(name)
    for table in (
        _AttentionBackendRegistry._backends,
        _AttentionBackendRegistry._constraints,
        _AttentionBackendRegistry._supported_arg_names,
    ):
        table.pop(member, None)
    _AttentionBackendRegistry._supports_context_parallel.discard(name)
    if _AttentionBackendRegistry._active_backend == name:
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
