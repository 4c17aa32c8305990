"""What every pattern is: frozen settings that say, from geometry alone, which query may see which key.

Each pattern gives an element rule (the definition), a block plan (analytic, no S x S tensor) and a picture of both. It has a
`tail`: what stands in for the key tiles that it skips.
"""

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, TypeVar

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule
from genattn.kernels.plan.freed import GIVE_BACK, give_back
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.plan.tail import TAILS
from genattn.settings import whole_number

MASK_LIMIT = 16_384
_LOG = logging.getLogger("genattn")
_SAID: set[str] = set()
TailName = str | None
Plan = TypeVar("Plan", BlockPlan, HeadTiles)


class _Unnamed(str):
    """A tail that nobody named: where it has no effect there is nothing to say."""


class PlanCache:
    """The plans used last, by everything they depend on. Bounded by all the bytes they hold, what backends derived from them
    included, so that a model with settings of its own in every layer keeps them all, and a few huge plans do not pile up.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._plans: OrderedDict[Hashable, BlockPlan] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: Hashable) -> BlockPlan | None:
        """The plan kept under `key`, or None."""
        with self._lock:
            if key not in self._plans:
                return None
            self._plans.move_to_end(key)
            return self._plans[key]

    def put(self, key: Hashable, plan: BlockPlan) -> None:
        """Keep `plan`, and drop the ones unused for longest where there is too much; the newest always stays."""
        with self._lock:
            self._plans.pop(key, None)
            self._plans[key] = plan
            # counted anew, because plans grow when they are used
            sizes = {kept: held_bytes(value) for kept, value in self._plans.items()}
            total = sum(sizes.values())
            dropped = 0
            while total - dropped > self.max_bytes and len(self._plans) > 1:
                dropped += sizes[self._plans.popitem(last=False)[0]]
        if dropped:
            plan.cache[GIVE_BACK] = True
            give_back()

    def forget(self, patterns: Collection["Pattern"]) -> None:
        """Drop the plans of these patterns."""
        with self._lock:
            for key in [key for key in self._plans if isinstance(key, tuple) and key[0] in patterns]:
                del self._plans[key]

    @property
    def _bytes(self) -> int:
        return sum(held_bytes(plan) for plan in list(self._plans.values()))


def held_bytes(plan: BlockPlan) -> int:
    """Bytes of all tensors that a plan keeps alive: its lists, and what backends derived from them."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[object] = [plan]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (type, str, int, float)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif not callable(item) or hasattr(item, "num_heads"):  # a rule is callable too
            waiting += getattr(item, "__dict__", {}).values()
    return sum(storages.values())


_CACHE = PlanCache(2**31)


def forget_plans(patterns: Collection["Pattern"]) -> None:
    """Drop the cached plans of these patterns."""
    _CACHE.forget(patterns)


