"""The rooms of this repository, read from its own source: what each is for, and who imports whom.

A room is a folder with code. The picture in docs/architecture.md leaves out every arrow that other arrows imply, so that forty
rooms stay readable; the table beside it names them all.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

from genattn.errors import GenAttnError

TOPS = ("kernels", "genattn", "guidance", "pipelines", "apps")
LABORATORY = (
    "apps/laboratory",
    "apps/laboratory/models",
    "apps/laboratory/mutation",
    "apps/laboratory/plans",
    "apps/laboratory/stacking",
    "apps/pages",
    "apps/pages/site",
    "pipelines/tiny/studies",
)
"""Rooms that are in the repository and not in the wheel."""
PACK = "apps/comfyui/pack"
"""What ComfyUI loads: a folder of files, entered from outside."""


@dataclass
class Room:
    """A folder with code. path: from the repository's root. about: first line of its docstring. imports: other rooms."""

    path: str
    about: str
    files: int = 0
    imports: set[str] = field(default_factory=set)


_DOORS = {
    "kernels": "Block-sparse attention: tensors in, tensors out; the choice of what computes it.",
    "genattn": "The names that users import, and the one error of the package.",
}


def module_name(path: Path, root: Path) -> str:
    """`kernels/plan/block_plan.py` as genattn.kernels.plan.block_plan."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts if parts[0] == "genattn" else ("genattn", *parts)).removesuffix(".__init__")


def read_rooms(root: Path) -> dict[str, Room]:
    """Every room under the five folders, by path, in the order kernels, genattn, guidance, pipelines, apps.

    Raises GenAttnError when `root` is no checkout.
    """
    sources = [path for top in TOPS for path in sorted((root / top).rglob("*.py"))]
    if not sources:
        raise GenAttnError(f"the rooms are read from a checkout, and {root} has none of {', '.join(TOPS)}; give its root")
    modules = {module_name(path, root): path for path in sources}
    rooms: dict[str, Room] = {}
    for path in sources:
        name = str(path.parent.relative_to(root))
        room = rooms.setdefault(name, Room(name, _about(path.parent, name)))
        text = path.read_text(encoding="utf-8")
        room.files += 1
        targets = {str(modules[m].parent.relative_to(root)) for m in imported(text) & modules.keys()}
        room.imports |= targets - {name}
    return rooms


def _about(folder: Path, name: str) -> str:
    init = folder / "__init__.py"
    said = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) if init.is_file() else None
    return _DOORS.get(name) or (said or "").split("\n")[0]


def imported(text: str) -> set[str]:
    """Full names of all that a module's source imports, wherever in it; `from a import b` gives both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def reachable(arrows: dict[str, set[str]], start: str) -> set[str]:
    """Everything that `start` imports, directly or through others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in arrows.get(waiting.pop(), ()):
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    return seen


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Rooms that import themselves through others; empty where imports point one way."""
    return sorted(room for room in arrows if room in reachable(arrows, room))


def without_implied(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no chain of other arrows implies (the transitive reduction); needs arrows without circles."""
    kept = {}
    for room, targets in arrows.items():
        through = {far for near in targets for far in reachable(arrows, near)}
        kept[room] = targets - through
    return kept


def picture(rooms: dict[str, Room]) -> str:
    """A Mermaid flow chart of the rooms, grouped by folder; dashed ones are not in the wheel."""
    arrows = without_implied({room.path: room.imports for room in rooms.values()})
    lines = ["```mermaid", "flowchart TB"]
    for top in reversed(TOPS):
        lines.append(f"  subgraph {top}_rooms [{top}/]")
        lines += [f"    {_node(path)}[{path.removeprefix(top + '/')}]" for path in rooms if path.split("/")[0] == top]
        lines.append("  end")
    lines += [f"  {_node(path)} --> {_node(target)}" for path in arrows for target in sorted(arrows[path])]
    lines.append("  classDef laboratory stroke-dasharray: 4 3")
    lines.append(f"  class {','.join(_node(path) for path in LABORATORY if path in rooms)} laboratory")
    return "\n".join([*lines, "```"])


def _node(path: str) -> str:
    return path.replace("/", "_") + "_room"


def table(rooms: dict[str, Room]) -> str:
    """A GitHub table: room, what it is for, and every room that it imports. No sizes: they change with every commit."""
    head = ["| room | what it is for | imports |", "| --- | --- | --- |"]
    return "\n".join(head + [_row(room) for room in rooms.values()])


def _row(room: Room) -> str:
    mark = " (not in the wheel)" if room.path in LABORATORY else ""
    imports = ", ".join(f"`{name}`" for name in sorted(room.imports)) or "-"
    return f"| `{room.path}/`{mark} | {room.about} | {imports} |"
