"""LoRA fine-tuning: resumes to the bit, its file loads into the stock pipeline, sparse trains like its dense twin, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from genattn import RadialPattern
from genattn.apps.sampling.output_files import write_video
from genattn.errors import GenAttnError
from genattn.fingerprint import named_file
from genattn.one_writer import only_writer
from genattn.patterns.combine import Union
from genattn.patterns.profiled import ProfiledPattern
from genattn.pipelines.finetune import tune as module
from genattn.pipelines.finetune.cache import ClipSize, LatentCache, load_clip
from genattn.pipelines.finetune.data import find_clips
from genattn.pipelines.finetune.lora import add_lora
from genattn.pipelines.finetune.tune import FinetuneSettings, finetune, longer, trainable
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.pipelines.training.trainer import TrainSettings

pytest.importorskip("peft", reason="LoRA training needs peft, the train extra")

SIZE = ClipSize(9, 64, 48)
PATTERN = RadialPattern(decay=0.25, floor=0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for i in range(3):
        frames = np.repeat(np.repeat(rng.integers(0, 255, (9, 8, 6, 3), dtype=np.uint8), 8, 1), 8, 2)
        write_video(folder / f"{i}.mp4", frames, 8.0, {})
        (folder / f"{i}.txt").write_text(f"clip {i}")
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "broken.txt").write_text("a broken one")
    return folder


@pytest.fixture(autouse=True)
def one_precision_per_test() -> Iterator[None]:
    """accelerate keeps the first one for as long as the process lives; a test may leave none behind for other files."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(steps: int = 3, **changes: Any) -> FinetuneSettings:
    training = TrainSettings(steps, learning_rate=0.02, warmup=1, ema=0.5, save_minutes=changes.pop("save_minutes", 1e9))
    return FinetuneSettings(**({"size": SIZE, "lora_rank": 2, "dense_layers": 0, "training": training} | changes))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "lora" / "pytorch_lora_weights.safetensors")


def run(clips: Path, out: Path, pattern: Any = PATTERN, on_save: Any = None, **changes: Any) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    pipe, call = build_pipeline("wan")
    result = finetune(pipe, find_clips(clips), pattern, settings(**changes), out, on_save)
    return pipe, call, result


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute")  # peft's word on two LoRAs, which is the point
def test_a_lora_is_trained_saved_and_loaded_by_the_stock_pipeline(clips: Path, tmp_path: Path) -> None:
    saved: list[int] = []
    trained, call, result = run(clips, tmp_path, on_save=lambda pipe, step: saved.append(step))
    assert (result.steps, result.clips, saved) == (3, 3, [3])
    assert [name for name, _ in result.skipped] == ["broken.mp4"]
    assert "broken.mp4\t" in (tmp_path / "skipped.txt").read_text()
    assert "sparse" in result.sparse
    assert "dense" not in result.sparse.split()[0]
    layers = weights(tmp_path)
    assert {name.split(".lora_")[0].rsplit(".", 2)[-1] for name in layers} >= {"to_q", "to_k", "to_v"}
    assert all(tensor.abs().max() > 0 for tensor in layers.values())
    fresh, _ = build_pipeline("wan")

    def sample(pipe: Any) -> torch.Tensor:
        short = call | {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        return torch.as_tensor(pipe(**short, generator=torch.Generator().manual_seed(0)).frames)

    before = sample(fresh)
    fresh.load_lora_weights(tmp_path / "lora")
    after = sample(fresh)
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, sample(trained), atol=1e-4, rtol=1e-4)

    # beside a style's LoRA: both act, and either can be left out
    style = {name: torch.randn_like(tensor) for name, tensor in layers.items()}
    fresh.load_lora_weights(style, adapter_name="style")
    fresh.set_adapters(["default_0", "style"], [1.0, 0.5])
    both = sample(fresh)
    assert sorted(fresh.get_active_adapters()) == ["default_0", "style"]
    fresh.set_adapters(["default_0"])
    assert (both - after).abs().max() > 1e-4
    torch.testing.assert_close(sample(fresh), after)
    fresh.unload_lora_weights()
    torch.testing.assert_close(sample(fresh), before)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_finetune as t
