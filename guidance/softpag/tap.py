"""The tap on a model's attention: perturbs chosen heads while a pass is marked, and lets all else through untouched.

Layers count over all blocks in execution order (`AttentionSite.depth`); of a block's attentions the first joint one is
meant, else the first self-attention (SD3.5's second, image-only attention is left alone).
"""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.heads.names import HeadsLike, HeadWeights, check_weight, checked_heads, head_name, resolve_heads
from genattn.guidance.passes.block_swap import BlockOrder
from genattn.guidance.softpag.perturbation import HeadMix, check_target, perturb_heads
from genattn.kernels.plan.lasting import lasting
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import AttentionCall, Inner, Plugin, Run
from genattn.settings import several

_KINDS = ("joint", "self", "spatial", "temporal")


@dataclass
class TappedModel:
    """What a tap knows of one denoiser.

    Attributes:
        layers: heads per layer.
        rows: per layer the weights of all heads, float32 [1, H], or [P, H] with one row per sample.
        blocks: the model's blocks in order.
        hits: attention calls perturbed, per layer.
    """

    layers: dict[int, int]
    rows: dict[int, torch.Tensor]
    blocks: BlockOrder
    hits: Counter[int] = field(default_factory=Counter)
    mixes: dict[Any, dict[int, HeadMix]] = field(default_factory=dict)

    @property
    def first(self) -> int:
        """The first perturbed layer."""
        return min(self.rows)

    def mix(self, batch: int, rows: torch.Tensor) -> dict[int, HeadMix]:
        """Per layer the weights for a forward of `batch` samples of which `rows` are perturbed.

        Raises:
            GenAttnError: if there are per-sample weights of another number of samples.
        """
        key = (batch, tuple(rows.tolist()))
        if key not in self.mixes:
            made = lasting(lambda u: HeadMix.from_rows(_spread(u, batch, rows)))
            self.mixes[key] = {layer: made(u) for layer, u in self.rows.items()}
        return self.mixes[key]

    def missed(self) -> list[int]:
        """Selected layers whose attention never came by."""
        return [layer for layer in self.rows if not self.hits[layer]]


