"""What an index and an installer read: declared packages, the page, the links, and the names that editors see."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

import genattn
from genattn.apps.pages.rooms import LABORATORY, TOPS, imported

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
README = (ROOT / "README.md").read_text()
# modules whose package has another name
PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless", "skimage": "scikit-image"}
# looked for and used where they are; none of them is needed, and what is not there is said
# (pandas comes with gradio, the third line with ComfyUI)
OPTIONAL = {
    "flash_attn", "flash_attn_interface", "flashinfer", "natten", "spas_sage_attn", "xformers",
    "comfy", "latent_preview", "pandas", "comfy_api", "comfy_extras", "folder_paths", "nodes", "server", "execution",
    "hpsv2", "ImageReward", "imagereward", "open_clip", "torchaudio", "torchvision", "sentencepiece", "ftfy",
}  # fmt: skip


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!;\[ ]", line, maxsplit=1)[0].lower() for line in requirements}


def test_every_import_is_declared() -> None:
    declared = _names(PROJECT["dependencies"]).union(*(_names(lines) for lines in PROJECT["optional-dependencies"].values()))
    for top in TOPS:
        for path in (ROOT / top).rglob("*.py"):
            if str(path.relative_to(ROOT)).startswith(LABORATORY):
                continue
            tops = {name.split(".")[0] for name in imported(path.read_text())} - set(sys.stdlib_module_names) - OPTIONAL
            missing = {PACKAGES.get(name, name).lower().replace("_", "-") for name in tops - {"genattn"}}
            missing -= {name.replace("_", "-") for name in declared}
            assert not missing, f"{path.relative_to(ROOT)} imports {sorted(missing)}, which pyproject.toml does not declare"


def test_no_declared_package_is_idle() -> None:
    sources = [path for top in TOPS for path in (ROOT / top).rglob("*.py")]
    used = {
        PACKAGES.get(name.split(".")[0], name.split(".")[0]).lower() for path in sources for name in imported(path.read_text())
    }
    by_others = {"accelerate"}  # diffusers' offloading
    assert _names(PROJECT["dependencies"]) <= used | by_others


def test_the_core_is_lean_and_comfyui_keeps_its_torch() -> None:
    heavy = {"scikit-image", "scipy", "pandas", "matplotlib", "gradio", "opencv-python-headless", "torchvision"}
    assert not _names(PROJECT["dependencies"]) & heavy
    assert _names(PROJECT["optional-dependencies"]["comfyui"]) == {"matplotlib"}
    page = (ROOT / "docs" / "comfyui.md").read_text()
    assert "pip freeze" in page
    assert "pip install -c" in page, "the page must show an install that holds ComfyUI's own torch"


@pytest.mark.parametrize("address", ["", "https://example.org/owner/genattn"])
def test_no_link_of_the_index_page_is_dead(address: str) -> None:
    page = SETUP["index_page"](README, address)
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    assert ("![" in page) == bool(address)
    if address:
        assert len(targets) == len(re.findall(r"\]\(([^)]+)\)", README))
        for target in targets:
            assert (ROOT / target.split("/HEAD/")[1].split("#")[0]).exists() or address not in target, target
    assert set(SETUP["links"](address)) == ({"Documentation", "Source", "Changelog"} if address else set())
    assert all(link.startswith(address) for link in SETUP["links"](address).values())


def test_metadata_is_whole() -> None:
    assert PROJECT["authors"]
    assert {"readme", "urls"} == set(PROJECT["dynamic"])
    assert PROJECT["version"] == genattn.__version__
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert newest.startswith(f"{genattn.__version__} - ")
    assert len(newest.splitlines()) <= 30
    assert not any("OS Independent" in line for line in PROJECT["classifiers"]), "only Linux was tested"


def test_editors_see_every_name() -> None:
    stub = ast.parse((ROOT / "genattn" / "__init__.pyi").read_text())
    told = {(alias.asname, node.module) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == set(genattn._EXPORTS.items())
    for name, module in genattn._EXPORTS.items():
        assert getattr(genattn, name).__module__ == module, f"{name} is defined elsewhere than {module}"
