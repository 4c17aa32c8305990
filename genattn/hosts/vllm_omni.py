"""vLLM-Omni's entry point for sparse attention: the callable that its SPARSE_ATTN dispatcher looks for by the name "genattn".

    vllm-omni serve MODEL --omni --diffusion-attention-config '{"per_role": {"self": {"backend": "SPARSE_ATTN",
        "extra": {"backend": "genattn", "params": {"pattern": "radial", "dense_steps": 0.25}}}}}'

The dispatcher (vllm-project/vllm-omni, pull request 4493) calls

    fn(query, key, value, params, is_causal=..., softmax_scale=...)        all [B, S, H, D], and so is the answer

with one flat dict: the settings above, the sampling step, the clip's latent and patch sizes, a mask where there is one. It has
no dense fallback of its own, so calls that a pattern cannot answer go to scaled_dot_product_attention here; every reason is
logged once and counted in `attention.report()`, or comes as an error with `strict`.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from genattn.errors import GenAttnError
from genattn.functional.dispatch import attention as sparse_attention
from genattn.functional.masks import key_mask

_LOG = logging.getLogger("genattn")
_OUTSIDE = ("before", "after")


class OmniAttention:
    """The callable. Settings by `params`, all optional:

    pattern: a name ("auto" by default, "radial", "gna", "adaptive", "profile:PATH") or a description, also as JSON text.
    tail: as in `genattn.attention`; "measured" by default, because the models were trained dense. impl: the backend.
    dense_steps: first steps that stay dense, a share in [0.0, 1.0] or a count; 0.25 by default where steps are told.
    min_tokens: shorter sequences stay dense. outside: where tokens that are not the clip's stand, "before" or "after" it.
    grid: (frames, height, width) of the tokens, where the framework does not tell the clip's size.
    strict: an error instead of a dense call for every reason but the schedule's.
    """

    # "full_attn_spans" is not among them, so the dispatcher refuses it before we would ignore it
    capabilities: Mapping[str, bool] = {"supports_attention_mask": True}

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self.sparse_calls = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        params: Mapping[str, Any],
        is_causal: bool = False,
        softmax_scale: float | None = None,
    ) -> torch.Tensor:
        """Self-attention [B, S, H, D] under the pattern of `params`, or dense.

        key and value [B, Sk, Hk, D] with Hk a divisor of H. Raises GenAttnError for settings that are wrong.
        """
        mask = params.get("attn_mask")
        reason, planned = _why_scheduled(params, query.shape[1])
        keys, reason = (None, reason) if reason else self._key_mask(query, key, mask, is_causal)
        place = None if reason else _place(query.shape, params)
        if place is None and not reason:
            reason = "the sequence is not the clip's tokens and `outside` does not say where the others stand"
        if reason:
            self._stay_dense(reason, strict=bool(params.get("strict")) and not planned)
            return _dense(query, key, value, mask, is_causal, softmax_scale)
        self.sparse_calls += 1
        out = sparse_attention(
            query,
            key,
            value,
            _pattern(params.get("pattern", "auto")),
            impl=params.get("impl", "auto"),
            scale=softmax_scale,
            key_mask=keys,
            tail=params.get("tail", "measured"),
            **(place or {}),
        )
        assert isinstance(out, torch.Tensor)
        return out

    @staticmethod
    def geometry_fn(query_shape: Sequence[int], params: Mapping[str, Any]) -> dict[str, Any]:
        """The clip's token grid, (frames, height, width), from what the framework tells; {} where it tells nothing usable.

        The dispatcher merges it into `params`. A grid in the settings wins.
        """
        if params.get("grid") is not None:
            return {}
        latent, patch = _same_rows(params.get("latent_shape")), _same_rows(params.get("patch_size"))
        if latent is None or patch is None or not all(patch):
            return {}
        return {"grid": tuple(size // cut for size, cut in zip(latent, patch))}

    def report(self) -> dict[str, Any]:
        """Calls of this process so far: how many ran sparse, and why the others did not."""
        return {"sparse_calls": self.sparse_calls, "dense_reasons": dict(self._counts)}

    @staticmethod
    def _key_mask(
        query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
    ) -> tuple[torch.Tensor | None, str]:
        if is_causal:
            return None, "the call is causal"
        if query.shape[1] != key.shape[1]:
            return None, f"{query.shape[1]} queries look at {key.shape[1]} keys: not self-attention over one sequence"
        if mask is not None and not mask.is_floating_point():
            mask = mask.bool()
        return key_mask(mask, query.shape[0], query.shape[1], key.shape[1])

    def _stay_dense(self, reason: str, strict: bool) -> None:
        if strict:
            raise GenAttnError(f"strict: the call must run sparse, and cannot: {reason}")
        if not self._counts[reason]:
            _LOG.warning("vLLM-Omni attention stays dense: %s", reason)
        self._counts[reason] += 1


attention = OmniAttention()


def _why_scheduled(params: Mapping[str, Any], tokens: int) -> tuple[str, bool]:
    """(why the settings leave this call dense, empty when they do not; whether they ask for that)."""
    least = params.get("min_tokens", 0)
    if isinstance(least, bool) or not isinstance(least, int) or least < 0:
        raise GenAttnError(f"min_tokens must be a whole number >= 0, got {least!r}")
    if tokens < least:
        return f"short sequence (min_tokens={least})", True
    first, step, total = params.get("dense_steps"), params.get("denoise_step_idx"), params.get("total_denoise_steps")
    if first is None:
        first = 0 if step is None or total is None else 0.25
    wrong = isinstance(first, bool) or not isinstance(first, int | float) or not first >= 0
    if wrong or (isinstance(first, float) and first > 1):
        raise GenAttnError(f"dense_steps must be a share in [0.0, 1.0] or a whole number of steps >= 0, got {first!r}")
    if not first:
        return "", False
    if step is None or (total is None and isinstance(first, float)):
        return f"the sampling step is not told, so dense_steps={first} cannot be kept", False
    count = first if isinstance(first, int) else math.ceil(first * _least(total) - 1e-9)
    return (f"first dense steps (dense_steps={first})", True) if _least(step) < count else ("", False)


def _least(told: Any) -> int:
    """The smallest entry of a number per sample."""
    return int(told.min()) if isinstance(told, torch.Tensor) else int(min(told)) if isinstance(told, Sequence) else int(told)


def _same_rows(told: Any) -> tuple[int, int, int] | None:
    """The three sizes that all samples share, None where there are none."""
    if told is None:
        return None
    rows = told.tolist() if isinstance(told, torch.Tensor) else list(told)
    rows = rows if rows and isinstance(rows[0], list | tuple) else [rows]
    sizes = {tuple(int(n) for n in row) for row in rows}
    only = sizes.pop() if len(sizes) == 1 else ()
    return only if len(only) == 3 else None  # type: ignore[return-value]


def _place(shape: Sequence[int], params: Mapping[str, Any]) -> dict[str, Any] | None:
    """grid, text_before and text_after for `genattn.attention`, None where they are not known."""
    outside, grid = params.get("outside"), params.get("grid")
    if outside not in (None, *_OUTSIDE):
        raise GenAttnError(f"outside must be one of {', '.join(_OUTSIDE)}, got {outside!r}")
    if grid is None:
        grid = OmniAttention.geometry_fn(shape, params).get("grid")
    if grid is None:
        return None
    more = shape[1] - math.prod(int(n) for n in grid)
    if more > 0 and outside is None and params.get("attn_mask") is not None:
        outside = "after"  # filling for equal shares of a sequence, which the mask hides
    if more < 0 or (more > 0 and outside is None):
        return None
    return {"grid": grid, "text_before": more if outside == "before" else 0, "text_after": more if outside == "after" else 0}


def _pattern(asked: Any) -> Any:
    """A description that came as JSON text, read; anything else as it is."""
    if isinstance(asked, str) and asked.lstrip().startswith("{"):
        try:
            return json.loads(asked)
        except ValueError as error:
            raise GenAttnError(f"pattern must be a name or a description in JSON, got {asked!r}: {error}") from error
    return asked


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, scale: float | None
) -> torch.Tensor:
    if mask is not None:
        mask = mask if mask.is_floating_point() else mask.bool()
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    grouped = query.shape[2] != key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
