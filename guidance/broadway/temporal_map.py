"""The arithmetic of BroadWay on frame-to-frame maps: energy, self-guidance, Fourier motion enhancement, the floor of beta.

    E1 = energy(A);  A2 = A + alpha (A_anchor - A);  A3 = A2 + (beta - 1) high(A2);  beta raised until E3 >= E1

BroadWay, also called ByTheWay (Bu et al., CVPR 2025): energy eq. 4, self-guidance eq. 3, enhancement eq. 6, floor eq. 7.
A map is a tensor of rows [..., F] that sum to 1 over the key frames. `high` keeps the bins of the row's discrete Fourier
transform near the Nyquist frequency; it is an orthogonal projection, so it is one F x F matrix and needs no transform.

Everything the edit does is linear in a few basis maps, and every number it needs is in their Gram matrix:

    A3 = A + alpha D + g high(A) + g alpha high(D),   D = A_anchor - A,   g = beta - 1

so rows may come in chunks: accumulate the Gram matrix and the outputs of each basis map, then solve for alpha and beta once.
`published_edit` is the definition, in float64 and with the transform.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import torch

from genattn.errors import GenAttnError
from genattn.kernels.plan.lasting import lasting
from genattn.settings import flag, number

BETA_LIMIT = 100.0
AUTO_DISPARITY = 0.5


@dataclass(frozen=True)
class MapEdit:
    """What is done to a map.

    Attributes:
        alpha: share of the anchor map, in [0, 1]; "auto" takes as much as brings the relative disparity to `AUTO_DISPARITY`.
        beta: factor of the high band, in [0, 100]; "auto" is the smallest factor, at least 1, that keeps the energy.
        tau: half-width of the high band around the Nyquist frequency, in bins of a clip of `tau_frames` frames.
        tau_frames: the clip length that tau is counted at, >= 2; the band scales with the frames. None: bins as they are.
        energy: wanted relative change of the energy (0.2 for 20 % more), in (-1, 10]; replaces beta.
        keep_energy: raise beta where the energy would fall; needed off for beta < 1.
    """

    alpha: float | Literal["auto"] = 0.6
    beta: float | Literal["auto"] = 1.5
    tau: float = 7.0
    tau_frames: int | None = 16
    energy: float | None = None
    keep_energy: bool = True

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not _between(self.alpha, 0.0, 1.0):
            raise GenAttnError(f"alpha must be in [0, 1] or 'auto', got {self.alpha!r}; 0 leaves self-guidance out")
        if self.beta != "auto" and not _between(self.beta, 0.0, BETA_LIMIT):
            raise GenAttnError(f"beta must be in [0, {BETA_LIMIT:g}] or 'auto', got {self.beta!r}; 1 leaves enhancement out")
        if self.tau_frames is not None and (not isinstance(self.tau_frames, int) or self.tau_frames < 2):
            raise GenAttnError(f"tau_frames must be an integer >= 2 or None, got {self.tau_frames!r}; the paper's is 16")
        limit = float("inf") if self.tau_frames is None else self.tau_frames / 2
        if not _between(self.tau, 0.0, limit):
            raise GenAttnError(
                f"tau must be in [0, {limit:g}] for tau_frames={self.tau_frames}, got {self.tau!r}; the paper's is 7"
            )
        if self.energy is not None and not (_between(self.energy, -1.0, 10.0) and self.energy > -1.0):
            raise GenAttnError(f"energy must be in (-1, 10], got {self.energy!r}; '+20%' or 0.2 asks for a fifth more")
        flag("keep_energy", self.keep_energy)
        if self.energy is None and self.keep_energy and self.beta != "auto" and self.beta < 1.0:
            raise GenAttnError(
                f"beta must be >= 1 while keep_energy is on, got {self.beta}; pass keep_energy=False to calm motion"
            )


@dataclass(frozen=True)
class EditScalars:
    """The numbers of one edit, each a 0-dim float32 tensor on the map's device; nothing here waits for the device.

    Attributes:
        alpha, beta: what was used.
        e1, e2, e3: energy before, after self-guidance, after enhancement, in [0, inf); 1/F is a uniform map.
        disparity: root mean square distance between the rows of the map and of its anchor, 0 without an anchor.
    """

    alpha: torch.Tensor
    beta: torch.Tensor
    e1: torch.Tensor
    e2: torch.Tensor
    e3: torch.Tensor
    disparity: torch.Tensor

    @property
    def coefficients(self) -> tuple[torch.Tensor, ...]:
        """Weights of the four basis maps: map, difference to the anchor, and the high bands of both."""
        gain = self.beta - 1.0
        return torch.ones_like(gain), self.alpha, gain, gain * self.alpha


def mean_scalars(parts: list[EditScalars]) -> EditScalars:
    """One set of numbers for the samples of a batch."""
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(EditScalars)]
    return EditScalars(**{name: torch.stack([getattr(part, name) for part in parts]).mean() for name in names})


@dataclass(frozen=True)
class Energies:
    """What beta is solved from, each a 0-dim tensor, mean per row over the conditional rows.

    Attributes:
        e1, e2: energy before and after self-guidance.
        mixed, high: product of the self-guided map with its high band, and of the high band with itself.
        disparity2: squared distance to the anchor.
    """

    e1: torch.Tensor
    e2: torch.Tensor
    mixed: torch.Tensor
    high: torch.Tensor
    disparity2: torch.Tensor


def high_bins(frames: int, tau: float, tau_frames: int | None = 16) -> tuple[int, ...]:
    """Bins of the high band: k >= 1 with min(k, F - k) >= F/2 - tau', tau' = tau F / tau_frames.

    Equal to the published c - tau .. c + tau for F = 16; symmetric for odd F, never the constant bin, never empty.

    Args:
        frames: F >= 2.
        tau: half-width of the band in bins of a clip of `tau_frames` frames, >= 0.
        tau_frames: None takes tau in bins of this clip.

    Example:
        >>> high_bins(9, 4.0)
        (3, 4, 5, 6)

    Raises:
        GenAttnError: for fewer than two frames.
    """
    if frames < 2:
        raise GenAttnError(f"a frame-to-frame map needs at least 2 frames, got {frames}; generate a clip, not a still")
    width = tau if tau_frames is None else tau * frames / tau_frames
    edge = min(frames / 2 - width, frames // 2)
    return tuple(k for k in range(1, frames) if min(k, frames - k) >= edge - 1e-9)


@lru_cache(maxsize=64)
@lasting
def band_projection(frames: int, tau: float, tau_frames: int | None = 16) -> torch.Tensor:
    """The high band as a matrix: float64 [F, F], symmetric, circulant, idempotent; rows sum to 0. high(A) = A @ P."""
    bins = torch.tensor(high_bins(frames, tau, tau_frames), dtype=torch.float64)
    shift = torch.arange(frames, dtype=torch.float64)
    phase = 2 * torch.pi * bins[:, None, None] * (shift[:, None] - shift[None, :]) / frames
    return phase.cos().sum(0) / frames


def energy(rows: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the sum of squares over key frames (eq. 4): [..., F] -> 0-dim.

    >>> energy(torch.full((4, 4), 0.25)).item(), energy(torch.eye(4)).item()
    (0.25, 1.0)
    """
    return rows.square().sum(-1).mean()


