"""Which tokens of a video's sequence belong to which latent frame: what is edited, what keeps its mass."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.kernels.plan.lasting import lasting


@dataclass(frozen=True, eq=False)
class KeyFrames:
    """Which tokens of a sequence belong to which frame.

    Attributes:
        tokens: int64 [T, n], places in the sequence of the keys of each edited frame.
        kept: int64 [R], keys whose mass stays as it is: text, references, a first frame left alone; may be empty.
        queries: int64 [Q], rows that are edited: every grid token, in raster order.
        others: int64 [S - Q], rows that stay as they are; may be empty.
    """

    tokens: torch.Tensor
    kept: torch.Tensor
    queries: torch.Tensor
    others: torch.Tensor

    @property
    def frames(self) -> int:
        """T, the number of edited frames."""
        return self.tokens.shape[0]

    def to(self, device: torch.device) -> "KeyFrames":
        """The same with its indices on `device`."""
        return KeyFrames(*(x.to(device) for x in (self.tokens, self.kept, self.queries, self.others)))


@lru_cache(maxsize=32)
@lasting
def key_frames(layout: TokenLayout, keep_first: bool = False) -> KeyFrames:
    """Sort the tokens of a layout by frame.

    Args:
        layout: needs a grid of three axes with at least two frames to edit.
        keep_first: leave the first frame alone: a causal autoencoder's first latent holds one frame, the others four.

    Raises:
        GenAttnError: for a still, or a grid without a frame axis.
    """
    frames = layout.grid3[0]
    if frames - keep_first < 2:
        raise GenAttnError(
            f"temporal guidance needs at least {2 + keep_first} latent frames, got {frames} in {layout.describe()!r}; "
            "ask for a longer clip"
        )
    index = layout.raster_index
    places = layout.grid_positions.view(frames, -1)
    others = torch.nonzero(index < 0).flatten()
    kept = torch.cat([places[0], others]) if keep_first else others
    return KeyFrames(places[int(keep_first) :], kept, layout.grid_positions, others)
