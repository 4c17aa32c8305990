"""One cell of the table: a neighbour and one of our methods on one pipeline, in every order, against a reference.

    dense     a dense pattern                     what the neighbour gives alone
    pattern   windows on every self-attention     the neighbour, attention exchanged by hand in the model's own
                                                  module for `genattn.attention`: no seam
    SoftPAG   one head disturbed, a second pass   at zero strength, second pass included, what the neighbour gives alone;
    NAG       a negative prompt at scale 1        at full strength another picture, the same in every order

After `remove()` the neighbour must give what it gives alone. Under a compiler, and where processes share the model, the
pattern's reference is the bare model: what is done by hand would be traced with it, or see one process's tokens only.
"""

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers.models.transformers import transformer_wan

from genattn.apps.laboratory.stacking.neighbours import NEIGHBOURS, Neighbour
from genattn.apps.laboratory.stacking.processes import measure_together
from genattn.errors import GenAttnError, first_line
from genattn.functional.dispatch import attention
from genattn.geometry.token_layout import TokenLayout
from genattn.guidance.nag import NAG
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.patterns.dense import DensePattern
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.seam.handle import Handle, apply

# without a tail: its reference is a mask written by hand
PATTERN = NeighborhoodPattern((2, 3, 3), tail=None)
GRID = TokenLayout.from_grid((3, 4, 3))
CHANGE = ("cache", "weights", "adapter")  # kinds of neighbours that change the result
ALIKE = ("compiler", "split")  # those that change how the model runs, and nothing of what comes out
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Method:
    """put: applies it to a pipeline, with `zero` in a form that must change nothing. guidance_scale: of the calls."""

    name: str
    put: Callable[[Any, bool], Handle]
    guidance_scale: float = 6.0


METHODS: tuple[Method, ...] = (
    Method("dense pattern", lambda pipe, zero: apply(pipe, DensePattern())),
    Method("pattern", lambda pipe, zero: apply(pipe, DensePattern() if zero else PATTERN, dense_steps=0, dense_layers=0)),
    Method("SoftPAG", lambda pipe, zero: apply(pipe, SoftPAG("L1H0", u=0.0 if zero else 1.0, scale=2.0))),
    Method("NAG", lambda pipe, zero: apply(pipe, NAG("red", alpha=0.0 if zero else 0.5, scale=4.0)), 1.0),
)


@dataclass(frozen=True)
class Cell:
    """result: "equal", "within", "refused", "differs" or "not tried". error: the largest relative one. note: why."""

    neighbour: str
    method: str
    result: str
    error: float = 0.0
    note: str = ""


_ORDER = ("equal", "within", "refused", "not tried", "differs")  # from best to worst


def measure(neighbour: Neighbour, method: Method) -> Cell:
    """Run one cell, see `measure_row`."""
    return measure_row(neighbour, (method,))[0]


def measure_row(neighbour: Neighbour, methods: Sequence[Method] = METHODS) -> list[Cell]:
    """Run the cells of a neighbour, in as many processes as it needs.

    A refusal of ours is a result, and so is a neighbour that has no code for this machine; what else other packages raise
    comes through. Of several processes the worst result counts.
    """
    reason = why_not(neighbour)
    if reason:
        return [Cell(neighbour.name, method.name, "not tried", note=reason) for method in methods]
    if neighbour.processes == 1:
        return [_measure(neighbour, method) for method in methods]
    found = measure_together(measure_named, neighbour.name, [method.name for method in methods], neighbour.processes)
    cells = ([Cell(**cell) for cell in of_all] for of_all in zip(*found))
    return [max(of_all, key=lambda cell: (_ORDER.index(cell.result), cell.error)) for of_all in cells]


