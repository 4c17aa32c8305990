"""What a call does when it says nothing: every default of a public class or function and every public constant, as written
down in defaults.txt.

A default is a promise that no other test may meet. Where one is meant to change: tests/test_defaults.py > tests/defaults.txt
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("kernels", "genattn", "guidance", "pipelines", "apps")
# what measures and draws for this repository alone, and random models for tests
LEFT_OUT = ("apps/laboratory", "apps/pages", "apps/bench/gpu", "pipelines/tiny/studies", "pipelines/tiny/random")
# these gather what happens in a run; all other dataclasses are settings or findings, which nobody may change later
GATHER = {
    "apps/cli/stopping: StopMessage",
    "apps/comfyui/hosts/call: RawCall",
    "apps/comfyui/patching/forward: Visit",
    "apps/comfyui/patching/forward: Forward",
    "apps/comfyui/patching/text_blocks: Look",
    "apps/comfyui/patching/two_texts: TwoTexts",
    "apps/comfyui/schema: Answer",
    "genattn/patterns/pattern: SiteMemory",
    "genattn/seam/explain: SiteForecast",
    "genattn/seam/plugin: Run",
    "genattn/seam/plugin: CallRecord",
    "genattn/seam/report: SiteStats",
    "genattn/seam/steps: _Progress",
    "guidance/broadway/forward_maps: ForwardMaps",
    "guidance/nag/carriers: Carried",
    "guidance/nag/nag: _Model",
    "guidance/passes/pass_role: _Seen",
    "guidance/softpag/softpag: _State",
    "guidance/softpag/softpag: GuidedStep",
    "guidance/softpag/tap: TappedModel",
    "pipelines/finetune/data: Dataset",
    "pipelines/long_clip/rotary_tables: _Slot",
    "pipelines/long_video/queue/latent_queue: LatentQueue",
    "pipelines/long_video/run: LongVideoResult",
    "pipelines/long_video/run: RunParts",
}


@functools.cache
def _trees() -> tuple[tuple[str, ast.Module], ...]:
    return tuple(_read())


def _read() -> Iterator[tuple[str, ast.Module]]:
    for top in TOPS:
        for path in sorted((ROOT / top).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(LEFT_OUT):
                yield name.removesuffix(".py"), ast.parse(path.read_text())


def _options(node: ast.ClassDef) -> dict[str, ast.expr] | None:
    """What a dataclass is made with; None for another class."""
    for decorator in node.decorator_list:
        call = decorator if isinstance(decorator, ast.Call) else ast.Call(decorator, [], [])
        if ast.unparse(call.func) == "dataclass":
            return {keyword.arg or "": keyword.value for keyword in call.keywords}
    return None


def _told(pairs: Iterator[tuple[str, ast.expr]]) -> str:
    """Numbers, words and switches; a default that is nothing, or is worked out, is left to the tests of what it does."""
    found: dict[str, Any] = {}
    for name, node in pairs:
        try:
            found[name] = ast.literal_eval(node)
        except ValueError:
            continue
    return ", ".join(f"{name}={value!r}" for name, value in found.items() if value not in (None, "", ()))


def _fields(node: ast.ClassDef, options: dict[str, ast.expr]) -> Iterator[tuple[str, ast.expr]]:
    yield from ((name, value) for name, value in options.items() if name != "frozen")
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or item.value is None:
            continue
        name, value = ast.unparse(item.target), item.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
            yield from ((f"{name}.{keyword.arg}", keyword.value) for keyword in value.keywords)
        else:
            yield name, value


def _parameters(node: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    places, named = [*node.args.posonlyargs, *node.args.args], node.args
    yield from ((arg.arg, value) for arg, value in zip(places[::-1], named.defaults[::-1], strict=False))
    yield from ((arg.arg, value) for arg, value in zip(named.kwonlyargs, named.kw_defaults, strict=True) if value is not None)


def _constants(body: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id.isupper() and not target.id.startswith("_"):
            parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if any(isinstance(part, int | float) for part in parts):  # tables of words are read where they are used
                yield target.id, node.value  # type: ignore[union-attr, misc]


def _public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, defaults) of every class and function that has some."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            options = _options(node)
            yield prefix + node.name, "" if options is None else _told(_fields(node, options))
            yield from _public(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            yield prefix + node.name, _told(_parameters(node))


def written() -> dict[str, str]:
    """Every file's constants and public names with their defaults, as they stand in the code."""
    found = {f"{file}: ": _told(_constants(tree.body)) for file, tree in _trees()}
    found |= {f"{file}: {name}": told for file, tree in _trees() for name, told in _public(tree.body)}
    return {name: told for name, told in sorted(found.items()) if told}


def test_defaults_are_those_that_were_promised() -> None:
    lines = (ROOT / "tests" / "defaults.txt").read_text().splitlines()
    promised = {name: told.removesuffix(")") for name, _, told in (line.partition("(") for line in lines)}
    found = written()
    changed = [f"{name}({told})" for name, told in found.items() if promised.get(name) != told]
    assert not changed, "a default changed; where it is meant to, write defaults.txt anew and tell it in CHANGELOG.md"
    assert not set(promised) - set(found), "these defaults are gone; write defaults.txt anew"


def test_only_what_gathers_can_be_changed() -> None:
    classes = [(file, node) for file, tree in _trees() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    made = {f"{file}: {node.name}": _options(node) for file, node in classes}
    assert {name for name, options in made.items() if options is not None and "frozen" not in options} == GATHER
    assert all(ast.literal_eval(options["frozen"]) for options in made.values() if options and "frozen" in options)


if __name__ == "__main__":
    print("\n".join(f"{name}({told})" for name, told in written().items()))
