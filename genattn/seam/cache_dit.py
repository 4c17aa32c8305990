"""Beside cache-dit: it counts the forwards of a denoiser and keeps what its blocks gave by that count, so an extra pass of ours
must not count as one of the pipeline's, and has a state of its own.

Nothing of it is imported: a model that it has on carries the manager of its states, their names, and the forward under its own.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

_EXTRA = "_genattn_extra"


def is_held(model: nn.Module) -> bool:
    """Whether cache-dit is on this model."""
    return "_original_forward" in model.__dict__ and hasattr(model.__dict__.get("_context_manager"), "_cached_context_manager")


@contextlib.contextmanager
def own_state(model: nn.Module, pass_name: str) -> Iterator[None]:
    """Inside, its states are those of an extra pass; they live as long as the pipeline's own, which is one run.

    The pipeline's states take every second forward for the other half of classifier-free guidance. An extra pass has one kind
    only.
    """
    if not is_held(model):
        yield
        return
    manager: Any = model.__dict__["_context_manager"]
    states, current = manager._cached_context_manager, manager._current_context
    before = {name: states[name] for name in model.__dict__["_context_names"] if name in states}
    states.update({name: _extra_of(state, pass_name) for name, state in before.items()})
    try:
        yield
    finally:
        states.update(before)
        manager._current_context = current


def _extra_of(state: Any, pass_name: str) -> Any:
    kept = state.__dict__.setdefault(_EXTRA, {})
    if pass_name not in kept:
        config = copy.copy(state.cache_config)
        config.enable_separate_cfg = False
        given = {**getattr(state, "_init_kwargs", {}), "name": state.name, "cache_config": config}
        made = type(state)(**given)
        made._init_args, made._init_kwargs = (), given
        kept[pass_name] = made
    return kept[pass_name]


@contextlib.contextmanager
def left_out(model: nn.Module) -> Iterator[None]:
    """Inside, every block runs: the forward is the one under cache-dit's."""
    if not is_held(model):
        yield
        return
    theirs, hook = model.__dict__["forward"], getattr(model, "_hf_hook", None)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if hook is not None:
            args, kwargs = hook.pre_forward(model, *args, **kwargs)
        out = model.__dict__["_original_forward"](*args, **kwargs)
        return out if hook is None else hook.post_forward(model, out)

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        model.__dict__["forward"] = theirs
