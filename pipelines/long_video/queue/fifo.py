"""FIFO-Diffusion: video of any length from a model of short clips (arXiv 2405.11473), on any latent queue.

    tick: every window of the queue goes through the model once, each latent at its own level; each latent takes one solver
    step;
          the cleanest leave, new ones enter.

All windows read the queue as it stood at the start of the tick, so they may run one by one, several in one batch, or spread
over processes, and the answer is the same. The published code runs them noisiest first, in place; since a window reads only
what lies before its end, that is the same again (`order="in_place"` is that slow twin).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.queue.frame_noise import frame_noise
from genattn.pipelines.long_video.queue.latent_queue import LatentQueue, QueueShape, Window
from genattn.pipelines.long_video.queue.window_group import WindowGroup
from genattn.pipelines.long_video.solvers.frame_solvers import FrameSolver


@dataclass(frozen=True)
class WindowBatch:
    """Some windows of one tick, for one forward of the model.

    latents: [K, C, F, H, W]. levels, numbers: int64 [K, F]. keep: per window, which of its latents are kept. index: which
    windows.
    """

    latents: torch.Tensor
    levels: torch.Tensor
    numbers: torch.Tensor
    keep: tuple[slice, ...]
    index: tuple[int, ...]

    def kept(self) -> torch.Tensor:
        """bool [K, F]."""
        mask = torch.zeros(self.levels.shape, dtype=torch.bool)
        for row, keep in zip(mask, self.keep):
            row[keep] = True
        return mask


@dataclass(frozen=True)
class WindowAnswer:
    """What the model says of a batch of windows. push: a direction [K, C, F, H, W] that the step is to move against, or
    None."""

    prediction: torch.Tensor
    push: torch.Tensor | None = None


Denoise = Callable[[WindowBatch], WindowAnswer]


class QueueHook:
    """Something that watches or changes the queue between the model and the end of a tick; the default does nothing."""

    def after_step(self, fifo: "Fifo", stepped: torch.Tensor) -> torch.Tensor:
        """The stepped latents [1, C, slots, H, W], before they move."""
        return stepped

    def on_leave(self, latents: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """The latents [1, C, K, H, W] that leave, before they are decoded."""
        return latents

    @property
    def held(self) -> int:
        """Latents that left the queue and wait here."""
        return 0

    def pass_on(self, fifo: "Fifo", latents: torch.Tensor, numbers: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Last of all: what goes to the decoder for the latents that leave; in order, but perhaps later and several at once."""
        return latents, list(numbers)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """State for a checkpoint, names unique to the hook."""
        return {}

    def to_numbers(self) -> dict[str, Any]:
        """State that is no tensor, JSON-ready."""
        return {}

    def load(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Take up a state."""

    def settings(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed, JSON-ready."""
        return {"hook": type(self).__name__}


class GaussianTail:
    """New latents are plain noise, as in FIFO-Diffusion."""

    def __call__(self, fifo: "Fifo", stepped: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """Latents [1, C, len(numbers), H, W] at the noisiest level."""
        return frame_noise(fifo.seed, numbers, stepped, purpose="tail")

    def settings(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"tail": "gaussian"}


class Fifo:
    """The queue, the model and the solver together. Batch size is one video.

    denoise: answers a WindowBatch. window_batch: windows per forward, >= 1. tail: what enters. hooks: run in order. group:
    processes that share the windows. order: "parallel", or "in_place" (noisiest first, each window reading what the ones
    before it left).
    """

    def __init__(
        self,
        denoise: Denoise,
        solver: FrameSolver,
        queue: LatentQueue,
        *,
        seed: int = 0,
        window_batch: int = 1,
        tail: Any = None,
        hooks: Sequence[QueueHook] = (),
        group: WindowGroup | None = None,
        order: Literal["parallel", "in_place"] = "parallel",
    ) -> None:
        if queue.shape.num_levels != solver.num_levels:
            raise GenAttnError(
                f"queue and solver must have the same levels, got {queue.shape.num_levels} and {solver.num_levels}"
            )
        if window_batch < 1:
            raise GenAttnError(f"window_batch must be >= 1, got {window_batch}")
        if order not in ("parallel", "in_place"):
            raise GenAttnError(f"order must be 'parallel' or 'in_place', got {order!r}")
        if order == "in_place" and (group is not None or window_batch != 1):
            raise GenAttnError(
                f"order='in_place' runs one window at a time, got window_batch={window_batch}; use order='parallel'"
            )
        self.denoise, self.solver, self.queue, self.seed = denoise, solver, queue, seed
        self.window_batch, self.tail, self.hooks, self.order = window_batch, tail or GaussianTail(), tuple(hooks), order
        self.group = group or WindowGroup.alone()
        self._forgotten: set[int] = set()

    def batch(self, windows: Sequence[Window], index: Sequence[int], latents: torch.Tensor) -> WindowBatch:
        """The batch that holds these windows of the queue."""
        levels, numbers = self.queue.shape.levels, self.queue.numbers
        return WindowBatch(
            torch.cat([latents[:, :, w.read] for w in windows]),
            torch.stack([levels[w.read] for w in windows]),
            torch.stack([numbers[w.read] for w in windows]),
            tuple(w.keep for w in windows),
            tuple(index),
        )

    def _answers(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        windows = self.queue.shape.windows
        prediction, push = torch.zeros_like(latents), torch.zeros_like(latents)
        mine = list(self.group.share(len(windows)))
        for start in range(0, len(mine), self.window_batch):
            index = mine[start : start + self.window_batch]
            chosen = [windows[i] for i in index]
            answer = self.denoise(self.batch(chosen, index, latents))
            for row, window in enumerate(chosen):
                prediction[:, :, window.write] = answer.prediction[row : row + 1, :, window.keep].to(latents)
                if answer.push is not None:
                    push[:, :, window.write] = answer.push[row : row + 1, :, window.keep].to(latents)
        return prediction, push

    def _step(
        self, latents: torch.Tensor, prediction: torch.Tensor, push: torch.Tensor, part: slice
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        levels, numbers = self.queue.shape.levels[part], self.queue.numbers[part].tolist()
        sample = latents[:, :, part]
        noise = None
        if self.solver.needs_noise:
            noise = frame_noise(self.seed, numbers, sample, purpose="step", variants=levels.tolist())
        state = {name: tensor[:, :, part] for name, tensor in self.queue.state.items()}
        stepped, state = self.solver.step(sample, prediction[:, :, part], levels, state, noise)
        # Ouroboros eq. 6: the push changes the noise direction of the step and leaves the clean latent alone
        gain = self.solver.direction_gain(levels, sample) * self.solver.grid.at(self.solver.grid.sigma, levels, sample)
        return stepped - (gain * push[:, :, part]).to(stepped), state

    def _parallel(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        latents = self.queue.latents
        prediction, push = self.group.sum(lambda: self._answers(latents), latents)
        part = self.queue.working
        stepped, state = self._step(latents, prediction, push, part)
        return _placed(latents, stepped, part), {n: _placed(t, state[n], part) for n, t in self.queue.state.items()}

    def _in_place(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        latents, states = self.queue.latents.clone(), dict(self.queue.state)
        for i, window in enumerate(self.queue.shape.windows):
            answer = self.denoise(self.batch([window], [i], latents))
            prediction = _placed(torch.zeros_like(latents), answer.prediction[:, :, window.keep], window.write)
            push = torch.zeros_like(latents)
            if answer.push is not None:
                push = _placed(push, answer.push[:, :, window.keep], window.write)
            stepped, state = self._step(latents, prediction, push, window.write)
            latents = _placed(latents, stepped, window.write)
            states = {n: _placed(t, state[n], window.write) for n, t in states.items()}
        return latents, states

    @property
    def passed_on(self) -> int:
        """Latents of the film that have been handed to the decoder so far."""
        return max(0, self.queue.first_number + self.queue.shape.head - sum(hook.held for hook in self.hooks))

    def forget(self, slot: int) -> None:
        """For hooks that replace a latent: the solver's history of that slot no longer holds and is cleared this tick."""
        self._forgotten.add(slot)

    def tick(self) -> tuple[torch.Tensor, list[int]]:
        """One step for everything in the queue; the latents that left, [1, C, K, H, W] (K may be 0), and their frame
        numbers."""
        with torch.no_grad():
            stepped, state = self._parallel() if self.order == "parallel" else self._in_place()
            for hook in self.hooks:
                stepped = hook.after_step(self, stepped)
            for slot in self._forgotten:
                for tensor in state.values():
                    tensor[:, :, slot] = 0
            self._forgotten.clear()
            first = self.queue.next_number
            numbers = range(first, first + self.queue.shape.latents_per_level)
            left, left_numbers = self.queue.advance(stepped, state, self.tail(self, stepped, numbers))
            for hook in self.hooks:
                left = hook.on_leave(left, left_numbers)
            for hook in self.hooks:
                left, left_numbers = hook.pass_on(self, left, left_numbers)
        return left, left_numbers

    def settings(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed, JSON-ready."""
        return {
            "queue": self.queue.shape.settings(),
            "solver": self.solver.settings(),
            "seed": self.seed,
            **self.tail.settings(),
            "hooks": [hook.settings() for hook in self.hooks],
        }


def _placed(whole: torch.Tensor, values: torch.Tensor, part: slice) -> torch.Tensor:
    out = whole.clone()
    out[:, :, part] = values.to(out)
    return out


def sample_clip(
    denoise: Denoise,
    solver: FrameSolver,
    like: torch.Tensor,
    *,
    seed: int = 0,
    progress: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """An ordinary clip [1, C, F, H, W] by the same model and solver, all latents at one level; frames 0 .. F-1 of `seed`.

    like: any tensor of that shape. progress: show a bar. after_step: told the number of steps done.
    Equals the stock pipeline's loop from the same noise.
    """
    length = like.shape[2]
    sample = frame_noise(seed, range(length), like, purpose="start")
    state = solver.empty_state(sample)
    numbers = torch.arange(length)
    with torch.no_grad():
        hidden = None if progress else True  # None: shown in a terminal and in a notebook, not in a log
        for level in tqdm(range(solver.num_levels - 1, -1, -1), desc="first clip", unit="step", disable=hidden):
            levels = torch.full((length,), level)
            answer = denoise(WindowBatch(sample, levels[None], numbers[None], (slice(0, length),), (0,)))
            noise = None
            if solver.needs_noise:
                noise = frame_noise(seed, range(length), sample, purpose="step", variants=levels.tolist())
            sample, state = solver.step(sample, answer.prediction.to(sample), levels, state, noise)
            if after_step is not None:
                after_step(solver.num_levels - level)
    return sample


def start_queue(shape: QueueShape, solver: FrameSolver, clip: torch.Tensor, *, seed: int = 0) -> LatentQueue:
    """A queue filled from a clean clip [1, C, K, H, W]: each latent brought to its level with its own noise."""

    def noise(clean: torch.Tensor, levels: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        fresh = frame_noise(seed, numbers.tolist(), clean, purpose="renoise", variants=levels.tolist())
        return solver.grid.add_noise(clean, levels, fresh)

    return LatentQueue.start(shape, clip.float(), noise, solver.empty_state)
