"""From the mask a stock processor made to a key mask that goes together with a pattern.

    None                     nothing hidden
    [B, Sk]                  key padding, bool or additive
    [B or 1, 1 or H, 1, Sk]  key padding per sample, the same for all heads
    [B or 1, 1, Sq, Sk]      the outer product of one validity vector (HunyuanVideo 1.5, Chroma): valid tokens see valid tokens

Everything else (causal blocks, biases, flex BlockMasks) says more than which keys are valid and cannot be reduced.
"""

from typing import Any

import torch

_HIDDEN = -1e3


def key_mask(mask: Any, batch: int, queries: int, keys: int) -> tuple[torch.Tensor | None, str]:
    """(bool [B, Sk] or None for "all keys", "") or (None, why the mask cannot be reduced)."""
    if mask is None:
        return None, ""
    if not isinstance(mask, torch.Tensor):
        return None, f"the mask is a {type(mask).__name__}"
    if mask.shape[-1] != keys:
        return None, f"the mask has {mask.shape[-1]} columns for {keys} keys"
    if mask.ndim == 2 and mask.shape[0] in (1, batch) and (mask.shape[0] != queries or queries == batch == 1):
        return _as_bool(mask, mask, batch)
    if mask.ndim == 4 and mask.shape[2] == 1 and mask.shape[0] in (1, batch):
        rows = mask[:, 0, 0]
        if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
            return None, "the mask differs from head to head"
        return _as_bool(rows, mask, batch)
    if mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == queries == keys and mask.shape[0] in (1, batch):
        return _outer_product(mask[:, 0], batch)
    return None, f"a mask of shape {tuple(mask.shape)} is more than a choice of keys"


def _as_bool(rows: torch.Tensor, mask: torch.Tensor, batch: int) -> tuple[torch.Tensor | None, str]:
    if rows.dtype is not torch.bool:
        if not bool(((rows == 0) | (rows <= _HIDDEN)).all()):
            return None, "the mask is an additive bias, not a choice of keys"
        rows = rows == 0
    if bool(rows.all()):
        return None, ""
    return rows.expand(batch, -1), ""


def _outer_product(mask: torch.Tensor, batch: int) -> tuple[torch.Tensor | None, str]:
    if mask.dtype is not torch.bool:
        if not bool(((mask == 0) | (mask <= _HIDDEN)).all()):
            return None, "the mask is an additive bias, not a choice of keys"
        mask = mask == 0
    # rows of padding tokens may see what they like, what they compute is never read; a token that counts sees itself
    own = mask.diagonal(dim1=1, dim2=2)
    if bool(((mask == own[:, None, :]) | ~own[:, :, None]).all()):
        return (None if bool(own.all()) else own.expand(batch, -1)), ""
    common = mask.all(dim=1)  # unless padding sees everything
    if bool(((mask == common[:, None, :]).all(dim=2) | mask.all(dim=2)).all()):
        return common.expand(batch, -1), ""
    return None, "the mask is not the outer product of one validity vector"
