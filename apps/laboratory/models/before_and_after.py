"""A model before plugins and after: all of its outputs, and whatever applying could touch, by identity."""

import copy
import sys
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def outputs(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> list[torch.Tensor]:
    """Every tensor that a forward without gradients gives, in order. The inputs are copied: some models write to theirs."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return [
            leaf for leaf in tree_leaves(model(**copy.deepcopy(inputs), return_dict=False)) if isinstance(leaf, torch.Tensor)
        ]


def same_bits(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """As many tensors, and each equal in every element; a NaN equals a NaN."""
    if [t.shape for t in ones] != [t.shape for t in others]:
        return False
    return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(ones, others))


def identities(model: nn.Module) -> dict[str, Any]:
    """Classes, attributes, processors and the globals of the processors' modules, by identity."""
    kept: dict[str, Any] = {}
    for name, module in model.named_modules():
        kept[name] = (type(module), {key: id(value) for key, value in module.__dict__.items()})
        processor = getattr(module, "processor", None)
        if processor is not None:
            spaces = [vars(sys.modules[base.__module__]) for base in type(processor).__mro__]
            named = [{k: id(v) for k, v in space.items() if k in ("F", "dispatch_attention_fn")} for space in spaces]
            own = dict(getattr(processor, "__dict__", {}))
            kept[f"{name} processor"] = (id(processor), type(processor), own, named)
    return kept


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names whose entry is not what it was."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
