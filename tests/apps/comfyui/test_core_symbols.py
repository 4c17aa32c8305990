"""What the node pack takes from ComfyUI's own modules, against a list that is checked in, and against a core when one is named.

ComfyUI promises none of these names. The list says what to look at when a new version comes out; with COMFYUI_DIR, the
sources there are read (nothing is imported), so a name that is gone is found without a server.
"""

import ast
import os
from pathlib import Path

import pytest
from core_symbols import Use, pack_sources, uses_in, why_missing

from genattn.apps.comfyui.hosts.families import HOSTS
from genattn.apps.comfyui.patching import seam

LISTED = Path(__file__).with_name("core_symbols.txt")
CORE = os.environ.get("COMFYUI_DIR")
needs_core = pytest.mark.skipif(not CORE, reason="COMFYUI_DIR names no ComfyUI; only the list of names was checked")

# what is reached through objects that ComfyUI hands over, class by class
MEMBERS = {
    ("comfy/model_patcher.py", "ModelPatcher"): (
        "clone", "get_wrappers", "add_wrapper_with_key", "add_callback_with_key", "get_model_object",
        "set_model_sampler_post_cfg_function",
    ),
    ("comfy/patcher_extension.py", "WrappersMP"): ("APPLY_MODEL", "DIFFUSION_MODEL", "OUTER_SAMPLE"),
    ("comfy/patcher_extension.py", "CallbacksMP"): ("ON_PRE_RUN", "ON_CLEANUP"),
    ("comfy/patcher_extension.py", "WrapperExecutor"): ("__call__",),
    ("comfy/conds.py", "CONDRegular"): ("process_cond",),
    ("comfy/samplers.py", "CFGGuider"): ("outer_sample", "inner_sample", "set_conds"),
    ("comfy/model_base.py", "BaseModel"): ("apply_model", "_apply_model", "extra_conds"),
}  # fmt: skip
# what is reached through words in dictionaries
WORDS = {
    "comfy/ldm/modules/attention.py": ("optimized_attention_override", "_inside_attn_wrapper", "attn2_patch"),
    "comfy/samplers.py": ("cond_or_uncond", "sigmas", "sample_sigmas", "cond_denoised", "model_conds", "prompt_type"),
    "comfy/patcher_extension.py": (seam.APPLY_MODEL, seam.ON_PRE_RUN, seam.ON_CLEANUP),
    "comfy/ldm/flux/model.py": ("patches_replace", "dit", "double_block", "single_block", "pe", "txt", "img", "attn_mask"),
    "comfy/ldm/hunyuan_video/model.py": ("double_block", "single_block", "pe", "txt", "img", "attention_mask"),
    "comfy/ldm/modules/diffusionmodules/mmdit.py": ("double_block", "txt", "img"),
    "comfy/ldm/wan/model.py": ("double_block", "img"),
}


def found() -> set[Use]:
    return set[Use]().union(*(uses_in(file.read_text(encoding="utf-8")) for file in pack_sources()))


def listed() -> list[str]:
    return [line for line in LISTED.read_text(encoding="utf-8").splitlines() if line]


def test_the_list_is_what_the_pack_takes() -> None:
    assert sorted(map(str, found())) == listed(), "look at what is new, then run core_symbols.py > core_symbols.txt"


def test_every_way_of_naming_is_seen() -> None:
    source = (
        "import comfy.utils\nimport comfy.samplers as s\nfrom comfy.a import b as c, d\nimport torch\n"
        "def f():\n    from comfy_api.latest import io\n    comfy.utils.load(1, x=2)\n    s.KSAMPLER\n    c(1, *rest, **more)\n"
        "    torch.ones(2)\n"
    )
    assert {str(use) for use in uses_in(source)} == {
        "comfy.utils *", "comfy.samplers *", "comfy.a b *;**", "comfy.a d", "comfy_api.latest io", "comfy.utils load 1;x",
        "comfy.samplers KSAMPLER",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("use", "why"),
    [
        (Use("comfy.a", "kept", "1;flag"), ""),
        (Use("comfy.a", "optional"), ""),
        (Use("comfy.a", "Thing", "1;"), ""),
        (Use("comfy.a", "kept", "*;**"), ""),
        (Use("comfy", "a"), ""),
        (Use("comfy.gone", "kept"), "comfy.gone is gone"),
        (Use("comfy.gone", "*"), "comfy.gone is gone"),
        (Use("comfy.a", "moved"), "comfy.a has no moved"),
        (Use("comfy.a", "kept", "3;"), "comfy.a.kept takes 2 arguments, not 3"),
        (Use("comfy.a", "kept", "1;new"), "comfy.a.kept takes no new"),
        (Use("comfy.a", "kept", "0;flag"), "comfy.a.kept wants x"),
        (Use("comfy.a", "Thing", "0;"), "comfy.a.Thing wants value"),
    ],
)
def test_what_a_core_lacks_is_said(tmp_path: Path, use: Use, why: str) -> None:
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "a.py").write_text(
        "def kept(x, flag=False): ...\nclass Thing:\n    def __init__(self, value): ...\n    def moved(self): ...\n"
        "if True:\n    try:\n        optional = 1\n    except ImportError:\n        pass\n"
    )
    assert why_missing(use, tmp_path) == why


@needs_core
def test_the_core_has_them_all() -> None:
    missing = [why for use in sorted(found()) if (why := why_missing(use, Path(CORE or "")))]
    assert missing == []


@needs_core
@pytest.mark.parametrize("place", MEMBERS, ids="-".join)
def test_the_core_has_the_members(place: tuple[str, str]) -> None:
    tree = ast.parse((Path(CORE or "") / place[0]).read_text(encoding="utf-8"))
    (owner,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == place[1]]
    names = {node.name for node in owner.body if isinstance(node, ast.FunctionDef)}
    names |= {target.id for node in owner.body if isinstance(node, ast.Assign) for target in node.targets}  # type: ignore[attr-defined]
    assert set(MEMBERS[place]) <= names


@needs_core
@pytest.mark.parametrize("file", WORDS)
def test_the_core_has_the_words(file: str) -> None:
    source = (Path(CORE or "") / file).read_text(encoding="utf-8")
    assert [word for word in WORDS[file] if f'"{word}"' not in source and f"'{word}'" not in source] == []


@needs_core
def test_the_core_has_the_families_except_those_it_is_too_old_for() -> None:
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (Path(CORE or "") / "comfy" / "ldm").rglob("*.py"))
    newer = {"SingleStreamDiT", "MiniMaxH3Model", "Kandinsky5"}
    lost = {name for name in HOSTS if f"class {name}(" not in sources}
    assert lost <= newer
