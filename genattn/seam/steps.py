"""Where the sampling loop stands: step, number of steps, noise level, and the start of a new run, read at the denoiser's root.

A step is a change of the timestep, so that two guidance passes share one and a second-order sampler's two evaluations at one
noise level share one. The number of steps is the number of distinct timesteps that the running pipeline will visit: a part of
the scheduler's list where it starts in the middle (`visits.py`). A run starts when the scheduler was given new timesteps, or
when the timestep jumps back. Block caches skip layers, never the root, so nothing is counted there.

The progress belongs to the pipeline that runs, not to the one that was applied: denoisers are shared between pipelines with a
scheduler each, and one pipeline has several denoisers. In a loop of the user's own no pipeline runs: the scheduler of the one
that was applied is asked as long as its list has the timesteps that come, and what a pipeline keeps of its last call is not.
"""

import contextlib
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from genattn.seam.processors import set_class, stock_class, swapped_class
from genattn.seam.sites import unwrapped
from genattn.seam.visits import is_listed, visits


@dataclass(frozen=True)
class Position:
    """step: 0-based. num_steps: None when nobody tells. sigma: None likewise. is_new_run: first forward of a run. repeats:
    forwards at this step before this one. sigmas: of all steps of the run, empty when nobody tells."""

    step: int
    num_steps: int | None
    sigma: float | None
    is_new_run: bool
    repeats: int
    sigmas: tuple[float, ...] = ()


@dataclass
class _Progress:
    """One pipeline's run. repeats: forwards at this timestep before this one."""

    plan: Any = None
    timestep: float | None = None
    step: int = -1
    repeats: int = 0
    visits: list[tuple[float, float | None]] = field(default_factory=list)

    def advance(self, timestep: float | None, pipe: Any, rising: bool, runs: bool) -> bool:
        """One more forward; whether it is the first of a run. runs: whether `pipe` is seen running."""
        plan = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
        is_new = self.step < 0 or plan is not self.plan or self._jumped_back(timestep, rising)
        if is_new:
            self.visits, first = visits(pipe, timestep, rising, runs)
            self.plan, self.step, self.timestep = plan, first - 1, None
        elif not runs and self.visits and not is_listed(pipe, timestep, rising):
            self.visits = []  # the loop has a scheduler of its own
        self.repeats += 1
        if timestep is None or timestep != self.timestep:
            self.step += 1
            self.repeats = 0
        self.timestep = timestep
        return is_new

    def _jumped_back(self, timestep: float | None, rising: bool) -> bool:
        if timestep is None or self.timestep is None:
            return False
        back = timestep < self.timestep if rising else timestep > self.timestep
        return back and not self._rises_here()

    def _rises_here(self) -> bool:
        """Whether the scheduler's own list goes up after this step, as between the two halves of an ancestral KDPM2 step."""
        here, after = self.step, self.step + 1
        return here >= 0 and after < len(self.visits) and self.visits[after][0] > self.visits[here][0]


_RUNNING: "weakref.WeakKeyDictionary[Any, _Progress]" = weakref.WeakKeyDictionary()


