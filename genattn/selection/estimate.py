"""The estimate of an attention map, tile by tile, that every rule chooses from.

    score_ij = scale qbar_i . kbar_j                     mean query of tile i, mean key of tile j
    looked at closer: kbar over halves, quarters, ...    score_ij = log mean_p exp(scale qbar_i . kbar_jp)
    mass_ij  = n_j e^score_ij / sum_j n_j e^score_ij     over the tiles that may be chosen
    spread_ij^2 = scale^2 qbar_i^2 . var(k_j)            variance of the scores inside tile j, or inside its halves of like
                                                         keys, channels taken as independent

Pooling tiles to their mean is SpargeAttn's selector (Zhang et al., arXiv 2502.18137, section 3.3); looking closer is HiP's (Lee
et al., arXiv 2406.09827), here at all tiles, because one product over pieces costs less than sorting out the promising ones.
"""

from dataclasses import dataclass

import torch

from genattn.errors import GenAttnError
from genattn.selection.pooling import lanes_used, tile_means, tile_variances
from genattn.settings import flag, whole_number


@dataclass(frozen=True)
class PooledScore:
    """How tiles are scored. levels: how often key tiles are halved, 0 to 8. weighted: whether a tile counts by its tokens.

    A tile of 128 keys at levels=2 is described by four means. Without weights a half-filled tile counts like a full one.
    """

    levels: int = 2
    weighted: bool = True

    def __post_init__(self) -> None:
        levels = whole_number("levels", self.levels, 0, "a whole number between 0 and 8; 2 is usual", most=8)
        object.__setattr__(self, "levels", levels)
        flag("weighted", self.weighted)


@dataclass(frozen=True, eq=False)
class Estimate:
    """query: mean queries [B, H, NQ, D], times the scale. key: mean keys [B, H, NK, D]. score: [B, H, NQ, NK].

    mass: [H, NQ, NK], averaged over the batch, summing to 1 over NK. variance: [B, H, NK, D] of the keys inside a tile or its
    halves, or None where no rule needs it. open: bool [1 or H, NQ, NK], the tiles that may be chosen. counted: of how many key
    tiles a share is taken, None for all.
    """

    query: torch.Tensor
    key: torch.Tensor
    score: torch.Tensor
    mass: torch.Tensor
    open: torch.Tensor
    variance: torch.Tensor | None = None
    counted: int | None = None

    @property
    def spread(self) -> torch.Tensor:
        """Standard deviation of the scores inside each tile, [H, NQ, NK], averaged over the batch."""
        if self.variance is None:
            raise GenAttnError("the spread needs the variance of the keys, got an estimate without; build it with spread=True")
        return (self.query.square() @ self.variance.transpose(-1, -2)).clamp_min(0).sqrt().mean(0)


def estimate(
    query: torch.Tensor,
    key: torch.Tensor,
    query_tiles: torch.Tensor,
    key_tiles: torch.Tensor,
    settings: PooledScore,
    scale: float | None = None,
    open: torch.Tensor | None = None,
    spread: bool = False,
    counted: int | None = None,
    halves: bool = False,
) -> Estimate:
    """The estimate for query [B, S, H, D] and key [B, S, Hk, D]; tiles int [N, lanes], -1 unused.

    open: bool [1 or H, NQ, NK], which tiles may be chosen; None: those that hold a token. spread: whether a rule needs it;
    halves: of which tiles it is the spread, those of two means of like keys or whole ones. counted: see Estimate.
    """
    repeats = query.shape[2] // key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mean_q = tile_means(query, query_tiles)[..., 0, :] * scale
    mean_k = tile_means(key, key_tiles)[..., 0, :].repeat_interleave(repeats, dim=1)
    score = _scores(mean_q, mean_k, key, key_tiles, settings.levels, repeats)
    count = lanes_used(key_tiles)[:, 0]
    allowed = (count > 0)[None, None] if open is None else open & (count > 0)
    variance = tile_variances(key, key_tiles, halves).repeat_interleave(repeats, dim=1) if spread else None
    weight = count if settings.weighted else None
    return Estimate(mean_q, mean_k, score, mass_of(score, allowed, weight), allowed, variance, counted)


def mass_of(score: torch.Tensor, open: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
    """Softmax mass [H, NQ, NK] of scores [B, H, NQ, NK] over the open tiles, averaged over the batch; zero elsewhere.

    count: tokens per key tile, [NK] or [H, 1, NK]; None counts every tile once.
    """
    logits = score if count is None else score + count.clamp_min(1).to(score.dtype).log()
    shut = ~open.expand(score.shape[1:])
    empty = shut.all(-1, keepdim=True)
    return logits.masked_fill(shut, -torch.inf).masked_fill(empty, 0.0).softmax(-1).masked_fill(shut, 0.0).mean(0)


def _scores(
    mean_q: torch.Tensor, mean_k: torch.Tensor, key: torch.Tensor, tiles: torch.Tensor, levels: int, repeats: int
) -> torch.Tensor:
    if not levels:
        return mean_q @ mean_k.transpose(-1, -2)
    parts = min(2**levels, tiles.shape[1])
    pieces = tile_means(key, tiles, parts).repeat_interleave(repeats, dim=1)
    used = lanes_used(tiles, parts) > 0
    scores = []
    for head in range(mean_q.shape[1]):  # one head at a time: parts times the size of the result
        fine = (mean_q[:, head] @ pieces[:, head].flatten(1, 2).transpose(-1, -2)).unflatten(-1, used.shape)
        fine = fine.masked_fill(~used, -torch.inf)
        scores.append(fine.logsumexp(-1) - used.sum(-1).clamp_min(1).to(fine.dtype).log())
    return torch.stack(scores, dim=1)
