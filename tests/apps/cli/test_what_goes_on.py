"""Every option of a command that goes on after a stop: another value is another request, or it changes no result."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import typer
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from genattn.apps.cli import root as cli
from genattn.apps.sampling import measured_rows
from genattn.apps.sampling.output_files import write_video
from genattn.apps.tuning.journal import Journal
from genattn.errors import GenAttnError
from genattn.guidance.headhunter import hunter
from genattn.pipelines.finetune import tune as finetune
from genattn.pipelines.tiny.random.build import build_pipeline
from genattn.profiling import profile
from genattn.profiling.recorder import Recorder

ROOT = Path(__file__).resolve().parents[3]
FREE = ""  # what stands here changes nothing that was measured before the stop
IN_WEIGHTS = "tests/genattn/test_fingerprint.py changes the adapters"
BELOW = "a test of its own below"

_SAMPLING = {
    "model": "--model {other}", "negative_prompt": "--negative-prompt dark", "frames": "--frames 9", "height": "--height 48",
    "width": "--width 48", "steps": "--steps 3", "guidance_scale": "--guidance-scale 3", "dtype": "--dtype bfloat16",
    "device": "--device cpu", "cpu_offload": "refused --cpu-offload model", "lora": IN_WEIGHTS,
    "image": "refused --image {folder}/a.png",
}  # fmt: skip
_TEXTS = {"prompt": "--prompt fox", "prompts": "--prompts {folder}/q.txt", "held_out": "--held-out 1", "seed": "--seed 1"}
_WRITTEN = {"out": FREE, "as_json": FREE}
SMALL = "--model {model} --frames 5 --height 32 --width 32 --steps 2 --guidance-scale 1"
# command -> (the words that it is begun with, option -> what is given beside them, or why nothing is)
ASKED: dict[str, tuple[str, dict[str, str]]] = {
    "compare": (
        f"{SMALL} --prompt cat --out {{folder}}/c.csv",
        {**_SAMPLING, **_TEXTS, **_WRITTEN, "attention": FREE, "dense_layers": "--dense-layers 2"},  # rows have their names
    ),
    "tune": (
        f"{SMALL} --prompt cat --budget 2x --try window --out {{folder}}/t",
        {
            **_SAMPLING, **_TEXTS, **_WRITTEN, "profile_map": f"--map {ROOT}/assets/maps/tiny-wan.safetensors",
            # a goal chooses among what was measured, and settings are known by their names
            "budget": FREE, "min_psnr": FREE, "min_oracle": FREE, "families": FREE, "densities": FREE,
        },
    ),
    "profile": (
        f"{SMALL} --prompts {{folder}}/p.txt --out {{folder}}/m.safetensors",
        {
            **_SAMPLING, **_WRITTEN, "prompts": "--prompts {folder}/q.txt", "samples": "--samples 4", "seed": "--seed 1",
            "target_density": FREE, "picture": FREE,  # taken from the sums, when they are whole
        },
    ),
    "hunt": (
        f"{SMALL} --prompts {{folder}}/p.txt --objective contrast --top-k 1 --log {{folder}}/h.jsonl",
        {
            **_SAMPLING, **_WRITTEN, "device": BELOW, "prompts": "--prompts {folder}/q.txt",
            "held_out": "--held-out {folder}/q.txt",
            "objective": "--objective sharpness", "floor": "--floor contrast=-9", "top_k": "--top-k 2", "heads": "--heads L1",
            "min_layer": "--min-layer 1", "u": "--u 0.5", "tune_u": "--tune-u 0.5", "scale": "--scale 2",
            "target": "--target uniform", "halving": "--halving 2", "probe_keep": "--probe-keep 1", "batch": "--batch 2",
            "call": "--call {{\"max_sequence_length\":16}}", "log": FREE,
            "rounds": FREE, "returned": FREE,  # a longer search goes on from a shorter one
        },
    ),
    "finetune": (
        "--model {model} --data {folder} --frames-factor 0.1 --height 64 --width 48 --lora-rank 2 --steps 2 --out {folder}/f",
        {
            **_WRITTEN, "data": "--data {folder}/more", "model": "--model {other}", "attention": "--attention dense",
            "pattern_options": "--pattern-options decay=0.3", "frames_factor": "--frames-factor 0.2", "frames": "--frames 17",
            "height": "--height 48", "width": "--width 64", "lora_rank": "--lora-rank 4", "steps": "--steps 3",
            "learning_rate": "--learning-rate 0.1", "batch": "--batch 2", "dense_layers": "--dense-layers 1",
            "gradient_checkpointing": "--no-gradient-checkpointing", "mixed_precision": "--mixed-precision bf16",
            "context_parallel": "refused --context-parallel 2", "seed": "--seed 1", "dtype": "--dtype bfloat16",
            "device": BELOW, "minutes": FREE, "save_minutes": FREE, "sample_prompt": FREE, "sample_steps": FREE,
        },
    ),
}  # fmt: skip
GIVEN = [(name, option, words) for name, (_, options) in ASKED.items() for option, words in options.items() if "--" in words]


class Seen(Exception):
    """What a command would compare with a run that was stopped."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("asked")
    (found / "p.txt").write_text("a cat\na dog\n")
    (found / "q.txt").write_text("a fox\na cow\n")
    for clip in (found / "a.mp4", found / "more" / "b.mp4"):
        write_video(clip, np.zeros((9, 64, 48, 3), np.uint8), 8.0, {})
        clip.with_suffix(".txt").write_text(f"clip {clip.stem}")
    Image.new("RGB", (8, 8)).save(found / "a.png")
    pipe, _ = build_pipeline("wan")
    for name in ("model", "other"):
        pipe.save_pretrained(found / name)
    file = next((found / "other" / "transformer").glob("*.safetensors"))
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return found


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    """What each command compares for its first words alone, filled as it is asked for."""
    return {}


