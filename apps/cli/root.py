"""The `genattn` command. A request that cannot be served gives one line on standard error and exit code 2.

0 done, 1 the work failed, 2 what was asked cannot be, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP: the same for every command.
"""

import errno
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from genattn.apps.cli import (
    app as commands_app,
    comfyui as commands_comfyui,
    evidence as commands_evidence,
    finetune as commands_finetune,
    hunt as commands_hunt,
    kernels as commands_kernels,
    long as commands_long,
    patterns as commands_patterns,
    profile as commands_profile,
    sampling as commands_sampling,
    stopping,
    streams,
    tune as commands_tune,
)
from genattn.apps.cli.proposing import meant
from genattn.errors import GenAttnError, RunFailed, first_line
from genattn.quiet import quieten

app = typer.Typer(
    name="genattn",
    help="Sparse attention, guidance by single attention heads and videos of any length, for stock diffusers pipelines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from genattn import __version__

        typer.echo(f"genattn {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Sparse attention, guidance by single attention heads and videos of any length, for stock diffusers pipelines."""


app.command("generate")(commands_sampling.generate_command)
app.command("compare")(commands_sampling.compare_command)
app.command("explain")(commands_sampling.explain_command)
app.command("measure")(commands_long.measure_command)
app.command("long")(commands_long.long_command)
app.command("profile")(commands_profile.profile_command)
app.command("tune")(commands_tune.tune_command)
app.command("hunt")(commands_hunt.hunt_command)
app.command("finetune")(commands_finetune.finetune_command)
app.command("simulate")(commands_patterns.simulate_command)
app.command("plan")(commands_patterns.plan_command)
app.command("show")(commands_patterns.show_command)
app.command("evidence")(commands_evidence.evidence_command)
app.command("doctor")(commands_kernels.doctor_command)
app.command("app")(commands_app.app_command)
app.add_typer(commands_kernels.bench_app, name="bench")
app.add_typer(commands_comfyui.comfyui_app, name="comfyui")

# typer carried click's exceptions from outside, then from within: its own names lead to whichever it raises
_REFUSALS = tuple(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)


# the request was fine, the disk or the limits of the machine are not
_MACHINE = (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE, getattr(errno, "EDQUOT", errno.EIO))
_SMALLER = "try --cpu-offload model, fewer frames, or a smaller size"
_WITHOUT_MODEL = ("show", "simulate")  # these are about a grid alone


def main() -> None:
    """Entry point of `genattn` and `python -m genattn`."""
    stopping.say_when_stopped(stopping.USUAL)  # whoever calls this twice must not see the last command's line
    streams.prepare()
    quieten()
    try:
        _refuse_empty_paths(sys.argv[1:])
        with stopping.heeding_terminate():
            code = app(prog_name="genattn", standalone_mode=False)
        sys.stdout.flush()
    except RunFailed as error:
        _fail(str(error), 1)
    except GenAttnError as error:
        _fail(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except SystemExit as stop:
        if not streams.reader_has_gone(stop.__context__):
            raise
        _leave_quietly()
    except OSError as error:  # a name that is too long, a file where a folder must be, a full disk
        if streams.reader_has_gone(error):
            _leave_quietly()
        where = f"{error.filename!r}: " if getattr(error, "filename", None) else ""
        _fail(f"{where}{error.strerror or error}", 1 if error.errno in _MACHINE else 2)
    except _REFUSALS as error:
        _refuse(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        smaller = "try a smaller --grid" if sys.argv[1:2] in ([name] for name in _WITHOUT_MODEL) else _SMALLER
        _fail(f"out of memory: {first_line(error) if str(error).strip() else 'the machine has no more'}; {smaller}", 1)
    if code in stopping.CODES:  # typer turns an interrupt into 130 and says nothing
        _fail(stopping.MESSAGE.line, stopping.MESSAGE.code if code == 130 else code)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse_empty_paths(words: list[str]) -> None:
    """An empty path is what a script's unset variable gives; taken as it stands it would be the current folder."""
    if not any(word == "" or word.endswith("=") for word in words):
        return
    options: dict[str, bool] = {}  # name -> whether it takes a path
    waiting: list[Any] = [typer.main.get_command(app)]
    for command in waiting:
        waiting += getattr(command, "commands", {}).values()
        for parameter in command.params:
            takes_path = _takes_path(parameter)
            options |= {name: options.get(name, False) or takes_path for name in parameter.opts if name.startswith("-")}
    for before, word in zip(["", *words], words):
        name = word.removesuffix("=") if word.endswith("=") else before
        empty = word == "" or (word.endswith("=") and word.startswith("--"))
        if empty and options.get(name, word == ""):
            what = name if name in options else "an argument"
            raise GenAttnError(f"{what} must not be empty; write . for the current folder")


def _takes_path(parameter: Any) -> bool:
    """Whether an option's values are paths: typer tells by annotation where it has click's classes within."""
    described = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    return described is Path or hasattr(getattr(parameter, "type", None), "path_type")


def _leave_quietly() -> NoReturn:
    """Who read has gone (`| head`): nothing is wrong, and the interpreter must not complain at its end."""
    streams.drop(sys.stdout)
    sys.exit(0)


def _refuse(error: Any) -> NoReturn:
    """A command line that cannot be read: what is wrong, and where the options stand."""
    path = "genattn" if getattr(error, "ctx", None) is None else error.ctx.command_path
    message = error.format_message()
    if type(error).__name__ == "NoSuchOption":
        found = meant(error.option_name, _options_of(error.ctx))
        message = f"no such option: {error.option_name}" + (f"; did you mean {' or '.join(found)}?" if found else "")
    if type(error).__name__ == "NoArgsIsHelpError":  # the help itself was printed already, or is the message
        if message:
            print(message)
        sys.exit(2)
    _fail(f"{message.strip().removesuffix('.')}; see: {path} --help", 2)


def _options_of(context: Any) -> list[str]:
    return [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)]


def _fail(message: str, code: int) -> NoReturn:
    streams.settle()
    print(f"genattn: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)
