"""Attention beyond the trained window decayed, so that a long clip keeps its focus (after UltraViCo, arXiv 2511.20123).

    logit(q, k) <- decay * logit(q, k) - penalty        for keys outside the trained window of frames around the query

In a clip longer than trained every query sees more keys than ever, and its attention thins out over them. A constant factor
below 1 on the logits outside the window, or a constant taken off them, gives the window its weight back; far frames still
count. Exact, on any dense backend: queries of one frame share their window, and a factor on logits is a factor on keys. A
pattern on the same model takes the decay into its plan instead (genattn/patterns/logit_decayed.py), and only calls that it
leaves dense come here.
"""

from typing import Any, ClassVar

import torch

from genattn.geometry.frame_decay import FrameDecay, windows
from genattn.seam.plugin import AttentionCall, Inner, Plugin, Run


class LogitDecay(Plugin):
    """See the module.

    trained_frames, decay, penalty: see `FrameDecay`. Shorter clips, cross-attention and text stay as they are.
    """

    serves_dense: ClassVar[bool] = True

    def __init__(self, trained_frames: int, decay: float = 0.9, penalty: float = 0.0) -> None:
        self.asked = FrameDecay(trained_frames, decay, penalty)
        self.trained_frames, self.decay, self.penalty = self.asked.trained_frames, self.asked.decay, self.asked.penalty

    def stays_out(self, run: Run, site: Any, tokens: int) -> str:
        """See Plugin.stays_out."""
        if run.layout is not None and run.layout.grid3[0] <= self.trained_frames:
            return "the clip is no longer than trained"
        return ""

    def decay_at(self, call: AttentionCall) -> FrameDecay | None:
        """See Plugin.decay_at."""
        if call.layout is None and call.run.sample_layouts and not call.is_causal:
            return self.asked  # the grids of the batch differ; whoever cuts it into samples knows each one's
        return None if self.why_not(call) else self.asked

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """See Plugin.attention: frame by frame, each query frame with its own keys; everything else in one stock call."""
        reason = self.why_not(call)
        if reason:
            call.record.stayed_dense(reason)
            return inner(call)
        assert call.layout is not None
        out = torch.empty_like(call.query[..., : call.value.shape[-1]])
        index = call.layout.raster_index.to(call.query.device)
        frames = call.layout.grid3[0]
        places = call.layout.grid3[1] * call.layout.grid3[2]
        of_frame = torch.where(index >= 0, index // places, -1)
        for first, group in windows(frames, self.trained_frames):
            queries = torch.nonzero((of_frame >= group.start) & (of_frame < group.stop)).flatten()
            outside = (of_frame >= 0) & ((of_frame < first) | (of_frame >= first + self.trained_frames))
            out[:, queries] = self._answer(call, inner, queries, outside)
        rest = torch.nonzero(of_frame < 0).flatten()
        if len(rest):
            out[:, rest] = inner(call.with_tensors(query=call.query[:, rest], mask=_rows(call.mask, rest), layout=None))
        call.record.edited = True
        call.record.lse = None  # of one group of frames
        return out

    def _answer(self, call: AttentionCall, inner: Inner, queries: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
        key, mask = call.key, _rows(call.mask, queries)
        if self.decay != 1:
            key = torch.where(outside[None, :, None, None], key * self.decay, key)
        if self.penalty:
            mask = _with_penalty(mask, outside, self.penalty, key)
        return inner(call.with_tensors(query=call.query[:, queries], key=key, mask=mask, layout=None))

    def why_not(self, call: AttentionCall) -> str:
        """The reason for which a call stays as it is, empty when it does not."""
        if call.layout is None or call.layout.grid is None:
            return call.run.why_no_layout or "no grid is known"
        if call.is_causal:
            return "the call is causal"
        if call.mask is not None and not isinstance(call.mask, torch.Tensor):
            return f"a {type(call.mask).__name__} cannot be cut by queries"
        return "" if self.asked.acts_on(call.layout) else "the clip is no longer than trained"

    def settings(self) -> dict[str, Any]:
        """See Plugin.settings."""
        return {"trained_frames": self.trained_frames, "decay": self.decay, "penalty": self.penalty}

    def describe(self) -> dict[str, Any]:
        """See Plugin.describe."""
        return {"plugin": type(self).__name__, **self.settings()}


def _rows(mask: Any, queries: torch.Tensor) -> Any:
    # [B, Sk] and [B, 1, 1, Sk] hold for every query
    if mask is None or mask.ndim == 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., queries, :]


def _with_penalty(mask: Any, outside: torch.Tensor, penalty: float, like: torch.Tensor) -> torch.Tensor:
    bias = torch.zeros(1, 1, 1, len(outside), device=like.device, dtype=like.dtype).masked_fill(outside, -penalty)
    if mask is None:
        return bias
    mask = mask[:, None, None] if mask.ndim == 2 else mask
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=like.device, dtype=like.dtype).masked_fill(~mask, float("-inf"))
    return mask.to(like) + bias
