"""A fade without any factor in a kernel: every key stands in the sequence twice, once as it is and once lowered.

    keys        k0 k1 ... k(S-1)   f k0  f k1 ... f k(S-1)          a factor on a key is a factor on its logits
    key tiles   0  1  ... NK - 1   NK    NK + 1 ... 2 NK - 1        a list names j, or NK + j for a pair that is outside

The lists are as long as before, so are the products; only keys and values take twice their memory. The second half of the keys
has a bias of minus the penalty. For backends that choose keys by index, on which gathering a lowered key costs nothing more.
"""

from dataclasses import dataclass, replace

import torch

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule
from genattn.kernels.plan.lasting import lasting
from genattn.kernels.plan.tail import Tail, packed_bits, unpack_words
from genattn.kernels.reference.tail import TailKeys, tail_keys


@dataclass(frozen=True, eq=False)
class TwiceRule:
    """`rule` over keys that stand twice; seqlen: how many there are."""

    rule: ElementRule
    seqlen: int

    @property
    def num_heads(self) -> int:
        return self.rule.num_heads

    def __call__(self, query_index: torch.Tensor, key_index: torch.Tensor) -> torch.Tensor:
        """See ElementRule."""
        return self.rule(query_index, key_index % self.seqlen)

    def to(self, device: torch.device | str) -> "TwiceRule":
        """The same on `device`."""
        return replace(self, rule=self.rule.to(device))


@dataclass(frozen=True, eq=False)
class Keys:
    """What a call on a plan without a fade takes: key and value [B, Sk', Hk, D], key_mask bool [B, Sk'] or None, and penalty,
    float [Sk'], what is taken off the logits of each key, None for nothing. factor: what the second half of the keys is
    multiplied by, None where keys stand once."""

    plan: BlockPlan
    key: torch.Tensor
    value: torch.Tensor
    key_mask: torch.Tensor | None
    penalty: torch.Tensor | None
    factor: float | None = None


def with_keys_twice(
    plan: BlockPlan, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None, dtype: torch.dtype | None = None
) -> Keys:
    """The same call without a fade; as it is where the plan has none. Differentiable.

    dtype: of the keys that are made, default that of `key`. What stands at a key that the mask hides must be finite.
    """
    fade = plan.fade
    if fade is None:
        return Keys(plan, key, value, key_mask, None)
    key = key if dtype is None else key.to(dtype)
    mask = None if key_mask is None else torch.cat([key_mask, key_mask], 1)
    penalty = None
    if fade.penalty:
        penalty = torch.zeros(2, plan.seqlen_k, dtype=torch.promote_types(key.dtype, torch.float32), device=key.device)
        penalty[1] = fade.penalty
        penalty = penalty.flatten()
    return Keys(
        keys_twice(plan), torch.cat([key, key * fade.factor], 1), torch.cat([value, value], 1), mask, penalty, fade.factor
    )


def lowered_tail_keys(given: Keys) -> TailKeys:
    """The pseudo-keys of the plan's tail; the penalty is in their weights, each half of the keys having its own.

    They are made once, from the keys as they are, and lowered afterwards: which keys share one must not depend on the fade.
    """
    tail = given.plan.tail
    assert tail is not None
    if given.factor is None:
        return tail_keys(given.key, given.value, tail, given.key_mask)
    length = given.key.shape[1] // 2
    counted = None if tail.counted is None else tail.counted[:length]
    once = replace(tail, tokens=tail.tokens[: tail.pseudo_keys // 2], counted=counted)
    mask = None if given.key_mask is None else given.key_mask[:, :length]
    made = tail_keys(given.key[:, :length], given.value[:, :length], once, mask)
    off = 0.0 if given.penalty is None else given.penalty[-1]
    return TailKeys(
        torch.cat([made.key, made.key * given.factor], 1),
        torch.cat([made.value, made.value], 1),
        torch.cat([made.log_count, made.log_count - off], 2),
        torch.cat([made.tokens, made.tokens], 1),
        torch.cat([made.members, torch.where(made.members >= 0, made.members + length, -1)], 2),
    )


def keys_twice(plan: BlockPlan) -> BlockPlan:
    """The plan without its fade over 2 Sk keys; kept in the plan."""
    if "keys twice" not in plan.cache:
        plan.cache["keys twice"] = _build(plan)
    return plan.cache["keys twice"]  # type: ignore[return-value]


@lasting
def _build(plan: BlockPlan) -> BlockPlan:
    fade, tiles, length = plan.fade, plan.key_tiles.shape[0], plan.seqlen_k
    assert fade is not None
    row, _ = plan.entries
    outside = fade.outside(row % plan.query_tiles.shape[0], plan.columns.long())
    return replace(
        plan,
        key_tiles=_twice(plan.key_tiles, length),
        columns=plan.columns + tiles * outside.to(torch.int32),
        rule=None if plan.rule is None else TwiceRule(plan.rule, length),
        seqlen_k=2 * length,
        tail=None if plan.tail is None else _tail_twice(plan.tail, fade.table(), length),
        fade=None,
    )


def _twice(tokens: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([tokens, torch.where(tokens >= 0, tokens + length, -1)])


def _tail_twice(tail: Tail, outside: torch.Tensor, length: int) -> Tail:
    skipped = unpack_words(tail.skipped, outside.shape[1])
    counted = None if tail.counted is None else torch.cat([tail.counted, tail.counted])
    halves = packed_bits(torch.cat([skipped & ~outside, skipped & outside], -1))
    return replace(tail, tokens=_twice(tail.tokens, length), skipped=halves, counted=counted)
