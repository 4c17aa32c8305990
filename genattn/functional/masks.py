"""From the mask a stock processor made to a key mask that goes together with a pattern.

    None                     nothing hidden
    [B, Sk]                  key padding, bool or additive
    [B or 1, 1 or H, 1, Sk]  key padding per sample, the same for all heads
    [B or 1, 1, Sq, Sk]      the outer product of one validity vector (HunyuanVideo 1.5, Chroma): valid tokens see valid tokens

    [B or 1, 1, Sq, Sk]      the same keys for every row of the grid, the rows of other tokens as they like (OmniGen, Ideogram)

Everything else (causal blocks, biases, flex BlockMasks) says more than which keys are valid and cannot be reduced.
"""

from collections.abc import Sequence
from typing import Any

import torch

from genattn.geometry.token_layout import TokenLayout

_HIDDEN = -1e3


def key_mask(mask: Any, batch: int, queries: int, keys: int) -> tuple[torch.Tensor | None, str]:
    """(bool [B, Sk] or None for "all keys", "") or (None, why the mask cannot be reduced)."""
    if mask is None:
        return None, ""
    if not isinstance(mask, torch.Tensor):
        return None, f"the mask is a {type(mask).__name__}"
    if mask.ndim == 4 and 0 in mask.stride()[1:3]:  # a row spread over heads and queries
        mask = mask[:, : 1 if mask.stride(1) == 0 else None, : 1 if mask.stride(2) == 0 else None]
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


def grid_key_mask(mask: Any, batch: int, keys: int, rows: torch.Tensor) -> torch.Tensor | None:
    """The key mask bool [B, Sk] that the queries `rows` (int64, places in the sequence) share; None when they do not.

    mask: [B or 1, 1, Sq, Sk], bool or additive.
    """
    square = isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[0] in (1, batch)
    if not square or mask.shape[2:] != (keys, keys):
        return None
    asked = mask[:, 0].index_select(1, rows.to(mask.device))
    if asked.dtype is not torch.bool:
        if not bool(((asked == 0) | (asked <= _HIDDEN)).all()):
            return None
        asked = asked == 0
    return asked[:, 0].expand(batch, -1) if bool((asked == asked[:, :1]).all()) else None


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


def why_not_apart(mask: Any, query: torch.Tensor, key: torch.Tensor, layouts: Sequence[TokenLayout]) -> str:
    """Why the sequences of a batch are not what their layouts say with filling behind; empty when they are."""
    batch, tokens = query.shape[:2]
    if len(layouts) != batch or key.shape[1] != tokens:
        return f"{batch} sequences of {tokens} tokens for {len(layouts)} samples of several sizes"
    keys, reason = key_mask(mask, batch, tokens, tokens)
    wanted = [layout.seqlen for layout in layouts]
    if keys is None:
        return reason or ("" if set(wanted) == {tokens} else f"sequences of {tokens} tokens for layouts of {wanted}")
    shown = torch.arange(tokens, device=keys.device) < torch.tensor(wanted, device=keys.device)[:, None]
    return "" if torch.equal(keys, shown) else "the mask is not the filling behind each sample's own tokens"
