"""Files that are whole or not there, whatever ends the write."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from genattn import whole_file as module
from genattn.whole_file import whole_file, write_whole


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_write_that_fails_leaves_the_old_file_alone(error: type[BaseException], tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a.json", "old")
    with pytest.raises(error), whole_file(path) as part:  # noqa: PT012
        part.write_text("half")
        raise error
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a" / "b" / "ä 猫.txt", "text\n")
    assert path.read_bytes() == b"text\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    link = tmp_path / "a.json"
    link.symlink_to(tmp_path / "big" / "b.json")
    for text in ("one", "two"):  # a link to nothing, and one to a file
        write_whole(link, text)
        assert (link.is_symlink(), (tmp_path / "big" / "b.json").read_text()) == (True, text)


def test_who_may_read_a_file_stays(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a.json", "old")
    path.chmod(0o600)
    write_whole(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600


def test_safetensors_tells_of_a_full_disk_as_everybody_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(OSError, match="No space left") as told, whole_file(tmp_path / "a.safetensors"):
        raise full
    assert (told.value.errno, told.value.filename) == (errno.ENOSPC, str(tmp_path / "a.safetensors"))
    with pytest.raises(OSError, match="something else") as told, whole_file(tmp_path / "a.safetensors"):
        raise SafetensorError("something else")
    assert told.value.errno == errno.EIO
    with whole_file(tmp_path / "a.safetensors") as part:
        save_file({"x": torch.ones(1)}, part)
    assert (tmp_path / "a.safetensors").is_file()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nothing tells whether a process lives")
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom genattn.whole_file import whole_file\n"
        "with whole_file(sys.argv[1]) as part:\n    part.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = write_whole(tmp_path / "a.json", "old")
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    left = [p.name for p in tmp_path.iterdir() if p != path]
    assert len(left) == 1
    assert left[0].startswith(".a.json.")
    assert path.read_text() == "old"
    living = tmp_path / f".a.json.{module._HOST}-{os.getppid()}-0.part"
    elsewhere = tmp_path / f".a.json.00000000-{os.getpid()}-0.part"
    another = tmp_path / left[0].replace(".a.json.", ".b.json.")
    for file in (living, elsewhere, another):
        file.write_text("")
    write_whole(path, "new")
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", living.name, elsewhere.name, another.name}


def test_two_writers_in_one_process_do_not_meet(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a") as one, whole_file(tmp_path / "a") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "one")]
