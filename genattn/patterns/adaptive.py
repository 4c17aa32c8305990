"""Tiles chosen by content, call by call: one pattern whose parts can be exchanged.

    tiles       boxes of a frame, runs of the sequence, or clusters per head          genattn/selection/tiling.py
    score       mean query against mean keys, looked at closer                        genattn/selection/estimate.py
    rule        top-k share, top-p mass, threshold, error-aware                       genattn/selection/rules.py
    prior       choose only inside one static pattern, always keep what another needs
    guard       tiles that their mean describes badly are kept                        genattn/selection/guards.py
    budget      the rule's amount by layer and head, factors along the run            genattn/selection/budget.py
    reuse       a plan holds for several steps, and for both guidance passes          (AdaSpa, arXiv 2502.21079)

Choosing only inside a static prior is DynamicRad's (arXiv 2604.20470). Text is always seen and sees all, every query sees its
own place. A plan's lists are per head and the same for all samples in it. Unlike the static patterns the mask depends on the
tensors: `plan_for(query, key, layout)`, not `plan(layout)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import PADDING
from genattn.kernels.plan.exact import exact
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.patterns.content import ContentPattern, Listing, check_tensors, keep_choice, kept_choice
from genattn.patterns.listed_plans import clustered_plan, plan_of_listed, static_codes
from genattn.patterns.pattern import Pattern, SiteMemory
from genattn.selection.budget import Budget
from genattn.selection.estimate import Estimate, PooledScore, estimate, mass_of
from genattn.selection.guards import Similarity, beside, holds, shares_tokens
from genattn.selection.kmeans import kmeans, means_by_label, nearest, sizes
from genattn.selection.rules import Rule, TopK, rule_named
from genattn.selection.seen import seen_lanes, seen_places, without_hidden
from genattn.selection.tiling import Boxes, Clusters, Runs, Tiling, tiling_named
from genattn.settings import flag, refuse, whole_number


@dataclass(frozen=True)
class AdaptivePattern(ContentPattern):
    """Settings of the choice.

    selection: a rule object or its name ("top-k", "top-p", "threshold", "error-aware"). tiles: likewise ("boxes", "runs",
    "clusters"). inside: tiles that this static pattern hides are never chosen. always: tiles of which it shows anything are
    always kept. neighbours: tiles on each side of the own one that are kept. refresh_every: steps for which a plan holds,
    >= 1. share_passes: whether the guidance passes of a step share one plan; needs a pipeline that tells its steps.

    Raises GenAttnError for settings out of range, and for priors that look at tensors, lower logits or stand over clusters.
    """

    selection: Rule | str = field(default_factory=TopK)
    score: PooledScore = field(default_factory=PooledScore)
    tiles: Tiling | str = field(default_factory=Boxes)
    guard: Similarity | None = None
    inside: Pattern | None = None
    always: Pattern | None = None
    neighbours: int = 0
    budget: Budget | None = None
    refresh_every: int = 1
    share_passes: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.selection, str):
            object.__setattr__(self, "selection", rule_named(self.selection))
        if not isinstance(self.selection, Rule):
            raise GenAttnError(f"selection must be a rule such as TopK(0.25) or its name, got {self.selection!r}")
        if isinstance(self.tiles, str):
            object.__setattr__(self, "tiles", tiling_named(self.tiles))
        if not isinstance(self.tiles, Boxes | Runs | Clusters):
            raise GenAttnError(f"tiles must be a tiling such as Boxes() or its name, got {self.tiles!r}")
        for name, least in (("neighbours", 0), ("refresh_every", 1)):
            value = whole_number(name, getattr(self, name), least, f"a whole number >= {least}")
            object.__setattr__(self, name, value)
        flag("share_passes", self.share_passes)
        for name, kind in (("score", PooledScore), ("guard", Similarity | None), ("budget", Budget | None)):
            if not isinstance(getattr(self, name), kind):
                raise refuse(name, getattr(self, name), f"a {getattr(kind, '__name__', str(kind))}")
        for name, prior in (("inside", self.inside), ("always", self.always)):
            if prior is not None and (not isinstance(prior, Pattern) or prior.needs_tensors):
                raise GenAttnError(f"{name} must be a pattern of geometry alone, such as RadialPattern(), got {prior!r}")
            if prior is not None and prior.lowers_logits:
                lowering = type(prior).__name__
                raise GenAttnError(f"{name} cannot hold {lowering}, whose logits it would leave; put {lowering} around all")
            if prior is not None and isinstance(self.tiles, Clusters):
                raise GenAttnError(f"{name} needs tiles that are places, got clusters, whose tokens stand anywhere")
        super().__post_init__()

    # ---- where in the model and the run

    def for_layer(self, layer: int, num_layers: int) -> "AdaptivePattern":
        """The choice with the amount and the priors of one layer."""
        amount = None if self.budget is None else self.budget.of_layer(layer, num_layers)
        found = self._with_priors(lambda prior: prior.for_layer(layer, num_layers))
        if amount is None:
            return found
        assert self.budget is not None
        return replace(found, selection=self.chosen_by.with_amount(amount), budget=Budget(steps=self.budget.steps))

    def for_step(self, step: int = -1, fraction: float | None = None) -> "AdaptivePattern":
        """The choice with the factor of this part of the run on its amount, and the priors of this step."""
        found = self._with_priors(lambda prior: prior.for_step(step, fraction))
        if self.budget is None or not self.budget.steps:
            return found
        factor = self.budget.factor(fraction)
        return replace(found, selection=self.chosen_by.scaled(factor), budget=replace(self.budget, steps=()))

    def for_heads(self, first: int, count: int) -> "AdaptivePattern":
        """The choice for some of the heads."""
        amount, found = self.chosen_by.amount, self._with_priors(lambda prior: prior.for_heads(first, count))
        if isinstance(amount, tuple):
            found = replace(found, selection=self.chosen_by.with_amount(amount[first : first + count]))
        return found

    def _with_priors(self, change: Callable[[Pattern], Pattern]) -> "AdaptivePattern":
        """With changed priors; itself where there is none."""
        priors = {"inside": self.inside, "always": self.always}
        changes = {name: change(prior) for name, prior in priors.items() if prior is not None}
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]

    def check_model(self, name: str, heads: tuple[int, ...], layers: int) -> None:
        """The priors must be for this model, and every amount must be one for all heads or one per head."""
        for prior in (self.inside, self.always):
            if prior is not None:
                prior.check_model(name, heads, layers)
        amounts = (self.chosen_by.amount, *(() if self.budget is None else self.budget.layers))
        for given in {len(amount) for amount in amounts if isinstance(amount, tuple)}:
            if set(heads) != {given}:
                raise GenAttnError(
                    f"a rule needs one amount, or one per head, got {given} amounts for {name} with "
                    f"{'/'.join(str(n) for n in sorted(set(heads)))} heads"
                )

    def check(self, layout: TokenLayout) -> None:
        """The priors must serve the layout, and a grid must hold as many tokens as clusters."""
        for prior in (self.inside, self.always):
            if prior is not None:
                prior.check(layout)
        if isinstance(self.tiles, Clusters):
            self.tiles.counts(int(layout.grid_positions.numel()))

    @property
    def chosen_by(self) -> Rule:
        """The rule, as an object."""
        assert isinstance(self.selection, Rule)
        return self.selection

    # ---- plans

    @exact
    @torch.no_grad()
    def plan_for(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        layout: TokenLayout,
        block_q: int = 128,
        block_k: int = 128,
        memory: SiteMemory | None = None,
        scale: float | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> BlockPlan | HeadTiles:
        """The plan for these queries [B, S, H, D] and keys [B, S, Hk, D]: lists per head, estimates averaged over the batch.

        key_mask: bool [B, S]; hidden keys take no part. Raises GenAttnError if the tensors do not fit the layout, or if the
        entries of the batch hide different places of the grid.
        """
        check_tensors(query, key, layout, key_mask)
        slot = ("plan", self, layout, block_q, block_k, query.shape[2], query.device)
        plan: BlockPlan | HeadTiles | None = kept_choice(memory, slot, self.refresh_every, self.share_passes)
        if plan is not None:
            return plan
        if self.tiles_by_head:
            plan = self.stand_in(self._clustered(query, key, layout, (block_q, block_k), memory, scale, key_mask))
        else:
            found = self.listing(query, key, layout, block_q, block_k, scale, key_mask=key_mask)
            plan = self.stand_in(plan_of_listed(found.listed, found.query_tiles, found.key_tiles, layout.seqlen))
        keep_choice(memory, slot, plan, self.share_passes)
        return plan

    @property
    def tiles_by_head(self) -> bool:
        """Whether the tiles are clusters."""
        return isinstance(self.tiles, Clusters)

    @exact
    @torch.no_grad()
    def listing(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        layout: TokenLayout,
        block_q: int,
        block_k: int,
        scale: float | None = None,
        memory: SiteMemory | None = None,
        key_mask: torch.Tensor | None = None,
    ) -> Listing:
        """See ContentPattern.listing."""
        if isinstance(self.tiles, Clusters):
            raise GenAttnError("clusters are tiles of each head's own; combine patterns on boxes or runs instead")
        check_tensors(query, key, layout, key_mask)
        slot = ("listing", self, layout, block_q, block_k, query.shape[2], query.device)
        found: Listing | None = kept_choice(memory, slot, self.refresh_every, self.share_passes)
        if found is None:
            found = self._listed(query, key, layout, (block_q, block_k), scale, key_mask)
            keep_choice(memory, slot, found, self.share_passes)
        return found

    def _listed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        layout: TokenLayout,
        block: tuple[int, int],
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> Listing:
        """The chosen pairs of boxes or runs."""
        assert isinstance(self.tiles, Boxes | Runs)
        made = self.tiles.tiles(layout, *block)
        query_tiles, key_tiles = made[0].to(query.device), made[1].to(query.device)
        seen, key = seen_places(key_mask, layout), without_hidden(key, key_mask)
        query_lanes, key_lanes = seen_lanes(query_tiles, seen, or_all=True), seen_lanes(key_tiles, seen)
        used = (key_lanes >= 0).any(1)
        repeats = query.shape[2] // key.shape[2]
        unlike = None
        if self.guard is not None:
            unlike = (self.guard.unlike(key, key_lanes, True, key_mask) & used).repeat_interleave(repeats, dim=0)
        text = holds(key_tiles, (layout.raster_index < 0).to(query.device))
        allowed = self._open(layout, made, unlike, query.device)
        counted = int((~text & used).sum())
        if 0 < counted < len(key_tiles):  # text is always seen: neither chosen nor counted
            allowed = ~text[None, None] if allowed is None else allowed & ~text
        found = estimate(
            query,
            key,
            query_lanes,
            key_lanes,
            self.score,
            scale,
            open=allowed,
            spread=self.chosen_by.needs_spread,
            counted=counted or None,
            halves=self.tail == "mean2",
        )
        listed = self.chosen_by.choose(found) | self._always(layout, query_tiles, key_tiles)
        if unlike is not None:
            listed = listed | unlike[:, None, :]
        if self.guard is not None and self.guard.queries:
            listed = listed | self.guard.unlike(query, query_lanes, False)[:, :, None]
        if self.always is not None:
            listed = listed | (static_codes(self.always.rule(layout), *made) > 0).to(query.device)
        return Listing(listed & used, query_tiles, key_tiles)

    def _open(
        self, layout: TokenLayout, tiles: tuple[torch.Tensor, torch.Tensor], unlike: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        """Bool [1 or H, NQ, NK]: what the prior shows, less what the guard keeps apart; None for all."""
        found = None
        if self.inside is not None:
            found = (static_codes(self.inside.rule(layout), *tiles) > 0).to(device)
        if unlike is not None and self.guard is not None and self.guard.shut:
            found = ~unlike[:, None, :] if found is None else found & ~unlike[:, None, :]
        return found

    def _always(self, layout: TokenLayout, query_tiles: torch.Tensor, key_tiles: torch.Tensor) -> torch.Tensor:
        """Bool [1, NQ, NK]: text both ways, the own place and its neighbours."""
        text = (layout.raster_index < 0).to(query_tiles.device)
        own = shares_tokens(query_tiles, key_tiles, layout.seqlen)
        wide = beside(own, ~holds(key_tiles, text), self.neighbours)
        return (wide | holds(key_tiles, text) | holds(query_tiles, text)[:, None])[None]

    def _clustered(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        layout: TokenLayout,
        block: tuple[int, int],
        memory: SiteMemory | None,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> HeadTiles:
        """Clusters of the grid's queries and keys, the rule between their centres, tiles of each head's own."""
        places = layout.grid_positions.to(query.device)
        seen, key = seen_places(key_mask, layout), without_hidden(key, key_mask)
        shown = None if seen is None else seen.to(query.device)[places]
        wanted = self._tiling.counts(places.numel(), *block)
        labels_q, centres_q = self._labels(query[:, places], wanted[0], memory, "query centres", shown)
        labels_k, centres_k = self._labels(key[:, places], wanted[1], memory, "key centres", shown)
        repeats = query.shape[2] // key.shape[2]
        labels_k, centres_k = labels_k.repeat_interleave(repeats, 0), centres_k.repeat_interleave(repeats, 0)
        batch = query.shape[0]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        mean_q = centres_q.unflatten(2, (batch, -1)).permute(2, 0, 1, 3) * factor
        mean_k = centres_k.unflatten(2, (batch, -1)).permute(2, 0, 1, 3)
        count = mean_k.shape[2]
        if shown is not None:  # what is hidden is a cluster of its own that nobody chooses
            labels_k = labels_k.masked_fill(~shown, count)
        tokens = sizes(labels_k, count + 1)[:, None, :count]
        score = mean_q @ mean_k.transpose(-1, -2)
        allowed = (tokens > 0).expand(-1, mean_q.shape[2], -1)
        mass = mass_of(score, allowed, tokens if self.score.weighted else None)
        variance = self._cluster_variance(key[:, places], labels_k, mean_k) if self.chosen_by.needs_spread else None
        listed = self.chosen_by.choose(Estimate(mean_q, mean_k, score, mass, allowed, variance))
        if shown is not None:
            listed = torch.nn.functional.pad(listed, (0, 1))
        index = layout.raster_index.to(query.device)
        others, padding = (index == -1).nonzero().flatten(), (index == PADDING).nonzero().flatten()
        return clustered_plan(labels_q, labels_k, listed, places, others, padding, layout.seqlen, block)

    @property
    def _tiling(self) -> Clusters:
        assert isinstance(self.tiles, Clusters)
        return self.tiles

    def _labels(
        self, x: torch.Tensor, clusters: int, memory: SiteMemory | None, name: str, shown: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K-means of [B, n, H, D] with the samples of a batch side by side: labels [H, n], centres [H, clusters, B D].

        shown: bool [n], the points that make the centres; the others take the label of the nearest.
        """
        points = x.permute(2, 1, 0, 3).flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        made_by = points if shown is None else points[:, shown]
        clusters = min(clusters, made_by.shape[1])
        slot = (name, None if self.share_passes or memory is None else memory.pass_name)
        start = memory.kept.get(slot) if memory is not None and memory.step >= 0 else None
        known = start is not None and start.shape == (points.shape[0], clusters, points.shape[2])
        rounds = self._tiling.step_iterations if known else self._tiling.iterations
        stride = self._tiling.stride(made_by.shape[1], clusters)
        labels, centres = kmeans(made_by, clusters, rounds, start if known else None, stride)
        if memory is not None and memory.step >= 0:
            memory.kept[slot] = centres
        if shown is not None:
            found = torch.empty(points.shape[:2], dtype=labels.dtype, device=labels.device)
            found[:, shown], found[:, ~shown] = labels, nearest(points[:, ~shown], centres)
            labels = found
        return labels, centres

    def _cluster_variance(self, key: torch.Tensor, labels: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """[B, H, C, D]: variance of each channel inside a cluster. key [B, n, Hk, D], labels [H, n], C for no cluster."""
        x = key.repeat_interleave(labels.shape[0] // key.shape[2], dim=2).permute(0, 2, 1, 3).to(mean.dtype)
        zero = torch.nn.functional.pad(torch.zeros_like(mean[0]), (0, 0, 0, 1))
        square = torch.stack([means_by_label(sample.square(), labels, zero) for sample in x])[:, :, :-1]
        return (square - mean.square()).clamp_min(0)
