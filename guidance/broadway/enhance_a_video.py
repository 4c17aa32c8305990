"""Enhance-A-Video (Luo et al., arXiv 2502.07508): strengthen attention by how much the frames look at one another.

    A[t, t'] = softmax over t' of <q(t, s), k(t', s)>,  per place s and head       same places only, after positions
    score = max(1, mean of the off-diagonal entries * (T + w))                     the cross-frame intensity, times w and T
    attention output of the video tokens *= score

One number per sample and attention, from a map that costs 1 / (tokens per frame) of it. The original multiplies behind the
output projection, this behind the attention: the projection's bias is not scaled, and every processor can be served.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.guidance.broadway.blocks import block_name, checked_blocks, pick_blocks
from genattn.guidance.broadway.frame_marginal_approx import same_place_rows
from genattn.guidance.broadway.key_frames import key_frames
from genattn.guidance.passes.delta import Window
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import AttentionCall, Inner, Plugin, Run
from genattn.settings import number

WEIGHTS = {"wan": 4.0, "hunyuanvideo": 4.0, "cogvideox": 3.4}
_LIMIT = 100.0


class EnhanceAVideo(Plugin):
    """Cross-frame intensity as a gain on the attention of a video DiT. Per-call option: weight.

    Args:
        weight: w, in [-100, 100]; published: 4 for Wan and HunyuanVideo, 3.4 for CogVideoX (`WEIGHTS`).
        blocks: names, positions or ranges ("14-20") of the blocks; None for all.
        start, stop: part of the run, fractions in [0, 1], both ends included; published: all of it.
        sigma_start, sigma_stop: noise levels, from sigma_start down to sigma_stop; None for no bound.

    Raises:
        GenAttnError: for settings out of range, and, when applied, for models without full video attention.
    """

    option_names = frozenset(("weight",))

    def __init__(
        self,
        weight: float = 4.0,
        *,
        blocks: Sequence[str | int] | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        sigma_start: float | None = None,
        sigma_stop: float | None = None,
    ) -> None:
        self.weight = _checked(weight)
        self.blocks = checked_blocks(blocks)
        self.window = Window(start, stop, sigma_start, sigma_stop)
        self._sites: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()
        self._scores: dict[str, torch.Tensor] = {}
        self._calls: Counter[str] = Counter()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "EnhanceAVideo":
        """The published weight of a model family: "wan", "hunyuanvideo" or "cogvideox".

        Raises:
            GenAttnError: for an unknown name.
        """
        if name not in WEIGHTS:
            raise GenAttnError(f"preset must be one of {', '.join(WEIGHTS)}, got {name!r}; or give weight")
        return cls(**{"weight": WEIGHTS[name], **changes})

    def settings(self) -> dict[str, Any]:
        """See Plugin.settings."""
        blocks = list(self.blocks) if self.blocks is not None else None
        return {"weight": self.weight, "blocks": blocks, **self.window.settings()}

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """Find the full attentions of a denoiser."""
        pool = sorted((s for s in sites if s.kind in ("self", "joint")), key=lambda s: s.depth)
        if not pool or any(s.kind == "temporal" for s in sites):
            kinds = ", ".join(sorted({s.kind for s in sites})) or "none"
            raise GenAttnError(
                f"Enhance-A-Video needs full video attention, got {type(model).__name__} with sites of kind {kinds}; "
                "for motion modules take BroadWay"
            )
        names = list(dict.fromkeys(block_name(s.name) for s in pool))
        chosen = names if self.blocks is None else pick_blocks(self.blocks, names)
        self._sites[model] = frozenset(s.name for s in pool if block_name(s.name) in chosen)

    def detach(self, model: nn.Module) -> None:
        """Forget the denoiser."""
        self._sites.pop(model, None)
        self._scores.clear()
        self._calls.clear()

    def wants(self, site: AttentionSite) -> bool:
        """The chosen full attentions."""
        return any(site.name in sites for sites in self._sites.values())

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise GenAttnError for a weight out of range."""
        if "weight" in options:
            _checked(options["weight"])

    def why_idle(self, run: Run) -> str:
        """See Plugin.why_idle."""
        return self.window.why_idle(run)

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """The attention, its video rows times the score."""
        out = inner(call)
        chosen = () if call.run.model is None else self._sites.get(call.run.model, ())
        if call.site.name not in chosen or not self.window.contains(call.run):
            return out
        if call.layout is None or call.layout.seqlen != call.query.shape[1]:
            told = call.run.why_no_layout or f"{call.query.shape[1]} tokens of unknown meaning"
            raise GenAttnError(f"Enhance-A-Video needs the token layout of {call.site.name!r}, got {told}; leave the block out")
        frames = key_frames(call.layout).to(call.query.device)
        rows = same_place_rows(call.query, call.key, frames, call.scale)
        weight = call.run.options_of(self).get("weight", self.weight)
        score = enhance_score(rows, weight)
        gain = score.to(out.dtype)[:, None, None, None]
        self._scores[call.site.name] = score.detach().mean()
        self._calls[call.site.name] += 1
        call.record.edited = True
        if frames.others.numel() == 0:
            return out * gain
        return out.index_copy(1, frames.queries, out.index_select(1, frames.queries) * gain)

    def describe(self) -> dict[str, Any]:
        """Settings, and how often each site was enhanced, with its last score."""
        scores = {name: float(score) for name, score in self._scores.items()}
        settings = {"plugin": "EnhanceAVideo", "weight": self.weight, "window": self.window.describe()}
        return {**settings, "guided_calls": dict(self._calls), "scores": scores}


def enhance_score(rows: torch.Tensor, weight: float) -> torch.Tensor:
    """max(1, cross-frame intensity * (T + w)) of `same_place_rows` [B, T, n, H, T]: [B], each sample's own."""
    count = rows.shape[-1]
    # rows sum to 1: what is not on the diagonal is spread over the T - 1 other entries
    intensity = (1.0 - rows.diagonal(dim1=1, dim2=-1).flatten(1).mean(1)) / (count - 1)
    return (intensity * (count + weight)).clamp_min(1.0)


def _checked(weight: object) -> float:
    return number("weight", weight, -_LIMIT, _LIMIT, f"a number in [-{_LIMIT:g}, {_LIMIT:g}]; published: {WEIGHTS}")
