"""Prompts from a text file, one a line."""

from pathlib import Path

from genattn.errors import GenAttnError
from genattn.text_file import read_text


def read_prompts(path: Path, option: str = "--prompts") -> list[str]:
    """The lines of `path`; empty ones and those that begin with # are left out.

    Raises GenAttnError, naming `option`, when the file cannot be read or holds none.
    """
    try:
        lines = [line.strip() for line in read_text(path).split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise GenAttnError(f"{option} must be a readable text file, got {str(path)!r} ({reason}); check the path") from None
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise GenAttnError(f"{option} must hold a prompt a line, got none in {str(path)!r}; write some")
    return prompts
