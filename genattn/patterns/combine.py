"""Patterns made of patterns: union, intersection, one per head, one per layer.

    Union(a, b)            what a or b shows             Intersection(a, b)     what both show
    PerHead((a, b), (0, 0, 1, 1))                        PerLayer((a, b), (0, 1, 1))

All parts of a plan need the same tiles. Each part proposes its own; the tiles with the least work for all parts are taken.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch

from genattn.errors import GenAttnError
from genattn.geometry.plan_build import plan_from_rule
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import CombinedRule, ElementRule, PerHeadRule
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.patterns.content import ContentPattern, Listing, check_tensors
from genattn.patterns.dense import DensePattern
from genattn.patterns.listed_plans import combined_codes, combined_head_tiles, plan_of_codes, static_codes, visible_codes
from genattn.patterns.pattern import Pattern, SiteMemory, TailName
from genattn.settings import several, whole_numbers

Combined = TypeVar("Combined", BlockPlan, HeadTiles)


@dataclass(frozen=True)
class _Parts(Pattern):
    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        what = "a list of patterns"
        object.__setattr__(self, "patterns", several("patterns", self.patterns, what))
        if not self.patterns or not all(isinstance(p, Pattern) for p in self.patterns):
            raise GenAttnError(f"{type(self).__name__} needs at least one pattern, got {self.patterns!r}")
        lowering = next((type(p).__name__ for p in self.patterns if p.lowers_logits), None)
        if lowering is not None and not isinstance(self, PerLayer):
            raise GenAttnError(
                f"{type(self).__name__} cannot hold {lowering}, whose logits it would leave; put {lowering} around all"
            )
        super().__post_init__()

    @property
    def hides_on_purpose(self) -> bool:
        """Whether any part does."""
        return any(p.hides_on_purpose for p in self.patterns)

    def check(self, layout: TokenLayout) -> None:
        """Every part must serve the layout."""
        for pattern in self.patterns:
            pattern.check(layout)

    @property
    def needs_tensors(self) -> bool:
        """Whether any part does."""
        return any(p.needs_tensors for p in self.patterns)

    def for_step(self, step: int = -1, fraction: float | None = None) -> Pattern:
        """The parts' patterns at one step of the run."""
        parts = tuple(p.for_step(step, fraction) for p in self.patterns)
        return self if parts == self.patterns else self._with_parts(parts)

    def _with_parts(self, parts: tuple[Pattern, ...]) -> Pattern:
        return replace(self, patterns=parts)

    def check_model(self, name: str, heads: tuple[int, ...], layers: int) -> None:
        """Every part must be for this model."""
        for pattern in self.patterns:
            pattern.check_model(name, heads, layers)

    def _chosen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        layout: TokenLayout,
        block: tuple[int, int],
        memory: SiteMemory | None,
        scale: float | None,
        key_mask: torch.Tensor | None,
    ) -> dict[Pattern, Listing]:
        """What each part that looks at the tensors chose, or chose some steps before, all on the same tiles.

        Raises GenAttnError where a part is a combination of its own, or where two parts cut the sequence differently.
        """
        check_tensors(query, key, layout, key_mask)
        choosing = [p for p in self.patterns if isinstance(p, ContentPattern)]
        content: dict[Pattern, Listing] = {p: p.listing(query, key, layout, *block, scale, memory, key_mask) for p in choosing}
        if any(p.needs_tensors and p not in content for p in self.patterns):
            raise GenAttnError(
                f"a {type(self).__name__} cannot hold another combination with a pattern that looks at the tensors; "
                "name all parts in one combination"
            )
        first, *others = content.values()
        if not all(_same(o.query_tiles, first.query_tiles) and _same(o.key_tiles, first.key_tiles) for o in others):
            raise GenAttnError(f"the parts of a {type(self).__name__} that look at the tensors must have the same tiles")
        return content

    def _codes(
        self, content: dict[Pattern, Listing], layout: TokenLayout
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """(per part uint8 codes [H or 1, NQ, NK] on the CPU, query tiles, key tiles); the content parts name the tiles."""
        first = next(iter(content.values()))
        tiles = first.query_tiles, first.key_tiles
        codes = [
            visible_codes(content[p].listed).cpu() if p in content else static_codes(p.rule(layout), *tiles)
            for p in self.patterns
        ]
        return codes, *tiles

    def _kept(self, memory: SiteMemory | None, chosen: Sequence[Any], make: Callable[[], Combined]) -> Combined:
        """The plan that `make` gives for what the parts chose; that of the call before while they keep to their choice."""
        if memory is None or memory.step < 0:
            return make()
        slot = "combined", memory.pass_name
        known = memory.kept.get(slot)
        same = known is not None and known[0] == self and len(known[1]) == len(chosen)
        if known is not None and same and all(old is new for old, new in zip(known[1], chosen)):
            return known[2]  # type: ignore[no-any-return]
        plan = make()
        memory.kept[slot] = self, list(chosen), plan
        return plan

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """The exact plan on the tiles of the part whose tiles cost least."""
        rule = self.rule(layout)
        # the parts' own tails are not the combination's
        proposals = {p: p.plan(layout, block_q, block_k) for p in dict.fromkeys(p.with_tail(None) for p in self.patterns)}
        if len(proposals) == 1 and rule.num_heads == 1 and self.patterns[0].tail_of_heads() is None:
            return next(iter(proposals.values()))
        plans = [plan_from_rule(rule, p.query_tiles, p.key_tiles, layout.seqlen) for p in _distinct(proposals.values())]
        return min(plans, key=lambda plan: plan.columns.numel())


def _distinct(plans: Iterable[BlockPlan]) -> list[BlockPlan]:
    kept: list[BlockPlan] = []
    for plan in plans:
        if not any(_same(plan.query_tiles, k.query_tiles) and _same(plan.key_tiles, k.key_tiles) for k in kept):
            kept.append(plan)
    return kept


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


@dataclass(frozen=True)
class _Combined(_Parts):
    op: ClassVar[str]

    def __init__(self, *parts: Pattern, tail: TailName = "auto", patterns: Sequence[Pattern] = ()) -> None:
        if parts and patterns:
            raise GenAttnError(f"patterns must be given one way, got {parts!r} and patterns={patterns!r}; name them once")
        object.__setattr__(self, "patterns", parts or patterns)
        object.__setattr__(self, "tail", tail)
        self.__post_init__()

    @property
    def measured_tail(self) -> TailName:
        """The first part's own, or the one that measured best for it; none where a part is causal."""
        first = self.patterns[0]
        found = first.measured_tail if first.tail == "auto" else first.tail
        return None if self.hides_on_purpose else found

    def with_measured_tail(self) -> Pattern:
        """The first part with its measured tail, where nothing else is asked for."""
        if self.tail != "auto":
            return self
        first, *others = self.patterns
        return type(self)(first.with_measured_tail(), *others)

    def with_tail(self, tail: TailName) -> Pattern:
        """This combination with another tail."""
        return type(self)(*self.patterns, tail=tail)

    def tail_of_heads(self) -> TailName | tuple[TailName, ...]:
        """The first part's where nothing else is asked for; none where a part is causal."""
        if self.tail != "auto":
            return self.tail
        return None if self.hides_on_purpose else self.patterns[0].tail_of_heads()

    def for_layer(self, layer: int, num_layers: int) -> Pattern:
        """The combination of the parts' patterns for one layer."""
        return type(self)(*(p.for_layer(layer, num_layers) for p in self.patterns), tail=self.tail)

    def for_heads(self, first: int, count: int) -> Pattern:
        """The combination of the parts' patterns for some heads."""
        return type(self)(*(p.for_heads(first, count) for p in self.patterns), tail=self.tail)

    def _with_parts(self, parts: tuple[Pattern, ...]) -> Pattern:
        return type(self)(*parts, tail=self.tail)

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
        """The plan for these queries and keys, on the tiles of the parts that look at them."""
        if not self.needs_tensors:
            return self.plan(layout, block_q, block_k)
        static = [p for p in self.patterns if not p.needs_tensors] or [DensePattern()]
        content = [p for p in self.patterns if p.needs_tensors]
        if len(content) == 1 and isinstance(content[0], ContentPattern) and content[0].tiles_by_head:
            alone = content[0].with_tail(None).plan_for(query, key, layout, block_q, block_k, memory, scale, key_mask)
            assert isinstance(alone, HeadTiles)

            def of_heads() -> HeadTiles:
                return self.stand_in(combined_head_tiles(alone, _combined(static, layout, self.op), self.op))

            return self._kept(memory, [alone], of_heads)
        chosen = self._chosen(query, key, layout, (block_q, block_k), memory, scale, key_mask)

        def of_all() -> BlockPlan:
            codes, query_tiles, key_tiles = self._codes(chosen, layout)
            # a pair that the content parts settle is all or nothing; what is left open is up to the static parts alone
            rule = _combined(static, layout, self.op)
            plan = plan_of_codes(combined_codes(codes, self.op), query_tiles, key_tiles, rule, layout.seqlen)
            return self.stand_in(plan.to(query.device))

        return self._kept(memory, list(chosen.values()), of_all)


@dataclass(frozen=True, init=False)
class Union(_Combined):
    """A query sees what any of the patterns shows it: `Union(a, b, ...)`. tail: "auto" takes the first part's."""

    op: ClassVar[str] = "any"

    def rule(self, layout: TokenLayout) -> ElementRule:
        """Any of the parts' rules."""
        return _combined(self.patterns, layout, "any")


@dataclass(frozen=True, init=False)
class Intersection(_Combined):
    """A query sees what all of the patterns show it: `Intersection(a, b, ...)`. tail: "auto" takes the first part's."""

    op: ClassVar[str] = "all"

    def rule(self, layout: TokenLayout) -> ElementRule:
        """All of the parts' rules."""
        return _combined(self.patterns, layout, "all")


def _combined(patterns: Sequence[Pattern], layout: TokenLayout, op: str) -> ElementRule:
    rules = tuple(p.rule(layout) for p in patterns)
    try:
        return CombinedRule(rules, op)
    except ValueError as error:
        raise GenAttnError(f"{error}; give every per-head setting one value per head of the model") from None


@dataclass(frozen=True)
class PerHead(_Parts):
    """Head h follows `patterns[choice[h]]`; without `choice` there is one pattern per head.

    tail: "auto" leaves each its own.
    """

    choice: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_choice(self, "head")

    def for_layer(self, layer: int, num_layers: int) -> Pattern:
        """The same heads with the parts' patterns for one layer."""
        return PerHead(tuple(p.for_layer(layer, num_layers) for p in self.patterns), self.choice, tail=self.tail)

    def with_measured_tail(self) -> Pattern:
        """The parts with their measured tails in the place of "auto"."""
        if self.tail != "auto":
            return self
        return replace(self, patterns=tuple(p.with_measured_tail() for p in self.patterns))

    def tail_of_heads(self) -> TailName | tuple[TailName, ...]:
        """Each head's part's, where nothing else is asked for."""
        assert self.choice is not None
        if self.tail != "auto":
            return self.tail
        kinds = [p.tail_of_heads() for p in self.patterns]
        # parts are the same for all heads: `rule` refuses others
        return tuple(None if isinstance(kinds[c], tuple) else kinds[c] for c in self.choice)  # type: ignore[misc]

    def for_heads(self, first: int, count: int) -> Pattern:
        """The same patterns, chosen for some of the heads."""
        assert self.choice is not None
        return PerHead(self.patterns, self.choice[first : first + count], tail=self.tail)

    def rule(self, layout: TokenLayout) -> ElementRule:
        """One rule per head. Raises GenAttnError if a part already differs by head."""
        rules = tuple(p.rule(layout) for p in self.patterns)
        if any(rule.num_heads > 1 for rule in rules):
            raise GenAttnError("PerHead needs parts that are the same for all heads, got one with per-head settings")
        assert self.choice is not None
        return PerHeadRule(rules, self.choice)

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
        """The plan for these queries and keys, on the tiles of the parts that look at them."""
        if not self.needs_tensors:
            return self.plan(layout, block_q, block_k)
        choice = self.choice or ()
        if len(choice) != query.shape[2]:
            raise GenAttnError(f"PerHead needs one entry per head, got {len(choice)} entries for {query.shape[2]} heads")
        chosen = self._chosen(query, key, layout, (block_q, block_k), memory, scale, key_mask)

        def of_all() -> BlockPlan:
            codes, query_tiles, key_tiles = self._codes(chosen, layout)
            rows = torch.stack([codes[part][head if len(codes[part]) > 1 else 0] for head, part in enumerate(choice)])
            static = tuple(DensePattern() if p.needs_tensors else p for p in self.patterns)
            rule = PerHead(static, choice).rule(layout)
            return self.stand_in(plan_of_codes(rows, query_tiles, key_tiles, rule, layout.seqlen).to(query.device))

        return self._kept(memory, list(chosen.values()), of_all)


@dataclass(frozen=True)
class PerLayer(_Parts):
    """Layer n (in execution order) follows `patterns[choice[n]]`; without `choice` there is one pattern per layer.

    tail: "auto" leaves each layer its own.
    """

    choice: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _set_choice(self, "layer")

    def for_layer(self, layer: int, num_layers: int) -> Pattern:
        """The pattern of one layer. Raises GenAttnError if `choice` has not one entry per layer."""
        assert self.choice is not None
        if len(self.choice) != num_layers or not 0 <= layer < num_layers:
            raise GenAttnError(
                f"PerLayer needs one entry per layer, got {len(self.choice)} entries for layer {layer} of {num_layers}"
            )
        pattern = self.patterns[self.choice[layer]].for_layer(layer, num_layers)
        return pattern if self.tail == "auto" else pattern.with_tail(self.tail)

    def with_measured_tail(self) -> Pattern:
        """The parts with their measured tails in the place of "auto"."""
        if self.tail != "auto":
            return self
        return replace(self, patterns=tuple(p.with_measured_tail() for p in self.patterns))

    def check(self, layout: TokenLayout) -> None:
        """A pattern that differs by layer has no single mask."""
        raise _one_mask_per_layer()

    def rule(self, layout: TokenLayout) -> ElementRule:
        """Not defined for all layers at once."""
        raise _one_mask_per_layer()


def _one_mask_per_layer() -> GenAttnError:
    return GenAttnError("PerLayer has one mask per layer; call for_layer(layer, num_layers) first")


def _set_choice(pattern: PerHead | PerLayer, what: str) -> None:
    wanted = f"a pattern 0..{len(pattern.patterns) - 1} for every {what}"
    choice = tuple(range(len(pattern.patterns)))
    if pattern.choice is not None:
        choice = whole_numbers("choice", pattern.choice, None, wanted)
    if not choice or not all(0 <= c < len(pattern.patterns) for c in choice):
        raise GenAttnError(f"choice must name a pattern 0..{len(pattern.patterns) - 1} for every {what}, got {tuple(choice)}")
    object.__setattr__(pattern, "choice", choice)
