"""Sparse attention, head-level guidance and endless video for stock diffusers models and pipelines."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

# a wheel holds kernels/, guidance/, pipelines/ and apps/ inside genattn/; a checkout holds them beside it
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

# `python -m genattn.MODULE`: Python looks for the module, with "-m" in the place of the program's name. It is a program of ours
# then, and as quiet as `genattn` is; before its own imports, which are at its top.
if getattr(sys, "argv", [])[:1] == ["-m"]:
    import_module("genattn.quiet").quieten()

# name -> module that holds it; resolved on first use, so that `import genattn` costs nothing beyond the standard library.
# Type checkers and editors read the same names in `__init__.pyi`.
_EXPORTS = {
    "DensePattern": "genattn.patterns.dense",
    "GenAttnError": "genattn.errors",
    "NeighborhoodPattern": "genattn.patterns.neighborhood",
    "Pattern": "genattn.patterns.pattern",
    "RadialPattern": "genattn.patterns.radial",
    "Schedule": "genattn.seam.schedule",
    "TokenLayout": "genattn.geometry.token_layout",
    "apply": "genattn.seam.handle",
    "attention": "genattn.functional.dispatch",
    "long_video": "genattn.pipelines.long_video.generate",
    "remove": "genattn.seam.handle",
    "save_video": "genattn.pipelines.long_video.output.save_video",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'genattn' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
