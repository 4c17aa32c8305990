"""Commands about patterns, from geometry alone: simulate."""

import re
from dataclasses import asdict
from typing import Annotated

import typer

from genattn.apps import options
from genattn.apps.printing import print_json, print_table
from genattn.errors import GenAttnError

Shape = Annotated[str, typer.Option(help="Tokens per axis, FRAMESxHEIGHTxWIDTH or HEIGHTxWIDTH, e.g. 30x48x80.")]


def simulate_command(
    grid: Shape,
    window: Annotated[str, typer.Option(help="Window per axis, e.g. 18x24x24; -1 is the whole axis.")],
    stride: Annotated[str, typer.Option(help="Stride per axis, or one for all.")] = "1",
    dilation: Annotated[str, typer.Option(help="Dilation per axis, or one for all.")] = "1",
    tile_q: Annotated[str | None, typer.Option(help="Query tile, e.g. 4x8x8; default: the one with the least work.")] = None,
    tile_k: Annotated[str | None, typer.Option(help="Key tile; default: the one with the least work.")] = None,
    block: Annotated[int, typer.Option(help="Tokens per tile when tiles are chosen.")] = 128,
    attention_share: Annotated[float, typer.Option(help="Share of a run's time that becomes sparse, for end to end.")] = 1.0,
    as_json: options.Json = False,
) -> None:
    """Bound the speed-up of neighborhood attention: by the worst tile (as NATTEN does) and by total work.

    Example: genattn simulate --grid 30x48x80 --window 18x24x24 --stride 16x8x8 --tile-q 4x8x8 --tile-k 2x8x8
    """
    from genattn.simulate import simulate

    found = simulate(
        parse_shape("--grid", grid),
        parse_shape("--window", window),
        _one_or_all(parse_shape("--stride", stride)),
        _one_or_all(parse_shape("--dilation", dilation)),
        tile_q=None if tile_q is None else parse_shape("--tile-q", tile_q),
        tile_k=None if tile_k is None else parse_shape("--tile-k", tile_k),
        block=block,
        attention_share=attention_share,
    )
    if as_json:
        print_json(asdict(found))
    else:
        print_table([{"bound": name, "value": value} for name, value in asdict(found).items()])


def parse_shape(option: str, text: str) -> tuple[int, ...]:
    """`18x24x24` as (18, 24, 24).

    Raises GenAttnError for anything but 1 to 3 whole numbers joined by x.
    """
    if not re.fullmatch(r"-?\d+(x-?\d+){0,2}", text.strip()):
        raise GenAttnError(f"{option} must be 1 to 3 whole numbers joined by x, e.g. 18x24x24, got {text!r}")
    return tuple(int(part) for part in text.split("x"))


def _one_or_all(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(values) == 1 else values
