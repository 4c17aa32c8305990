"""Files that people hand over: JSON of any encoding that editors write, and one error for whatever is wrong in it."""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genattn.errors import GenAttnError
from genattn.settings import number, whole_number
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
        remedy = "check the path" if isinstance(error, OSError) else "check the path, or mend or remove the file"
        raise GenAttnError(f"{what} must be a readable JSON file, got {path} ({error}); {remedy}") from error


def read_object(path: str | Path, what: str) -> dict[str, Any]:
    """As `read_json`, for a file that must hold an object."""
    found = read_json(path, what)
    if not isinstance(found, dict):
        raise GenAttnError(f"{what} must hold a JSON object, got {type(found).__name__} in {path}; copy or write it again")
    return found


DEFAULTS_FILE = "genattn_defaults.json"


def read_defaults(folder: str | Path) -> dict[str, Any]:
    """What a model's folder says it was made for: height, width, frames, steps, guidance_scale, fps; {} where it says nothing.

    Raises GenAttnError for a file that cannot be read, or holds what none of these can be.
    """
    path = Path(folder) / DEFAULTS_FILE
    if not path.is_file():
        return {}
    found = read_object(path, "the defaults of a model")
    for name in ("height", "width", "frames", "steps"):
        if found.get(name) is not None:
            whole_number(f"{name} in {path}", found[name], 1, "a whole number >= 1; mend or remove the file", most=1_000_000)
    for name, least in (("fps", 1e-3), ("guidance_scale", -1e6)):
        if found.get(name) is not None:
            number(f"{name} in {path}", found[name], least, 1e6, "a finite number in its range; mend or remove the file")
    return found


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


def check_of(line: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of a JSON line's values: what is kept beside them tells whether they were changed."""
    return f"{zlib.crc32(json.dumps(line, sort_keys=True).encode()):08x}"
