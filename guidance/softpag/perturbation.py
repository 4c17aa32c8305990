"""Perturbed attention of single heads, by interpolating outputs instead of maps.

SoftPAG (arXiv 2506.10978, eq. 7) draws a head's map A towards another map T: A' = (1 - u) A + u T. Every target here is
linear in the output, A'V = lerp(AV, TV, u), and TV is known without a map:

    identity          T = I over the whole sequence, text rows too: TV = V, the authors' form
    identity_image    the same on image rows only; text rows keep AV
    identity_text     the same on text rows only
    image_to_image    an image row sees itself and all text, softmax over those: diffusers' PAG for SD3
    uniform           T = 1/n over the keys: TV = mean V
    mean_query        every row asks with the mean query: one attention row (SEG with infinite blur)
    zero              the head says nothing: TV = 0
    skip              the whole block is left out, hidden states pass unchanged (STG, skip-layer guidance)

So AV may come from any backend, sparse ones included, and no S x S tensor is made. `genattn.guidance.softpag.perturbation_maps`
holds the slow twins that define all this with explicit maps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from genattn.errors import GenAttnError
from genattn.seam.plugin import AttentionCall

TARGETS = ("identity", "identity_image", "identity_text", "image_to_image", "uniform", "mean_query", "zero", "skip")
_ROWS_PER_CHUNK = 1024


@dataclass(frozen=True)
class HeadMix:
    """Which heads of one layer are drawn how far towards the target.

    Attributes:
        heads: int64 [n], increasing.
        u: float32 [1, n], or [B, n] with one row per sample.
    """

    heads: torch.Tensor
    u: torch.Tensor

    @classmethod
    def from_rows(cls, rows: torch.Tensor) -> "HeadMix":
        """From weights of all heads, [1 or B, H]; heads that are zero in every row are left alone."""
        heads = torch.nonzero(rows.amax(dim=0) > 0).flatten()
        return cls(heads, rows[:, heads].float())

    def for_batch(self, batch: int) -> "HeadMix":
        """The same for a call whose batch holds every sample several times in a row (once per frame, or per place).

        Raises:
            GenAttnError: if there are per-sample weights and the call does not hold every sample.
        """
        copies, rest = divmod(batch, len(self.u))
        if rest or not copies:
            raise GenAttnError(
                "samples of one batch that are perturbed differently (mode='batched', per_sample) need attention over the "
                f"whole batch, got a call of {batch} for {len(self.u)} samples: this model attends to its samples one by one; "
                "use mode='extra' and one selection of heads"
            )
        return self if copies == 1 or len(self.u) == 1 else HeadMix(self.heads, self.u.repeat_interleave(copies, 0))

    def to(self, device: torch.device) -> "HeadMix":
        """The same on another device."""
        return self if self.u.device == device else HeadMix(self.heads.to(device), self.u.to(device))


def check_target(target: str) -> str:
    """`target`, if it is one of `TARGETS`; else raises GenAttnError."""
    if target not in TARGETS:
        raise GenAttnError(f"target must be one of {', '.join(TARGETS)}, got {target!r}; choose one of those")
    return target


def perturb_heads(call: AttentionCall, out: torch.Tensor, mix: HeadMix, target: str) -> torch.Tensor:
    """Draw the chosen heads of an attention output towards the target.

    Args:
        call: the attention call that `out` answers.
        out: [B, S, H, D], from any backend.
        mix: heads and weights.
        target: one of `TARGETS` but "skip", which is no matter of one attention call.

    Returns:
        [B, S, H, D]; the other heads keep their bits.

    Raises:
        GenAttnError: where the target has no meaning for this call.
    """
    mix = mix.to(out.device).for_batch(len(out))
    selected = out.index_select(2, mix.heads)
    goal = _GOALS[check_target(target)](call, selected, mix.heads)
    weight = mix.u[:, None, :, None].to(out.dtype)
    mixed = torch.lerp(selected, goal.to(out.dtype), weight.expand_as(selected))
    # writing in place saves the copy of the untouched heads, but must not reach into what autograd has kept
    return out.index_copy(2, mix.heads, mixed) if out.requires_grad else out.index_copy_(2, mix.heads, mixed)


def select_heads(tensor: torch.Tensor, heads: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Chosen query heads' part of a key or value [B, S, Hk, D], where groups of query heads may share one."""
    return tensor.index_select(2, heads // (num_heads // tensor.shape[2]))


def image_rows(call: AttentionCall) -> torch.Tensor | None:
    """Int64 positions of the image tokens, None when every token is one.

    Raises:
        GenAttnError: for a joint sequence whose layout is unknown.
    """
    if call.layout is None:
        if call.site.kind == "joint":
            raise GenAttnError(
                f"image rows must be known, got no layout for the joint sequence of {call.site.name}; use target 'identity'"
            )
        return None
    if call.layout.seqlen != call.tokens:
        raise GenAttnError(
            f"the layout must cover the sequence, got {call.layout.describe()} for {call.tokens} tokens "
            f"at {call.site.name}; use target 'identity'"
        )
    positions = call.layout.grid_positions
    if call.only_first:
        positions = positions[positions < call.query.shape[1]]
    return None if len(positions) == call.query.shape[1] else positions.to(call.query.device)


def _text_keys(call: AttentionCall) -> torch.Tensor:
    """Bool [Sk]: the keys that are no image token; of a call whose layout is known."""
    assert call.layout is not None
    text = torch.ones(call.key.shape[1], dtype=torch.bool, device=call.key.device)
    text[call.layout.grid_positions.to(text.device)] = False
    return text


def key_mask(call: AttentionCall) -> torch.Tensor | None:
    """The mask as one row for all queries: bool or additive, [B or 1, Sk]; None without a mask.

    Raises:
        GenAttnError: if different queries see different keys.
    """
    mask = call.mask
    if call.is_causal:
        raise GenAttnError(f"this target needs the same keys for all queries, got causal {call.site.name}; use 'identity'")
    if mask is None or mask.ndim == 2:
        return mask
    per_head = mask.flatten(1, 2) if mask.ndim == 4 else mask
    row = per_head.amax(dim=1)
    same = (per_head == row[:, None]).all(-1)
    if mask.dtype == torch.bool:
        same |= ~per_head.any(-1)
    if not bool(same.all()):
        raise GenAttnError(
            f"this target needs the same keys for all queries, got a mask {tuple(mask.shape)} with differing rows "
            f"at {call.site.name}; use target 'identity'"
        )
    return row


def _values(call: AttentionCall, selected: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    if call.tokens != call.key.shape[1]:
        raise GenAttnError(
            f"an identity map needs as many keys as queries, got {call.key.shape[1]} and {call.query.shape[1]} "
            f"at {call.site.name}; use target 'uniform'"
        )
    return select_heads(call.value[:, : call.query.shape[1]], heads, call.query.shape[2])


def _values_image(call: AttentionCall, selected: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    rows = image_rows(call)
    values = _values(call, selected, heads)
    return values if rows is None else selected.index_copy(1, rows, values.index_select(1, rows).to(selected.dtype))


def _values_text(call: AttentionCall, selected: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    rows = image_rows(call)
    if rows is None:
        return selected
    values = _values(call, selected, heads).to(selected.dtype)
    return values.index_copy(1, rows, selected.index_select(1, rows))


def _image_to_image(call: AttentionCall, selected: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    rows = image_rows(call)
    if call.layout is None or len(call.layout.grid_positions) == call.key.shape[1]:
        return _values(call, selected, heads)
    rows = torch.arange(call.query.shape[1], device=call.query.device) if rows is None else rows
    text = _text_keys(call)
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    query, key, value = (select_heads(t, heads, call.query.shape[2]) for t in (call.query, call.key, call.value))
    key_text, value_text = key[:, text].float(), value[:, text].float()
    mask = key_mask(call)
    bias = None if mask is None else _additive(mask[:, text])[:, None, None, :]
    goal = selected.clone()
    for chunk in rows.split(_ROWS_PER_CHUNK):
        q, k, v = (t.index_select(1, chunk).float() for t in (query, key, value))
        logits = torch.einsum("bihd,bjhd->bihj", q, key_text) * scale
        logits = logits if bias is None else logits + bias
        weights = torch.cat([(q * k).sum(-1, keepdim=True) * scale, logits], -1).softmax(-1)
        mixed = weights[..., :1] * v + torch.einsum("bihj,bjhd->bihd", weights[..., 1:], value_text)
        goal.index_copy_(1, chunk, mixed.to(goal.dtype))
    return goal


def _uniform(call: AttentionCall, selected: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    values = select_heads(call.value, heads, call.query.shape[2])
    mask = key_mask(call)
    if mask is None:
        return values.mean(1, keepdim=True, dtype=torch.float32).to(selected.dtype).expand_as(selected)
    seen = _additive(mask).softmax(-1)
    return torch.einsum("bj,bjhd->bhd", seen.expand(len(values), -1), values.float())[:, None].expand_as(selected)


def _mean_query(call: AttentionCall, selected: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    key, value = (select_heads(t, heads, call.query.shape[2]) for t in (call.key, call.value))
    query = call.query.index_select(2, heads).mean(1, dtype=torch.float32)
    logits = torch.einsum("bhd,bjhd->bhj", query, key.float()) * scale
    mask = key_mask(call)
    logits = logits if mask is None else logits + _additive(mask)[:, None]
    return torch.einsum("bhj,bjhd->bhd", logits.softmax(-1), value.float())[:, None].expand_as(selected)


def _zero(call: AttentionCall, selected: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(selected)


def _skip(call: AttentionCall, selected: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    raise GenAttnError(f"target 'skip' must leave out whole blocks, got a call at {call.site.name}; name layers, not heads")


def _additive(mask: torch.Tensor) -> torch.Tensor:
    """A mask as float32 summands of the logits."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


_Goal = Callable[[AttentionCall, torch.Tensor, torch.Tensor], torch.Tensor]
_GOALS: dict[str, _Goal] = {
    "identity": _values,
    "identity_image": _values_image,
    "identity_text": _values_text,
    "image_to_image": _image_to_image,
    "uniform": _uniform,
    "mean_query": _mean_query,
    "zero": _zero,
    "skip": _skip,
}
