"""Token orders, attention calls and a node, on stand-ins for ComfyUI; `test_live_orders` has the real models."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from comfy_standins import Patcher, WanModel, X
from torch import nn

from genattn.apps.comfyui import pictures, pipes
from genattn.apps.comfyui.hosts.call import RawCall, call_mask, core_attention, preference, preferred_of, takes_holders
from genattn.apps.comfyui.hosts.families import HOSTS, host_of, served
from genattn.apps.comfyui.hosts.host import Entry
from genattn.apps.comfyui.nodes import node_specs
from genattn.apps.comfyui.patching.seam import Override
from genattn.apps.comfyui.pipe_nodes import long_video_node
from genattn.apps.comfyui.profiling import write_profile
from genattn.apps.comfyui.schema import Field, NodeSpec
from genattn.errors import GenAttnError
from genattn.layouts.families import FAMILIES
from genattn.one_writer import only_writer
from genattn.patterns.dense import DensePattern


def stand_in(name: str, **fields: Any) -> Any:
    """A model of that class with the given attributes."""
    return type(name, (), fields)()


def told(model: Any, shape: tuple[int, ...], tokens: int, text: int | None = None, **extras: Any) -> str:
    return host_of(model).layout(model, Entry(shape, text, extras), tokens).describe()


VIDEO, PICTURE = (1, 16, 3, 8, 8), (1, 16, 8, 7)
QWEN = stand_in("QwenImageTransformer2DModel", patch_size=2)
KREA = stand_in("SingleStreamDiT", patch=2)
Z_IMAGE = stand_in("NextDiT", patch_size=2, pad_tokens_multiple=8)
LTX = stand_in("LTXVModel")
COSMOS = stand_in("MiniTrainDIT", patch_temporal=1, patch_spatial=2)
KANDINSKY = stand_in("Kandinsky5", patch_size=(1, 2, 2))
H3 = stand_in("MiniMaxH3Model", patch_size=(1, 2, 2))
WAN = stand_in("WanModel", patch_size=(1, 2, 2))
SPEECH = type("WanModel_S2V", (type(WAN),), {})()


def test_text_stands_before_the_picture_and_references_behind() -> None:
    reference = [torch.zeros(1, 16, 1, 4, 4)]
    assert told(QWEN, (1, 16, 1, 8, 8), 21, text=5) == "text 5 + grid 4x4"
    assert told(QWEN, (1, 16, 2, 8, 8), 37, text=5) == "text 5 + grid 2x4x4"
    assert told(QWEN, (1, 16, 1, 8, 8), 25, text=5, ref_latents=reference) == "text 5 + grid 4x4 + reference 2x2"
    assert told(KREA, PICTURE, 21, text=5) == "text 5 + grid 4x4"
    assert told(stand_in("Chroma", patch_size=2), PICTURE, 21, text=5) == "text 5 + grid 4x4"
    with pytest.raises(GenAttnError, match="Krea: 30 tokens are not 16 of the picture"):
        told(KREA, PICTURE, 30, text=5)


def test_z_image_fills_text_and_picture_up() -> None:
    assert told(Z_IMAGE, (1, 16, 6, 6), 8 + 16, text=6) == "text 8 + grid 3x3 + register 7"
    assert told(Z_IMAGE, PICTURE, 8 + 16, text=6) == "text 8 + grid 4x4"
    plain = stand_in("NextDiT", patch_size=2)
    assert told(plain, (1, 16, 6, 6), 15, text=6) == "text 6 + grid 3x3"


def test_ltx_keyframes_are_references_behind_the_clip() -> None:
    assert told(LTX, VIDEO, 3 * 64) == "grid 3x8x8"
    assert told(LTX, VIDEO, 3 * 64, keyframe_idxs=torch.zeros(1, 3, 64, 2)) == "grid 2x8x8 + reference 64"
    assert told(LTX, (1, 1, 999), 3 * 64, latent_shapes=[[1, 16, 3, 8, 8], [1, 8, 5, 16]]) == "grid 3x8x8"
    with pytest.raises(GenAttnError, match="no whole frames"):
        told(LTX, VIDEO, 3 * 64, keyframe_idxs=torch.zeros(1, 3, 65, 2))
    with pytest.raises(GenAttnError, match="the call has 100"):
        told(LTX, VIDEO, 100)


def test_clips_without_text_in_the_sequence() -> None:
    assert told(COSMOS, VIDEO, 48) == "grid 3x4x4"
    assert told(COSMOS, (1, 16, 1, 8, 8), 16) == "grid 4x4"
    assert told(KANDINSKY, VIDEO, 48) == "grid 3x4x4"
    assert host_of(KANDINSKY).grid(KANDINSKY, VIDEO) == (3, 4, 4)


def test_minimax_reads_its_own_packed_layout() -> None:
    parts = [(0, 5, "text"), (5, 21, "cond"), (21, 29, "audio"), (29, 77, "video")]
    packed = {"layout": SimpleNamespace(segments=parts)}
    shapes = [[1, 16, 3, 8, 8], [1, 32, 4]]
    described = told(H3, (1, 1, 1), 77, latent_shapes=shapes, minimax_payload=packed)
    assert described == "text 5 + reference 16 + audio 8 + grid 3x4x4"
    assert told(H3, (1, 1, 1), 61, text=5, latent_shapes=shapes) == "text 13 + grid 3x4x4"


def test_references_of_wan_variants() -> None:
    reference = torch.zeros(1, 16, 1, 8, 8)
    assert told(WAN, VIDEO, 64, reference_latent=reference) == "reference 16 + grid 3x4x4"
    assert told(SPEECH, VIDEO, 64, reference_latent=reference) == "grid 3x4x4 + reference 16"
    assert told(WAN, VIDEO, 64, context_latents=[reference]) == "grid 3x4x4 + reference 1x4x4"
    with pytest.raises(GenAttnError, match="whose order is not known"):
        told(WAN, VIDEO, 70, context_latents=[reference])


def test_every_family_names_its_diffusers_class() -> None:
    for host in HOSTS.values():
        assert host.diffusers in {name for family in FAMILIES for name in family.models}, host.name
        assert host.name in served()


def test_heads_are_found_in_the_block_where_the_model_does_not_tell_them() -> None:
    class Attention(nn.Module):
        heads = 6

    block = nn.Sequential(Attention())
    model = stand_in("LTXVModel", transformer_blocks=[block, block])
    assert [(site.name, site.heads) for site in host_of(model).sites(model)] == [
        ("transformer_blocks.0", 6),
        ("transformer_blocks.1", 6),
    ]


# ---- holders and preferences


class Holder:
    """ComfyUI's holder of one tensor, as its newer versions hand them over."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor

    def peek(self) -> torch.Tensor:
        assert self.tensor is not None
        return self.tensor

    def take(self) -> torch.Tensor:
        found, self.tensor = self.peek(), None
        return found


