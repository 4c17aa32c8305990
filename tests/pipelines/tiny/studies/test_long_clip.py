"""The study of one clip beyond its training: which rows it makes, under which LoRA, and its table."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import WanPipeline

from genattn.errors import GenAttnError
from genattn.pipelines.finetune.lora import add_lora, save_lora
from genattn.pipelines.tiny.studies import long_clip as tiny
from genattn.pipelines.tiny.world import render

MODEL = Path(__file__).resolve().parents[4] / "assets" / "tiny-wan"
STEPS = 7


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    pipe = WanPipeline.from_pretrained(MODEL)
    add_lora(pipe.transformer, 2, 2)
    save_lora(pipe, folder, {"steps": STEPS, "lora_rank": 2, "size": {"frames": 57}, "pattern": "None"})
    return folder


def test_the_lora_of_this_length_is_found_and_named(lora: Path, tmp_path: Path) -> None:
    told = {"steps": 3, "lora_rank": 4, "size": {"frames": 113}, "pattern": "RadialPattern()"}
    (tmp_path / "finetune.json").write_text(json.dumps(told))
    assert tiny.lora_of([tmp_path, lora], 57) == (lora, "dense, 7 steps, rank 2")
    assert tiny.lora_of([tmp_path, lora], 113) == (tmp_path, "RadialPattern(), 3 steps, rank 4")
    with pytest.raises(GenAttnError, match=r"trained at the clip's 29 frames, got \[113, 57\]"):
        tiny.lora_of([tmp_path, lora], 29)


def test_untuned_rows_come_first_and_the_lora_is_on_the_model_for_its_own(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[list[str], bool]] = []

    def clips(pipe: Any, plugins: list[Any], scenes: Any, frames: int, *_: Any) -> Any:
        made.append(([type(plugin).__name__ for plugin in plugins], bool(pipe.get_active_adapters())))
        return np.stack([render(scene, frames, 64, 64) for scene in scenes])

    monkeypatch.setattr(tiny, "clips", clips)
    table = tmp_path / "rows.csv"
    command = ["--model", str(MODEL), "--factors", "2", "--count", "2", "--table", str(table), "--variants", "stock"]
    tiny.main(command)
    tiny.main([*command, "--lora", str(lora)])
    tiny.main([*command, "--lora", str(lora)])
    assert made == [
        ([], False),
        ([], True),
        (["RIFLEx"], True),
        (["LogitDecay"], True),
        (["FrameStretch"], True),
    ]
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["lora"] for row in rows] == ["", *["dense, 7 steps, rank 2"] * len(tiny.TUNED)]
    shown = tiny.markdown(table).split("\n")
    assert [line.split(" | ")[1] for line in shown[2:-2]] == ["stock", *tiny.TUNED]
    assert shown[-1].endswith("Length LoRAs: dense, 7 steps, rank 2 at 2x.</sub>")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="count must be >= 2 and factors > 0, got 1"):
        tiny.main(["--count", "1"])
    with pytest.raises(GenAttnError, match="must be a tiny pipeline's folder"):
        tiny.main(["--model", str(tmp_path)])
