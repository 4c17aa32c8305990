"""What the attention benchmarks run: real layouts and patterns, by name."""

from dataclasses import dataclass

import torch

from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern
from genattn.patterns.radial import RadialPattern


@dataclass(frozen=True)
class AttentionCase:
    """One measured call: a pattern on a grid with text after it; the last `hidden` tokens are masked, as a short prompt's."""

    name: str
    grid: tuple[int, ...]
    pattern: Pattern
    text: int = 0
    heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    hidden: int = 0

    @property
    def layout(self) -> TokenLayout:
        """The token sequence."""
        return TokenLayout.from_grid(self.grid, text_after=self.text)

    def key_mask(self, device: str) -> torch.Tensor | None:
        """Bool [1, S], False for the hidden tokens; None where there are none."""
        if not self.hidden:
            return None
        return (torch.arange(self.layout.seqlen, device=device) < self.layout.seqlen - self.hidden)[None]


def cpu_cases(quick: bool = False) -> list[AttentionCase]:
    """Sequences of 8k to 21k tokens, both head dims and types; quick: three of them."""
    shapes = [
        ("radial 21x32x32", (21, 32, 32), RadialPattern(), 64),
        ("radial 41x16x32", (41, 16, 32), RadialPattern(), 0),
        ("gna 16x24x24 strided", (16, 24, 24), NeighborhoodPattern((8, 8, 8), stride=(4, 4, 4)), 0),
        ("gna 16x24x24 sliding", (16, 24, 24), NeighborhoodPattern((8, 8, 8)), 0),
        ("gna 128x128 sliding", (128, 128), NeighborhoodPattern((40, 40)), 0),
    ]
    kinds = [(d, t) for d in (64, 128) for t in (torch.float32, torch.bfloat16)]
    if quick:
        kept = [(shapes[1], (64, torch.float32)), (shapes[2], (128, torch.bfloat16)), (shapes[3], (64, torch.bfloat16))]
        return [AttentionCase(n, g, p, t, 1, *kind) for (n, g, p, t), kind in kept]
    return [AttentionCase(n, g, p, t, 1, *kind) for n, g, p, t in shapes for kind in kinds]


def gpu_cases() -> list[AttentionCase]:
    """Wan, Hunyuan and FLUX sizes at the heads their models have."""
    grids = {
        "wan 480p 81f": ((21, 30, 52), 0, 12),
        "wan 720p 81f": ((21, 45, 80), 0, 40),
        "wan 720p 321f": ((81, 45, 80), 0, 4),
        "hunyuan 720p 117f": ((30, 45, 80), 256, 24),
        "hunyuan 720p 129f": ((33, 45, 80), 256, 24),
    }
    cases = [AttentionCase(f"radial {name}", grid, RadialPattern(), text, heads) for name, (grid, text, heads) in grids.items()]
    hunyuan = (30, 48, 80)
    for name, stride in (("strided", (2, 8, 8)), ("tiled", (16, 8, 8)), ("sliding", (1, 1, 1))):
        pattern = NeighborhoodPattern((18, 24, 24), stride=stride)
        cases.append(AttentionCase(f"gna 18x24x24 {name} 30x48x80", hunyuan, pattern, 0, 24))
    for side, window in ((64, 20), (256, 80)):
        cases.append(AttentionCase(f"gna flux {side}^2 s16", (side, side), NeighborhoodPattern(window, stride=16), 512, 24))
        cases.append(AttentionCase(f"gna flux {side}^2 sliding", (side, side), NeighborhoodPattern(window), 512, 24))
    return cases + [AttentionCase(c.name, c.grid, c.pattern, c.text, c.heads, 64) for c in cases[:2]]


def lease_cases() -> list[AttentionCase]:
    """What decides: HunyuanVideo and Wan at 720p under Radial, strided and sliding windows, without and with a key mask."""
    windows = NeighborhoodPattern((18, 24, 24), stride=(2, 8, 8)), NeighborhoodPattern((18, 24, 24))
    patterns = {"radial": RadialPattern(), "gna strided": windows[0], "gna sliding": windows[1]}
    models = {"hunyuan 720p": ((33, 45, 80), 256, 24), "wan 720p": ((21, 45, 80), 0, 40)}
    cases = []
    for hidden in (0, 160):
        for model, (grid, text, heads) in models.items():
            for name, pattern in patterns.items():
                title = f"{name} {model}{' masked' if hidden else ''}"
                cases.append(AttentionCase(title, grid, pattern, text, heads, hidden=hidden))
    return cases


def toy_cases() -> list[AttentionCase]:
    """The same kinds at sizes that an interpreter can run: for trying the benchmark out where no GPU is."""
    windows = NeighborhoodPattern((2, 4, 4), stride=(1, 2, 2)), NeighborhoodPattern((2, 4, 4))
    patterns = {"radial": RadialPattern(), "gna strided": windows[0], "gna sliding": windows[1]}
    named = {f"{name} toy{' masked' if n else ''}": (p, n) for n in (0, 3) for name, p in patterns.items()}
    return [AttentionCase(name, (2, 8, 8), p, 5, 2, 16, torch.float32, n) for name, (p, n) in named.items()]
