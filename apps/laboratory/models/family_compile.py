"""Whether a family's tiny model compiles with plugins on as it does without: the compile columns of the table of families.

Dynamo frames are counted with the eager backend, and a model is given up after `COMPILE_SECONDS` of this processor.
"""

import functools
import signal
from collections.abc import Callable
from typing import Any

import torch

from genattn.apps.laboratory.models.family_trials import apply_sites, attempt, forward
from genattn.errors import kind_and_line
from genattn.layouts.families import family_of
from genattn.patterns.dense import DensePattern
from genattn.patterns.radial import RadialPattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.seam.handle import Handle, apply
from genattn.seam.sites import find_sites

COMPILE_SECONDS = 150


def compile_columns(family: str) -> dict[str, str]:
    """Blocks compiled one by one, and the whole model, each against stock compiled alike."""
    inputs = build_inputs(family)
    stock = forward(build_model(family), inputs)
    tries = {how: functools.partial(_compiles, family, inputs, how, stock) for how in ("regional", "full")}
    return {f"compile_{how}": attempt(functools.partial(within, COMPILE_SECONDS, run)) for how, run in tries.items()}


class _TooLong(BaseException):
    """Not an Exception: Dynamo turns those into its own."""


def within(seconds: float, try_out: Callable[[], str]) -> str:
    """The answer, or "not tried" after so many seconds of processor time."""

    def stop(number: int, frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        return try_out()
    except _TooLong:
        return f"not tried: tracing took longer than {seconds:g} s on one core"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _compiles(family: str, inputs: dict[str, Any], how: str, stock: torch.Tensor) -> str:
    """Frames equal to stock's, applied before compiling; none added while schedule and pattern change."""
    try:
        frames, _ = _frames(family, inputs, how, None)
    except Exception as error:
        return f"not tried: stock itself does not: {kind_and_line(error)}"
    if not frames:
        return "not tried: no attention of stock's stands in a stack of blocks"
    refusal = next((site.unreachable for site in apply_sites(build_model(family)) if site.unreachable), "")
    if refusal:
        return f"refused: {refusal}"
    mine, out = _frames(family, inputs, how, lambda model: apply(model, DensePattern()))
    if mine != frames:
        return f"{mine} frames where stock has {frames}"
    return "yes" if torch.equal(out, stock) else f"largest difference {float((out - stock).abs().max()):.1e}"


def _frames(family: str, inputs: dict[str, Any], how: str, put_on: Callable[[Any], Handle] | None) -> tuple[int, torch.Tensor]:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = build_model(family), CompileCounterWithBackend("eager")
    handle = put_on(model) if put_on is not None else None
    runner: Any = model
    if how == "full":
        runner = torch.compile(model, fullgraph=True, backend=counter)
    else:
        for block in blocks(model):
            block.compile(fullgraph=True, backend=counter)
    out = forward(runner, inputs)
    if handle is not None:
        radial = apply(model, RadialPattern(), dense_steps=0)
        for options in ({}, {"dense_layers": 0}, {"enabled": False}):
            with radial.options(**options):
                forward(runner, inputs)
        radial.remove()
        handle.remove()
    torch._dynamo.reset()
    return counter.frame_count, out


def blocks(model: Any) -> list[Any]:
    """The blocks that `compile_repeated_blocks` takes; where a model names none, the members of its stacks that attend."""
    names = getattr(model, "_repeated_blocks", None)
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    attending = {id(module) for module, _ in find_sites(model, "", family_of(model))}
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    members = [block for stack in stacks for block in stack if any(id(part) in attending for part in block.modules())]
    inner = {id(part) for block in members for part in block.modules() if part is not block}
    return [block for block in members if id(block) not in inner]
