import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genattn.errors import GenAttnError
from genattn.pipelines.tiny.studies import train_sparse

MODEL = Path(__file__).resolve().parents[4] / "assets" / "tiny-wan"


@pytest.fixture
def run_dir(tmp_path):
    """Invented latents of whole clips and stills, as long as tiny-wan's."""
    captions = json.dumps(["a red circle moves right on a dark background"] * 2)
    for kind in ("stills", "settled-stills", "clips", "settled-clips"):
        latents = torch.randn(2, 6, 8 if "clips" in kind else 1, 16, 16, generator=torch.Generator().manual_seed(0))
        (tmp_path / kind).mkdir()
        save_file({"latents": latents.half()}, tmp_path / kind / "latents-00000.safetensors", metadata={"captions": captions})
    return tmp_path


def test_the_arms_start_alike_and_the_trained_ones_differ(run_dir, tmp_path):
    table = tmp_path / "out" / "train_sparse.csv"
    arguments = ["--model", str(MODEL), "--run-dir", str(run_dir), "--table", str(table)]
    train_sparse.main([*arguments, "--steps", "2", "--count", "2", "--sampling-steps", "1", "--learning-rate", "1e-3"])
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["untrained", "dense", "radial"]
    assert [row["pattern"].split("(")[0] for row in rows] == ["dense", "dense", "RadialPattern"]
    assert rows[0]["step_seconds"] == ""
    assert all(float(row["step_seconds"]) > 0 for row in rows[1:])
    # what a step teaches depends on what it is taught through; a loss through the pattern is not the dense one
    assert len({row["loss_dense"] for row in rows}) == 3
    assert all(row["loss_dense"] != row["loss_radial"] for row in rows)
    assert {"device", "torch", "diffusers", "commit", "date"} <= set(rows[0])


@pytest.mark.parametrize("changes", [{"steps": 0}, {"count": 1}, {"sampling_steps": 0}, {"learning_rate": 0.0}, {"seed": -1}])
def test_bad_settings_are_refused(changes):
    with pytest.raises(GenAttnError, match="steps must be >= 1, count >= 2"):
        train_sparse.StudySettings(**changes)


def test_only_a_tiny_pipeline_is_studied(tmp_path):
    with pytest.raises(GenAttnError, match="must be a tiny pipeline's folder"):
        train_sparse.main(["--model", str(tmp_path), "--run-dir", str(tmp_path)])
