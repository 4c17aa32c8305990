"""The pages' code imports and calls what exists, and relies on nothing that the oldest accepted diffusers lacks."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DTYPE_SINCE = (0, 40)  # DiffusionPipeline.from_pretrained reads `dtype` from this version on; older ones ignore it silently


def _floor(package: str) -> tuple[int, ...]:
    found = re.search(rf'"{package}>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found is not None
    return tuple(int(part) for part in found.group(1).split("."))


def test_the_oldest_diffusers_reads_the_dtype_that_the_pages_give() -> None:
    assert _floor("diffusers") >= DTYPE_SINCE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_name_the_dtype_in_one_way_and_need_no_ffmpeg(page: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    assert "torch_dtype" not in code
    assert "export_to_video" not in code, "it needs a ffmpeg that is not installed; use genattn.save_video"


def _named(node: ast.expr, names: dict[str, Any]) -> Any:
    """The object behind a name or a dotted name of a block; None where the block made it itself."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_named(node.value, names), node.attr, None)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_code_imports_and_calls_is_there(page: Path) -> None:
    """Also in blocks that no test runs, because they need a large model."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        tree = ast.parse(block)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page.name, "exec"), names)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and inspect.ismodule(module := _named(node.value, names)):
                assert hasattr(module, node.attr), f"{page.name}: {module.__name__} has no {node.attr}"
            if not isinstance(node, ast.Call) or not (target := _named(node.func, names)):
                continue
            if not getattr(target, "__module__", "").startswith("genattn"):
                continue
            if inspect.isclass(target) and issubclass(target, Exception):
                continue
            takes = inspect.signature(target).parameters
            given = {keyword.arg for keyword in node.keywords} - {None}
            free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
            assert free or given <= set(takes), f"{page.name}: {ast.unparse(node)}"
