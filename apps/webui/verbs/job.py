"""One piece of work of the app: in a thread of its own, telling how far it is, stopped within one step.

    for update in Job(work, lock).updates(): ...        # closing the generator stops the work

A browser must hear something several times a second and must be able to stop at any moment, while a pipeline's call returns
once, at the end. So the call runs in a thread; a hook on the denoiser asks before every forward whether it should go on.
One job at a time holds the lock: the pipelines are shared by all visitors. Messages queue up to a bound, so a slow reader
slows the work down and memory stays bounded.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

HEARTBEAT_SECONDS = 0.25
QUEUED_MESSAGES = 4


class Stopped(Exception):
    """The visitor does not want the result any more."""


@dataclass(frozen=True)
class Update:
    """What a job tells: where it is, and the results that are new; `last` with the final ones."""

    stage: str
    done: int = 0
    total: int | None = None
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)
    last: bool = False

    def text(self) -> str:
        """One line for people, with a bar where the end is known."""
        if self.last:
            return f"**{self.stage}** in {self.seconds:.1f} s"
        if not self.total:
            return f"{self.stage} · {self.seconds:.1f} s"
        full = round(20 * min(1.0, self.done / self.total))
        return f"`{'█' * full}{'░' * (20 - full)}` {self.stage} {self.done} of {self.total} · {self.seconds:.1f} s"


Work = Callable[["Job"], dict[str, Any]]


class Job:
    """Work to be done while `lock` is held.

    work: gets the job, to `tell` and to be stopped by; its answer is the values of the last update.
    """

    def __init__(self, work: Work, lock: AbstractContextManager[Any]) -> None:
        self.work, self.lock = work, lock
        self.stop_asked = threading.Event()
        self.ended = threading.Event()
        self.on_stop: list[Callable[[], None]] = []
        self.raising = True
        self._messages: queue.Queue[Update | BaseException] = queue.Queue(QUEUED_MESSAGES)
        self._begun = time.monotonic()
        self._latest = Update("waiting for the run before")

    # ---- from inside the work

    def tell(self, stage: str, done: int = 0, total: int | None = None, **values: Any) -> None:
        """Say where the work is and hand over new results; raises Stopped when nobody listens any more."""
        self._put(Update(stage, done, total, self._seconds(), values))

    def check(self) -> None:
        """Raise Stopped if the visitor asked for it."""
        if self.stop_asked.is_set() and self.raising:
            raise Stopped

    @contextmanager
    def watching(self, *models: Any) -> Iterator[None]:
        """While entered, every forward of the models asks first whether to go on."""

        def before_forward(module: Any, args: Any) -> None:
            self.check()

        with ExitStack() as stack:
            for model in models:
                stack.callback(model.register_forward_pre_hook(before_forward).remove)
            yield

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """While entered, a stop is left to the callbacks in `on_stop`, which end the work in good order."""
        self.raising = False
        try:
            yield
        finally:
            self.raising = True

    def on_step(self, stage: str, total: int) -> Callable[..., dict[str, Any]]:
        """A diffusers `callback_on_step_end` that tells the step."""

        def after_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            self.tell(stage, step + 1, total)
            return kwargs

        return after_step

    # ---- from outside

    def updates(self) -> Iterator[Update]:
        """Updates until the work is done, at least one every quarter of a second; raises what the work raises.

        Closing the generator early stops the work within one forward of the model.
        """
        thread = threading.Thread(target=self._run, name="genattn-job", daemon=True)
        thread.start()
        try:
            while True:
                message = self._next()
                if isinstance(message, BaseException):
                    raise message
                yield message
                if message.last:
                    return
        finally:
            self.stop()

    def stop(self) -> None:
        """Ask the work to stop; returns at once."""
        self.stop_asked.set()
        for call in self.on_stop:
            call()

    def _next(self) -> "Update | BaseException":
        try:
            message = self._messages.get(timeout=HEARTBEAT_SECONDS)
        except queue.Empty:
            old = self._latest
            return Update(old.stage, old.done, old.total, self._seconds())
        if isinstance(message, Update):
            self._latest = message
        return message

    def _run(self) -> None:
        try:
            with self.lock:
                self.check()
                self._begun = time.monotonic()
                values = self.work(self)
            self._put(Update("done", seconds=self._seconds(), values=values, last=True))
        except Stopped:
            pass
        except BaseException as error:  # the thread that listens raises it
            self._put(error, always=True)
        finally:
            self.ended.set()

    def _put(self, message: "Update | BaseException", always: bool = False) -> None:
        while True:
            if self.stop_asked.is_set():
                if always or not self.raising:
                    return
                raise Stopped
            try:
                self._messages.put(message, timeout=HEARTBEAT_SECONDS)
                return
            except queue.Full:
                continue

    def _seconds(self) -> float:
        return time.monotonic() - self._begun