class ComfyAttention(nn.Module):
    """A layer's wish for an attention function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


def first(*args: Any, **options: Any) -> torch.Tensor:
    return torch.zeros(1)


def second(*args: Any, **options: Any) -> torch.Tensor:
    return torch.ones(1)


def test_a_preference_counts_where_it_is_known() -> None:
    both = preferred_of(nn.ModuleList([ComfyAttention(first), ComfyAttention(second)]))
    assert both == [first, second]
    assert preference(both, 1) is second
    assert preference(both, 2) is None, "more calls than layers: nobody knows whose"
    assert preference([first, first], 7) is first
    assert preference([], 0) is None
    assert preferred_of(object()) == []


def test_holders_are_asked_for_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert core_attention() is None
    assert not hasattr(Override(None), "container_function")
    assert not hasattr(Override(first), "container_function")
    with pytest.raises(AttributeError, match="Override has no speed"):
        Override(None).speed  # noqa: B018

    def core(q: Any, *rest: Any, **options: Any) -> torch.Tensor:
        return q.take() + 1 if hasattr(q, "take") else q

    core.container_function = core  # type: ignore[attr-defined]
    module = SimpleNamespace(optimized_attention=core)
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", module)  # type: ignore[arg-type]
    assert takes_holders(core)
    assert not hasattr(Override(first), "container_function"), "who stands under us takes plain tensors"
    holders = [Holder(torch.zeros(1, 4, 8)) for _ in range(3)]
    out = Override(None).container_function(*holders, 2)
    assert float(out.mean()) == 1.0
    assert holders[0].tensor is None, "the backend took it, so it may free it"
    holders = [Holder(torch.zeros(1, 4, 8)) for _ in range(3)]
    assert float(Override(core).container_function(*holders, 2).mean()) == 1.0


def test_a_sparse_call_looks_into_the_holders() -> None:
    raw = RawCall(first, None, *(Holder(torch.randn(1, 4, 8)) for _ in range(3)), 2, {})
    assert [tuple(t.shape) for t in raw.heads_last()] == [(1, 4, 2, 4)] * 3


@pytest.mark.parametrize(
    ("given", "expected"), [((5, 7), (1, 1, 5, 7)), ((2, 5, 7), (2, 1, 5, 7)), ((2, 3, 5, 7), (2, 3, 5, 7))]
)
def test_a_mask_has_four_axes(given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    mask = torch.rand(given)
    found = call_mask(mask)
    assert found is not None
    assert found.shape == expected
    assert torch.equal(found.flatten(), mask.flatten())
    assert call_mask(None) is None


@pytest.fixture
def comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def module(name: str, **parts: Any) -> None:
        made = ModuleType(name)
        vars(made).update(parts)
        monkeypatch.setitem(sys.modules, name, made)

    module("comfy")
    module("comfy.utils", ProgressBar=lambda total: SimpleNamespace(update_absolute=lambda *told: None))
    module("comfy.samplers")
    module("comfy_api")
    module("comfy_api.latest", VideoFromFile=lambda path: path)
    module(
        "folder_paths",
        get_output_directory=lambda: str(tmp_path),
        get_save_image_path=lambda prefix, folder: (folder, prefix, 3, "", prefix),
    )


@pytest.mark.usefixtures("comfy")
def test_a_long_video_is_pictures_from_black_to_white(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def endless(pipe: Any, prompt: str, path: Path, show: Any, **settings: Any) -> Any:
        asked.update(settings, path=path)
        return [np.full((2, 3, 3), level, np.uint8) for level in (0, 51, 255)], "told"

    monkeypatch.setattr(pipes, "endless", endless)
    monkeypatch.setattr(pipes, "fps_of", lambda pipe: 12.0)
    pipe = SimpleNamespace(pipe=None)
    answer = long_video_node(pipe, "a", "", 5, 3, 0, 64, 0, 0.0, 4, True, True, 0.0)
    images, film, told = answer.values
    assert images.shape == (3, 2, 3, 3)
    assert images.dtype == torch.float32
    assert torch.allclose(images[:, 0, 0, 0], torch.tensor([0.0, 0.2, 1.0]))
    assert (film, told) == (str(tmp_path / "genattn_long_00003_.mp4"), "told")
    assert answer.text == "genattn_long_00003_.mp4: 3 frames"
    # 0 and an empty text leave a setting to the pipeline
    assert {name: asked.get(name) for name in ("width", "fps", "seed", "negative_prompt")} == {
        "width": 64, "fps": 12.0, "seed": 5, "negative_prompt": None
    }  # fmt: skip
    assert not {"height", "num_inference_steps", "guidance_scale"} & set(asked)
    assert asked["ouroboros"] is not None


@pytest.mark.usefixtures("comfy")
def test_a_map_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    model = Patcher(SimpleNamespace(diffusion_model=WanModel()))
    with only_writer(tmp_path / "a.safetensors", "--out"), pytest.raises(GenAttnError, match="in use: .* give another name"):
        write_profile(model, [], [], X, 0, 2, 1.0, 2, 0.3, "a")


WIDGETS = [(spec, field) for spec in node_specs() for field in spec.inputs if field.is_widget]


@pytest.mark.parametrize(("spec", "field"), WIDGETS, ids=lambda part: part.id)
def test_no_node_runs_with_a_value_that_its_widget_would_not_take(spec: NodeSpec, field: Field) -> None:
    """ComfyUI lets NaN through, and whatever another node gives by a link."""
    never = replace(spec, run=lambda **_: pytest.fail("it ran"))
    wrong: list[Any] = {"COMBO": ["nope"], "STRING": ["a\0b", 3], "BOOLEAN": []}.get(field.type, [math.nan, math.inf, "x"])
    if field.type in ("INT", "FLOAT"):
        wrong += [cast("float", field.low) - 1, -math.inf, cast("float", field.high) + 1]
    for value in wrong if not field.seed else []:
        with pytest.raises(GenAttnError, match=f"^{field.id} must be .*, got "):
            never.answer(**{field.id: value})
    good = replace(spec, run=lambda **given: given)
    kept = {field.id: 2**63 if field.seed else field.default}
    assert good.answer(**kept) == kept
    assert good.answer(**{field.id: None}) == {field.id: None}, "a link that gives nothing yet"


def test_a_model_whose_name_no_file_can_have_is_told() -> None:
    with pytest.raises(GenAttnError, match="is neither a folder nor a model on this machine"):
        pipes.load("x" * 300, "auto", "cpu", offline=True)


def test_a_long_video_prints_nothing_into_comfyuis_log(
    random_wan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "make_room", lambda pipe: None)
    holder, seen = pipes.load(str(random_wan_folder), "float32", "cpu", offline=True), []
    capsys.readouterr()
    sizes = {"height": 32, "width": 32, "window": 3, "num_inference_steps": 4, "guidance_scale": 1.0}
    frames, told = pipes.endless(holder, "a", tmp_path / "a.mp4", lambda done, frame: seen.append(done), num_frames=5, **sizes)
    assert (len(frames), seen, told) == (5, [1, 2, 3, 4, 5], "no plugins: stock")
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize(
    ("sigma", "message"), [(0.0, "sigma must lie in"), (1.01, "got 1.01"), (1.0, "is dense"), (0.01, "is dense")]
)
def test_a_noise_level_to_probe_at(sigma: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "sparse_of", lambda model: SimpleNamespace(pattern=DensePattern()))
    with pytest.raises(GenAttnError, match=message):
        pictures.probe_blocks(None, None, torch.zeros(1), sigma, 0)
