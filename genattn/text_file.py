"""Text as people's editors save it: UTF-8 with or without a byte order mark, and UTF-16 with one."""

import codecs
from pathlib import Path

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def decoded(content: bytes) -> str:
    """The text of a file's content, without its byte order mark. Raises UnicodeDecodeError where it is in another encoding."""
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    text = content.decode(encoding)
    if "\0" in text:  # UTF-16 without a mark, UTF-32, or no text at all: every byte of it may pass for UTF-8
        raise UnicodeDecodeError(encoding, content, 0, min(4, len(content)), "zero bytes")
    return text


def read_text(path: Path) -> str:
    """The text of a file; see `decoded`. Line ends become "\\n"."""
    return decoded(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