from genattn.pipelines.finetune import tune as module
steps = 0
stock = module.denoising_loss
def loss(*args):
    global steps
    steps += 1
    if steps == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(*args)
module.denoising_loss = loss
from pathlib import Path
t.run(Path({clips!r}), Path({out!r}), steps=4, save_minutes=1e-9)
"""


def test_a_killed_run_ends_with_the_same_weights(clips: Path, tmp_path: Path) -> None:
    run(clips, tmp_path / "whole", steps=4)
    code = KILLED.format(tests=os.path.dirname(__file__), clips=str(clips), out=str(tmp_path / "cut"))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    torch.manual_seed(77)
    assert run(clips, tmp_path / "cut", steps=4)[2].steps == 4
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    with pytest.raises(GenAttnError, match="holds a run with other settings .*lora_rank was 2"):
        run(clips, tmp_path / "cut", steps=4, lora_rank=3)


def test_maps_are_known_by_their_content(tmp_path: Path) -> None:
    shipped = Path(__file__).resolve().parents[3] / "assets" / "maps"
    path = tmp_path / "map.safetensors"
    seen = []
    for name in ("tiny-wan", "tiny-wan-long"):
        shutil.copy(shipped / f"{name}.safetensors", path)
        seen.append([named_file(file) for file in module._maps(Union(ProfiledPattern(str(path)), PATTERN))])
    assert [len(files) for files in seen] == [1, 1]
    assert seen[0] != seen[1]
    assert module._maps(None) == module._maps(PATTERN) == []


def test_a_folder_that_another_run_writes_is_refused(clips: Path, tmp_path: Path) -> None:
    with only_writer(tmp_path / "t", "folder"), pytest.raises(GenAttnError, match="t is in use: another run writes there"):
        run(clips, tmp_path / "t", steps=1)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("what", ["pixels", "caption", "text encoder", "transformer"])
def test_a_run_goes_on_with_what_began_it_alone(what: str, clips: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    run(data, tmp_path / "run", steps=1)
    pipe, _ = build_pipeline("wan")
    if what == "pixels":
        write_video(data / "1.mp4", np.full((9, 64, 48, 3), 90, np.uint8), 8.0, {})
    elif what == "caption":
        (data / "1.txt").write_text("another one")
    else:
        part = pipe.text_encoder if what == "text encoder" else pipe.transformer
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(1.5)
    before = weights(tmp_path / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    name = {"caption": "data", "transformer": "model"}.get(what, "encoded")
    with pytest.raises(GenAttnError, match=f"holds a run with other settings .*{name} was '"):
        finetune(pipe, find_clips(data), PATTERN, settings(1), tmp_path / "run")
    assert all(torch.equal(before[key], value) for key, value in weights(tmp_path / "run").items())


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # autocast around float32 norms
def test_checkpointed_blocks_train_alike_and_bf16_trains(clips: Path, tmp_path: Path) -> None:
    """Blocks recomputed in the backward pass see the pattern of their forward."""
    first: dict[str, dict[str, torch.Tensor]] = {}
    for name, changes in {"own": {}, "plain": {"gradient_checkpointing": False}, "bf16": {"mixed_precision": "bf16"}}.items():
        run(clips, tmp_path / name, steps=1, **changes)
        first[name] = weights(tmp_path / name)
    for key, tensor in first["own"].items():
        torch.testing.assert_close(tensor, first["plain"][key], atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(tensor, first["bf16"][key]) for key, tensor in first["own"].items())
    assert all(torch.isfinite(tensor).all() for tensor in first["bf16"].values())


def test_clips_are_encoded_once(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = trainable(build_pipeline("wan")[0])
    files = LatentCache(base, tmp_path, SIZE).fill(find_clips(clips))
    latents, embeds = load_clip(files[0])
    assert latents is not None
    assert latents.shape == (base.channels, 3, 8, 6)
    assert set(embeds) == {"encoder_hidden_states"}
    again = LatentCache(base, tmp_path, SIZE)
    monkeypatch.setattr(again, "encode_frames", lambda frames: pytest.fail("encoded again"))
    assert again.fill(find_clips(clips)) == files
    assert LatentCache(base, tmp_path, ClipSize(5, 64, 48)).fill(find_clips(clips))[0] not in files
    files[0].write_bytes(b"cut off")
    with pytest.raises(GenAttnError, match="cannot be read .* delete it"):
        load_clip(files[0])


def test_a_clip_that_has_gone_is_skipped_with_the_reason(clips: Path, tmp_path: Path) -> None:
    dataset = find_clips(clips)
    gone = replace(dataset.clips[0], path=tmp_path / "gone.mp4")
    dataset.clips = [gone, *dataset.clips[1:]]
    files = LatentCache(trainable(build_pipeline("wan")[0]), tmp_path / "cache", SIZE).fill(dataset)
    assert len(files) == len(dataset.clips)
    assert gone not in dataset.clips
    assert any(name == gone.name and "it cannot be read" in reason for name, reason in dataset.skipped)


def test_what_cannot_be_trained_says_why(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for family, reason in {
        "wan-experts": "two experts",
        "animatediff": "no transformer",
    }.items():
        with pytest.raises(GenAttnError, match=f"cannot fine-tune: .*{reason}"):
            trainable(build_pipeline(family)[0])
    with pytest.raises(GenAttnError, match="can end on, got 8"):
        run(clips, tmp_path, size=ClipSize(8, 64, 48))
    with pytest.raises(GenAttnError, match="no clip of the dataset can be used"):
        run(clips, tmp_path, size=ClipSize(13, 64, 48))
    with pytest.raises(GenAttnError, match="context_parallel=2 cannot be served"):
        run(clips, tmp_path, context_parallel=2)
    with pytest.raises(GenAttnError, match="the rank must be >= 1"):
        add_lora(None, 0, 1.0)
    with pytest.raises(GenAttnError, match="no attention projection"):
        add_lora(torch.nn.Linear(2, 2), 2, 1.0)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "peft", None)
        with pytest.raises(
            GenAttnError, match=r"fine-tuning needs peft, which is not installed; pip install 'genattn\[train\]'"
        ):
            add_lora(torch.nn.Linear(2, 2), 2, 1.0)
    monkeypatch.setattr(
        type(trainable(build_pipeline("wan")[0])), "limits", lambda self, latents: f"{latents} latents are too many"
    )
    with pytest.raises(GenAttnError, match="cannot fine-tune at 9 frames of 8 x 6 latents: 3 latents are too many"):
        run(clips, tmp_path)
    for wrong, match in (
        ({"batch": 0}, "must be >= 1"),
        ({"caption_dropout": 2.0}, "caption_dropout"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
    ):
        with pytest.raises(GenAttnError, match=match):
            settings(**wrong)


def test_lengths_in_multiples() -> None:
    base = trainable(build_pipeline("wan")[0])
    assert [longer(base, 81, f) for f in (1, 2, 4)] == [81, 161, 321]
    with pytest.raises(GenAttnError, match="frames_factor must be > 0"):
        longer(base, 81, 0)


def test_cached_clips_of_other_sizes_are_refused(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from safetensors.torch import save_file

    text = {"text.encoder_hidden_states": torch.zeros(1, 4, 8)}
    for i, size in enumerate((2, 3)):
        save_file({"latents": torch.zeros(4, size, 2, 2), **text}, tmp_path / f"{i}.safetensors")
    save_file(text, tmp_path / "empty.safetensors")
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    embeds = load_clip(files[0])[1]
    with pytest.raises(GenAttnError, match="must be of one size"):
        module.Batches(files, embeds, settings(batch=8), Accelerator(cpu=True)).draw(torch.Generator().manual_seed(0))
    with pytest.raises(GenAttnError, match="holds no latents"):
        module.Batches([tmp_path / "empty.safetensors"], embeds, settings(), Accelerator(cpu=True))


@pytest.mark.slow
# the stock Mochi asks for autocast in float32, which a CPU does not have
@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("family", ["ltx", "cogvideox", "skyreels", "hunyuan", "mochi", "ltx2"])
def test_other_families_train_by_the_same_code(family: str, clips: Path, tmp_path: Path) -> None:
    import video_pipes

    pipe = getattr(video_pipes, family)()
    size = ClipSize(7 if family == "mochi" else 9, 64, 64)
    result = finetune(pipe, find_clips(clips), None, settings(steps=2, size=size), tmp_path)
    assert result.steps == 2
    fresh = getattr(video_pipes, family)()
    fresh.load_lora_weights(tmp_path / "lora")
    assert fresh.get_active_adapters()
    assert json.loads((tmp_path / "lora" / "finetune.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("family", "reason"),
    [("hunyuan15", "has no stock LoRA loader"), ("kandinsky", "has no attention projection called to_q")],
)
def test_families_without_a_loader_or_known_projections_are_refused(
    family: str, reason: str, clips: Path, tmp_path: Path
) -> None:
    import video_pipes

    pipe = getattr(video_pipes, family)()
    with pytest.raises(GenAttnError, match=reason):
        finetune(pipe, find_clips(clips), None, settings(steps=1, size=ClipSize(9, 64, 64)), tmp_path)


RANK = """
import sys
sys.path.insert(0, {tests!r})
import test_finetune as t
from genattn.pipelines.finetune import tune as module
from pathlib import Path
drawn = []
stock = module.Batches.draw
def draw(self, generator):
    latents, embeds = stock(self, generator)
    drawn.append(latents.flatten()[:2].tolist())
    return latents, embeds
