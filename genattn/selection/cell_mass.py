"""How much of its attention a cell of queries gives to each cell of keys, and what skipping cells would change: exactly, for a
few queries per cell.

    mass_ij = mean over sampled queries q of cell i of  sum_{k in cell j} softmax(q.k)
    loss_ij = the same with each term times the standard deviation of the scores inside cell j

The loss is what standing in for cell j would cost to first order (see `ErrorAware`). Text keys take part in the softmax, so
what goes to text is no cell's. Only a slab of the scores is there at a time.
"""

import torch

from genattn.kernels.plan.exact import exact
from genattn.selection.seen import without_hidden

_SCORES_AT_ONCE = 1 << 24


@exact
def cell_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    cells: torch.Tensor,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    samples: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mass, loss), float64 [H, N, N], averaged over the batch.

    query [B, S, H, D], key [B, Sk, Hk, D]; cells int [N, lanes] of token indices, -1 unused; key_mask bool [B, Sk]. samples:
    queries per cell, evenly spaced over its tokens.
    """
    batch, _, heads, dim = query.shape
    scale, key = dim**-0.5 if scale is None else scale, without_hidden(key, key_mask)
    chosen = sampled(cells, samples)
    some = chosen.shape[1]
    keys = key.float().repeat_interleave(heads // key.shape[2], dim=2).permute(0, 2, 3, 1)
    step = max(1, _SCORES_AT_ONCE // max(1, batch * heads * some * key.shape[1]))
    mass, loss = [], []
    for part in chosen.split(step):
        rows = query[:, part.flatten()].float().transpose(1, 2)
        scores = (rows @ keys) * scale
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
        given, spread = _by_cell(scores, cells)
        mass.append(given.unflatten(2, part.shape).mean((0, 3)).double())
        loss.append((given * spread).unflatten(2, part.shape).mean((0, 3)).double())
    return torch.cat(mass, 1), torch.cat(loss, 1)


def _by_cell(scores: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax mass per cell and standard deviation of its visible scores, [B, H, R, N] each, of scores [B, H, R, S]."""
    lanes = cells.long().clamp_min(0).flatten()
    inside = scores[..., lanes].unflatten(-1, cells.shape)
    used = (cells >= 0) & (inside != -torch.inf)  # NaN stays, so that it is seen
    norm = scores.logsumexp(-1)[..., None, None]
    given = (inside - norm).exp().masked_fill(~used, 0.0).sum(-1)
    number = used.sum(-1).clamp_min(1)
    finite = inside.masked_fill(~used, 0.0)
    mean = finite.sum(-1) / number
    apart = (finite - mean[..., None]).square().masked_fill(~used, 0.0)
    return given, (apart.sum(-1) / number).sqrt()


def sampled(cells: torch.Tensor, samples: int) -> torch.Tensor:
    """Int64 [N, samples or fewer]: tokens evenly spaced over each cell."""
    count = (cells >= 0).sum(1)
    some = min(samples, int(count.max()))
    spot = (2 * torch.arange(some, device=cells.device) + 1) * count[:, None] // (2 * some)
    return cells.long().gather(1, spot)


@exact
def share_errors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cells: torch.Tensor,
    kept: torch.Tensor,
    tail: bool,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    samples: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(squared error of the output [C, H], squared output [H]), float64, summed over sampled queries and the batch.

    kept: bool [C, H, N, N], C choices of cells per query cell. tail: whether the mean key and value of a skipped cell stand in
    for it, as often as it has visible keys; else it is dropped. Keys outside the cells (text) are always seen.
    """
    batch, _, heads, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    key, value = without_hidden(key, key_mask), without_hidden(value, key_mask)
    chosen, index = sampled(cells, samples), cells.long().clamp_min(0)
    repeats = heads // key.shape[2]
    keys, values = (x.float().repeat_interleave(repeats, dim=2).transpose(1, 2) for x in (key, value))
    visible = torch.ones(batch, key.shape[1], dtype=torch.bool, device=key.device) if key_mask is None else key_mask
    used = (cells >= 0) & visible[:, index]  # [B, N, lanes]
    count = used.sum(-1)[:, None].float()  # [B, 1, N]
    by_cell_v = values[:, :, index] * used[:, None, ..., None]
    mean_k = (keys[:, :, index] * used[:, None, ..., None]).sum(3) / count.clamp_min(1)[..., None]
    mean_v = by_cell_v.sum(3) / count.clamp_min(1)[..., None]
    other = visible.clone()
    other[:, index[cells >= 0]] = False
    error = torch.zeros(kept.shape[0], heads, dtype=torch.float64, device=query.device)
    power = torch.zeros(heads, dtype=torch.float64, device=query.device)
    step = max(1, _SCORES_AT_ONCE // max(1, batch * heads * chosen.shape[1] * max(key.shape[1], cells.shape[0] * dim)))
    for first in range(0, chosen.shape[0], step):
        part = chosen[first : first + step]
        rows = query[:, part.flatten()].float().transpose(1, 2) * scale
        scores = (rows @ keys.transpose(-1, -2)).masked_fill(~visible[:, None, None], -torch.inf)
        weight = (scores - scores.amax(-1, keepdim=True)).exp()
        each = weight[..., index.flatten()].unflatten(-1, index.shape) * used[:, None, None]
        num, den = torch.einsum("bhrnl,bhnld->bhrnd", each, by_cell_v), each.sum(-1)
        rest = weight * other[:, None, None]
        base_num, base_den = rest @ values, rest.sum(-1)
        whole = (base_num + num.sum(3)) / (base_den + den.sum(-1))[..., None]
        pseudo = (rows @ mean_k.transpose(-1, -2) - scores.amax(-1, keepdim=True)).exp() * count[:, :, None]
        power += whole.square().sum((0, 2, 3)).double()
        for number, cell in enumerate(kept):
            seen = cell[:, first : first + step].repeat_interleave(part.shape[1], dim=1)[None].float()
            top, bottom = base_num + (num * seen[..., None]).sum(3), base_den + (den * seen).sum(-1)
            if tail:
                stood = pseudo * (1 - seen)
                top, bottom = top + stood @ mean_v, bottom + stood.sum(-1)
            apart = top / bottom.clamp_min(1e-30)[..., None] - whole
            error[number] += apart.square().sum((0, 2, 3)).double()
    return error, power
