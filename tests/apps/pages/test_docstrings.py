"""Examples in docstrings run: everything that looks like an interpreter session, in every module that has one."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("genattn", "kernels", "guidance", "pipelines", "apps")


def modules_with_examples() -> list[str]:
    found = []
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text():
                parts = file.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(parts if folder == "genattn" else ("genattn", *parts)))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_there_are_examples() -> None:
    assert len(modules_with_examples()) >= 8
