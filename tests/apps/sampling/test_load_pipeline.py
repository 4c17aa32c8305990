"""A folder is looked through before anything is loaded; what is missing is told in one line."""

import json
import shutil
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from genattn.apps import cli
from genattn.apps.comfyui.pipes import load as comfyui_load
from genattn.apps.sampling.load_pipeline import check_folder, load_pipeline, names_modular, pick_device, shipped_model
from genattn.apps.sampling.run import (
    DENSE,
    AttentionSettings,
    SamplingSettings,
    call_arguments,
    makes_video,
    refuse_early,
    run_once,
)
from genattn.apps.webui.verbs.session import Session
from genattn.errors import GenAttnError
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.planning.presets import preset


@pytest.fixture
def folder(random_wan_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_wan_folder, tmp_path / "model"))


def test_a_whole_folder_loads(random_wan_folder: Path) -> None:
    pipe = load_pipeline(random_wan_folder)
    assert type(pipe).__name__ == "WanPipeline"
    assert str(pipe.transformer.dtype) == "torch.float32"
    assert str(load_pipeline(random_wan_folder, dtype="bfloat16").transformer.dtype) == "torch.bfloat16"


@pytest.mark.parametrize(
    ("version", "name"), [("0.36.0", "torch_dtype"), ("0.39.2", "torch_dtype"), ("0.40.0.dev0", "dtype"), ("1.0.0", "dtype")]
)
def test_each_version_is_told_the_precision_in_its_own_words(
    version: str, name: str, random_wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def from_pretrained(source: str, **told: object) -> None:
        asked.append(told)
        raise OSError("enough")

    monkeypatch.setattr(diffusers, "__version__", version)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(GenAttnError, match="cannot be loaded: enough"):
        load_pipeline(random_wan_folder, dtype="bfloat16")
    assert asked == [{"use_safetensors": True, name: torch.bfloat16}]


def test_missing_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    with pytest.raises(GenAttnError, match=r"is not a diffusers pipeline: it has no model_index\.json"):
        load_pipeline(folder)


def test_half_written_index(folder: Path) -> None:
    (folder / "model_index.json").write_text('{"_class_name": "WanPi')
    with pytest.raises(GenAttnError, match="cannot be read as JSON"):
        check_folder(folder)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_component(folder: Path, component: str) -> None:
    shutil.rmtree(folder / component)
    with pytest.raises(GenAttnError, match=f"component '{component}' .* has no folder"):
        check_folder(folder)


def test_missing_config(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(GenAttnError, match="component 'vae' .* has no config"):
        check_folder(folder)


def test_missing_weights(folder: Path) -> None:
    next((folder / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(GenAttnError, match="has no weights in safetensors form"):
        check_folder(folder)


def test_truncated_weights(folder: Path) -> None:
    file = next((folder / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(GenAttnError, match="is damaged"):
        load_pipeline(folder)


def test_missing_shard(folder: Path) -> None:
    file = next((folder / "transformer").glob("*.safetensors"))
    index = {"weight_map": {"a": file.name, "b": "part-2.safetensors"}}
    (folder / "transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(GenAttnError, match=r"part-2\.safetensors missing"):
        check_folder(folder)


def _asked(monkeypatch: pytest.MonkeyPatch, answer: Exception | None, cached: str | None) -> None:
    """The hub answers so, and the cache holds the index at that place."""

    def model_info(self: object, repo_id: str, timeout: float) -> None:
        assert 0 < timeout <= 30
        if answer is not None:
            raise answer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda source, index: cached)


def _http_error(kind: type[Exception], status: int) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, f"status {status}")
    return error


@pytest.mark.parametrize(
    ("answer", "cached", "where"),
    [
        (None, None, {}),
        (_http_error(HfHubHTTPError, 405), None, {}),  # a mirror of files
        (ConnectionError("no route"), "/cache/model_index.json", {"local_files_only": True}),
    ],
)
def test_a_hub_id_is_loaded_from_where_it_is(
    answer: Exception | None, cached: str | None, where: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    _asked(monkeypatch, answer, cached)
    asked: list[dict[str, object]] = []

    def from_pretrained(source: str, **told: object) -> None:
        asked.append(told)
        raise OSError("enough")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda source, **told: asked.append(told))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(GenAttnError, match="'owner/name' cannot be loaded: enough"):
        load_pipeline("owner/name", dtype="bfloat16")
    assert asked == [where, {"use_safetensors": True, "dtype": torch.bfloat16, **where}]


@pytest.mark.parametrize(
    ("answer", "cached", "message"),
    [
        (
            _http_error(RepositoryNotFoundError, 401),
            "/cache/index",
            "the hub has no model 'owner/name', or shows it to its members",
        ),
        (TimeoutError("too slow"), None, r"cannot be reached \(too slow\) and 'owner/name' is not in the local cache"),
    ],
)
def test_a_hub_id_that_is_nowhere(answer: Exception, cached: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _asked(monkeypatch, answer, cached)
    with pytest.raises(GenAttnError, match=message):
        load_pipeline("owner/name")


def test_unknown_places(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="there is no folder"):
        load_pipeline(str(tmp_path / "nowhere"))
    with pytest.raises(GenAttnError, match="'wan-14b' is the name of a shape, which has no weights; give --model the folder"):
        load_pipeline("wan-14b")
    with pytest.raises(
        GenAttnError, match="'nobody/has-this-model' is not in the local cache; where there is a network, run: hf"
    ):
        load_pipeline("nobody/has-this-model")
    with pytest.raises(GenAttnError, match=r"'own er/name' is neither a folder nor a hub id \(Repo id must use"):
        load_pipeline("own er/name")
    with pytest.raises(GenAttnError, match="no shipped model 'tiny-nothing'"):
        shipped_model("tiny-nothing")


def test_dtype_and_device(random_wan_folder: Path) -> None:
    with pytest.raises(GenAttnError, match="dtype must be auto, float32, float16, bfloat16, got 'int3'"):
        load_pipeline(random_wan_folder, dtype="int3")
    assert pick_device("cpu") == "cpu"
    with pytest.raises(GenAttnError, match="device must be one of .*cpu.*, got 'abacus'"):
        pick_device("abacus")


@pytest.mark.parametrize(("kind", "expected"), [("model", "enable_model_cpu_offload"), ("group", "enable_group_offload")])
def test_offload_comes_instead_of_the_move(
    random_wan_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, expected: str
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("genattn.apps.sampling.load_pipeline.pick_device", lambda device: "cuda:1")
    for name in ("to", "enable_model_cpu_offload", "enable_group_offload"):
        monkeypatch.setattr(
            diffusers.DiffusionPipeline, name, lambda self, *args, _name=name, **named: calls.append(f"{_name} {args} {named}")
        )
    load_pipeline(random_wan_folder, cpu_offload=kind)
    assert [call.split()[0] for call in calls] == [expected], "the whole model must never be moved"
    assert "cuda:1" in calls[0] or "index=1" in calls[0]


def test_offload_without_an_accelerator_is_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(
        GenAttnError, match="--cpu-offload model needs an accelerator to offload from, and the device is the CPU"
    ):
        load_pipeline(tmp_path / "never looked at", device="cpu", cpu_offload="model")
    with pytest.raises(GenAttnError, match="--cpu-offload must be model or group, got 'disk'"):
        load_pipeline(None, device="cpu", cpu_offload="disk")


@pytest.fixture(scope="module")
def modular_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A modular pipeline without an index of a stock one."""
    blocks = pytest.importorskip(
        "diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3",
        reason="this diffusers has no modular SD3",
    )
    stock, _ = build_pipeline("sd3")
    pipe = blocks.StableDiffusion3AutoBlocks().init_pipeline()
    wanted = set(pipe._component_specs)
    pipe.update_components(**{k: v for k, v in stock.components.items() if k in wanted and v is not None})
    target = tmp_path_factory.mktemp("modular") / "saved"
    pipe.save_pretrained(str(target), overwrite_modular_index=True)
    moved = tmp_path_factory.mktemp("elsewhere") / "moved"  # the index still names the place where it was saved
    target.rename(moved)
    return moved


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_modular_folder_loads_and_samples(modular_folder: Path) -> None:
    assert names_modular(str(modular_folder))
    pipe = load_pipeline(modular_folder)
    assert type(pipe).__name__ == "StableDiffusion3ModularPipeline"
    assert type(pipe.transformer).__name__ == "SD3Transformer2DModel"
    assert not makes_video(pipe)
    call = call_arguments(pipe, SamplingSettings(height=16, width=16, steps=2))
    dense = run_once(pipe, {**call, "max_sequence_length": 16}, "a cat", 0, DENSE, "test")
    assert dense.frames.shape == (1, 16, 16, 3)
    window = AttentionSettings("neighborhood", NeighborhoodPattern((3, 3)), dense_steps=0, dense_layers=0)
    sparse = run_once(pipe, {**call, "max_sequence_length": 16}, "a cat", 0, window, "test")
    assert sparse.density is not None
    assert sparse.density < 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_command_app_and_comfyui_open_a_modular_folder(
    modular_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "picture.png"
    words = ["generate", "--model", str(modular_folder), "--prompt", "a cat", "--attention", "neighborhood", "--window", "3x3"]
    more = ["--height", "16", "--width", "16", "--steps", "2", "--dense-steps", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["genattn", *words, *more])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert out.is_file()

    session = Session(tmp_path / "app", [str(modular_folder)])
    assert session.names(video=False) == [modular_folder.name]
    assert session.layers(session.check_name(None, video=False))

    held = comfyui_load(str(modular_folder), "auto", "cpu", offline=True)
    assert type(held.pipe).__name__ == "StableDiffusion3ModularPipeline"
    with held.with_plugins(NeighborhoodPattern((3, 3))).applied() as handle:
        assert handle.active


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_modular_folder_that_lost_a_component(modular_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(modular_folder, tmp_path / "model"))
    next((copied / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(GenAttnError, match="has no weights in safetensors form"):
        load_pipeline(copied)
    shutil.rmtree(copied / "transformer")
    with pytest.raises(GenAttnError, match="is incomplete: transformer cannot be loaded; copy the model again"):
        load_pipeline(copied)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", ["3", "[]", "null", "[" * 100_000, "{"])
def test_a_config_that_is_none_is_refused_before_anything_is_asked(name: str, content: str, folder: Path) -> None:
    (folder / name).write_text(content)
    for look in (check_folder, load_pipeline):
        with pytest.raises(
            GenAttnError, match=f"{name} (must hold a JSON object|cannot be read as JSON).*; copy the model again"
        ):
            look(folder)
    with pytest.raises(GenAttnError, match="; copy the model again"):
        refuse_early(SamplingSettings(model=str(folder)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("transformer/config.json", {"patch_size": "x"}),
        ("transformer/config.json", {"text_dim": None}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}),
        ("model_index.json", {"vae": ["diffusers", 3]}),
        ("model_index.json", {"_class_name": 3}),
        ("text_encoder/config.json", {"num_heads": "x"}),
        ("tokenizer/tokenizer_config.json", {"unk_token": []}),
    ],
)
def test_a_setting_that_a_class_cannot_take_is_one_line(name: str, change: dict[str, object], folder: Path) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(GenAttnError, match=r"cannot be loaded: \w+|is incomplete"):
        load_pipeline(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"height": "x"}', '{"frames": 0}'])
def test_damaged_defaults_are_refused_everywhere(content: str, folder: Path, tmp_path: Path) -> None:
    (folder / "genattn_defaults.json").write_text(content)
    with pytest.raises(GenAttnError, match="genattn_defaults.json"):
        refuse_early(SamplingSettings(model=str(folder)))
    with pytest.raises(GenAttnError, match="genattn_defaults.json"):
        call_arguments(load_pipeline(folder), SamplingSettings())
    with pytest.raises(GenAttnError, match="genattn_defaults.json"):
        Session(tmp_path / "app", [str(folder)])


@pytest.mark.parametrize("content", ["{", "[]", '{"_class_name": "WanTransformer3DModel"}', "[" * 100_000])
def test_a_folder_whose_config_is_damaged_is_not_planned_for(content: str, folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text(content)
    with pytest.raises(GenAttnError, match="must be a readable JSON file|must hold a JSON object|is damaged or was changed"):
        preset(str(folder))
