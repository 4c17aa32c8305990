"""Files that people hand over: JSON of any encoding that editors write, and one error for whatever is wrong in it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.text_file import read_text

# what a value of the wrong kind ends in where it is first used
_DAMAGE = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)


def read_json(path: str | Path, what: str) -> Any:
    """The content of a JSON file, see `read_text`. what: for the message, as "a head set".

    Raises GenAttnError for a file that is missing, is no text, or is no JSON.
    """
    try:
        return json.loads(read_text(Path(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise GenAttnError(f"{what} must be a readable JSON file, got {path} ({error}); check the path") from error


@contextmanager
def whole(what: str) -> Iterator[None]:
    """While entered, a value of a wrong kind is a GenAttnError that names `what`: the thing that is read."""
    try:
        yield
    except GenAttnError:
        raise
    except _DAMAGE as error:
        told = str(error).strip().splitlines() or [""]
        raise GenAttnError(
            f"{what} is damaged or was changed by hand ({type(error).__name__}: {told[0]}); write it again"
        ) from error
