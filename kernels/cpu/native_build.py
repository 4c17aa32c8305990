"""Builds `block_sparse.cpp` with the machine's own C++ compiler on first use and loads it with ctypes.

The library lies in a cache folder under a name that hashes source, flags, compiler and processor, and appears there by an
atomic rename, so processes that race build it twice at worst and never load half of it. `GENATTN_NO_NATIVE=1` switches it
off, `GENATTN_CACHE` moves the folder, `CXX` names the compiler, `GENATTN_NATIVE_ARCH` replaces `native` in `-march=native`.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

_SOURCE = Path(__file__).with_name("block_sparse.cpp")
_BUILD_SECONDS = 300
_log = logging.getLogger("genattn")


def native_library() -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none (told once in the log when it is a failure)."""
    if os.environ.get("GENATTN_NO_NATIVE", "0") not in ("", "0"):
        return "switched off by GENATTN_NO_NATIVE"
    found = _load(os.environ.get("GENATTN_NATIVE_ARCH", "native"), os.environ.get("CXX"), str(cache_folder()))
    return found


def cache_folder() -> Path:
    """Where built libraries and measured tables are kept."""
    named = os.environ.get("GENATTN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(named) if named else Path(base) / "genattn"


@lru_cache(maxsize=8)
def _load(arch: str, compiler: str | None, folder: str) -> ctypes.CDLL | str:
    path = shutil.which(compiler) if compiler else shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if path is None:
        return _told(f"no C++ compiler found ({compiler or 'g++, clang++, c++'})")
    flags = _flags(arch)
    library = Path(folder) / f"block_sparse-{_fingerprint(path, flags)}.so"
    try:
        if not library.exists():
            _build(path, flags, library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return _told(f"{path} failed: {(error.stderr or '').strip().splitlines()[-1:]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return _told(f"the native library could not be built or loaded: {error}")


def _told(reason: str) -> str:
    _log.warning("genattn: the C++ attention kernel is not available, a slower path serves instead: %s", reason)
    return reason


def _flags(arch: str) -> list[str]:
    machine = platform.machine().lower()
    # clang on arm64 spells the host's own instruction set -mcpu
    target = f"-mcpu={arch}" if machine in ("arm64", "aarch64") else f"-march={arch}"
    return ["-O3", target, "-std=c++17", "-shared", "-fPIC", "-fopenmp"]


def _fingerprint(compiler: str, flags: list[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=30).stdout
    texts = [path.read_text() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h")))]
    parts = [*texts, *flags, os.path.realpath(compiler), version, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """Enough of the processor's identity that a shared home folder never serves the wrong instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _build(compiler: str, flags: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    handle, half = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        command = [compiler, *flags, str(_SOURCE), "-o", half]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)
        os.replace(half, library)
    finally:
        Path(half).unlink(missing_ok=True)
