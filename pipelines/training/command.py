"""The command line that every training of a tiny model has: where it runs, which phases, for how long."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def training_parser(
    module: str, doc: str, phases: Sequence[str], run: Callable[[argparse.Namespace], None]
) -> tuple[argparse.ArgumentParser, "argparse._SubParsersAction[argparse.ArgumentParser]", argparse.ArgumentParser]:
    """The parser of `python -m module`, its commands, and the command `train` with the options that all trainings share.

    The caller adds what only its own model has. `run` is called with the options of `train`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    training.set_defaults(run=run)
    training.add_argument("--run-dir", type=Path, required=True, help="where checkpoints and cached latents go")
    training.add_argument("--phases", nargs="+", choices=phases, default=list(phases), help="which to run, in order")
    training.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    training.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="autocast")
    training.add_argument("--seed", type=int, default=0, help="seed of everything random")
    training.add_argument("--minutes", type=float, default=1e9, help="wall-clock limit of each phase")
    return parser, commands, training


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> None:
    """Read the arguments (None: of the process) and run the command that they name."""
    options = parser.parse_args(arguments)
    options.run(options)
