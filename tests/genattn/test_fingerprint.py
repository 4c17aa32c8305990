"""A mark changes with whatever changes what a model gives, and with nothing else."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genattn.fingerprint import content_mark, model_fingerprint, named_file, pipeline_fingerprint, place_of, precision
from genattn.pipelines.tiny.random.build import build_model, build_pipeline


def test_weights_and_names_are_told_apart() -> None:
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert model_fingerprint({"m": a}) == model_fingerprint({"m": a})
    assert model_fingerprint({"m": a}) != model_fingerprint({"m": b})
    assert model_fingerprint({"m": a}) != model_fingerprint({"n": a})


def test_adapters_are_told_apart_by_strength() -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    plain = model_fingerprint({"m": model})
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model)
    layer: Any = model[0]
    seen = {plain, model_fingerprint({"m": model})}
    layer.scaling["default"] *= 0.5
    seen.add(model_fingerprint({"m": model}))
    layer.enable_adapters(False)
    seen.add(model_fingerprint({"m": model}))
    assert len(seen) == 4


def test_a_change_in_any_part_of_a_pipeline_is_told() -> None:
    pipe, _ = build_pipeline("wan")
    seen = [pipeline_fingerprint(pipe)]
    assert pipeline_fingerprint(copy.deepcopy(pipe)) == seen[0]
    for name in ("transformer", "vae", "text_encoder"):
        weight = next(p for p in getattr(pipe, name).parameters() if p.numel() > 1)
        with torch.no_grad():
            weight += 1
        seen.append(pipeline_fingerprint(pipe))
    pipe.scheduler.register_to_config(flow_shift=7.0)
    seen.append(pipeline_fingerprint(pipe))
    pipe.scheduler.register_to_config(_diffusers_version="0.0")
    assert pipeline_fingerprint(pipe) == seen[-1], "another version of the library is no other model"
    assert len(set(seen)) == 5


def test_a_model_alone_has_one_too() -> None:
    assert pipeline_fingerprint(build_model("sd3")) != pipeline_fingerprint(build_model("sd3", seed=1))


def test_weights_of_every_kind_are_read() -> None:
    """Float8, none in memory, and quantized by torchao, whose tensors have no view."""
    assert model_fingerprint({"m": torch.nn.Linear(8, 8).to(torch.float8_e4m3fn)})
    away = torch.nn.Linear(8, 8).to("meta")
    assert model_fingerprint({"m": away}) == model_fingerprint({"m": torch.nn.Linear(8, 8).to("meta")})
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    models = [torch.nn.Sequential(torch.nn.Linear(64, 64)) for _ in range(2)]
    for model in models:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert model_fingerprint({"m": models[0]}) == model_fingerprint({"m": models[0]})
    assert model_fingerprint({"m": models[0]}) != model_fingerprint({"m": models[1]})


def test_a_named_file_tells_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    first = named_file(path)
    assert first.startswith(f"{path} (")
    path.write_bytes(b"two")
    assert named_file(path) != first


def test_precision_is_told_where_values_do_not_tell_it() -> None:
    """Weights that were stored in bfloat16 have the same values in float32."""
    stored, wide = (torch.nn.Linear(3, 3).to(torch.bfloat16) for _ in range(2))
    wide.load_state_dict(stored.state_dict())
    wide.to(torch.float32)
    assert pipeline_fingerprint(stored) == pipeline_fingerprint(wide)
    assert (precision(stored), precision(wide)) == ("bfloat16", "float32")
    assert precision(torch.nn.Sequential(stored, wide, torch.nn.Embedding(2, 2))) == "bfloat16, float32"
    wide.register_buffer("count", torch.zeros(1, dtype=torch.long))
    assert precision(wide) == "float32"


def test_the_place_of_an_offloaded_pipeline_is_where_it_computes() -> None:
    waiting = SimpleNamespace(device=torch.device("cpu"), _execution_device=torch.device("cuda:1"))
    assert place_of(waiting) == "cuda:1"
    assert place_of(SimpleNamespace(device=torch.device("cpu"))) == "cpu"
    assert place_of(torch.nn.Linear(3, 3)) == "cpu"
    assert place_of(torch.nn.Linear(3, 3, device="meta")) == "meta"
    assert place_of(torch.nn.Identity()) == "cpu"


def test_a_folder_of_weights_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    file = folder / "a.safetensors"
    file.write_bytes(bytes(3 << 20))
    seen = [content_mark(folder), content_mark(file)]
    for at in (0, (3 << 20) - 1):  # its beginning and its end are read
        content = bytearray(3 << 20)
        content[at] = 1
        file.write_bytes(content)
        seen += [content_mark(folder), content_mark(file)]
    file.write_bytes(bytes((3 << 20) + 1))
    seen += [content_mark(folder), content_mark(file)]
    file.write_bytes(bytes(3 << 20))
    assert content_mark(file) == seen[1]
    file.rename(folder / "b.safetensors")
    seen.append(content_mark(folder))
    assert len(set(seen)) == 9
