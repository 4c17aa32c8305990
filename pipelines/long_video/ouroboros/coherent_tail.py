"""New latents that remember the last one: low frequencies from the queue's end, high frequencies from noise
(Ouroboros-Diffusion, eq. 3).

    tail = IFFT( LPF FFT(z) + HPF FFT(noise) ),      z = the last latent, taken back up to the noisiest level

The filters are FreeInit's (arXiv 2312.07537). As released, HPF = 1 - LPF and the filter's time term does not vanish for a
single latent, so LPF peaks at exp(-1/2): independent unit Gaussians lose variance (std .958). Kept variance needs HPF =
sqrt(1 - LPF^2) and no offset; that is the default here, the released mix is `mix="published"`.

Rectified flow ends in pure noise, where the step back up would forget everything. There the latent is mixed with noise at
the share that the published schedule leaves (`keep`, 0.86).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.frame_noise import frame_noise

if TYPE_CHECKING:
    from genattn.pipelines.long_video.queue.fifo import Fifo

FILTERS = ("gaussian", "butterworth", "ideal")


def low_pass(height: int, width: int, cutoff: float, kind: str = "gaussian", offset: float = 0.0) -> torch.Tensor:
    """FreeInit's low-pass filter [H, W] in [0, 1], zero frequency in the middle. offset: added squared distance."""
    y = (2 * torch.arange(height) / height - 1).square()[:, None]
    x = (2 * torch.arange(width) / width - 1).square()[None]
    distance = y + x + offset
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


class CoherentTail:
    """The tail of a Fifo. cutoff: of the low-pass filter, in shares of the Nyquist frequency, (0, 1]. kind: "gaussian",
    "butterworth" or "ideal". mix: "variance" keeps the variance, "published" is the released demo. keep: share of the old
    latent where the schedule leaves none (flow), [0, 1]."""

    def __init__(
        self,
        cutoff: float = 0.25,
        kind: Literal["gaussian", "butterworth", "ideal"] = "gaussian",
        mix: Literal["variance", "published"] = "variance",
        keep: float = 0.86,
    ) -> None:
        if not 0 < cutoff <= 1:
            raise GenAttnError(f"cutoff must be above 0 and at most 1, got {cutoff}; the paper uses 0.25")
        if kind not in FILTERS:
            raise GenAttnError(f"kind must be one of {', '.join(FILTERS)}, got {kind!r}")
        if mix not in ("variance", "published"):
            raise GenAttnError(f"mix must be 'variance' or 'published', got {mix!r}")
        if not 0 <= keep <= 1:
            raise GenAttnError(f"keep must be 0 to 1, got {keep}")
        self.cutoff, self.kind, self.mix, self.keep = cutoff, kind, mix, keep

    def _raised(self, fifo: "Fifo", last: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        grid, top = fifo.solver.grid, torch.tensor([fifo.solver.num_levels - 1])
        if not grid.is_flow:
            return grid.renoise(last, top - 1, top, noise)
        alpha, sigma = grid.at(grid.alpha, top - 1, last), grid.at(grid.sigma, top - 1, last)
        unit = last / (alpha.square() + sigma.square()).sqrt()
        return self.keep * unit + (1 - self.keep**2) ** 0.5 * noise

    def __call__(self, fifo: "Fifo", stepped: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """See GaussianTail."""
        last = stepped[:, :, -1:].expand(-1, -1, len(numbers), -1, -1)
        up = frame_noise(fifo.seed, numbers, stepped, purpose="renoise", variants=[fifo.solver.num_levels] * len(numbers))
        fresh = frame_noise(fifo.seed, numbers, stepped, purpose="tail")
        exact = self.mix == "variance"
        height, width = last.shape[-2:]
        passed = low_pass(height, width, self.cutoff, self.kind, 0.0 if exact else self.cutoff**2)
        return mix_frequencies(self._raised(fifo, last, up), fresh, passed, exact)

    def settings(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"tail": "coherent", "cutoff": self.cutoff, "kind": self.kind, "mix": self.mix, "keep": self.keep}
