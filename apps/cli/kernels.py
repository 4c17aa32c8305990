"""Commands about kernels: bench attention, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from genattn.apps.cli import options
from genattn.apps.cli.printing import print_json, print_lines
from genattn.apps.cli.stopping import rows_stay, say_when_stopped
from genattn.errors import GenAttnError, RunFailed

bench_app = typer.Typer(
    no_args_is_help=True, help="Time the attention backends of this machine, or tune the Triton kernels for its GPU."
)

_LARGEST_HEAD = 4096  # far beyond any model; an answer takes a tensor of that size


@bench_app.callback()
def _bench() -> None:
    """Keeps `attention` a subcommand however many there are."""


@bench_app.command("attention")
def bench_attention_command(
    quick: Annotated[bool, typer.Option(help="Only a few shapes: under three minutes on a CPU.")] = False,
    impl: Annotated[list[str] | None, typer.Option(help="A backend to measure. Repeat the option for several.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Start no new case after this many seconds; default on a GPU: 150.")
    ] = None,
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="CSV file to append the rows to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw time over density to this file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Time block-sparse attention against every dense backend of this machine. Results are checked before they are timed.

    Example: genattn bench attention --quick --out out/attention.csv
    """
    from genattn.apps.bench.attention import MEASURABLE, bench_attention, plot_attention, rows_to_share
    from genattn.apps.sampling.load_pipeline import pick_device
    from genattn.apps.sampling.measured_rows import check_rows
    from genattn.apps.sampling.output_files import check_out

    if out is not None:
        check_rows(out)
    if plot is not None:
        check_out(plot, (".png",), "--plot")
    unknown = sorted(set(impl or ()) - set(MEASURABLE))
    if unknown:
        raise GenAttnError(f"--impl must be one of {', '.join(MEASURABLE)}, got {', '.join(unknown)}")
    if rounds is not None and rounds < 1:
        raise GenAttnError(f"--rounds must be >= 1, got {rounds}")
    if seconds is not None and not seconds > 0:
        raise GenAttnError(f"--seconds must be > 0, got {seconds}")
    quiet = (lambda line: None) if as_json else print_lines
    where = None if device is None else pick_device(device)
    if out is not None:
        rows_stay(out)
    rows = bench_attention(quick, where, out, rounds, impls=impl, progress=quiet, seconds=seconds)
    if as_json:
        print_json(rows)
    else:
        print_lines(rows_to_share(rows))
    if plot is not None:
        plot_attention(rows, plot)
    idle = [name for name in impl or () if name != "auto" and all(row["impl"] != name for row in rows)]
    if idle:
        raise RunFailed(f"no case was measured for {', '.join(idle)}; `genattn doctor` says what it lacks")


@bench_app.command("autotune")
def autotune_command(
    head_dim: Annotated[list[int] | None, typer.Option(help="Head dimension. Repeat the option for several.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each setting.", min=1)] = 5,
    as_json: options.Json = False,
) -> None:
    """Find faster launch settings of the Triton kernels on this GPU and keep them for this machine.

    Example: genattn bench autotune --head-dim 128
    """
    from genattn.apps.bench.autotune import autotune_here

    dims = head_dim or [64, 128]
    if any(not 1 <= dim <= 256 for dim in dims):
        raise GenAttnError(f"--head-dim must lie in [1, 256], got {', '.join(map(str, dims))}")
    tell = (lambda line: None) if as_json else print_lines
    found = autotune_here(dims, rounds, tell, kept=lambda path: say_when_stopped(_how_to_go_on(path)))
    if as_json:
        print_json(found)
    else:
        print_lines(f"kept in {found['file']}")
        print_lines(f"to share it, put this line into an issue: {found['row']}")


def _how_to_go_on(table: Path) -> str:
    return f"stopped; what was found so far is in use from {table}, and the same command begins from it"


def doctor_command(
    head_dim: Annotated[int, typer.Option(help="Head dimension to check the backends for.")] = 128,
    report: Annotated[bool, typer.Option(help="One text to paste into a bug report: versions too, no private paths.")] = False,
    as_json: options.Json = False,
) -> None:
    """Tell what this machine can run, and what the other backends need.

    Example: genattn doctor
    """
    from genattn.apps.bench.doctor import bug_report, describe_doctor, doctor

    if not 1 <= head_dim <= _LARGEST_HEAD:
        raise GenAttnError(f"--head-dim must be >= 1 and at most {_LARGEST_HEAD}, got {head_dim}")
    if report and as_json:
        raise GenAttnError("give --report or --json, got both: a report is text")
    facts = doctor(head_dim)
    if report:
        print_lines(bug_report(facts))
    elif as_json:
        print_json(facts)
    else:
        print_lines(describe_doctor(facts))