def basis_maps(
    rows: torch.Tensor, anchor: torch.Tensor | None, projection: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """The maps an edit is made of: float32 [K, ..., F], K = 4 (see `EditScalars.coefficients`), or 2 without an anchor.

    Args:
        rows: the map, [..., F], rows sum to 1.
        anchor: the anchor's map, broadcastable to `rows`; None where there is none.
        projection: `band_projection`, [F, F].
        visible: bool, broadcastable to `rows`: key frames that a row can see at all. What it cannot see stays 0: the anchor
            is renormalised over what is visible, and the high band is cut to it and made to sum to 0 again.
    """
    rows = rows.float()
    parts = [rows]
    if anchor is not None:
        target = anchor.float().expand_as(rows)
        if visible is not None:
            target = target * visible
            total = target.sum(-1, keepdim=True)
            target = torch.where(total > 0, target / total.clamp_min(torch.finfo(torch.float32).tiny), rows)
        parts.append(target - rows)
    return torch.stack(parts + [_high(part, projection, visible) for part in parts])


def gram(basis: torch.Tensor) -> torch.Tensor:
    """Sums of products of the basis maps over rows and frames: [K, ..., F] -> [4, 4], float32; divide by the rows."""
    if basis.shape[0] == 2:  # no anchor: no difference to it either
        basis = torch.stack([basis[0], torch.zeros_like(basis[0]), basis[1], torch.zeros_like(basis[1])])
    flat = basis.flatten(1)
    # products and sums, not a matmul: a user's TF32 setting must not reach these numbers
    pairs = {(i, j): (flat[i] * flat[j]).sum() for i in range(4) for j in range(i, 4)}
    return torch.stack([torch.stack([pairs[min(i, j), max(i, j)] for j in range(4)]) for i in range(4)])


def solve(mean_gram: torch.Tensor, edit: MapEdit, frames: int, beta: torch.Tensor | None = None) -> EditScalars:
    """Alpha, beta and the energies from the Gram matrix per row of the conditional rows.

    With M2 the self-guided map and H its high band, E3 = E2 + 2 g <M2, H> + g^2 <H, H> for g = beta - 1. The floor of eq. 7
    is the g where E3 = E1; for an uncut band <M2, H> = <H, H> and it is sqrt((E1 - E2_low) / E2_high), as published.

    Args:
        mean_gram: `gram` over the number of rows, [4, 4].
        edit: what is wanted.
        frames: F, the length of a row.
        beta: 0-dim; use this factor (measured on the conditional pass) instead of measuring one.
    """
    g = mean_gram.float()
    alpha = anchor_share(edit, g[0, 0] + 2 * g[0, 1] + g[1, 1], g[1, 1], frames)
    energies = Energies(
        e1=g[0, 0],
        e2=g[0, 0] + 2 * alpha * g[0, 1] + alpha**2 * g[1, 1],
        mixed=g[0, 2] + alpha * (g[0, 3] + g[1, 2]) + alpha**2 * g[1, 3],
        high=g[2, 2] + 2 * alpha * g[2, 3] + alpha**2 * g[3, 3],
        disparity2=g[1, 1],
    )
    return solve_energies(energies, edit, alpha, beta)


def solve_energies(energies: Energies, edit: MapEdit, alpha: torch.Tensor, beta: torch.Tensor | None = None) -> EditScalars:
    """As `solve`, from the energies themselves."""
    if beta is None:
        beta = _beta(edit, energies)
    gain = beta - 1.0
    e3 = energies.e2 + 2 * gain * energies.mixed + gain**2 * energies.high
    return EditScalars(alpha, beta, energies.e1, energies.e2, e3, energies.disparity2.clamp_min(0).sqrt())


def anchor_share(edit: MapEdit, anchor_energy: torch.Tensor, disparity2: torch.Tensor, frames: int) -> torch.Tensor:
    """Alpha, 0-dim. "auto": as much of the anchor as brings |A - anchor| down to AUTO_DISPARITY of the anchor's own motion.

    Args:
        edit: says alpha; anchor_energy: energy of the anchor's rows; disparity2: squared distance to it, per row;
        frames: F. The anchor's motion is its distance from the uniform map, sqrt(anchor_energy - 1 / F).
    """
    if edit.alpha != "auto":
        # nothing is taken where there is no anchor, or no difference to it
        return torch.where(disparity2 > 0, edit.alpha, torch.zeros_like(disparity2))
    motion = (anchor_energy - 1.0 / frames).clamp_min(1e-12)
    relative = (disparity2.clamp_min(0) / motion).sqrt()
    return (1.0 - AUTO_DISPARITY / relative.clamp_min(1e-6)).clamp(0.0, 1.0)


def combine(basis: torch.Tensor, scalars: EditScalars) -> torch.Tensor:
    """The edited map: [K, ..., F] -> [..., F], float32."""
    weights = scalars.coefficients if basis.shape[0] == 4 else scalars.coefficients[::2]
    edited = basis[0].clone()
    for weight, part in zip(weights[1:], basis[1:], strict=True):
        edited += weight * part
    return edited


def edit_map(
    rows: torch.Tensor,
    anchor: torch.Tensor | None,
    edit: MapEdit,
    conditional: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, EditScalars]:
    """Edit a whole map at once.

    Args:
        rows: [N, ..., F], rows sum to 1.
        anchor: broadcastable to `rows`, or None.
        edit: what to do.
        conditional: int64 [n], entries of the first axis on which energies are measured; None for all.
        beta: 0-dim; use this factor instead of measuring one.

    Returns:
        The edited map, float32 like `rows`, and the numbers.
    """
    frames = rows.shape[-1]
    projection = band_projection(frames, edit.tau, edit.tau_frames).to(rows.device)
    basis = basis_maps(rows, anchor, projection)
    measured = basis if conditional is None else basis.index_select(1, conditional)
    scalars = solve(gram(measured) / (measured[0].numel() // frames), edit, frames, beta)
    return combine(basis, scalars), scalars


def resize_anchor(anchor: torch.Tensor, places: tuple[int, int], new_places: tuple[int, int], heads: int) -> torch.Tensor:
    """Bring an anchor map to another resolution and head count.

    Args:
        anchor: [B * h * w, H, F, F], places in raster order.
        places: (h, w) of the anchor.
        new_places: (h, w) wanted; bilinear between places, so that rows still sum to 1.
        heads: heads wanted; where they differ every head gets the mean over the anchor's heads.

    Returns:
        [B * h' * w', heads, F, F].
    """
    if anchor.shape[1] != heads:
        anchor = anchor.mean(1, keepdim=True).expand(-1, heads, -1, -1)
    if places == new_places:
        return anchor
    frames = anchor.shape[-1]
    planes = anchor.reshape(-1, *places, heads * frames * frames).permute(0, 3, 1, 2)
    planes = torch.nn.functional.interpolate(planes, size=new_places, mode="bilinear", align_corners=False)
    return planes.permute(0, 2, 3, 1).reshape(-1, heads, frames, frames)


def published_edit(
    rows: torch.Tensor, anchor: torch.Tensor | None, alpha: float, beta: float, tau: int, conditional: slice = slice(None)
) -> tuple[torch.Tensor, dict[str, float]]:
    """The definition, as published, in float64 and with the transform; slow, for tests and for reading.

    The band is c - tau .. c + tau, c = F // 2, tau in bins of this clip.

    Args:
        rows: [N, ..., F]; anchor: the same shape or None; alpha, beta, tau: numbers; conditional: slice of the first axis.

    Returns:
        The edited map and {"e1", "e2", "e3", "beta"}.

    Raises:
        GenAttnError: where the published band would take in the constant bin.
    """
    frames = rows.shape[-1]
    band = [k for k in range(frames) if abs(k - frames // 2) <= tau]
    if 0 in band or len(band) != 2 * tau + 1:
        raise GenAttnError(f"the published band needs at least 2 tau + 2 = {2 * tau + 2} frames, got {frames}; use edit_map")
    rows = rows.double()
    e1 = rows[conditional].square().sum(-1).mean()
    if anchor is not None:
        rows = rows + alpha * (anchor.double() - rows)
    spectrum = torch.fft.fft(rows, dim=-1)
    power = spectrum[conditional].abs().square() / frames
    e2_high = power[..., band].sum(-1).mean()
    e2 = power.sum(-1).mean()
    floor = float(((e1 - (e2 - e2_high)).clamp_min(0) / e2_high).sqrt())
    used = max(beta, floor)
    spectrum[..., band] *= used
    edited = torch.fft.ifft(spectrum, dim=-1).real
    edited = edited / edited.sum(-1, keepdim=True)
    e3 = edited[conditional].square().sum(-1).mean()
    return edited, {"e1": float(e1), "e2": float(e2), "e3": float(e3), "beta": used}


def parse_energy(energy: str | float | None) -> float | None:
    """`"+20%"`, `"-15 %"` or a number to the relative change of the energy.

    Raises:
        GenAttnError: for anything else.
    """
    if energy is None:
        return None
    if not isinstance(energy, str):
        return number("energy", energy, -1.0, 10.0, "a percentage like '+20%' or a number like 0.2, in (-1, 10]", above=True)
    text = energy.replace(" ", "")
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise GenAttnError(f"energy must be a percentage like '+20%' or a number like 0.2, got {energy!r}") from None


def _high(rows: torch.Tensor, projection: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    high = rows.double() @ projection if rows.device.type == "cpu" else rows @ projection.float()
    high = high.float()
    if visible is None:
        return high
    high = high * visible
    return high - visible * (high.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp_min(1))


def _beta(edit: MapEdit, energies: Energies) -> torch.Tensor:
    """The factor of the high band; where the band is empty no factor changes anything and 1 is kept."""
    e1, e2, mixed, high = energies.e1, energies.e2, energies.mixed, energies.high
    wanted = e1 if edit.energy is None else e1 * (1.0 + edit.energy)
    some = high > 1e-9 * e2
    safe = torch.where(some, high, torch.ones_like(high))
    root = (mixed.square() + safe * (wanted - e2)).clamp_min(0).sqrt()
    reaching = torch.where(some, 1.0 + (root - mixed) / safe, torch.ones_like(high))
    if edit.energy is not None:
        return reaching.clamp(0.0, BETA_LIMIT)
    asked = torch.ones_like(high) * (1.0 if edit.beta == "auto" else edit.beta)
    return torch.maximum(asked, reaching.clamp_max(BETA_LIMIT)) if edit.keep_energy else asked


def _between(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
