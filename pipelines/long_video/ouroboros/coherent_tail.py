"""New latents that remember the last one: low frequencies from the queue's end, high frequencies from noise
(Ouroboros-Diffusion, eq. 3).

    tail = IFFT( LPF FFT(z) + HPF FFT(noise) ),      z = the last latent, taken back up to the noisiest level

The filters are FreeInit's (arXiv 2312.07537). As released, the filter's time term does not vanish for a single latent, so LPF
peaks at exp(-1/2), and HPF = 1 - LPF loses variance (std .958). The default here keeps that strength and takes HPF =
sqrt(1 - LPF^2), which brings two independent unit Gaussians back to unit variance; the released mix is `mix="published"`.

A schedule that ends in pure noise (rectified flow, zero terminal SNR) has no step back up: it would forget everything. There
z is the latent mixed with noise, at the share that the published schedule keeps with as many levels (`published_share`).

The tail is a loop: what one latent hands on, the next one has, and every step adds clean signal to it. A share k at frequency
0 piles that up to 1 / (1 - k) times itself, and a model that is told "pure noise" takes it for a picture. The released share
(at most .55) stays harmless. For a larger one z is the last latent as it stood before its step, which holds just the signal
that its level asks for; where a schedule ends in pure noise that is the noise that the model means.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.frame_noise import frame_noise

if TYPE_CHECKING:
    from genattn.pipelines.long_video.queue.fifo import Fifo

FILTERS = ("gaussian", "butterworth", "ideal")
# FreeInit's filter over a single latent: its time term, (-cutoff)^2, is there at every frequency
RELEASED_PEAK = math.exp(-1 / 2)
# what the released demo holds at frequency 0 with 64 levels: .909 exp(-1/2)
LARGEST_LATENT_SHARE = 0.552
# share of signal at the noisiest level below which a schedule counts as ending in pure noise
_SOME_SIGNAL = 1e-3


def low_pass(height: int, width: int, cutoff: float, kind: str = "gaussian") -> torch.Tensor:
    """FreeInit's low-pass filter [H, W] in [0, 1], zero frequency in the middle, where it is 1."""
    y = (2 * torch.arange(height) / height - 1).square()[:, None]
    x = (2 * torch.arange(width) / width - 1).square()[None]
    distance = y + x
    if kind == "gaussian":
        return torch.exp(-distance / (2 * cutoff**2))
    if kind == "butterworth":
        return 1 / (1 + (distance / cutoff**2) ** 4)
    return (distance <= 2 * cutoff**2).float()


def mix_frequencies(low: torch.Tensor, high: torch.Tensor, passed: torch.Tensor, keep_variance: bool) -> torch.Tensor:
    """Low frequencies of one latent, high of another, [..., H, W] each; `passed` is the low-pass filter [H, W]."""
    passed = passed.to(device=low.device, dtype=torch.float32)
    rest = (1 - passed.square()).clamp(min=0).sqrt() if keep_variance else 1 - passed
    spectrum = [torch.fft.fftshift(torch.fft.fftn(part.float(), dim=(-2, -1)), dim=(-2, -1)) for part in (low, high)]
    mixed = torch.fft.ifftshift(spectrum[0] * passed + spectrum[1] * rest, dim=(-2, -1))
    return torch.fft.ifftn(mixed, dim=(-2, -1)).real.to(low.dtype)


def published_share(num_levels: int) -> float:
    """Share of a latent that the step back to pure noise keeps on the published schedule (VideoCrafter2: scaled-linear betas
    .00085 to .012 over 1000 steps, `num_levels` of them evenly spaced): .909 for 64 levels, .68 for 16, .46 for 8."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    kept = (1 - betas).cumprod(0)
    below = round(999 * (1 - 1 / max(1, num_levels - 1)))
    return float((kept[999] / kept[below]).sqrt())


class CoherentTail:
    """The tail of a Fifo. cutoff: of the low-pass filter, in shares of the Nyquist frequency, (0, 1]. kind: "gaussian",
    "butterworth" or "ideal". mix: "variance" brings unit variance back, "published" is the released demo. keep: share of the
    last latent that the new one holds at frequency 0, [0, 1]; as released when None. Above `LARGEST_LATENT_SHARE` it is taken
    from the latent before its step."""

    def __init__(
        self,
        cutoff: float = 0.25,
        kind: Literal["gaussian", "butterworth", "ideal"] = "gaussian",
        mix: Literal["variance", "published"] = "variance",
        keep: float | None = None,
    ) -> None:
        if not 0 < cutoff <= 1:
            raise GenAttnError(f"cutoff must be above 0 and at most 1, got {cutoff}; the paper uses 0.25")
        if kind not in FILTERS:
            raise GenAttnError(f"kind must be one of {', '.join(FILTERS)}, got {kind!r}")
        if mix not in ("variance", "published"):
            raise GenAttnError(f"mix must be 'variance' or 'published', got {mix!r}")
        if keep is not None and not 0 <= keep <= 1:
            raise GenAttnError(f"keep must be 0 to 1, or None for the released share, got {keep}")
        self.cutoff, self.kind, self.mix, self.keep = cutoff, kind, mix, keep

    def _released(self, fifo: "Fifo", last: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The stepped latents `last` back at the noisiest level, by the schedule or by what the published one would keep."""
        grid, top = fifo.solver.grid, torch.tensor([fifo.solver.num_levels - 1])
        if float(grid.alpha[-1]) >= _SOME_SIGNAL:
            return grid.renoise(last, top - 1, top, noise)
        return _mixed(_unit(fifo, last, top - 1), noise, published_share(fifo.solver.num_levels))

    def _kept(self, fifo: "Fifo", last: torch.Tensor, noise: torch.Tensor, keep: float) -> torch.Tensor:
        """A given share: of the stepped latents, or, where those would pile up, of the last one before its step."""
        top = torch.tensor([fifo.solver.num_levels - 1])
        if keep <= LARGEST_LATENT_SHARE:
            return _mixed(_unit(fifo, last, top - 1), noise, keep)
        return _mixed(_unit(fifo, fifo.queue.latents[:, :, -1:].expand_as(last), top), noise, keep)

    def __call__(self, fifo: "Fifo", stepped: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """See GaussianTail."""
        last = stepped[:, :, -1:].expand(-1, -1, len(numbers), -1, -1)
        up = frame_noise(fifo.seed, numbers, stepped, purpose="renoise", variants=[fifo.solver.num_levels] * len(numbers))
        fresh = frame_noise(fifo.seed, numbers, stepped, purpose="tail")
        raised = self._released(fifo, last, up) if self.keep is None else self._kept(fifo, last, up, self.keep)
        height, width = last.shape[-2:]
        passed = low_pass(height, width, self.cutoff, self.kind) * (RELEASED_PEAK if self.keep is None else 1.0)
        return mix_frequencies(raised, fresh, passed, self.mix == "variance")

    def settings(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"tail": "coherent", "cutoff": self.cutoff, "kind": self.kind, "mix": self.mix, "keep": self.keep}


def _unit(fifo: "Fifo", latents: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Latents of one level with the spread that white noise has, were the clean ones of unit variance."""
    grid = fifo.solver.grid
    alpha, sigma = grid.at(grid.alpha, level, latents), grid.at(grid.sigma, level, latents)
    return latents / (alpha.square() + sigma.square()).sqrt()


def _mixed(latents: torch.Tensor, noise: torch.Tensor, keep: float) -> torch.Tensor:
    return keep * latents + (1 - keep**2) ** 0.5 * noise
