"""Whether a file that a node reads is still the one it read: ComfyUI keeps results while inputs are the same."""

from pathlib import Path

_DEEPEST = 2  # a pipeline folder holds its components one below


def fingerprint(text: str) -> str:
    """Size and time of the file or of every file in the folder that `text` names; the text itself for anything else.

    A hub id has no time; empty stands for what is shipped.
    """
    path = Path(text.strip()).expanduser()
    try:
        files = [path] if path.is_file() else _inside(path) if path.is_dir() and text.strip() else []
        told = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    except OSError:  # gone, or not to be read: the node itself says so
        return text
    return repr(told) if told else text


def _inside(folder: Path) -> list[Path]:
    found = [file for depth in range(1, _DEEPEST + 1) for file in folder.glob("/".join("*" * depth)) if file.is_file()]
    return sorted(found)