class HeadTap(Plugin):
    """Perturbs heads in marked passes; guidance marks them, see `SoftPAG` and `SoftPAGGuidance`.

    Args:
        heads: which heads, see `genattn.guidance.heads.names`; a `HeadSet` brings its own weights.
        u: weight of heads without one of their own, in [0, 1].
        target: one of `genattn.guidance.softpag.perturbation.TARGETS`.
        per_sample: instead of `heads`, one selection per conditional sample of the batch.
    """

    def __init__(
        self,
        heads: HeadsLike | HeadSet | None,
        u: float = 0.5,
        target: str = "identity",
        per_sample: Sequence[HeadsLike] | None = None,
    ) -> None:
        if (heads is None) == (per_sample is None):
            raise GenAttnError(f"either heads or per_sample must be given, got {heads!r} and {per_sample!r}; name one")
        if per_sample is not None and not per_sample:
            raise GenAttnError(f"per_sample must hold one selection per sample, got {per_sample!r}; add some")
        if heads is not None and not isinstance(heads, HeadSet):
            heads = checked_heads(heads)
        if per_sample is not None:
            parts = several("per_sample", per_sample, "a list of selections, one per sample")
            per_sample = [checked_heads(part) if part else () for part in parts]
        self.heads, self.per_sample = heads, per_sample
        self.u, self.target = check_weight("u", u), check_target(target)
        self._models: WeakKeyDictionary[nn.Module, TappedModel] = WeakKeyDictionary()
        self._told: dict[str, dict[str, Any]] = {}
        self._sites: set[tuple[str, str]] = set()
        self._marked: dict[tuple[int, int, str | None], dict[int, HeadMix]] = {}
        self._everywhere: dict[int, HeadMix] | None = None

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """Find the heads in a denoiser; raises GenAttnError if it does not have them or they cannot be reached."""
        primary = primary_sites(sites)
        if not primary:
            raise GenAttnError(f"head guidance needs self- or joint attention in blocks, got none in {type(model).__name__}")
        layers = {depth: site.heads for depth, site in primary.items()}
        rows = self._weights(layers, model.__class__.__name__)
        for layer in rows:
            if primary[layer].unreachable:
                raise GenAttnError(
                    f"a selected head must be reachable, got layer {layer} of {type(model).__name__} ({primary[layer].name}): "
                    f"{primary[layer].unreachable}; choose other layers"
                )
        if self.target == "skip":
            _check_whole_layers(rows)
        self._models[model] = TappedModel(layers, rows, BlockOrder(model, sites))
        self._sites |= {(primary[layer].model, primary[layer].name) for layer in rows}

    def detach(self, model: nn.Module) -> None:
        """Forget a denoiser; what happened on it stays in the report."""
        tapped = self._models.pop(model, None)
        if tapped is not None:
            self._told[model.__class__.__name__] = self._summary(tapped)

    def _summary(self, tapped: TappedModel) -> dict[str, Any]:
        chosen = {layer: torch.nonzero(u.amax(0)).flatten().tolist() for layer, u in sorted(tapped.rows.items())}
        return {
            "heads": [head_name((layer, head)) for layer, heads in chosen.items() for head in heads],
            "hits": {f"L{layer}": tapped.hits[layer] for layer in chosen},
        }

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Per denoiser the selected heads and how often each layer was perturbed, JSON-ready."""
        return {**self._told, **{model.__class__.__name__: self._summary(tapped) for model, tapped in self._models.items()}}

    def _weights(self, layers: dict[int, int], model: str) -> dict[int, torch.Tensor]:
        if isinstance(self.heads, HeadSet):
            self.heads.check_model(layers, model)
            picks: list[HeadWeights] = [self.heads.heads]
        elif self.heads is not None:
            picks = [resolve_heads(self.heads, layers, self.u)]
        else:
            picks = [resolve_heads(part, layers, self.u) if part else {} for part in self.per_sample or ()]
        rows: dict[int, torch.Tensor] = {}
        for sample, weights in enumerate(picks):
            for (layer, head), u in weights.items():
                rows.setdefault(layer, torch.zeros(len(picks), layers[layer]))[sample, head] = u
        if not rows:
            raise GenAttnError(f"at least one sample must have heads, got {self.per_sample!r}; name some")
        return rows

    def model(self, model: nn.Module | None) -> TappedModel:
        """What is known of a denoiser; raises GenAttnError if the plugin was never applied to it."""
        found = None if model is None else self._models.get(model)
        if found is None:
            raise GenAttnError(f"{type(self).__name__} must be applied to the denoiser first, got {type(model).__name__}")
        return found

    def wants(self, site: AttentionSite) -> bool:
        """The selected layers' attention."""
        return (site.model, site.name) in self._sites

    @contextlib.contextmanager
    def marking(self, run: Run, mixes: dict[int, HeadMix]) -> Iterator[None]:
        """Perturb the attention calls of this denoiser on this thread, but for those of passes inside this one."""
        key = (id(run.model), threading.get_ident(), run.extra)
        self._marked[key] = mixes
        try:
            yield
        finally:
            del self._marked[key]

    def mark_all(self, mixes: dict[int, HeadMix] | None) -> None:
        """Perturb every attention call from now on; None ends it."""
        self._everywhere = mixes

    def why_not_split(self, split: str) -> str:
        """Every target but the mean of all queries is told by one's own queries and all keys."""
        if split == "ring" and self.target == "mean_query":
            return (
                "target='mean_query' asks with the mean of all queries, of which a ring has some; use Ulysses or another target"
            )
        return ""

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """The chain's answer, with heads perturbed where the pass is marked."""
        out = inner(call)
        mixes = self._marked.get((id(call.run.model), threading.get_ident(), call.run.extra), self._everywhere)
        if mixes is None:  # maybe a block that is computed again in the backward pass, long after the marks
            mixes = call.run.notes.get(id(self))
        else:
            call.run.notes[id(self)] = mixes
        if mixes is None or call.site.depth not in mixes or _is_over_others(call):
            return out
        if call.run.model is not None:
            self.model(call.run.model).hits[call.site.depth] += 1
        call.record.edited = True
        mix = _local(mixes[call.site.depth], call)
        return out if mix is None else perturb_heads(call, out, mix, self.target)


def primary_sites(sites: Sequence[AttentionSite]) -> dict[int, AttentionSite]:
    """The attention that a layer's head names mean, by depth."""
    found: dict[int, AttentionSite] = {}
    for kind in _KINDS:
        for site in sites:
            if site.depth >= 0 and site.kind == kind:
                found.setdefault(site.depth, site)
    return dict(sorted(found.items()))


def _is_over_others(call: AttentionCall) -> bool:
    """Whether the call is over a part of the sequence that is not guided: text by itself, references whose keys are kept."""
    whole = call.run.layout
    return call.layout is None and whole is not None and call.key.shape[1] < whole.seqlen


def _spread(u: torch.Tensor, batch: int, rows: torch.Tensor) -> torch.Tensor:
    if len(u) > 1 and len(u) != len(rows):
        raise GenAttnError(f"per_sample must hold one selection per conditional sample, got {len(u)} for {len(rows)}")
    if len(u) == 1 and len(rows) == batch:
        return u
    full = torch.zeros(batch, u.shape[1])
    full[rows] = u
    return full


def _local(mix: HeadMix, call: AttentionCall) -> HeadMix | None:
    """The part of a mix that this process holds, where heads are split over processes."""
    count = call.query.shape[2]
    if call.head_offset == 0 and count == call.site.heads:
        return mix
    here = (mix.heads >= call.head_offset) & (mix.heads < call.head_offset + count)
    return HeadMix(mix.heads[here] - call.head_offset, mix.u[:, here]) if bool(here.any()) else None


def _check_whole_layers(rows: dict[int, torch.Tensor]) -> None:
    for layer, u in rows.items():
        if len(u) > 1 or not bool((u == u[0, 0]).all()):
            raise GenAttnError(
                f"target 'skip' must leave out whole layers, got single heads or per-sample choices in layer {layer}; "
                f"name the layer, L{layer}"
            )
