"""A place is held by one run at a time, in threads and processes, and nothing of the lock is left."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from genattn.errors import GenAttnError
from genattn.one_writer import leave_lock, only_writer, take_lock

HOLD = """
import sys, time
from genattn.one_writer import only_writer
with only_writer(sys.argv[1], "x"):
    print(1, flush=True)
    time.sleep(600)
"""


def test_the_second_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    place = tmp_path / "new" / "tuned"
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(GenAttnError) as told, only_writer(tmp_path / "new" / ".." / "new" / "tuned", "--out"):
            pass
        refused.append(str(told.value))

    with only_writer(place, "--out"), only_writer(tmp_path / "new" / "other", "--out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert "is in use: another run writes there at this moment; wait for it to end, or give another --out" in refused[0]
    with only_writer(place, "--out"):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_a_patient_one_waits(tmp_path: Path) -> None:
    def second() -> None:
        with only_writer(tmp_path / "a", "--out", patience=60):
            order.append("second")

    order: list[str] = []
    thread = threading.Thread(target=second)
    with only_writer(tmp_path / "a", "--out"):
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_an_error_lets_the_place_go(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "a", "--out"):
        print(1 / 0)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_lets_the_place_go(tmp_path: Path) -> None:
    code = [sys.executable, "-c", HOLD, str(tmp_path / "a")]
    with subprocess.Popen(code, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(GenAttnError, match="a is in use: another run"), only_writer(tmp_path / "a", "--out"):
            pass
        holder.kill()
    with only_writer(tmp_path / "a", "--out"):
        pass
    assert list(tmp_path.iterdir()) == [], "what the killed one left has gone too"


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking the file, its holder removes it: a third run would make a new one and hold that."""
    path, real, gone = tmp_path / "x.lock", Path.exists, iter([True])

    def exists(self: Path) -> bool:
        if self == path and next(gone, False):
            self.unlink()
        return real(self)

    monkeypatch.setattr(Path, "exists", exists)
    lock = take_lock(path, "x: another", "x")
    assert path.is_file()
    with pytest.raises(GenAttnError, match="x: another writes there"):
        take_lock(path, "x: another", "x")
    leave_lock(lock)
    leave_lock(lock)
    assert not path.is_file()
