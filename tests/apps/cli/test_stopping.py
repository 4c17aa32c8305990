"""A stop is heard wherever it comes, also where Python drops what is raised."""

import os
import signal
import sys
import time
import weakref
from collections.abc import Callable

import pytest

from genattn.apps.cli.stopping import MESSAGE, heeding_terminate

STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]


class Thing:
    pass


def _in_destructor(number: int) -> None:
    class Ends:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    Ends()


def _in_callback(number: int) -> None:
    def gone(_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.01)

    thing = Thing()
    kept = weakref.ref(thing, gone)
    del thing
    assert kept() is None


def _plainly(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.usefixtures("hangup_is_heard")
@pytest.mark.parametrize(("number", "code"), STOPS)
@pytest.mark.parametrize("place", [_plainly, _in_destructor, _in_callback])
def test_a_stop_ends_the_work_wherever_it_comes(place: Callable[[int], None], number: int, code: int) -> None:
    hook, handlers = sys.unraisablehook, [signal.getsignal(each) for each, _ in STOPS]
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), heeding_terminate():
        pytest.fail(f"it was not heard: {place(number)} {time.sleep(30)}")
    assert time.monotonic() - begun < 25, "it ends the wait, too"
    assert MESSAGE.code == code
    assert sys.unraisablehook is hook
    assert [signal.getsignal(each) for each, _ in STOPS] == handlers


def test_a_closed_terminal_does_not_stop_what_nohup_started() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with heeding_terminate():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_other_errors_of_destructors_are_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))

    class Fails:
        def __del__(self) -> None:
            raise ZeroDivisionError

    with heeding_terminate():
        Fails()
    assert told == [ZeroDivisionError]