module.Batches.draw = draw
saved = []
_, _, result = t.run(Path({clips!r}), Path({out!r}), steps={steps}, on_save=lambda pipe, step: saved.append(step), **{changes})
import json, os
told = dict(world=int(os.environ.get("WORLD_SIZE", 1)), drawn=drawn, saved=saved, steps=result.steps)
Path({out!r}, f"rank{{os.environ.get('RANK', 0)}}.json").write_text(json.dumps(told))
"""


def ranks(clips: Path, out: Path, steps: int, world: int, **changes: Any) -> list[dict[str, Any]]:
    """The same training in `world` processes that torchrun starts; what each of them says."""
    out.mkdir(parents=True, exist_ok=True)
    script = out / "rank.py"
    script.write_text(
        RANK.format(tests=os.path.dirname(__file__), clips=str(clips), out=str(out), steps=steps, changes=changes)
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.slow
def test_two_data_parallel_processes_train_as_one_with_twice_the_batch(clips: Path, tmp_path: Path) -> None:
    told = ranks(clips, tmp_path / "two", steps=2, world=2)
    assert [rank["world"] for rank in told] == [2, 2]
    assert [rank["saved"] for rank in told] == [[2], []], "the first process alone saves and samples"
    assert told[0]["drawn"] != told[1]["drawn"], "each process has clips of its own"
    run(clips, tmp_path / "one", steps=2, batch=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():  # AdamW blows rounding up where gradients are tiny; other noise would show as 1e-2
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    assert run(clips, tmp_path / "two", steps=2)[2].steps == 2, "one process reads what two wrote"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "settings.json is gone"), ("{", "readable JSON"), ("[]", "must hold an object"), ('{"seed": 1}', "other settings")],
)
def test_a_run_whose_settings_cannot_be_read_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    """What it was begun with is then not known, so going on could be with another model or other data."""
    from genattn.pipelines.finetune.tune import _same_run

    _same_run(tmp_path, {"seed": 0})
    (tmp_path / "training.safetensors").write_bytes(b"")
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(GenAttnError, match=message):
        _same_run(tmp_path, {"seed": 0})
