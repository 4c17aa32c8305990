"""The house: who imports whom, what the wheel holds, what an import costs, and whose `kernels` a bare import finds."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["kernels", "genattn", "guidance", "pipelines", "apps"]  # each may import itself and those before it
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports are banned"
            names.add(node.module or "")
    return names


def _room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "genattn":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "genattn"


# the two doors of the package itself: they hand over to a room further down, when called
DOORS = {ROOT / "genattn" / "__init__.py", ROOT / "genattn" / "__main__.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        if path in DOORS:
            continue
        for name in _imports(path):
            target = _room(name)
            if target is not None:
                assert ROOMS.index(target) <= ROOMS.index(room), f"{path.relative_to(ROOT)} imports {name}"


def test_kernels_need_only_torch_and_triton() -> None:
    allowed = {"genattn", "torch", "triton", "xformers"} | set(sys.stdlib_module_names)
    optional = {"flashinfer", "natten", "spas_sage_attn", "flash_attn", "flash_attn_interface"}  # used when installed
    for path in (ROOT / "kernels").rglob("*.py"):
        top = {name.split(".")[0] for name in _imports(path)}
        assert top <= allowed | optional, f"{path.name} imports {sorted(top - allowed - optional)}"


@pytest.mark.parametrize("room", [r for r in ROOMS if r != "genattn"])
def test_mapped_folders_have_no_init(room: str) -> None:
    assert not (ROOT / room / "__init__.py").exists(), "a bare `import kernels` must keep meaning the other package"
    assert not (ROOT / "genattn" / room).exists(), f"genattn/{room} would hide the folder {room}/"


def test_every_package_is_listed() -> None:
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for room in ROOMS:
        base = "genattn" if room == "genattn" else f"genattn.{room}"
        for path in (ROOT / room).rglob("*.py"):
            inner = path.parent.relative_to(ROOT / room).parts
            found.add(".".join((base, *inner)))
    assert found <= listed, f"add to [tool.setuptools] packages: {sorted(found - listed)}"


def _run(code: str, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, json, genattn; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    loaded = set(json.loads(_run(code, tmp_path)))
    assert not loaded & {"torch", "diffusers", "transformers", "triton", "gradio", "matplotlib"}


def test_core_needs_no_optional_part(tmp_path: Path) -> None:
    """Patterns and attention work with diffusers, triton and gradio out of reach."""
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'triton', 'gradio', 'xformers'): sys.modules[name] = None\n"
        "import torch, genattn\n"
        "layout = genattn.TokenLayout.from_grid((2, 3, 4))\n"
        "q = torch.randn(1, layout.seqlen, 1, 8)\n"
        "print(genattn.attention(q, q, q, genattn.RadialPattern(), layout).shape)\n"
    )
    assert "torch.Size([1, 24, 1, 8])" in _run(code, tmp_path)


def test_public_names_resolve() -> None:
    import genattn

    assert len(genattn.__all__) - 1 <= 12
    for name in genattn.__all__:
        assert getattr(genattn, name) is not None, name
    assert set(genattn.__all__) <= set(dir(genattn))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        genattn.nonsense  # noqa: B018


def test_bare_kernels_is_not_ours() -> None:
    code = "import kernels; print(getattr(kernels, '__file__', None))"
    assert str(ROOT / "kernels") not in _run(code, ROOT)


def test_wheel_is_complete(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    source = tmp_path / "source"
    _copy_sources(source)
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for room in ROOMS:
        for path in (source / room).rglob("*"):
            if path.suffix in {".py", ".json", ".cpp", ".typed"}:
                inside = path.relative_to(source) if room == "genattn" else Path("genattn") / path.relative_to(source)
                assert str(inside) in names, f"the wheel lacks {inside}"
    assert "genattn/assets/tiny-wan/model_index.json" in names
    assert not any(n.startswith(("kernels/", "tests/", "assets/")) for n in names)


def _copy_sources(target: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if not (ROOT / name).is_file():
            continue
        if name.split("/")[0] in {*ROOMS, "assets"} or name in {"pyproject.toml", "README.md", "LICENSE"}:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
