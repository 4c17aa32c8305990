"""A pattern on the seam: sparse where schedule, mask and layout allow it, else the user's own backend, the reason noted."""

import contextlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, is_dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.functional.each_sample import attention_of_each, rows_of_samples, same_places
from genattn.functional.masks import grid_key_mask, key_mask, why_not_apart
from genattn.functional.memories import Memories
from genattn.functional.planned import AnyPlan, plan_for, planned_attention, why_no_tail
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.block_sparse import IMPLS, as_autocast, choose_impl
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.first_queries import of_first_queries
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.layouts.site import AttentionSite
from genattn.patterns.as_json import pattern_from_dict, pattern_to_dict, plain
from genattn.patterns.dense import DensePattern
from genattn.patterns.logit_decayed import LogitDecayed
from genattn.patterns.pattern import Pattern, SiteMemory, forget_plans
from genattn.seam.plugin import AttentionCall, CallRecord, Inner, Plugin, Run
from genattn.seam.schedule import Schedule
from genattn.settings import refuse

_LOG = logging.getLogger("genattn")
_MOST_PASSES = 4  # in a step


class SparsePlugin(Plugin):
    """`pattern` on every self and joint attention, when `schedule` says so. impl: as in `genattn.attention`.

    A backend that is named must serve every sparse call, or its reason comes as a GenAttnError; "auto" takes the best one.
    """

    option_names: ClassVar[frozenset[str]] = Schedule.names() | {"impl"}
    answers: ClassVar[bool] = True

    def __init__(self, pattern: Pattern, schedule: Schedule | None = None, impl: str = "auto") -> None:
        if not isinstance(pattern, Pattern):
            raise GenAttnError(f"pattern must be a Pattern such as RadialPattern(), got {type(pattern).__name__}: {pattern!r}")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise refuse("schedule", schedule, "a Schedule or None; e.g. Schedule(dense_steps=0.25)")
        if impl not in (known := (*IMPLS, "halo", "natten")):
            raise GenAttnError(f"impl must be one of {', '.join(known)}, got {impl!r}")
        self.pattern, self.schedule, self.impl = pattern, schedule or Schedule(), impl
        self.origin = ""  # which name and preset it comes from, for the report
        self.known_as = ""  # the diffusers class of a model that holds its weights under another name
        self._tailed = pattern.with_measured_tail()
        self._blocks: dict[int, int] = {}
        self._mask: tuple[Any, Any] | None = None
        self._said: set[str] = set()
        self._memory = Memories()
        self._used: set[Pattern] = set()

    def attach(self, model: nn.Module, sites: Sequence[AttentionSite]) -> None:
        """Refuse models whose self-attention cannot be made sparse."""
        wanted = [site for site in sites if self.wants(site)]
        name = self.known_as or model.__class__.__name__
        if not wanted:
            raise GenAttnError(f"{name} has no self or joint attention for a pattern; its sites are {_kinds(sites)}")
        hidden = [site for site in wanted if site.unreachable]
        if len(hidden) == len(wanted):
            raise GenAttnError(f"{name} cannot run sparse: {hidden[0].unreachable}")
        blocks = 1 + max(site.depth for site in sites)
        self.pattern.check_model(name, tuple(site.heads for site in wanted), blocks)
        for site in wanted:  # a pattern that differs by layer must fit this model's layers
            self.pattern.for_layer(site.depth, blocks)
        self._blocks[id(model)] = blocks

    def detach(self, model: nn.Module) -> None:
        """Forget the model, and with the last one the plans."""
        self._blocks.pop(id(model), None)
        self._memory.clear()
        if not self._blocks:
            forget_plans(self._used)
            self._used.clear()
            self._mask = None

    def why_idle(self, run: Run) -> str:
        """What the schedule says of all steps; a pattern that is dense says nothing."""
        if isinstance(self.pattern, DensePattern):
            return ""
        return self.schedule.with_options(run.options_of(self)).why_idle(run)

    def begin_run(self, run: Run) -> None:
        """Forget what a pattern chose in this pipeline's last run."""
        self._memory.forget(run.pipe)

    def blocks_of(self, model: nn.Module | None) -> int:
        """Number of blocks of an attached model, over all its stacks."""
        return self._blocks.get(id(model), 0)

    def wants(self, site: AttentionSite) -> bool:
        """Attention over a grid: all of it, or one frame of it."""
        return site.kind in ("self", "joint", "spatial")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Schedule settings are checked as in its constructor."""
        self.schedule.with_options(options)

    @property
    def touches_attention(self) -> bool:
        """A dense pattern never does."""
        return not isinstance(self.pattern, DensePattern)

    def why_not_split(self, split: str) -> str:
        """Some of the queries cannot choose tiles for all, and boxes that follow the query tile know no part of a sequence."""
        if split == "ring" and self.pattern.needs_tensors:
            return f"{type(self.pattern).__name__} chooses tiles by all queries, of which a ring has some; use Ulysses"
        if split == "ring" and self.impl in ("halo", "natten"):
            return f"impl={self.impl!r} answers whole sequences; use impl='auto' or Ulysses"
        return ""

    def foresee(self, call: AttentionCall) -> None:
        """A backend that is named must serve; the first steps are dense and would not tell."""
        impl = call.run.options_of(self).get("impl", self.impl)
        if impl in ("auto", "halo", "natten") or self.why_not(call) or call.layout is None:
            return
        plan = plan_for(call.query, call.key, self._pattern_at(call, impl), call.layout, scale=call.scale)
        if not isinstance(plan, BlockPlan):
            return
        tensors = as_autocast(call.query, call.key, call.value)
        try:
            choose_impl(*tensors, plan, impl=impl)
        except ValueError as error:
            raise GenAttnError(str(error)) from error

    def stays_out(self, run: Run, site: AttentionSite, tokens: int) -> str:
        """What the schedule says of the call; a dense pattern always stays out."""
        schedule = self.schedule.with_options(run.options_of(self))
        planned = schedule.why_dense(run, site, tokens, self.blocks_of(run.model))
        return planned or ("the pattern is dense" if isinstance(self.pattern, DensePattern) else "")

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """Sparse, or `inner` with a reason."""
        options = call.run.options_of(self)
        planned = self.stays_out(call.run, call.site, call.tokens)
        if planned:
            return _dense(call, inner, planned)
        if call.layout is None and call.run.sample_layouts:
            return self._each_sample(call, inner)
        reason = self.why_not(call)
        keys, others, reason = (None, None, reason) if reason else self._key_mask(call)
        if reason:
            self._say_once(call, reason)
            return _dense(call, inner, reason)
        impl = options.get("impl", self.impl)
        assert call.layout is not None
        pattern = self._pattern_at(call, impl)
        self._used.add(pattern)
        flags: dict[str, Any] = {"impl": impl, "scale": call.scale, "key_mask": keys}
        groups = same_places(_samples_of(call), keys, call.layout) if pattern.needs_tensors else []
        if len(groups) > 1:
            out = self._by_own_plans(call, pattern, groups, **flags)
            return out if others is None else _with_rows(out, others, call, inner)
        plan = plan_for(call.query, call.key, pattern, call.layout, impl, self._memory_at(call), call.scale, keys)
        if call.only_first:
            plan = _for_own_rows(plan, call)
        tail = plan.tail if isinstance(plan, BlockPlan | HeadTiles) else None
        call.record.ran_sparse(plan.density, None if tail is None else tail.kind)
        if others is not None:
            out = planned_attention(call.query, call.key, call.value, plan, **flags)  # type: ignore[assignment]
            return _with_rows(out, others, call, inner)
        if call.record.wants_lse:
            with contextlib.suppress(GenAttnError):  # some backends do not tell it
                out, call.record.lse = planned_attention(call.query, call.key, call.value, plan, return_lse=True, **flags)
                return out
        return planned_attention(call.query, call.key, call.value, plan, **flags)  # type: ignore[return-value]

    def _by_own_plans(self, call: AttentionCall, pattern: Pattern, groups: list[torch.Tensor], **flags: Any) -> torch.Tensor:
        """Every sample by the tiles that it chose itself."""
        layout, impl = call.layout, flags["impl"]
        assert layout is not None

        def plan_of(query: torch.Tensor, key: torch.Tensor, keys: torch.Tensor | None, number: int) -> AnyPlan:
            return plan_for(query, key, pattern, layout, impl, self._memory_at(call, f"[{number}]"), call.scale, keys)

        out, plans = attention_of_each(call.query, call.key, call.value, groups, plan_of, **flags)
        assert isinstance(out, torch.Tensor)
        tail = getattr(plans[0], "tail", None)
        call.record.ran_sparse(sum(plan.density for plan in plans) / len(plans), None if tail is None else tail.kind)
        return out

    def _each_sample(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """A batch of sequences that differ in grid or in length, filled up at their ends or told where they are: every one
        under its own layout."""
        layouts, tokens = call.run.sample_layouts, call.query.shape[1]
        told = len(layouts) == len(call.query) and all(layout.seqlen == tokens for layout in layouts)
        alone = [_one_sample(call, place, layout, keeps_mask=told) for place, layout in enumerate(layouts)]
        reason = "" if told else why_not_apart(call.mask, call.query, call.key, layouts)
        reason = reason or next(filter(None, map(self.why_not, alone)), "")
        if reason:
            self._say_once(call, reason)
            return _dense(call, inner, reason)
        parts = []
        for one in alone:
            out = self.attention(one, inner)
            parts.append(torch.nn.functional.pad(out, (0, 0, 0, 0, 0, tokens - out.shape[1])))
        if all(one.record.sparse for one in alone):
            work = [one.record.density * one.query.shape[1] ** 2 for one in alone]
            call.record.ran_sparse(sum(work) / (len(work) * tokens**2))
        return torch.cat(parts)

    def _say_once(self, call: AttentionCall, reason: str) -> None:
        """What the schedule did not ask for is told when it first happens; `report()` counts all of it."""
        if reason not in self._said and not isinstance(self.pattern, DensePattern):
            self._said.add(reason)
            _LOG.warning("%s stays dense: %s", call.site.name, reason)

    def plan_at(self, call: AttentionCall) -> BlockPlan:
        """The plan for a call of a known layout. Raises GenAttnError for a pattern whose tiles differ by head."""
        assert call.layout is not None
        pattern, memory = self._pattern_at(call), self._memory_at(call)
        keys, _, _ = self._key_mask(call)
        plan = plan_for(call.query, call.key, pattern, call.layout, memory=memory, scale=call.scale, key_mask=keys)
        if not isinstance(plan, BlockPlan):
            raise GenAttnError("this needs a plan with the same tiles for all heads, got clusters; use tiles='boxes'")
        return plan

    def _memory_at(self, call: AttentionCall, sample: str = "") -> SiteMemory | None:
        """What the site keeps for a pattern that chooses by content, in all or of one sample.

        Nothing where gradients are wanted: a block that is computed again in the backward pass must choose as it did before.
        """
        if not self.pattern.needs_tensors or call.run.wants_gradient:
            return None
        found = self._memory.at(call.run.pipe, (id(call.run.model), call.site.name + sample))
        run = call.run  # where nobody names the passes of a step, they keep their order
        found.pass_name = run.pass_name or f"forward {run.repeats}"
        found.step = run.step if run.pass_name or run.repeats < _MOST_PASSES else -1  # a bare model may stay at one step
        return found

    def _pattern_at(self, call: AttentionCall, impl: str = "auto") -> Pattern:
        # tail="auto" is on where the backend has it: none that was named is refused for a default
        acting = self.pattern if why_no_tail(impl, call.query.device) else self._tailed
        pattern = acting.for_layer(call.site.depth, self._blocks.get(id(call.run.model), call.site.depth + 1))
        pattern = pattern.for_step(call.run.step, call.run.fraction)
        heads = call.query.shape[2]  # fewer than the site has, where processes share them
        pattern = pattern.for_heads(call.head_offset, heads) if 0 < heads < call.site.heads else pattern
        return pattern if call.decay is None else LogitDecayed(pattern, *astuple(call.decay))

    def why_not(self, call: AttentionCall) -> str:
        """The reason for which this pattern cannot answer the call, empty when it can."""
        if isinstance(self.pattern, DensePattern):
            return "the pattern is dense"
        if call.is_causal:
            return "the call is causal"
        if call.layout is None:
            return _why_no_layout(call)
        if call.layout.grid is None:
            return f"the layout {call.layout.describe()!r} has no grid"
        try:
            self._pattern_at(call).check(call.layout)
        except GenAttnError as error:
            return f"{type(self.pattern).__name__} does not serve this layout: {error}"
        return ""

    def _key_mask(self, call: AttentionCall) -> tuple[torch.Tensor | None, torch.Tensor | None, str]:
        """(keys bool [B, Sk] or None for all, rows that keep a mask of their own, "") or (None, None, why it cannot be).

        Read once for a tensor that all layers share: reading it waits for the device.
        """
        if call.mask is None:
            return None, None, ""
        counts = isinstance(call.mask, torch.Tensor) and not call.mask.is_inference()
        version = call.mask._version if counts else None
        known = self._mask  # another thread may put its own there meanwhile
        if known is not None and known[0][0]() is call.mask and known[0][1:] == (version, call.query.shape[:2]):
            return known[1]  # type: ignore[no-any-return]
        keys, reason = key_mask(call.mask, call.query.shape[0], call.query.shape[1], call.key.shape[1])
        others = None
        if reason:
            assert call.layout is not None
            keys = grid_key_mask(call.mask, call.query.shape[0], call.key.shape[1], call.layout.grid_positions)
            if keys is not None:
                others, reason = torch.nonzero(call.layout.raster_index < 0).flatten().to(call.query.device), ""
        answer = keys, others, reason
        self._mask = ((weakref.ref(call.mask), version, call.query.shape[:2]), answer)
        return answer

    def __reduce_ex__(self, protocol: Any) -> Any:
        """See Plugin: fresh, with a pattern of any class."""
        kept = {"origin": self.origin, "known_as": self.known_as}
        return type(self), (self.pattern, self.schedule, self.impl), kept

    def __repr__(self) -> str:
        """The constructor's call."""
        schedule = "" if self.schedule == Schedule() else f", {self.schedule!r}"
        return f"{type(self).__name__}({self.pattern!r}{schedule}{'' if self.impl == 'auto' else f', impl={self.impl!r}'})"

    def settings(self) -> dict[str, Any]:
        """Pattern, schedule, backend, as a file holds them."""
        return {"pattern": pattern_to_dict(self.pattern), "schedule": plain(asdict(self.schedule)), "impl": self.impl}

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "SparsePlugin":
        """See Plugin.from_settings. Raises GenAttnError for an unknown pattern or setting of the schedule."""
        given = dict(settings)
        if "pattern" not in given:
            raise GenAttnError(f"a SparsePlugin has pattern, schedule and impl, got {sorted(given)}")
        schedule = dict(given.pop("schedule", None) or {})
        strange = sorted(set(schedule) - Schedule.names())
        if strange:
            raise GenAttnError(f"unknown settings {strange}; a schedule has {', '.join(sorted(Schedule.names()))}")
        return cls(pattern_from_dict(given.pop("pattern")), Schedule(**schedule), **given)

    def describe(self) -> dict[str, Any]:
        """Pattern, schedule, backend."""
        settings: dict[str, Any] = asdict(self._tailed) if is_dataclass(self._tailed) else {}
        return {
            "plugin": type(self).__name__,
            "pattern": {"type": type(self.pattern).__name__, **settings},
            "schedule": asdict(self.schedule),
            "impl": self.impl,
            **({"preset": self.origin} if self.origin else {}),
        }