@pytest.fixture
def identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Any]]:
    """What the command compares, for its first words and more; of a request that is refused its message."""
    made_with = Journal.made_with

    def of_journal(journal: Journal, *told: str) -> NoReturn:
        made_with(journal, *told)
        raise Seen(journal.request)

    def seen(content: Any) -> NoReturn:
        raise Seen(json.loads(json.dumps(content)))

    monkeypatch.setattr(Journal, "made_with", of_journal)
    monkeypatch.setattr(Recorder, "load", lambda recorder, path, about: seen(about))
    monkeypatch.setattr(hunter, "SearchLog", lambda path, settings, sizes, *_: seen({**settings, "sizes": sizes}))
    monkeypatch.setattr(finetune, "_same_run", lambda out, about: seen(about))

    def of(name: str, more: str) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        words = f"{name} {ASKED[name][0]} {more}".split()
        places = {"folder": folder, "model": folder / "model", "other": folder / "other"}
        try:
            cli.app([word.format(**places) for word in words], standalone_mode=False)
        except Seen as found:
            return found.args[0]
        except GenAttnError as error:
            return str(error)
        raise AssertionError

    yield of
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", sorted(ASKED))
def test_no_option_is_forgotten(name: str) -> None:
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    assert {each.name for each in command.params} == set(ASKED[name][1])


@pytest.mark.parametrize(("name", "option", "words"), GIVEN)
def test_another_value_is_another_request(
    name: str, option: str, words: str, identity: Callable[[str, str], Any], first: dict[str, Any]
) -> None:
    found = identity(name, words.removeprefix("refused "))
    assert isinstance(found, str) == words.startswith("refused "), found
    if name not in first:
        first[name] = identity(name, "")
    assert found != first[name]


@pytest.mark.parametrize(("name", "module"), [("hunt", hunter), ("finetune", finetune), ("profile", profile)])
def test_another_device_is_another_request(
    name: str, module: Any, identity: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = identity(name, "")
    assert here == identity(name, "")
    monkeypatch.setattr(module, "place_of", lambda pipe: "cuda:1")
    assert identity(name, "") == here | {"device": "cuda"}


@pytest.mark.parametrize("name", ["compare", "tune"])
def test_another_machine_is_another_request(
    name: str, identity: Callable[[str, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = identity(name, "")["machine"]
    assert here.startswith("CPU, ")
    assert "float32" in here
    monkeypatch.setattr(measured_rows, "native_library", lambda: "switched off")
    assert identity(name, "")["machine"] == f"{here}, no C++ kernel"
