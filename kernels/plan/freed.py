"""Memory that plans gave up, handed back to the system.

Plans of ever new lengths leave holes of ever new sizes between the tensors that stay, and the C library keeps them.
"""

import ctypes
import functools

GIVE_BACK = "give back after first use"  # in the cache of a plan that came in another's place


def give_back() -> None:
    """Let the C library return what was freed, where it can (glibc); some milliseconds."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # no such thing on Windows
        return None