def _for_own_rows(plan: AnyPlan, call: AttentionCall) -> BlockPlan:
    """The plan for the rows that this process has of a ring."""
    if not isinstance(plan, BlockPlan):
        raise GenAttnError(
            "under ring context parallelism a plan must have fixed tiles, got one that has none; use impl='auto'"
        )
    return of_first_queries(plan, call.query.shape[1])


def _with_rows(out: torch.Tensor, rows: torch.Tensor, call: AttentionCall, inner: Inner) -> torch.Tensor:
    """out [B, S, H, D], the queries `rows` answered by `inner` under their rows of the mask."""
    mask = call.mask.index_select(2, rows.to(call.mask.device))
    own = inner(call.with_tensors(query=call.query.index_select(1, rows), mask=mask, layout=None))
    return out.index_copy(1, rows, own.to(out.dtype))


def _samples_of(call: AttentionCall) -> list[torch.Tensor]:
    """The entries of each sample of the pipeline, whatever guidance and frames multiplied them by."""
    folded = call.site.kind == "spatial"
    passes = (2 if call.run.pass_name == "cond_uncond" else 1) if folded else None
    return rows_of_samples(call.query.shape[0], call.run.samples, passes)


def _one_sample(call: AttentionCall, place: int, layout: TokenLayout, keeps_mask: bool = False) -> AttentionCall:
    mask = call.mask if keeps_mask else None
    if isinstance(mask, torch.Tensor) and len(mask) > 1:
        mask = mask[place : place + 1]
    cut = {name: getattr(call, name)[place : place + 1, : layout.seqlen] for name in ("query", "key", "value")}
    run = replace(call.run, layout=layout, sample_layouts=())
    site = replace(call.site, name=f"{call.site.name}[{place}]")  # what a pattern remembers of a sample is that sample's
    return call.with_tensors(**cut, mask=mask, layout=layout, run=run, site=site, record=CallRecord())


def _dense(call: AttentionCall, inner: Inner, reason: str) -> torch.Tensor:
    call.record.stayed_dense(reason)
    return inner(call)


def _why_no_layout(call: AttentionCall) -> str:
    run, queries, keys = call.run, call.query.shape[1], call.key.shape[1]
    if queries != keys:
        return f"{queries} queries look at {keys} keys: not self-attention over one sequence"
    if run.layout is None:
        return run.why_no_layout or "no layout is known"
    return f"the layout {run.layout.describe()!r} has {run.layout.seqlen} tokens, the call has {queries}"


def _kinds(sites: Sequence[AttentionSite]) -> str:
    return ", ".join(sorted({site.kind for site in sites})) or "none"
