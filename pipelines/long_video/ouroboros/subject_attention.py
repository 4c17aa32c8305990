"""Subject-aware cross-frame attention (SACFA) and what else looks at the subject inside the denoiser (Ouroboros-Diffusion,
eq. 4).

Cross-attention of the first half of the model tells where the subject's words look: a mask per frame. In the second half (up
blocks), spatial self-attention gets the subject's keys and values of all frames of the window appended,

    K_i' = [K_i ; K_subject of all frames],   V_i' likewise,

so that every frame can look up the subject as the others show it. An empty mask appends nothing: stock attention to the bit.
The same pass collects the subject's mean key per frame, which memory and guidance work with.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from genattn.errors import GenAttnError
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import AttentionCall, Inner, Plugin

if TYPE_CHECKING:
    from torch import nn


def cross_map(
    query: torch.Tensor, key: torch.Tensor, tokens: Sequence[int], scale: float | None, chunk: int = 4096
) -> torch.Tensor:
    """Share of attention that each query gives to the text tokens, mean over heads: [B, Sq] from [B, Sq, H, D], [B, Sk, H,
    D]."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    keys = key.float().permute(0, 2, 3, 1)
    out = []
    for part in query.split(chunk, 1):
        scores = part.float().transpose(1, 2) @ keys * factor
        out.append(scores.softmax(-1)[..., list(tokens)].sum(-1).mean(1))
    return torch.cat(out, 1)


def grid_of(places: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of a grid of `places` that is the latent's height x width, halved as often as needed; None if it is
    not."""
    factor = 1
    while factor <= max(height, width):
        rows, columns = -(-height // factor), -(-width // factor)
        if rows * columns == places:
            return rows, columns
        factor *= 2
    return None


class SubjectWatch(Plugin):
    """Masks from cross-attention, keys and values of the subject into self-attention.

    threshold: share of a frame's range of attention above which a place belongs to the subject, (0, 1). attend: append keys
    and values.
    """

    def __init__(self, threshold: float = 0.5, attend: bool = True) -> None:
        if not 0 < threshold < 1:
            raise GenAttnError(f"threshold must be between 0 and 1, got {threshold}")
        self.threshold, self.attend = threshold, attend
        self._sources: set[str] = set()
        self._targets: set[str] = set()
        self._has_rope = False
        self._tokens: Sequence[int] | None = None
        self._frames, self._size = 0, (0, 0)
        self._maps: list[torch.Tensor] = []
        self._mask: torch.Tensor | None = None
        self._collecting = False
        self.features: dict[str, torch.Tensor] = {}
        self.appended = 0

    def attach(self, model: "nn.Module", sites: Sequence[AttentionSite]) -> None:
        """See Plugin.attach: finds the cross-attention that tells masks and the self-attention that follows it."""
        usable = [s for s in sites if "temp_attentions" not in s.name and not s.unreachable]
        cross = [s for s in usable if s.kind == "cross"]
        selfs = [s for s in usable if s.kind in ("self", "spatial")]
        if not cross or not selfs:
            raise GenAttnError(
                f"{type(model).__name__} has {len(cross)} cross-attentions and {len(selfs)} self-attentions within reach; "
                "subject masks need both, leave subject_attention and guidance off"
            )
        if any(s.stack.startswith("up_blocks") for s in selfs):
            self._sources |= {s.name for s in cross if not s.stack.startswith("up_blocks")}
            self._targets |= {s.name for s in selfs if s.stack.startswith("up_blocks")}
        else:
            middle = sorted({s.depth for s in cross})[len({s.depth for s in cross}) // 2]
            self._sources |= {s.name for s in cross if s.depth < middle} or {cross[0].name}
            self._targets |= {s.name for s in selfs if s.depth >= middle}
        # frames of a UNet or of Latte stand in the batch; a video transformer holds them in one sequence
        self._has_rope = not any(s.kind == "spatial" or s.stack.startswith("up_blocks") for s in selfs)
        if self.attend and self._has_rope:
            raise GenAttnError(
                f"{type(model).__name__} attends over all frames of a window already, so appending their keys adds nothing; "
                "use memory_frames instead of subject_attention"
            )

    def wants(self, site: AttentionSite) -> bool:
        """See Plugin.wants."""
        return site.name in self._sources or site.name in self._targets

    def begin(
        self,
        frames: int,
        size: tuple[int, int],
        tokens: Sequence[int] | None,
        mask: torch.Tensor | None = None,
        collect: bool = False,
    ) -> None:
        """Before a forward. frames, size: of the window's latents. tokens: subject's; None keeps to a given mask bool [F, h,
        w]."""
        self._frames, self._size, self._tokens, self._mask, self._collecting = frames, size, tokens, mask, collect
        self._maps, self.features = [], {}

    def end(self) -> None:
        """After a forward; attention outside `begin` and `end` is untouched."""
        self._tokens, self._mask, self._collecting, self._maps = None, None, False, []

    def mask(self) -> torch.Tensor | None:
        """Where the subject is, bool [F, h, w] at the latent's size: the given mask, or that of the cross-attention seen so
        far."""
        if self._mask is not None or not self._maps:
            return self._mask
        mean = torch.stack(self._maps).mean(0)
        low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
        return (mean - low) / (high - low).clamp(min=1e-8) > self.threshold

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        """See Plugin.attention."""
        if self._frames == 0 or (self._tokens is None and self._mask is None):
            return inner(call)
        if call.site.name in self._sources:
            if self._tokens is not None:
                self._see(call)
            return inner(call)
        mask = self.mask()
        if mask is None:
            return inner(call)
        if self._collecting:
            self._collect(call, mask)
        return inner(self._with_subject(call, mask) if self.attend else call)

    def _see(self, call: AttentionCall) -> None:
        with torch.no_grad():
            shares = cross_map(call.query, call.key, self._tokens or (), call.scale).reshape(self._frames, -1)
            grid = grid_of(shares.shape[1], *self._size)
            if grid is not None:
                picture = shares.reshape(self._frames, 1, *grid)
                self._maps.append(F.interpolate(picture, self._size, mode="bilinear", align_corners=False)[:, 0])

    def _at(self, mask: torch.Tensor, places: int) -> torch.Tensor | None:
        grid = grid_of(places, *self._size)
        if grid is None:
            return None
        small = F.interpolate(mask[:, None].float(), grid, mode="bilinear", align_corners=False)
        return small[:, 0].flatten(1) > 0

    def _with_subject(self, call: AttentionCall, mask: torch.Tensor) -> AttentionCall:
        where = self._at(mask, call.key.shape[1])
        if where is None or not bool(where.any()) or call.mask is not None:
            return call
        self.appended += 1
        frames = call.key.shape[0]
        extra = [t[where][None].expand(frames, -1, -1, -1) for t in (call.key, call.value)]
        return call.with_tensors(key=torch.cat([call.key, extra[0]], 1), value=torch.cat([call.value, extra[1]], 1))

    def _collect(self, call: AttentionCall, mask: torch.Tensor) -> None:
        # rotary keys turn with the frame number, so a video transformer is judged by its values
        tensor = call.value if self._has_rope else call.key
        flat = tensor.reshape(self._frames, -1, tensor.shape[-2] * tensor.shape[-1])
        where = self._at(mask, flat.shape[1])
        if where is not None:
            weight = where[..., None].to(flat)
            self.features[call.site.name] = (flat * weight).sum(1) / weight.sum(1).clamp(min=1)

    def describe(self) -> dict[str, Any]:
        """See Plugin.describe."""
        return {"plugin": "SubjectWatch", "threshold": self.threshold, "attend": self.attend, "appended": self.appended}
