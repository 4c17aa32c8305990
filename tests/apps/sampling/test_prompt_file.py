"""Prompts come from text files, one a line."""

from pathlib import Path

import pytest

from genattn.apps.sampling.prompt_file import read_prompts
from genattn.errors import GenAttnError


def test_comments_and_empty_lines_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "two.txt").write_text("a cat\n# no\n\n a dog \n")
    assert read_prompts(tmp_path / "two.txt") == ["a cat", "a dog"]


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match=r"--held-out must be a readable text file, got '.*none.txt' \(No such file"):
        read_prompts(tmp_path / "none.txt", "--held-out")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GenAttnError, match="it is not UTF-8 text"):
        read_prompts(tmp_path / "bytes.txt")
    (tmp_path / "empty.txt").write_text("# a comment\n\n")
    with pytest.raises(GenAttnError, match="--prompts must hold a prompt a line, got none"):
        read_prompts(tmp_path / "empty.txt")
