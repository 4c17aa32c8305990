"""The `genattn` command. A request that cannot be served gives one line on standard error and exit code 2."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from genattn.apps import options
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

    request = GenerateRequest(
        prompt=prompt,
        out=out,
        model=model,
        negative_prompt=negative_prompt,
        frames=frames,
        height=height,
        width=width,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        attention=attention,
        pattern_options=pattern_options,
        dense_steps=dense_steps,
        dense_layers=dense_layers,
        compare_dense=compare_dense,
        dtype=dtype,
        device=device,
        cpu_offload=cpu_offload,
        fps=fps,
    )
    report = generate(request)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_runs(report)


def _print_runs(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ["attention", "seconds", "density", "peak_memory_gb", "psnr", "ssim"]
    table = Table(title=f"{report['request']['prompt']!r}, seed {report['seed']}, {report['steps']} steps, {report['device']}")
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
    console.print("wrote " + ", ".join([*report["files"], str(Path(report["request"]["out"]).with_suffix(".json"))]))


def main() -> None:
    """Entry point of `genattn` and `python -m genattn`."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except GenAttnError as error:
        _fail(str(error), 2)
    except click.exceptions.Abort:
        _fail("stopped; no unfinished file was left", 130)
    except KeyboardInterrupt:
        _fail("stopped; no unfinished file was left", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)


def _fail(message: str, code: int) -> None:
    print(f"genattn: {message}", file=sys.stderr)
    sys.exit(code)