@dataclass
class SiteMemory:
    """What one attention site keeps from call to call of a sampling run: a chosen plan, centres of clusters.

    step: 0-based sampling step of the call, -1 when unknown. pass_name: the guidance pass. kept: by the pattern that keeps it.
    """

    step: int = -1
    pass_name: str | None = None
    kept: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pattern(ABC):
    """Base of the patterns. Subclasses are frozen, hashable dataclasses: equal settings are equal patterns.

    tail: what stands in for skipped key tiles: None (nothing), "mean" (the mean of each tile) or "mean2" (the means of two
        halves of like keys), as pseudo-keys weighed by their number of keys. A tile that is visited is then seen whole.
        "auto": on a model, which was trained with dense attention, what measured best for the pattern
        (`with_measured_tail`); in a plain call of `attention`, where the pattern's mask is the definition, nothing.
    """

    tail: TailName = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.tail, str | None) or self.tail not in (None, "auto", *TAILS):
            raise GenAttnError(f"tail must be None or one of auto, {', '.join(TAILS)}, got {self.tail!r}")
        if self.tail in TAILS and self.hides_on_purpose:
            raise GenAttnError(
                f"tail={self.tail!r} stands in for keys that dense attention sees, but a causal axis hides them on purpose; "
                "use tail=None"
            )

    @abstractmethod
    def rule(self, layout: TokenLayout) -> ElementRule:
        """The definition: which query token sees which key token of `layout`."""

    @abstractmethod
    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """The block plan, from geometry, without an S x S tensor. Called through `plan`, which caches."""

    def for_layer(self, layer: int, num_layers: int) -> "Pattern":
        """The pattern of one layer, 0 <= layer < num_layers in execution order; itself unless layers differ."""
        return self

    def for_step(self, step: int = -1, fraction: float | None = None) -> "Pattern":
        """The pattern of one sampling step; itself unless steps differ.

        step: 0 at pure noise, -1 when unknown. fraction: of the run, in [0, 1), None when unknown.
        """
        return self

    def for_heads(self, first: int, count: int) -> "Pattern":
        """The pattern of heads first .. first + count - 1, where processes share the heads; itself unless heads differ."""
        return self

    @property
    def needs_tensors(self) -> bool:
        """Whether the plan depends on queries and keys: `plan_for` then, not `plan`."""
        return False

    @property
    def hides_on_purpose(self) -> bool:
        """Whether skipped keys must stay unseen, because the pattern is causal."""
        return False

    @property
    def lowers_logits(self) -> bool:
        """Whether its plans change logits, so that no pattern of several parts can take it apart."""
        return False

    @property
    def measured_tail(self) -> TailName:
        """The tail with which clips came out nearest to dense on dense models; None where keys are hidden on purpose."""
        return None if self.hides_on_purpose else "mean2"

    def with_tail(self, tail: TailName) -> "Pattern":
        """This pattern with another tail."""
        return replace(self, tail=tail)

    def with_measured_tail(self) -> "Pattern":
        """This pattern with its measured tail in the place of "auto"."""
        if self.tail != "auto":
            return self
        return self.with_tail(None if self.measured_tail is None else _Unnamed(self.measured_tail))

    def tail_of_heads(self) -> TailName | tuple[TailName, ...]:
        """The kind of stand-in, None for none; one per head where heads differ."""
        return None if self.tail == "auto" else self.tail

    def stand_in(self, plan: Plan) -> Plan:
        """`plan` with this pattern's tail. Says once where a tail was asked for and the plan skips nothing.

        Raises GenAttnError where heads ask for different kinds.
        """
        kinds = self.tail_of_heads()
        each = kinds if isinstance(kinds, tuple) else (kinds,)
        found = sorted({kind for kind in each if kind is not None})
        if len(found) > 1:
            raise GenAttnError(f"heads must share one kind of tail or have None, got {', '.join(found)}; choose one of them")
        if not found:
            return plan.with_tail(None)
        tailed = plan.with_tail(found[0], [kind is not None for kind in each] if isinstance(kinds, tuple) else None)
        if tailed.tail is not None:
            return tailed.seen_whole([kind is not None for kind in each] * (plan.num_heads // len(each)))
        if self.tail not in ("auto", None) and not isinstance(self.tail, _Unnamed):
            self._say_no_effect()
        return tailed

    def _say_no_effect(self) -> None:
        name = type(self).__name__
        if name not in _SAID:
            _SAID.add(name)
            _LOG.warning("tail=%r has no effect: %s visits every key tile here, nothing is skipped", self.tail, name)

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
        """The plan for actual queries [B, S, H, D] and keys [B, S, Hk, D]; only content-adaptive patterns look at them.

        memory: what this attention site keeps between the calls of one run, where there is one. scale: of the scores, None for
        D ** -0.5. key_mask: bool [B, S], keys that are hidden and take no part in the choice.
        """
        return self.plan(layout, block_q, block_k)

    def check_model(self, name: str, heads: tuple[int, ...], layers: int) -> None:  # noqa: B027
        """Raise GenAttnError if this pattern was made for another model.

        name: class of the denoiser. heads: of the attentions it would act on. layers: blocks over all stacks.
        """

    def check(self, layout: TokenLayout) -> None:  # noqa: B027
        """Raise GenAttnError if this pattern cannot serve `layout`, saying the nearest legal setting."""

    def mask(self, layout: TokenLayout) -> torch.Tensor:
        """Bool [S, S], or [H, S, S] when heads differ: True where row (query) sees column (key).

        Raises GenAttnError above 16,384 tokens: the mask is for looking at and for tests, `plan` is for running.
        """
        if layout.seqlen > MASK_LIMIT:
            raise GenAttnError(
                f"mask() is for at most {MASK_LIMIT} tokens, got {layout.seqlen}; use plan(), which needs no S x S tensor"
            )
        self.check(layout)
        index = torch.arange(layout.seqlen)
        visible = self.rule(layout)(index[:, None], index[None, :])
        return visible[0] if visible.shape[0] == 1 else visible

    def plan(self, layout: TokenLayout, block_q: int = 128, block_k: int = 128) -> BlockPlan:
        """The block plan for tiles of `block_q` x `block_k` tokens; cached by pattern, layout and tile sizes."""
        sides = {"block_q": block_q, "block_k": block_k}
        block_q, block_k = (whole_number(name, side, 1, "a number of tokens >= 1") for name, side in sides.items())
        key = (self, layout, block_q, block_k)
        plan = _CACHE.get(key)
        if plan is None:
            self.check(layout)
            plan = lasting(self._stood_in)(layout, block_q, block_k)
            _CACHE.put(key, plan)
        return plan

    def _stood_in(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        return self.stand_in(self.build_plan(layout, block_q, block_k))
