"""What the node pack takes from ComfyUI's own modules, read from its source: names, and how its functions are called.

Run as a program it writes the list that `test_core_symbols` holds: python core_symbols.py > core_symbols.txt
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import genattn

CORE = ("comfy", "comfy_api", "folder_paths", "latent_preview", "nodes", "node_helpers", "comfy_extras", "execution")


@dataclass(frozen=True, order=True)
class Use:
    """One name of a core module. call: "" where it is not called, else "positional;keywords" with * or ** for spread ones."""

    module: str
    name: str
    call: str = ""

    def __str__(self) -> str:
        return f"{self.module} {self.name} {self.call}".rstrip()


def pack_sources() -> list[Path]:
    """The Python files of the pack and of all it adds to ComfyUI."""
    (folder,) = (path for root in genattn.__path__ if (path := Path(root) / "apps" / "comfyui").is_dir())
    return sorted(folder.rglob("*.py"))


def uses_in(source: str) -> set[Use]:
    """Every name of ComfyUI's modules that a source touches, by `from m import n`, `m.n` and `alias.n`."""
    tree = ast.parse(source)
    modules, names, found = dict[str, str](), dict[str, tuple[str, str]](), set[Use]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in CORE:
                    modules[alias.asname or alias.name] = alias.name
                    found.add(Use(alias.name, "*"))
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in CORE:
            assert node.module is not None
            for alias in node.names:
                names[alias.asname or alias.name] = (node.module, alias.name)
                found.add(Use(node.module, alias.name))
    calls = {id(node.func): _call(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        told = calls.get(id(node), "")
        if isinstance(node, ast.Attribute) and (module := modules.get(ast.unparse(node.value))):
            found.add(Use(module, node.attr, told))
        elif isinstance(node, ast.Name) and node.id in names and told:
            found.add(Use(*names[node.id], told))
    return {use for use in found if use.call or not any(o.call and (o.module, o.name) == (use.module, use.name) for o in found)}


def _call(node: ast.Call) -> str:
    starred = any(isinstance(arg, ast.Starred) for arg in node.args)
    keywords = sorted(word.arg or "**" for word in node.keywords)
    return f"{'*' if starred else len(node.args)};{','.join(keywords)}"


def why_missing(use: Use, core: Path) -> str:
    """Why a core does not have a name, or could not be called so; empty when it can."""
    tree = _source(core, use.module)
    if tree is None and not (core / use.module.replace(".", "/")).is_dir():
        return f"{use.module} is gone"
    if use.name == "*":
        return ""
    bound = {} if tree is None else dict(_bound(tree))
    if use.name not in bound:
        return "" if _source(core, f"{use.module}.{use.name}") is not None else f"{use.module} has no {use.name}"
    return _why_unbindable(use, bound[use.name]) if use.call else ""


def _source(core: Path, module: str) -> ast.Module | None:
    base = core / module.replace(".", "/")
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return None


def _bound(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names at the top of a module, also those under `if` and `try`; methods are none."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from ((part.id, node) for part in ast.walk(target) if isinstance(part, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from _bound(node)


def _why_unbindable(use: Use, node: ast.AST) -> str:
    """A call against a function's parameters, or those of a class's `__init__`."""
    if isinstance(node, ast.ClassDef):
        node = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"), node)
        skipped = 1
    else:
        skipped = 0
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        return ""
    told, _, words = use.call.partition(";")
    given = [word for word in words.split(",") if word]
    if told == "*" or "**" in given:
        return ""
    plain = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)][skipped:]
    known = {*plain, *(arg.arg for arg in node.args.kwonlyargs)}
    unknown = [word for word in given if word not in known]
    if unknown and node.args.kwarg is None:
        return f"{use.module}.{use.name} takes no {', '.join(unknown)}"
    if int(told) > len(plain) and node.args.vararg is None:
        return f"{use.module}.{use.name} takes {len(plain)} arguments, not {told}"
    required = plain[int(told) : len(plain) - len(node.args.defaults)]
    lacking = [name for name in required if name not in given]
    return f"{use.module}.{use.name} wants {', '.join(lacking)}" if lacking else ""


if __name__ == "__main__":
    found = set().union(*(uses_in(file.read_text(encoding="utf-8")) for file in pack_sources()))
    print("\n".join(str(use) for use in sorted(found)))
