"""Commands about patterns, from geometry alone: simulate, plan, show."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines, print_table
from genattn.apps.sampling.shapes import parse_shape
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
    attention_share: Annotated[
        float, typer.Option(help="Share of a run's time spent in attention, to predict the whole run.", min=0, max=1)
    ] = 1.0,
    as_json: options.Json = False,
) -> None:
    """Tell how much faster neighborhood attention can be at most, by its slowest tile (as NATTEN counts) and by its total work.

    Example: genattn simulate --grid 30x48x80 --window 18x24x24 --stride 16x8x8 --tile-q 4x8x8 --tile-k 2x8x8
    """
    from genattn.planning.simulate import simulate

    found = simulate(
        _grid(grid),
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
        print_table(_bounds(found, attention_share))


def _bounds(found: Any, attention_share: float) -> list[dict[str, Any]]:
    """A simulation as people read it."""
    tiles = {"query tile": found.tile_q, "key tile": found.tile_k}
    faster = {"the scores wanted": found.flops, "slowest tile": found.worst_tile, "total work": found.total_work}
    told = {"grid": _by(found.grid), **{name: "-" if tile is None else _by(tile) for name, tile in tiles.items()}}
    told |= {f"attention faster at most, by {name}": f"{x:.2f}x" for name, x in faster.items() if x is not None}
    if attention_share < 1:
        told |= {
            f"whole run faster at most, by {name}": f"{x:.2f}x"
            for name, x in zip(("slowest tile", "total work"), found.end_to_end)
        }
    told |= {"scores computed": f"{found.density:.1%}", "visited tiles without a mask": f"{found.mask_free:.0%}"}
    told |= {f"padding in {name}": f"{share:.1%}" for name, share in zip(("query tiles", "key tiles"), found.padding)}
    return [{"": name, "value": value} for name, value in told.items()]


def plan_command(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="A preset (wan-14b, hunyuan-video, flux-dev, ...; others are listed) or a folder."),
    ] = "wan-14b",
    size: Annotated[str | None, typer.Option(help="Pixels, HEIGHTxWIDTH, e.g. 720x1280; default: the model's.")] = None,
    frames: options.FrameCount = None,
    target_density: Annotated[
        float, typer.Option(help="Share of the attention scores that a sparse call may compute, 0 to 1.")
    ] = 0.25,
    dense_steps: Annotated[float, typer.Option(help="Share of the steps that stays dense.")] = 0.25,
    dense_layers: options.DenseLayers = 1,
    steps: options.Steps = None,
    auto: Annotated[bool, typer.Option(help="Measure on the pipeline --model and choose per layer and head.")] = False,
    min_psnr: Annotated[
        float | None, typer.Option(help="Measure, and take the sparsest settings that stay within this many dB of dense.")
    ] = None,
    prompt: options.Prompt = "a red circle moves right on a dark background",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the first setting to this JSON file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Rank patterns for a model and size by predicted speed. Also lists the legal sizes nearby and what a run costs.

    Example: genattn plan --model wan-14b --size 720x1280 --frames 81 --target-density 0.25
    """
    from genattn.planning.planner import plan_settings

    pixels = None if size is None else parse_shape("--size", size)
    if pixels is not None and len(pixels) != 2:
        raise GenAttnError(f"--size must be HEIGHTxWIDTH, e.g. 720x1280, got {size!r}")
    if auto or min_psnr is not None:
        _measure(model, pixels, frames, steps, prompt, target_density, min_psnr, out, as_json)
        return
    found = plan_settings(model, pixels, frames, target_density, dense_steps, dense_layers, steps)
    rows = [_setting_row(asdict(s) | {"pattern": repr(s.pattern)}) for s in found.settings]
    summary = {
        "model": found.model,
        "size": "x".join(map(str, found.size)),
        "frames": found.frames,
        "tokens": found.layout.describe(),
        "steps": found.steps,
        "dense_steps": found.dense_steps,
        "dense_layers": found.dense_layers,
        "attention_share": round(found.attention_share, 4),
        "dense_pflops": round(found.dense_pflops, 2),
    }
    if out is not None:
        _save_first(found.settings, out)
    if as_json:
        print_json({**summary, "settings": rows, "nearby": [asdict(n) for n in found.nearby]})
        return
    print_lines(*(f"{name.replace('_', ' ')}: {value}" for name, value in summary.items()))
    print_table([_shown(row) for row in rows], "predicted by arithmetic; published settings first, then others, fastest first")
    print_lines(*(f"source of {row['label']}: {row['published']}" for row in rows if row["published"]))
    print_table([_size_row(asdict(n)) for n in found.nearby], "legal sizes nearby")
    if found.settings:
        best = found.settings[0]
        kept = f"dense_steps={dense_steps:g}, dense_layers={dense_layers}"
        print_lines("the first setting in Python:", f"    genattn.apply(pipe, {_python(best.pattern)}, {kept})")
        asked = f"--out {out}" if out else "--out settings.json"
        use = f"genattn generate --model FOLDER_OR_ID --settings {out or 'settings.json'}"
        print_lines(f"on the command line{'' if out else ' (run plan with ' + asked + ' first)'}:", f"    {use}")


