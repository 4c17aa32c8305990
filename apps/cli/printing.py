"""How the commands show what they found: tables for people, JSON for programs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table


def print_json(content: Any) -> None:
    """JSON on standard output, nothing else."""
    typer.echo(json.dumps(content, indent=2, default=str))


# names of the JSON reports as people read them; any other is shown with spaces in the place of underscores
_WORDS = {
    "n": "clips",
    "speedup": "times as fast",
    "density": "scores computed",
    "peak_memory_gb": "peak GB",
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "fps": "frames per second",
}


def in_words(name: str) -> str:
    """The name of a column or measure for people."""
    return _WORDS.get(name, name.replace("_", " "))


def in_print(value: Any) -> str:
    """A value for people: no long decimals, no brackets, nothing for what is not there."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{in_words(str(name))} {in_print(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(in_print, value)) or "none"
    return str(value)


def print_table(rows: Sequence[Mapping[str, Any]], title: str = "", names: Iterable[str] | None = None) -> None:
    """Rows as a table, headed in words; `NAME_low` and `NAME_high` are shown as an interval behind NAME."""
    shown = [name for name in (names or rows[0]) if any(name in row for row in rows)]
    shown = [name for name in shown if not name.endswith(("_low", "_high"))]
    table = Table(*map(in_words, shown), title=title or None)
    for row in rows:
        table.add_row(*(_cell(row, name) for name in shown))
    _console().print(table)


def print_lines(*lines: str) -> None:
    """Plain lines, not coloured."""
    console = _console()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


class _Console(Console):
    """rich's console; a reader that has gone (`| head`) is no failure of the command."""

    def on_broken_pipe(self) -> None:
        """Hand the error to the command's entry point, which knows what it means; rich would end with exit code 1."""
        raise BrokenPipeError


def _console() -> Console:
    """As wide as the terminal; wide enough for whole tables where there is none."""
    console = _Console()
    return console if console.is_terminal else _Console(width=160)


def _cell(row: Mapping[str, Any], name: str) -> str:
    text = in_print(row.get(name))
    return f"{text} [{row[f'{name}_low']:.3g}, {row[f'{name}_high']:.3g}]" if f"{name}_low" in row else text


def print_clips(report: Mapping[str, Any]) -> None:
    """The runs of one generate report, its warnings and its files."""
    judged = ("colour", "shape", "motion")
    rows = []
    for run in report["runs"]:
        oracle = run.get("oracle") or {}
        rows.append(
            {**run, **{name: {1.0: "yes", 0.0: "no"}.get(oracle[name], oracle[name]) for name in judged if name in oracle}}
        )
    title = f"{report['prompt']!r}, seed {report['seed']}, {report['num_inference_steps']} steps, {report['device']}"
    print_table(rows, title, ["attention", "seconds", "speedup", "density", "peak_memory_gb", "psnr", "ssim", *judged])
    print_lines(*(run["preset"] for run in report["runs"] if run.get("preset")))
    print_lines(*(f"note: {line}" for line in [*report["warnings"], *(n for run in report["runs"] for n in run["notes"])]))
    print_lines("wrote " + ", ".join([*report["files"], str(Path(report["files"][0]).with_suffix(".json"))]))
