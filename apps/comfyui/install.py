"""Put the node pack into a ComfyUI, and take it out again."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import genattn
from genattn.errors import GenAttnError

NAME = "genattn"
MARK = "comfy_entrypoint"
# beside it while it is copied or deleted; ComfyUI passes over names that end so
_COMING, _GOING = f"{NAME}.new.disabled", f"{NAME}.old.disabled"


def pack_folder() -> Path:
    """The node pack inside this installation: entry, help pages, example workflows, registry metadata.

    Raises GenAttnError if this installation came without it.
    """
    for root in genattn.__path__:
        folder = Path(root) / "apps" / "comfyui" / "pack"
        if (folder / "__init__.py").is_file():
            return folder
    raise GenAttnError("this installation has no ComfyUI node pack; install the whole genattn package again")


def custom_nodes(directory: Path) -> Path:
    """The custom_nodes folder of a ComfyUI (or of its --base-directory); raises GenAttnError when there is none."""
    found = directory if directory.name == "custom_nodes" else directory / "custom_nodes"
    if not found.is_dir():
        raise GenAttnError(f"{directory} is not a ComfyUI: it has no custom_nodes folder; give the folder that holds main.py")
    return found


def install(directory: Path, link: bool = False) -> Path:
    """Copy the pack (or link to it) into a ComfyUI; an older copy of it is replaced when the new one is whole. Returns its
    place.

    Raises GenAttnError, before anything is written, when there is something else of that name.
    """
    target = custom_nodes(directory) / NAME
    _check_ours(target)
    if link:
        remove(directory)
        target.symlink_to(pack_folder(), target_is_directory=True)
        return target
    coming = target.with_name(_COMING)
    _clear(coming)
    try:
        shutil.copytree(pack_folder(), coming, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        _put_aside(target)
        coming.rename(target)
    finally:
        _clear(coming)
        _clear(target.with_name(_GOING))
    return target


def remove(directory: Path) -> bool:
    """Take the pack out of a ComfyUI; False when it was not there. Raises GenAttnError when that name is somebody else's."""
    target = custom_nodes(directory) / NAME
    _check_ours(target)
    found = _put_aside(target)
    _clear(target.with_name(_GOING))
    return found


def _put_aside(target: Path) -> bool:
    """Free the pack's name in one move: a copy that a stop left without its entry would be taken for somebody else's."""
    going = target.with_name(_GOING)
    _clear(going)
    if target.is_symlink():
        target.unlink()
        return True
    if not target.exists():
        return False
    target.rename(going)
    return True


def _check_ours(target: Path) -> None:
    """Raise GenAttnError when something else has the pack's name."""
    if target.is_symlink():
        if target.exists() and target.resolve() != pack_folder().resolve():
            raise GenAttnError(f"{target} is a link to {target.resolve()}, which is not this pack; move it away first")
        return
    entry = target / "__init__.py"
    if target.exists() and (not entry.is_file() or MARK not in entry.read_text(encoding="utf-8")):
        raise GenAttnError(f"{target} is there and is not this pack; move it away first")


def _clear(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def installed_for(directory: Path, prefixes: Sequence[str] = ()) -> str:
    """What to do so that ComfyUI's own Python finds genattn, empty when that Python seems to be this one."""
    here = Path(sys.prefix).resolve()
    inside = [directory / name for name in ("venv", ".venv", "python_embeded", "../python_embeded", *prefixes)]
    other = next((place for place in inside if place.is_dir() and place.resolve() != here), None)
    return "" if other is None else f"ComfyUI has a Python of its own in {other}; install genattn[comfyui] there too"
