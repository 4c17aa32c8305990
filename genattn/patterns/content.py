"""What all patterns share that look at queries and keys: no mask without tensors, one listing of tiles, memory along a run."""

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.element_rule import ElementRule
from genattn.patterns.pattern import Pattern, SiteMemory
from genattn.selection.seen import check_key_mask


@dataclass(frozen=True, eq=False)
class Listing:
    """Chosen pairs of tiles. listed: bool [H, NQ, NK]; tiles: int32 [N, lanes], on the device of the queries."""

    listed: torch.Tensor
    query_tiles: torch.Tensor
    key_tiles: torch.Tensor


@dataclass(frozen=True)
class ContentPattern(Pattern):
    """Base of the patterns that choose by content."""

    @property
    def needs_tensors(self) -> bool:
        """Yes."""
        return True

    @abstractmethod
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
        """The chosen pairs on tiles that are the same for all heads; GenAttnError where every head has tiles of its own.

        scale, memory, key_mask: as in `plan_for`.
        """

    @property
    def tiles_by_head(self) -> bool:
        """Whether every head has tiles of its own, so that there is no listing."""
        return False

    def rule(self, layout: TokenLayout) -> ElementRule:
        """Not defined without tensors."""
        self._needs_tensors()

    def build_plan(self, layout: TokenLayout, block_q: int, block_k: int) -> BlockPlan:
        """Not defined without tensors."""
        self._needs_tensors()

    def mask(self, layout: TokenLayout) -> torch.Tensor:
        """Not defined without tensors."""
        self._needs_tensors()

    def _needs_tensors(self) -> NoReturn:
        name = type(self).__name__
        raise GenAttnError(f"{name} looks at the queries and keys; call plan_for(query, key, layout), or attention(...)")


def check_tensors(query: torch.Tensor, key: torch.Tensor, layout: TokenLayout, key_mask: torch.Tensor | None = None) -> None:
    """Raise GenAttnError unless query [B, S, H, D], key [B, S, Hk, D] and key_mask [B, S] fit the layout and each other."""
    fits = query.ndim == key.ndim == 4 and query.shape[1] == key.shape[1] == layout.seqlen
    if not fits or query.shape[2] % key.shape[2] or query.shape[3] != key.shape[3]:
        raise GenAttnError(
            f"query and key must be [B, {layout.seqlen}, H, D] with H a multiple of key heads, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    check_key_mask(key_mask, key)


def kept_choice(memory: SiteMemory | None, key: Hashable, refresh_every: int, share_passes: bool) -> Any:
    """The plan or listing that was chosen for `key` at most `refresh_every - 1` steps ago, None where a new choice is due.

    A pass may take over the plan of another pass only where `share_passes` says so.
    """
    if memory is None or memory.step < 0:
        return None
    if memory.pass_name is None and not share_passes and refresh_every == 1:
        return None  # which pass this is nobody tells: another one may have come before it in this step
    found = memory.kept.get(_slot(key, memory, share_passes))
    if found is None:
        return None
    step, choice = found
    return choice if 0 <= memory.step - step < refresh_every else None


def keep_choice(memory: SiteMemory | None, key: Hashable, choice: object, share_passes: bool) -> None:
    """Remember what was chosen at this step."""
    if memory is not None and memory.step >= 0:
        memory.kept[_slot(key, memory, share_passes)] = memory.step, choice


def _slot(key: Hashable, memory: SiteMemory, share_passes: bool) -> Hashable:
    return "choice", key, None if share_passes else memory.pass_name
