"""Content-adaptive blocks: each query tile keeps the key tiles that its pooled queries and keys point to.

The plainest case of `AdaptivePattern`: boxes of a frame, a share of the tiles, and the means of halves and quarters where one
mean would hide a strong key. Pooling tiles to their mean and picking by softmax mass is SpargeAttn's selector (Zhang et al.,
arXiv 2502.18137, section 3.3); looking closer is HiP's (Lee et al., arXiv 2406.09827).
"""

from dataclasses import dataclass

import torch

from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.plan.head_tiles import HeadTiles
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.content import ContentPattern, Listing
from genattn.patterns.pattern import SiteMemory
from genattn.selection.estimate import PooledScore
from genattn.selection.guards import Similarity
from genattn.selection.rules import TopK
from genattn.settings import number, whole_number


@dataclass(frozen=True)
class BlockTopK(ContentPattern):
    """Settings of the selector.

    keep: share of the key tiles per query tile, in (0, 1]. min_similarity: key tiles whose mean cosine to their own mean is
    below this are kept for all queries; 0 turns it off. levels: how often key tiles are halved and looked at again.
    """

    keep: float = 0.25
    min_similarity: float = 0.0
    levels: int = 2

    def __post_init__(self) -> None:
        least = number("min_similarity", self.min_similarity, 0, 1, "a cosine in [0, 1]; 0 turns it off")
        checked = {
            "keep": number("keep", self.keep, 0, 1, "a share in (0, 1]", above=True),
            "min_similarity": least,
            "levels": whole_number("levels", self.levels, 0, "a whole number between 0 and 8", most=8),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        super().__post_init__()

    @property
    def choice(self) -> AdaptivePattern:
        """The same choice in the general form."""
        guard = Similarity(self.min_similarity) if self.min_similarity else None
        return AdaptivePattern(TopK(self.keep), PooledScore(self.levels, weighted=False), guard=guard, tail=self.tail)

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
        """The plan for these queries [B, S, H, D] and keys [B, S, Hk, D]: lists per head, scores averaged over the batch.

        Raises GenAttnError if the tensors do not fit the layout.
        """
        return self.choice.plan_for(query, key, layout, block_q, block_k, memory, scale, key_mask)

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
        return self.choice.listing(query, key, layout, block_q, block_k, scale, memory, key_mask)
