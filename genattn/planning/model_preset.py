"""The shape of one denoiser and what it costs: tokens of a clip, arithmetic of a forward."""

from collections.abc import Sequence
from dataclasses import dataclass

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern


@dataclass(frozen=True)
class RadialPreset:
    """Settings of one published script or of ours. dense_steps: share of the run; block: tokens per tile."""

    pattern: RadialPattern
    dense_steps: float
    dense_layers: int
    block: int
    source: str


@dataclass(frozen=True)
class ModelPreset:
    """One denoiser. compression: pixels (frames, height, width) per latent; patch: latents per token.

    heads x head_dim is the model dimension, ffn the inner one (half as much again where it is gated, as three matrices do
    the work of two). cross_tokens: text seen by cross-attention; joint_tokens: text (and sound) in the same sequence, before
    or after the grid. passes: denoiser runs per step (2 with classifier-free guidance). width: channels of the hidden states
    where they are not heads x head_dim. kv_heads: heads of keys and values where they are fewer. clips: (a, b, c, d) where a
    n + b frames are c n + d latents, None for the usual rule. source: where the shape stands.
    """

    name: str
    heads: int
    head_dim: int
    layers: int
    ffn: int
    compression: tuple[int, int, int]
    patch: tuple[int, int, int] = (1, 2, 2)
    cross_tokens: int = 0
    joint_tokens: int = 0
    text_first: bool = False
    passes: int = 2
    steps: int = 50
    size: tuple[int, int] = (720, 1280)
    frames: int = 81
    radial: tuple[RadialPreset, ...] = ()
    neighborhood: tuple[tuple[NeighborhoodPattern, str], ...] = ()
    width: int = 0
    kv_heads: int = 0
    clips: tuple[int, int, int, int] | None = None
    source: str = ""

    @property
    def multiples(self) -> tuple[int, int]:
        """Pixels that height and width must be multiples of."""
        return self.compression[1] * self.patch[1], self.compression[2] * self.patch[2]

    @property
    def frame_step(self) -> int:
        """Legal frame counts are frame_step * n + 1."""
        return self.compression[0] * self.patch[0]

    def grid(self, size: Sequence[int], frames: int) -> tuple[int, int, int]:
        """Tokens (frames, height, width) for a video of `size` (height, width) pixels.

        Raises GenAttnError with the nearest legal values.
        """
        for name, value, multiple in zip(("height", "width"), size, self.multiples):
            if value < multiple or value % multiple:
                below = max(multiple, value // multiple * multiple)
                raise GenAttnError(
                    f"{name} must be a multiple of {multiple} for {self.name}, got {value}; "
                    f"nearest: {below} or {below + multiple}"
                )
        step, first, latents, extra = self.clips or (self.frame_step, 1, 1, 1)
        if frames < first or (frames - first) % step:
            below = max(first, (frames - first) // step * step + first)
            raise GenAttnError(
                f"frames must be {step} * n + {first} for {self.name}, got {frames}; nearest: {below} or {below + step}"
            )
        long = (frames - first) // step * latents + extra
        return long, size[0] // self.multiples[0], size[1] // self.multiples[1]

    def layout(self, size: Sequence[int], frames: int) -> TokenLayout:
        """The token sequence of its self-attention."""
        grid = self.grid(size, frames)
        before, after = (self.joint_tokens, 0) if self.text_first else (0, self.joint_tokens)
        return TokenLayout.from_grid(grid, before, after)

    def flops(self, layout: TokenLayout) -> tuple[float, float]:
        """(self-attention, everything else) of one forward at batch 1."""
        dim, tokens = self.heads * self.head_dim, layout.seqlen
        width, keys = self.width or dim, (self.kv_heads or self.heads) * self.head_dim
        linear = 4 * width * (dim + keys) + 4 * width * self.ffn
        if self.cross_tokens:
            linear += 4 * width * dim + 4 * self.cross_tokens * dim
        return 4.0 * self.layers * dim * tokens**2, float(self.layers * tokens * linear)
