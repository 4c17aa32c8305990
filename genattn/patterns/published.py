"""Published selection rules under their names, made of the parts of `AdaptivePattern`.

    sol()      Sol-Attn    runs of 64, a tile is exact where its mean score is tau deviations above the row's mean
    sparge()   SpargeAttn  128 queries x 64 keys, top-p mass, tiles unlike themselves kept
    svg2()     SVG2        k-means clusters per head, top-p mass between centres weighted by their sizes

Each reproduces which tiles are chosen, at batch 1; what stands in for the others is the pattern's `tail`. Text is always kept
here, where the releases leave it to the caller (Sol-Attn's sink range). Which model, steps and layers stay dense is a matter of
the schedule.
"""

from typing import Any

from genattn.errors import GenAttnError
from genattn.patterns.adaptive import AdaptivePattern
from genattn.selection.estimate import PooledScore
from genattn.selection.guards import Similarity
from genattn.selection.rules import Threshold, TopP
from genattn.selection.tiling import Clusters, Runs


def sol(tau: float = 1.0, variance: str = "diag", **settings: Any) -> AdaptivePattern:
    """Sol-Attn, "Accelerating Video Generation Inference via On-the-Fly Attention Sparsification" (arXiv 2607.24027).

    Read: the release, NVlabs/Sana branch sol-engine, techniques/sparse_backends/sol_attn, `triton_ref/fwd.py` (routing inside
    the online softmax) and `mps/preprocess.py` (thresholds). With s the scale, qbar_i and kbar_j means over runs of 64 tokens:

        exact_ij  <=>  s qbar_i . kbar_j > mu_i + tau sqrt(max(var_i, 0) + eps)   or  |i - j| <= 1   or  j a sink
        mu_i = s qbar_i . mean_j kbar_j
        var_i = s^2 sum_d qbar_id^2 var_j(kbar_jd)          "diag", its default
              = s^2 qbar_i^T E_j[kbar_j kbar_j^T] qbar_i - mu_i^2     "exact", the variance of the row's scores

    (eps is 1e-6 in units of bits squared). The mark is a quantile of the row, not a distance from the running maximum. Skipped
    tiles are stood in for by their mean key and value, n_j times: tail="mean" here. tau: 1.0 is the release's default, ComfyUI
    and Wan2GP start at 1.3.
    """
    return AdaptivePattern(
        Threshold(tau, variance),  # type: ignore[arg-type]
        PooledScore(levels=0),
        Runs((64, 64)),
        neighbours=1,
        **{"tail": "mean", **settings},
    )


def sparge(mass: float = 0.98, similarity: float = 0.6, **settings: Any) -> AdaptivePattern:
    """SpargeAttn (Zhang et al., ICML 2025, arXiv 2502.18137, section 3.3).

    Read: thu-ml/SpargeAttn, spas_sage_attn/utils.py, `get_block_map_meansim`, and the defaults of
    `spas_sage2_attn_meansim_cuda` (0.6, 0.98, smoothed keys, blocks of 128 queries and 64 keys). With P the softmax over the
    mean scores of the key blocks that are like themselves:

        like(X) <=> mean over all pairs of tokens of X of their cosine > similarity          keys less their overall mean
        M_ij = 1  if not like(Q_i) or not like(K_j),  or j among the first c_i of row i of P, largest first,
        c_i = max(1, the number of partial sums of that order that are <= mass)

    Its second stage, which skips products inside the kernel, is not a choice of tiles and not part of this.
    """
    guard = Similarity(similarity, of="pairs", centred=True, queries=True, shut=True)
    return AdaptivePattern(TopP(mass, reach=False), PooledScore(0, weighted=False), Runs((128, 64)), guard, **settings)


def svg2(
    mass: float = 0.9,
    least: float = 0.1,
    query_clusters: int = 100,
    key_clusters: int = 500,
    iterations: int = 50,
    step_iterations: int = 2,
    **settings: Any,
) -> AdaptivePattern:
    """Sparse VideoGen 2 (Yang et al., NeurIPS 2025, arXiv 2505.18875, sections 4.1 and 4.2).

    Read: svg-project/Sparse-VideoGen, `WanAttn_SAPAttn_Processor` in svg/models/wan/attention.py, `identify_dynamic_map` and
    `batch_kmeans_Euclid` in svg/kmeans_utils.py, scripts/wan. With centres c of queries and keys and n_j keys in cluster j:

        P_ij = n_j exp(cq_i . ck_j / sqrt(D)) / sum_j (...)
        kept: the largest P_i first, while the sum of those before is <= mass, and the first int(least KC) in any case

    K-means is Euclidean, 50 iterations at first and 2 from the last centres at each later step. The release starts from random
    tokens, we from evenly spaced ones. The paper has 100 query and 500 key clusters at 720p, its scripts also 100 and 100.
    """
    tiles = Clusters(query_clusters, key_clusters, iterations, step_iterations, sample=1)
    return AdaptivePattern(TopP(mass, least), PooledScore(0), tiles, **settings)


PUBLISHED = {"sol": sol, "sparge": sparge, "svg2": svg2}


def published(name: str, **settings: Any) -> AdaptivePattern:
    """The preset called `name`. Raises GenAttnError that lists the names, or for a setting it does not have."""
    if name not in PUBLISHED:
        raise GenAttnError(f"a published selection must be one of {', '.join(PUBLISHED)}, got {name!r}")
    try:
        return PUBLISHED[name](**settings)  # type: ignore[operator]
    except TypeError as error:
        raise GenAttnError(f"settings of {name}: {error}") from None