def measure_named(neighbour: str, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Cells by their names, for a process that cannot be handed functions."""
    (beside,) = (n for n in NEIGHBOURS if n.name == neighbour)
    return [asdict(_measure(beside, method)) for method in METHODS if method.name in methods]


def _measure(neighbour: Neighbour, method: Method) -> Cell:
    gc.collect()  # a refused pipeline goes with its plugins: names put back while a compiler traces them would fail it
    try:
        alone = _alone(neighbour, method)
    except (NotImplementedError, ValueError) as error:
        note = f"by itself it does not run on this machine: {first_line(error)}"
        return Cell(neighbour.name, method.name, "not tried", note=note)
    if neighbour.kind in CHANGE and torch.equal(alone, _stock(method.guidance_scale)):
        return Cell(
            neighbour.name, method.name, "differs", note="the neighbour has no effect here, so the cell would tell nothing"
        )
    wanted = _alone(_NOBODY if neighbour.kind in ALIKE else neighbour, method, by_hand) if method.name == "pattern" else alone
    places = range(len(neighbour.steps) + 1)
    try:
        found = [_run(neighbour, method, place, zero) for place, zero in itertools.product(places, (True, False))]
    except GenAttnError as error:
        return Cell(neighbour.name, method.name, "refused", note=str(error))
    at_zero, at_full = found[::2], found[1::2]
    if method.name == "dense pattern":
        target = alone
    else:
        target = wanted if method.name == "pattern" else at_full[0][0]
        if any(_error(got, alone) <= neighbour.close for got, _ in at_full):
            return Cell(neighbour.name, method.name, "differs", note="the method has no effect beside it")
    errors = [_error(got, target) for got, _ in at_full]
    errors += [_error(got, alone) for got, _ in at_zero] + [_error(after, alone) for _, after in found]
    worst = max(errors)
    result = "equal" if worst == 0.0 else "within" if worst <= max(neighbour.close, _SMALLEST) else "differs"
    return Cell(neighbour.name, method.name, result, worst)


_NOBODY = Neighbour("nobody", "")


def why_not(neighbour: Neighbour) -> str:
    """Why the neighbour cannot be tried here, empty when it can."""
    if neighbour.why_not:
        return neighbour.why_not
    installed = importlib.util.find_spec(neighbour.package.replace("-", "_")) is not None
    return "" if installed else f"not installed (pip install {neighbour.package})"


def version_of(neighbour: Neighbour) -> str:
    """Of its package, empty where that is not installed."""
    try:
        return importlib.metadata.version(neighbour.package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextlib.contextmanager
def by_hand() -> Iterator[None]:
    """The model's own module calls `genattn.attention` wherever its tokens look at themselves."""
    stock = transformer_wan.dispatch_attention_fn

    def dispatch(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> Any:
        if query.shape[1] == key.shape[1] == GRID.seqlen:
            return attention(query, key, value, PATTERN, GRID)
        return stock(query, key, value, *rest, **named)

    transformer_wan.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        transformer_wan.dispatch_attention_fn = stock


def _alone(neighbour: Neighbour, method: Method, inside: Callable[[], Any] = contextlib.nullcontext) -> torch.Tensor:
    with inside(), _pipeline(neighbour) as (pipe, call):
        for step in neighbour.steps:
            step(pipe)
        return _sample(pipe, call, method.guidance_scale)


@functools.cache
def _stock(guidance_scale: float) -> torch.Tensor:
    """Without neighbour and without us."""
    pipe, call = build_pipeline("wan")
    return _sample(pipe, call, guidance_scale)


def _run(neighbour: Neighbour, method: Method, place: int, zero: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(what both give together, what the neighbour gives after removal); ours comes before step `place` of the neighbour."""
    with _pipeline(neighbour) as (pipe, call):
        for step in neighbour.steps[:place]:
            step(pipe)
        handle = method.put(pipe, zero)
        for step in neighbour.steps[place:]:
            step(pipe)
        together = _sample(pipe, call, method.guidance_scale)
        handle.remove()
        return together, _sample(pipe, call, method.guidance_scale)


@contextlib.contextmanager
def _pipeline(neighbour: Neighbour) -> Iterator[tuple[Any, dict[str, Any]]]:
    pipe, call = build_pipeline("wan")
    try:
        yield pipe, call
    finally:
        neighbour.undo(pipe)


def _sample(pipe: Any, call: dict[str, Any], guidance_scale: float) -> torch.Tensor:
    given = {**call, "num_inference_steps": 5, "output_type": "latent", "guidance_scale": guidance_scale}
    if guidance_scale <= 1:
        given.pop("negative_prompt", None)
    out: torch.Tensor = pipe(**given, generator=torch.Generator().manual_seed(0)).frames
    return out.clone()


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(_SMALLEST))
