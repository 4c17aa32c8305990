"""The house: who imports whom, what the wheel holds, what an import costs, and whose `kernels` a bare import finds."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from genattn.apps.pages.rooms import LABORATORY, TOPS, Room, circles, imported, read_rooms

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


# Who may import whom, room by room. A new arrow is a decision: it needs a word here, and one that is gone leaves.
MAY_IMPORT = {
    "kernels": "kernels/cpu kernels/peers kernels/plan kernels/reference kernels/triton",
    "kernels/cpu": "kernels/plan kernels/reference",
    "kernels/peers": "kernels/plan kernels/reference kernels/triton",
    "kernels/plan": "",
    "kernels/reference": "kernels/plan",
    "kernels/triton": "kernels/cpu kernels/plan kernels/reference",
    "genattn": "",
    "genattn/decoding": "genattn genattn/functional genattn/geometry genattn/layouts genattn/patterns genattn/seam",
    "genattn/distributed": "",
    "genattn/functional": (
        "genattn genattn/geometry genattn/patterns genattn/planning genattn/selection kernels kernels/peers "
        "kernels/plan kernels/triton"
    ),
    "genattn/geometry": "genattn kernels/plan",
    "genattn/hosts": "genattn genattn/functional genattn/patterns genattn/seam",
    "genattn/layouts": "genattn genattn/geometry",
    "genattn/patterns": "genattn genattn/geometry genattn/selection kernels/peers kernels/plan",
    "genattn/planning": "genattn genattn/geometry genattn/patterns genattn/selection kernels/plan",
    "genattn/profiling": (
        "genattn genattn/functional genattn/geometry genattn/layouts genattn/patterns genattn/seam genattn/selection"
    ),
    "genattn/seam": (
        "genattn genattn/distributed genattn/functional genattn/geometry genattn/layouts genattn/patterns genattn/planning "
        "kernels kernels/cpu kernels/plan"
    ),
    "genattn/selection": "genattn genattn/geometry kernels/plan kernels/reference",
    "guidance/broadway": (
        "genattn genattn/functional genattn/geometry genattn/layouts genattn/patterns genattn/seam "
        "guidance/passes "
        "kernels kernels/plan kernels/triton"
    ),
    "guidance/headhunter": "genattn genattn/seam guidance/heads guidance/passes guidance/softpag",
    "guidance/heads": "genattn",
    "guidance/nag": "genattn genattn/functional genattn/geometry genattn/layouts genattn/seam guidance/heads guidance/passes",
    "guidance/passes": "genattn genattn/layouts genattn/seam guidance/heads",
    "guidance/s2": "genattn genattn/seam guidance/heads guidance/passes guidance/softpag",
    "guidance/softpag": "genattn genattn/layouts genattn/seam guidance/heads guidance/passes kernels/plan",
    "guidance/tag": "genattn genattn/seam guidance/passes",
    "pipelines/finetune": (
        "genattn genattn/patterns genattn/seam "
        "pipelines/long_video/bases pipelines/long_video/solvers pipelines/training "
        "pipelines/video"
    ),
    "pipelines/long_clip": "genattn genattn/geometry genattn/layouts genattn/seam",
    "pipelines/long_video": (
        "genattn genattn/seam "
        "pipelines/long_video/bases pipelines/long_video/ouroboros pipelines/long_video/output "
        "pipelines/long_video/quality pipelines/long_video/queue"
    ),
    "pipelines/long_video/bases": "genattn pipelines/long_video/output pipelines/long_video/solvers",
    "pipelines/long_video/ouroboros": "genattn genattn/layouts genattn/seam pipelines/long_video/queue",
    "pipelines/long_video/output": "genattn pipelines/video",
    "pipelines/long_video/quality": "genattn pipelines/long_video/queue pipelines/video",
    "pipelines/long_video/queue": "genattn pipelines/long_video/bases pipelines/long_video/solvers",
    "pipelines/long_video/solvers": "genattn",
    "pipelines/tiny": "genattn pipelines/training",
    "pipelines/tiny/random": "genattn",
    "pipelines/tiny/studies": (
        "genattn genattn/layouts genattn/patterns genattn/seam "
        "guidance/broadway guidance/headhunter guidance/heads guidance/nag guidance/s2 guidance/softpag guidance/tag "
        "pipelines/finetune pipelines/long_clip pipelines/long_video/output pipelines/long_video/quality "
        "pipelines/tiny pipelines/training"
    ),
    "pipelines/training": "genattn",
    "pipelines/video": "genattn",
    "apps/bench": (
        "apps/sampling "
        "genattn genattn/functional genattn/geometry genattn/patterns "
        "kernels kernels/cpu kernels/peers kernels/plan kernels/reference kernels/triton"
    ),
    "apps/cli": (
        "apps/bench apps/comfyui apps/sampling apps/tuning apps/webui apps/webui/verbs "
        "genattn genattn/geometry genattn/patterns genattn/planning genattn/profiling "
        "guidance/headhunter "
        "pipelines/finetune pipelines/long_video pipelines/long_video/ouroboros pipelines/long_video/quality "
        "pipelines/tiny pipelines/training"
    ),
    "apps/comfyui": (
        "apps/sampling apps/comfyui/hosts apps/comfyui/patching "
        "genattn genattn/functional genattn/geometry genattn/layouts genattn/patterns genattn/planning genattn/profiling "
        "genattn/seam genattn/selection guidance/heads guidance/softpag kernels/plan "
        "pipelines/long_video pipelines/long_video/ouroboros"
    ),
    "apps/comfyui/hosts": "genattn genattn/geometry genattn/layouts genattn/seam",
    "apps/comfyui/patching": (
        "apps/comfyui/hosts genattn genattn/geometry genattn/layouts genattn/planning genattn/seam "
        "guidance/heads guidance/nag guidance/softpag "
        "pipelines/long_video/queue pipelines/long_video/solvers"
    ),
    "apps/comfyui/pack": "apps/comfyui",
    "apps/laboratory": (
        "apps/bench apps/sampling "
        "genattn genattn/decoding genattn/functional genattn/geometry genattn/layouts genattn/patterns "
        "genattn/planning genattn/seam genattn/selection "
        "guidance/broadway guidance/nag guidance/softpag "
        "kernels kernels/plan kernels/reference pipelines/long_clip "
        "pipelines/long_video pipelines/long_video/bases pipelines/long_video/ouroboros "
        "pipelines/long_video/quality pipelines/long_video/queue pipelines/tiny pipelines/tiny/random"
    ),
    "apps/laboratory/models": (
        "genattn genattn/layouts genattn/patterns genattn/seam guidance/nag guidance/softpag pipelines/tiny/random"
    ),
    "apps/laboratory/mutation": "genattn",
    "apps/laboratory/plans": (
        "apps/laboratory apps/sampling genattn genattn/geometry genattn/layouts genattn/patterns genattn/seam kernels "
        "kernels/reference pipelines/long_clip"
    ),
    "apps/laboratory/stacking": (
        "apps/sampling genattn genattn/functional genattn/geometry genattn/patterns genattn/seam "
        "guidance/nag guidance/softpag pipelines/tiny/random"
    ),
    "apps/pages": (
        "apps/cli apps/laboratory apps/laboratory/stacking apps/laboratory/models apps/laboratory/plans apps/sampling "
        "genattn genattn/geometry genattn/layouts genattn/patterns genattn/planning "
        "guidance/broadway "
        "pipelines/long_video/bases pipelines/long_video/ouroboros pipelines/tiny/random pipelines/tiny/studies"
    ),
    "apps/pages/site": "genattn",
    "apps/sampling": (
        "genattn genattn/patterns genattn/planning genattn/seam genattn/selection "
        "guidance/broadway guidance/heads guidance/nag guidance/softpag kernels/cpu "
        "pipelines/long_video/output pipelines/tiny pipelines/video"
    ),
    "apps/tuning": (
        "apps/sampling "
        "genattn genattn/functional genattn/geometry genattn/patterns genattn/planning genattn/profiling genattn/seam "
        "genattn/selection pipelines/tiny"
    ),
    "apps/webui": "apps/webui/tabs apps/webui/verbs genattn",
    "apps/webui/tabs": "apps/bench apps/sampling apps/webui/verbs genattn genattn/planning guidance/heads guidance/softpag",
    "apps/webui/verbs": (
        "apps/sampling "
        "genattn genattn/geometry genattn/planning genattn/seam "
        "guidance/headhunter guidance/heads guidance/softpag "
        "pipelines/long_video pipelines/long_video/bases pipelines/long_video/ouroboros pipelines/long_video/output "
        "pipelines/long_video/quality pipelines/long_video/queue pipelines/tiny"
    ),
}


@pytest.fixture(scope="module")
def rooms() -> dict[str, Room]:
    return read_rooms(ROOT)


def test_rooms_import_what_the_list_says(rooms: dict[str, Room]) -> None:
    arrows = {name: room.imports for name, room in rooms.items()}
    listed = {name: set(targets.split()) for name, targets in MAY_IMPORT.items()}
    new = {f"{a} -> {b}" for a in arrows for b in arrows[a] - listed.get(a, set())}
    gone = {f"{a} -> {b}" for a in listed for b in listed[a] - arrows.get(a, set())}
    assert not new, f"arrows that MAY_IMPORT does not have: {sorted(new)}"
    assert not gone, f"arrows in MAY_IMPORT that no import needs: {sorted(gone)}"
    assert listed.keys() == rooms.keys()


def test_no_two_rooms_import_each_other(rooms: dict[str, Room]) -> None:
    assert circles({name: room.imports for name, room in rooms.items()}) == []


def test_folders_import_one_way(rooms: dict[str, Room]) -> None:
    for name, room in rooms.items():
        for target in room.imports:
            assert TOPS.index(target.split("/")[0]) <= TOPS.index(name.split("/")[0]), f"{name} imports {target}"


def test_no_folder_is_crowded(rooms: dict[str, Room]) -> None:
    assert {name: room.files for name, room in rooms.items() if room.files > 20} == {}
    every = [path.parent for path in (ROOT / "tests").rglob("*.py")]
    assert {str(folder): every.count(folder) for folder in every if every.count(folder) > 20} == {}


def test_the_product_does_not_need_the_laboratory(rooms: dict[str, Room]) -> None:
    for name, room in rooms.items():
        if name not in LABORATORY:
            assert not room.imports & set(LABORATORY), f"{name} is in the wheel and imports {room.imports & set(LABORATORY)}"
    packages = {"genattn." + name.replace("/", ".") for name in LABORATORY}
    assert not packages & set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_every_room_says_what_it_is_for(rooms: dict[str, Room]) -> None:
    assert [name for name, room in rooms.items() if not room.about] == []


def test_tests_mirror_the_rooms(rooms: dict[str, Room]) -> None:
    places = {str(path.parent.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("test_*.py")} - {"."}
    assert places <= rooms.keys(), f"tests/ has folders that are no rooms: {sorted(places - rooms.keys())}"


def test_no_relative_imports() -> None:
    for top in TOPS:
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{path}:{node.lineno} is relative"


def test_kernels_need_only_torch_and_triton() -> None:
    allowed = {"genattn", "torch", "triton", "xformers"} | set(sys.stdlib_module_names)
    optional = {"flashinfer", "natten", "spas_sage_attn", "flash_attn", "flash_attn_interface"}  # used when installed
    for path in (ROOT / "kernels").rglob("*.py"):
        top = {name.split(".")[0] for name in imported(path.read_text())}
        assert top <= allowed | optional, f"{path.name} imports {sorted(top - allowed - optional)}"


@pytest.mark.parametrize("room", [r for r in TOPS if r != "genattn"])
def test_mapped_folders_have_no_init(room: str) -> None:
    assert not (ROOT / room / "__init__.py").exists(), "a bare `import kernels` must keep meaning the other package"
    assert not (ROOT / "genattn" / room).exists(), f"genattn/{room} would hide the folder {room}/"


def test_every_package_is_listed() -> None:
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for name in read_rooms(ROOT).keys() - set(LABORATORY):
        found.add(name.replace("/", ".") if name.split("/")[0] == "genattn" else f"genattn.{name.replace('/', '.')}")
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

    assert len(genattn.__all__) - 1 <= 16
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
    laboratory = tuple(f"genattn/{name}/" for name in LABORATORY)
    for room in TOPS:
        for path in (source / room).rglob("*"):
            if path.suffix in {".py", ".pyi", ".json", ".cpp", ".h", ".typed"}:
                inside = str(path.relative_to(source) if room == "genattn" else Path("genattn") / path.relative_to(source))
                assert (inside in names) == (not inside.startswith(laboratory)), f"the wheel lacks {inside}, or should"
    assert "genattn/assets/tiny-wan/model_index.json" in names
    assert not any(n.startswith(("kernels/", "tests/", "assets/")) for n in names)
    models = {name.split("/")[2] for name in names if name.endswith("model_index.json")}
    assert models == {"tiny-wan", "tiny-wan-long-bound"}, "the other tiny models come with a checkout"
    assert "genattn/assets/maps/tiny-wan-long-bound.safetensors" in names  # what a first run takes
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert "Author: The genattn authors" in metadata
    assert "# genattn" in metadata
    assert "](docs/" not in metadata


def _copy_sources(target: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if not (ROOT / name).is_file():
            continue
        if name.split("/")[0] in {*TOPS, "assets"} or name in {"pyproject.toml", "setup.py", "README.md", "LICENSE"}:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
