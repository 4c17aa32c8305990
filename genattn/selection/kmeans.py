"""K-means per head: tokens that resemble each other become one tile, wherever on the grid they stand.

Routing Transformer (Roy et al., arXiv 2003.05997) and SVG2 (Yang et al., arXiv 2505.18875, section 4.1, and
`batch_kmeans_Euclid` of its release): Lloyd's iterations under Euclidean distance, started from centres of the step before
where there are some. Here the first start is evenly spaced tokens instead of random ones, so that equal calls give equal tiles.
"""

import torch

from genattn.errors import GenAttnError

_DISTANCES_AT_ONCE = 1 << 26


def kmeans(
    points: torch.Tensor, clusters: int, iterations: int, centres: torch.Tensor | None = None, stride: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels int64 [H, N], centres [H, clusters, D]) of points [H, N, D].

    iterations: >= 1 assignments, stopping early when no label changes. centres: where to start, [H, clusters, D]. The labels
    belong to the centres before the last update, the centres returned are the means under these labels; a centre without
    points stays where it was. stride: rounds before the last look at every stride-th point alone.

    Raises GenAttnError for more clusters than points, or fewer rounds than one.
    """
    heads, count, _ = points.shape
    if not 1 <= clusters <= count:
        raise GenAttnError(f"clusters must be between 1 and the {count} tokens there are, got {clusters}; ask for fewer")
    if iterations < 1:
        raise GenAttnError(f"iterations of k-means must be >= 1, got {iterations}")
    if centres is None or centres.shape != (heads, clusters, points.shape[2]):
        # whole numbers: the default type may be one that cannot tell neighbours apart
        spots = torch.arange(clusters, device=points.device) * (2 * count - 2) + clusters - 1
        centres = points[:, spots // max(1, 2 * clusters - 2)]
    labels = torch.full((heads, count), -1, device=points.device)
    some = points[:, ::stride].contiguous()
    for left in reversed(range(iterations)):
        looked_at = some if left else points
        found = nearest(looked_at, centres)
        if torch.equal(found, labels):
            break
        labels = found
        centres = means_by_label(looked_at, labels, centres)
    return (labels, centres) if labels.shape[1] == count else kmeans(points, clusters, 1, centres)


def nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Int64 [H, N]: the centre nearest to each point; the first between equals."""
    norm = centres.square().sum(-1)
    step = max(1, _DISTANCES_AT_ONCE // (centres.shape[0] * centres.shape[1]))
    away = centres.transpose(1, 2)
    # |p|^2 is the same for all centres; one fused product, because the distances are most of what k-means writes
    return torch.cat([torch.baddbmm(norm[:, None], some, away, alpha=-2).argmin(-1) for some in points.split(step, 1)], 1)


def means_by_label(points: torch.Tensor, labels: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """[H, C, D]: mean of the points of each label; the old centre where there are none."""
    heads, clusters, _ = centres.shape
    count = sizes(labels, clusters)
    row = (labels + clusters * torch.arange(heads, device=labels.device)[:, None]).flatten()
    # whole rows at a time: eight times faster than scatter_add with labels spread over the columns
    total = torch.zeros_like(centres).flatten(0, 1).index_add_(0, row, points.flatten(0, 1)).view_as(centres)
    return torch.where(count[..., None] > 0, total / count.clamp_min(1)[..., None], centres)


def sizes(labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Int64 [H, C]: points of each label."""
    return torch.zeros(labels.shape[0], clusters, dtype=torch.int64, device=labels.device).scatter_add_(
        1, labels, torch.ones_like(labels)
    )
