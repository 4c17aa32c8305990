"""The seam over other versions of diffusers, each unpacked alone beside the installed packages.

Every family that a version has, denoiser alone, and loading: 0.36, 0.39, and 0.40, the oldest that is asked for. Whole test
files where an older version once differed: 0.39 and 0.40.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WHOLE = (
    "tests/genattn/layouts/test_families.py",
    "tests/genattn/seam/test_apply.py",
    "tests/genattn/seam/test_lives_with.py",
    "tests/guidance/nag/test_nag_pipelines.py",
    "tests/guidance/softpag/test_softpag_families.py",
    "tests/guidance/softpag/test_softpag_lives_with.py",
)
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import importlib.util
find = importlib.util.find_spec  # old versions cannot import the quantisers of today, and need none here
importlib.util.find_spec = lambda name, *rest: None if name in ("torchao", "bitsandbytes") else find(name, *rest)
import torch, diffusers
assert diffusers.__version__ == sys.argv[1], diffusers.__version__
import copy
from genattn import DensePattern, RadialPattern
from genattn.guidance.passes.prediction import leaves
from genattn.seam.handle import apply
from genattn.pipelines.tiny.random.build import build_inputs, build_model, families
ran = 0
for family in families():
    if family == "sana":
        continue  # refused as linear
    model, inputs = build_model(family), build_inputs(family)
    if family in ("qwen-image", "qwen-image-edit") and sys.argv[1] == "0.36.0":
        inputs["txt_seq_lens"] = [inputs["encoder_hidden_states"].shape[1]]  # later versions take it from the mask

    def forward():
        with torch.no_grad():
            return leaves(model(**copy.deepcopy(inputs), return_dict=False))

    def same(ones, others):
        return len(ones) == len(others) > 0 and all(torch.equal(a, b) for a, b in zip(ones, others))

    stock = forward()
    kinds = [type(m) for m in model.modules()]
    processors = [type(m.processor) for m in model.modules() if hasattr(m, "processor")]
    with apply(model, DensePattern()):
        assert same(forward(), stock), family
    with apply(model, RadialPattern(), dense_steps=0, dense_layers=0) as handle:
        forward()
        report = handle.report()
        assert report.sparse_calls > 0, (family, report.dense_reasons)
        assert "no layout" not in str(report.dense_reasons), (family, report.dense_reasons)
    assert [type(m) for m in model.modules()] == kinds
    assert [type(m.processor) for m in model.modules() if hasattr(m, "processor")] == processors
    assert same(forward(), stock), family
    ran += 1
from genattn.apps.sampling.load_pipeline import load_pipeline
from genattn.pipelines.tiny.random.build import build_pipeline
from types import SimpleNamespace
from diffusers.pipelines.wan import pipeline_wan
if not hasattr(pipeline_wan, "ftfy"):
    pipeline_wan.ftfy = SimpleNamespace(fix_text=str)  # only mends broken text
pipe, call = build_pipeline("wan")
pipe.save_pretrained("saved")
pipe = load_pipeline("saved", dtype="bfloat16")
assert pipe.transformer.dtype == torch.bfloat16
pipe.set_progress_bar_config(disable=True)
with apply(pipe, RadialPattern()) as handle:
    pipe(**call)
    assert handle.report().sparse_calls > 0
print("families:", ran)
"""


def beside(version: str, tmp_path: Path) -> dict[str, str]:
    """The environment in which this version of diffusers stands before the installed one."""
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), f"diffusers=={version}"]
    got = subprocess.run(install, capture_output=True, text=True, timeout=500, check=False)
    if got.returncode:
        pytest.skip(f"diffusers {version} cannot be installed here: {got.stderr.strip().splitlines()[-1]}")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}


@pytest.mark.slow
@pytest.mark.parametrize(("version", "families"), [("0.36.0", 49), ("0.39.0", 65), ("0.40.0", 72)])
def test_other_versions(version: str, families: int, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, version],
        capture_output=True,
        text=True,
        env=beside(version, tmp_path),
        cwd=tmp_path,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "families: " in ran.stdout
    assert int(ran.stdout.rsplit(":", 1)[1]) == families


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.39.0", "0.40.0"])
def test_whole_files_on_an_older_version(version: str, tmp_path: Path) -> None:
    """What fails in an older version by its own fault is skipped there with the reason; nothing else is."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rs", *WHOLE]
    environment = beside(version, tmp_path)
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=1800, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:]
    skipped = [line for line in ran.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("group offloading" in line for line in skipped), skipped
