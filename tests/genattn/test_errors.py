"""What is told of another library's error is one line, and never nothing."""

import pytest

from genattn.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("one\ntwo"), "one"),
        (OSError("\n  one  \n"), "one"),
        (TimeoutError(), "TimeoutError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
