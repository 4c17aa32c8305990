"""Other libraries' lines at import time do not reach the user of a command, be it `genattn` or a module of the laboratory."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from genattn import quiet


def test_a_module_run_as_a_program_is_quiet(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "genattn.pipelines.tiny.studies.nag", "--help"]  # imports diffusers before anything else
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout


def test_an_import_changes_no_logger(tmp_path: Path) -> None:
    asked = "import logging, genattn; print([name for name, it in logging.root.manager.loggerDict.items() if it.filters])"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_only_the_known_lines_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    quiet.quieten()
    quiet.quieten()
    for name, parts in quiet._LINES.items():
        logger = logging.getLogger(name)
        assert len([f for f in logger.filters if isinstance(f, quiet._LeftOut)]) == 1
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=name):
            logger.propagate, before = True, logger.propagate
            for part in parts:
                logger.warning("x %s y", part)
                logger.error("x %s y", part)
            logger.warning("something else")
            logger.propagate = before
        told = [(record.levelname, record.getMessage()) for record in caplog.records]
        assert told == [("ERROR", f"x {part} y") for part in parts] + [("WARNING", "something else")], name