class StepTracker:
    """Reads for one denoiser, or for all of one pipeline. pipe: the one that was applied, asked where none is seen running."""

    def __init__(self, pipe: Any = None) -> None:
        self._applied = weakref.ref(pipe) if pipe is not None else lambda: None
        self._running: Any = self._applied
        self.in_call = False
        self._bare = _Progress()
        self.samples: int | None = None

    @property
    def pipe(self) -> Any:
        """The pipeline that ran last, None for a bare model."""
        return self._running()

    @property
    def has_pipe(self) -> bool:
        """Whether a scheduler can be asked."""
        return self._applied() is not None

    def observe(
        self,
        timestep: float | None,
        told: dict[str, Any],
        num_steps: int | None,
        rising: bool = False,
        model: nn.Module | None = None,
    ) -> Position:
        """One forward of `model` at `timestep`; `told` is what the pipeline put into its cache context."""
        found, self.samples = running_pipeline(model) if model is not None else (None, None)
        self.in_call = found is not None
        self._running = weakref.ref(found) if found is not None else self._applied
        progress = self._progress
        is_new = progress.advance(timestep, self.pipe, rising, self.in_call)
        total = told.get("num_inference_steps") or num_steps or len(progress.visits) or None
        step = progress.step
        if told.get("step_index") is not None and (total is None or told["step_index"] < total):
            step = told["step_index"]
        if total is not None and step >= total:  # more forwards than were announced: the announcement was wrong
            total = None
        sigma = told.get("sigma")
        if sigma is None and step < len(progress.visits):
            sigma = progress.visits[step][1]
        sigmas = tuple(level for _, level in progress.visits if level is not None)
        sigmas = sigmas if len(sigmas) == total else ()
        return Position(step, total, None if sigma is None else float(sigma), is_new, progress.repeats, sigmas)

    @property
    def _progress(self) -> _Progress:
        pipe = self.pipe
        return self._bare if pipe is None else _RUNNING.setdefault(pipe, _Progress())

    def guess_pass(self, cfg: str | None) -> str | None:
        """Name of the pass for pipelines without cache contexts; None in a loop of the user's own.

        cfg: "batched", "two_pass" or None when it is not known.
        """
        guided = getattr(self.pipe, "do_classifier_free_guidance", None) if self.in_call else None
        if cfg is None or not isinstance(guided, bool):
            return None
        if not guided:
            return "cond"
        repeats = self._progress.repeats
        if cfg == "batched":
            return "cond_uncond"
        return ("cond", "uncond")[repeats] if repeats < 2 else None  # a third pass is something else

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """What is observed inside is forgotten."""
        running, bare = self._running, dataclasses.replace(self._bare)
        before = {pipe: dataclasses.replace(progress) for pipe, progress in _RUNNING.items()}
        try:
            yield
        finally:
            self._running, self._bare = running, bare
            _RUNNING.clear()
            _RUNNING.update(before)


def running_pipeline(model: nn.Module) -> tuple[Any, int | None]:
    """(the pipeline whose call this is, samples in its latents): the innermost `self` of a `__call__` on the stack that has
    `model` and a scheduler. (None, None) where none runs; None for the samples where its call has no latents."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            parts = getattr(owner, "__dict__", {})
            if "scheduler" in parts and any(
                isinstance(part, nn.Module) and unwrapped(part) is model for part in parts.values()
            ):
                latents = frame.f_locals.get("latents")
                return owner, len(latents) if isinstance(latents, torch.Tensor) and latents.ndim > 1 else None
        frame = frame.f_back  # type: ignore[assignment]
    return None, None


Told = Callable[[str], None]
_WATCHERS: "weakref.WeakKeyDictionary[Any, list[weakref.WeakMethod[Told]]]" = weakref.WeakKeyDictionary()


def watch_parts(pipe: Any, told: Told) -> None:
    """Call the method `told` with the name of every part that `pipe` is given, until `unwatch_parts` or while both live.

    Nothing runs in a new denoiser that plugins know of, so the assignment is where it can be told. A pipeline whose class
    cannot be exchanged in place is left alone.
    """
    stock: Any = type(pipe)
    if stock_class(pipe) is stock:
        try:
            set_class(pipe, _watched(stock))
        except TypeError:
            return
    _WATCHERS.setdefault(pipe, []).append(weakref.WeakMethod(told))


def unwatch_parts(pipe: Any, told: Told) -> None:
    """Undo `watch_parts`; the last one gives the pipeline its class back."""
    kept = [ref for ref in _WATCHERS.pop(pipe, []) if ref() not in (None, told)]
    if kept:
        _WATCHERS[pipe] = kept
    elif stock_class(pipe) is not type(pipe):
        set_class(pipe, stock_class(pipe))


_WATCHED: "weakref.WeakValueDictionary[int, type]" = weakref.WeakValueDictionary()  # as _SUBCLASSES of processors


def _watched(stock: Any) -> type:
    made = _WATCHED.get(id(stock))
    if made is not None:
        return made

    def __setattr__(self: Any, name: str, value: Any) -> None:
        stock.__setattr__(self, name, value)
        for ref in tuple(_WATCHERS.get(self, ())):
            told = ref()
            if told is not None:
                told(name)

    made = _WATCHED[id(stock)] = swapped_class(stock, {"__setattr__": __setattr__})
    return made
