"""The command tune: the settings that reach a goal on one's own model and prompts, measured, as one file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines, print_table
from genattn.apps.cli.progress import progress_bar
from genattn.apps.cli.sampling import held_out_captions
from genattn.apps.cli.stopping import same_command_goes_on
from genattn.apps.sampling.prompt_file import read_prompts
from genattn.errors import GenAttnError, RunFailed

if TYPE_CHECKING:
    from genattn.apps.sampling.run import SamplingSettings

_SHOWN = ("setting", "faster", "seconds", "computed", "PSNR dB", "least dB", "SSIM", "oracle", "prompts")


@options.sampling_options()
def tune_command(
    settings: "SamplingSettings",
    budget: Annotated[str | None, typer.Option(help="Times as fast as dense, the whole call.", metavar="2x")] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="Least PSNR against the dense clip, in dB. 30 is near, 25 is visible.")
    ] = None,
    min_oracle: Annotated[
        float | None, typer.Option(help="Tiny models: least share of what was asked that the clip shows, 0 to 1.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt as you would use it. Repeat the option for several.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one per line.")] = None,
    held_out: Annotated[int, typer.Option(help="Add this many captions that the tiny models were not trained on.", min=0)] = 0,
    families: Annotated[
        list[str] | None,
        typer.Option(
            "--try", help="Kind to try: window, gna, radial, adaptive or profiled. Repeat the option for several. Default: all."
        ),
    ] = None,
    densities: Annotated[str, typer.Option(help="Shares of the scores to try, separated by commas.")] = "0.15,0.25,0.4,0.6",
    profile_map: Annotated[
        Path | None, typer.Option("--map", help="A map of `genattn profile`, in place of profiling here.")
    ] = None,
    seed: options.Seed = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of settings, picture and journal.")] = Path("out/tuned"),
    as_json: options.Json = False,
) -> None:
    """Measure which settings reach a goal on your model and prompts, and write them as one file.

    Every candidate runs beside dense attention on the same noise. Candidates that are clearly beaten drop out early. After a
    stop the same command goes on where it was; another goal reuses what was measured.

    Example: genattn tune --budget 2x --prompts captions.txt --model assets/tiny-wan-long --out out/tuned
    """
    from genattn.apps.sampling.load_pipeline import shipped_model
    from genattn.apps.tuning.draw import need_matplotlib
    from genattn.apps.tuning.goal import Goal, parse_budget
    from genattn.apps.tuning.tune import JOURNAL, SETTINGS, left_out, tune

    goal = Goal(None if budget is None else parse_budget(budget), min_psnr, min_oracle)
    shares = _shares(densities)
    need_matplotlib()
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else []), *held_out_captions(held_out)]
    wanted = _named(families) or None
    for note in left_out(texts, wanted, profile_map):
        typer.echo(f"note: {note}", err=True)
    same_command_goes_on(out / JOURNAL)
    chosen: dict[str, Any] = {} if wanted is None else {"families": wanted}
    with progress_bar("runs") as tell:
        found = tune(settings, texts, goal, out, seed=seed, densities=shares, profile_map=profile_map, tell=tell, **chosen)
    if as_json:
        print_json(found.to_dict())
    else:
        print_table([_row(row, found) for row in sorted(found.rows, key=lambda row: -row.speedup)], f"wanted: {goal}", _SHOWN)
        print_lines("* on the front: no other is both faster and nearer to dense", f"picture: {found.folder / 'front.png'}")
        if found.chosen is not None:
            path = found.folder / SETTINGS
            print_lines(f"chosen: {found.chosen.name}, {found.chosen.speedup:.2f} times as fast, {found.chosen.psnr:.1f} dB")
            line = f"genattn generate --model {settings.model or shipped_model()} --settings {path} --prompt ..."
            print_lines(f"wrote {path}", f"use it: {line}")
            print_lines(f'        genattn.apply(pipe, "settings:{path}")')
    if found.chosen is None:
        raise RunFailed(found.why)


def _named(families: list[str] | None) -> list[str]:
    return [part.strip() for text in families or () for part in text.split(",") if part.strip()]


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise GenAttnError(f"--densities must be numbers separated by commas, such as 0.25,0.4, got {text!r}") from None


def _row(row: Any, found: Any) -> dict[str, Any]:
    """A measured row as people read it."""
    star = " *" if row in found.front else ""
    return {
        "setting": row.name + star,
        "faster": f"{row.speedup:.2f}x",
        "seconds": row.seconds,
        "computed": f"{row.density:.0%}",
        "PSNR dB": f"{row.psnr:.1f}",
        "least dB": f"{row.worst:.1f}",
        "SSIM": f"{row.ssim:.3f}",
        **({} if row.oracle is None else {"oracle": f"{row.oracle:.2f}"}),
        "prompts": row.prompts,
    }
