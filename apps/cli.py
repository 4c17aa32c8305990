"""The `genattn` command. A request that cannot be served gives one line on standard error and exit code 2."""

import sys
from typing import NoReturn

import click
import typer

from genattn.apps import commands_hunt, commands_kernels, commands_long, commands_patterns, commands_sampling
from genattn.errors import GenAttnError

app = typer.Typer(
    name="genattn",
    help="Sparse attention, head-level guidance and endless video for stock diffusers pipelines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


app.command("generate")(commands_sampling.generate_command)
app.command("compare")(commands_sampling.compare_command)
app.command("explain")(commands_sampling.explain_command)
app.command("measure")(commands_long.measure_command)
app.command("long")(commands_long.long_command)
app.command("hunt")(commands_hunt.hunt_command)
app.command("simulate")(commands_patterns.simulate_command)
app.command("plan")(commands_patterns.plan_command)
app.command("show")(commands_patterns.show_command)
app.command("doctor")(commands_kernels.doctor_command)
app.add_typer(commands_kernels.bench_app, name="bench")


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
