"""The `genattn` command. A request that cannot be served gives one line on standard error and exit code 2."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import click
import typer

from genattn.apps import options
from genattn.apps.attention_names import pattern_from_name
from genattn.errors import GenAttnError

app = typer.Typer(
    name="genattn",
    help="Sparse attention, head-level guidance and endless video for stock diffusers pipelines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keeps `generate` a subcommand however many commands there are."""


@app.command("generate")
def generate_command(
    prompt: options.Prompt,
    model: options.Model = None,
    negative_prompt: options.NegativePrompt = None,
    frames: options.FrameCount = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: options.Seed = 0,
    attention: options.Attention = "radial",
    pattern_options: options.PatternOptions = None,
    dense_steps: options.DenseSteps = 0.25,
    dense_layers: options.DenseLayers = 1,
    compare_dense: Annotated[bool, typer.Option(help="Run dense attention too, same seed, and compare.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    cpu_offload: options.CpuOffload = None,
    fps: options.Fps = None,
    out: options.Out = Path("out/video.mp4"),
    as_json: options.Json = False,
) -> None:
    """Make a video (or picture) from a prompt, with sparse attention.

    Example: genattn generate --prompt "a red circle moves right on a dark background" --compare-dense --out out.mp4
    """
    from genattn.apps.generate import GenerateRequest, generate
    from genattn.apps.sampling_run import AttentionSettings, SamplingSettings

    chosen = AttentionSettings(attention, pattern_from_name(attention, pattern_options), dense_steps, dense_layers)
    settings = SamplingSettings(
        model, negative_prompt, frames, height, width, steps, guidance_scale, dtype, device, cpu_offload
    )
    request = GenerateRequest(prompt, out, chosen, settings, seed, compare_dense, fps)
    report = generate(request)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_runs(report)


@app.command("compare")
def compare_command(
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; give it several times for several.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    held_out: Annotated[int, typer.Option(help="Add so many held-out captions of the tiny world.")] = 0,
    attention: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME@DENSE_STEPS (radial@0.5); give it several times.")
    ] = None,
    model: options.Model = None,
    frames: options.FrameCount = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance_scale: options.GuidanceScale = None,
    seed: options.Seed = 0,
    dense_layers: options.DenseLayers = 1,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV file to append the rows to.")] = None,
    as_json: options.Json = False,
) -> None:
    """Sample the same prompts under several attentions; quality, time and memory with intervals.

    Example: genattn compare --held-out 20 --attention radial --attention radial@0 --out out/compare.csv
    """
    from genattn.apps.bench_rows import append_rows
    from genattn.apps.compare import compare, parse_attention, read_prompts
    from genattn.apps.output_files import check_out
    from genattn.apps.sampling_run import SamplingSettings

    if out is not None:
        check_out(out, (".csv",))
    wanted = [parse_attention(text, dense_layers) for text in attention or ["radial"]]
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else []), *_held_out_captions(held_out)]
    settings = SamplingSettings(model, None, frames, height, width, steps, guidance_scale, dtype, device)
    rows = compare(texts, wanted, settings, seed)
    if out is not None:
        append_rows(out, rows)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        _print_rows(rows, f"{len(texts)} prompts, {rows[0]['device']}")


def _held_out_captions(count: int) -> list[str]:
    if count == 0:
        return []
    from genattn.pipelines.tiny_world import caption, sample_scene

    return [caption(sample_scene(10_000 + i, held_out=i % 2 == 1)) for i in range(count)]


def _print_rows(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    names = ["attention", "n", "seconds", "speedup", "density", "peak_memory_gb", "psnr", "ssim", "colour", "shape", "motion"]
    shown = [name for name in names if any(name in row for row in rows)]
    table = Table(*shown, title=title)
    for row in rows:
        table.add_row(*(_with_interval(row, name) for name in shown))
    Console().print(table)


def _with_interval(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    if f"{name}_low" not in row:
        return str(row[name])
    return f"{row[name]:.3g} [{row[f'{name}_low']:.3g}, {row[f'{name}_high']:.3g}]"


def _print_runs(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ["attention", "seconds", "density", "peak_memory_gb", "psnr", "ssim"]
    table = Table(
        title=f"{report['prompt']!r}, seed {report['seed']}, {report['num_inference_steps']} steps, {report['device']}"
    )
    judged = [k for k in ("colour", "shape", "motion") if k in (report["runs"][0].get("oracle") or {})]
    for name in columns + judged:
        table.add_column(name, justify="right" if name != "attention" else "left")
    for run in report["runs"]:
        cells = [str(run.get(name, "-")) for name in columns]
        table.add_row(*cells, *("yes" if run["oracle"][k] else "no" for k in judged))
    console = Console()
    console.print(table)
    for line in [*report["warnings"], *(note for run in report["runs"] for note in run["notes"])]:
        console.print(f"note: {line}", highlight=False)
    console.print("wrote " + ", ".join([*report["files"], str(Path(report["files"][0]).with_suffix(".json"))]))


def main() -> None:
    """Entry point of `genattn` and `python -m genattn`."""
    try:
        code = app(standalone_mode=False)
    except GenAttnError as error:
        _fail(str(error), 2)
    except (click.exceptions.Abort, KeyboardInterrupt):
        code = 130
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    if code == 130:  # typer turns an interrupt into this exit code and says nothing
        _fail("stopped; no unfinished file was left", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"genattn: {message}", file=sys.stderr)
    sys.exit(code)