def _save_first(settings: Sequence[Any], out: Path) -> None:
    from genattn.apps.sampling.output_files import check_out
    from genattn.patterns.as_json import save_pattern

    check_out(out, (".json",))
    if not settings:
        raise GenAttnError("no setting comes near this density, so there is none to write; try another --target-density")
    save_pattern(settings[0].pattern, out, {"label": settings[0].label, "density": settings[0].density})


def _python(pattern: Any) -> str:
    """The constructor call, with what differs from the defaults."""
    given = [
        f"{each.name}={getattr(pattern, each.name)!r}"
        for each in fields(pattern)
        if getattr(pattern, each.name) != each.default
    ]
    return f"genattn.{type(pattern).__name__}({', '.join(given)})"


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A setting as people read it: headings of two lines leave room for it; sources stand below the table."""
    return {
        "setting": row["label"],
        "scores\ncomputed": row["density"],
        "mask-free\ntiles": row["mask_free"],
        "attention\nfaster by": row["attention_speedup"],
        "run\nfaster by": row["run_speedup"],
        "PFLOPs": row["pflops"],
    }


def _size_row(size: dict[str, Any]) -> dict[str, Any]:
    return {
        "height x width": _by(size["size"]),
        "frames": size["frames"],
        "tokens": f"{size['tokens']} ({_by(size['grid'])})",
        "tiles filled": size["fill"],
        "the released Radial code runs it": "yes" if size["official"] else "no",
    }


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _measure(
    model: str,
    pixels: tuple[int, ...] | None,
    frames: int | None,
    steps: int | None,
    prompt: str,
    target_density: float,
    min_psnr: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    from genattn.apps.sampling.output_files import check_out
    from genattn.apps.sampling.run import SamplingSettings
    from genattn.apps.tuning.measured_plan import measured_plan

    if out is not None:
        check_out(out, (".json",))
    height, width = pixels or (None, None)
    settings = SamplingSettings(model, None, frames, height, width, steps)
    found = measured_plan(settings, prompt, target_density, min_psnr, out=out)
    if as_json:
        print_json(found.facts())
        return
    print_lines(f"chosen for density {found.density}: {_chosen(found.pattern)}")
    if found.psnr is not None:
        print_lines(f"PSNR {found.psnr:.1f} dB against dense")
    if out is not None:
        print_lines(f"wrote {out}; use it with: genattn generate --settings {out}")


def _chosen(pattern: Any) -> str:
    """A choice per layer and head in a line: how often each pattern was taken."""
    counts = Counter(repr(part) for part in _leaves(pattern))
    return ", ".join(f"{count} x {name}" for name, count in counts.most_common())


def _leaves(pattern: Any) -> Iterator[Any]:
    parts = getattr(pattern, "patterns", None)
    if parts is None:
        yield pattern
    else:
        for part in parts:
            yield from _leaves(part)


def _setting_row(setting: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in setting.items()}


def show_command(
    grid: Shape,
    attention: options.Attention = "radial",
    window: options.Window = None,
    stride: options.Stride = None,
    pattern_options: options.PatternOptions = None,
    text_before: Annotated[int, typer.Option(help="Text tokens before the grid.")] = 0,
    text_after: Annotated[int, typer.Option(help="Text tokens after the grid.")] = 0,
    query: Annotated[
        str | None, typer.Option(help="Position of the token whose window is drawn, such as 4x8x8; default: the middle.")
    ] = None,
    block: Annotated[int, typer.Option(help="Tokens per tile.")] = 128,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Picture to write; default: draw in the terminal.")] = None,
    as_json: options.Json = False,
) -> None:
    """Draw a pattern: the token mask, the block plan and one token's window, as a picture or in the terminal.

    Example: genattn show --grid 21x30x52 --attention radial --out radial.png
    """
    from genattn.apps.sampling.attention_names import pattern_from_name
    from genattn.apps.sampling.output_files import check_out
    from genattn.geometry.token_layout import TokenLayout
    from genattn.planning.show import check_size, draw_pattern, terminal_pattern

    pattern = pattern_from_name(attention, pattern_options, window, stride)
    if pattern is None:
        raise GenAttnError("show draws a pattern, and dense attention has none; name another --attention")
    if query is not None and out is None and not as_json:
        raise GenAttnError("--query is drawn in a picture, and none was asked for; add --out show.png")
    layout = TokenLayout.from_grid(_grid(grid), text_before, text_after)
    check_size(layout, block)
    plan = pattern.plan(layout, block, block)
    if out is not None:
        check_out(out, (".png", ".svg", ".pdf"))
        draw_pattern(pattern, layout, out, query=None if query is None else parse_shape("--query", query), block=block)
    if as_json:
        facts = {"pattern": repr(pattern), "layout": layout.describe(), "density": plan.density, "full_share": plan.full_share}
        print_json(facts | {"file": None if out is None else str(out)})
    elif out is None:
        print_lines(terminal_pattern(pattern, layout, block=block))
    else:
        print_lines(f"density {plan.density:.4f}, {plan.full_share:.0%} of visited tiles need no mask; wrote {out}")


def _grid(text: str) -> tuple[int, ...]:
    shape = parse_shape("--grid", text)
    if min(shape) < 1:
        raise GenAttnError(f"--grid must have at least one token on every axis, got {text!r}")
    return shape


def _one_or_all(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(values) == 1 else values
