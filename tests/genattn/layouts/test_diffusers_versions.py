"""The seam over other versions of diffusers: model-only, each version unpacked alone beside the installed packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FAMILIES = ("wan", "flux", "sd3", "hunyuan-video", "cogvideox", "ltx", "mochi", "unet", "qwen-image", "latte")
SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
import importlib.util
find = importlib.util.find_spec  # old versions cannot import the quantisers of today, and need none here
importlib.util.find_spec = lambda name, *rest: None if name in ("torchao", "bitsandbytes") else find(name, *rest)
import torch, diffusers
assert diffusers.__version__ == sys.argv[1], diffusers.__version__
from genattn import DensePattern, RadialPattern
from genattn.seam.handle import apply
from genattn.pipelines.tiny.random.build import build_inputs, build_model
from genattn.pipelines.tiny.random.models import MODELS
ran = 0
for family in sys.argv[2:]:
    if not MODELS[family].available:
        print(family, "is not in this version")
        continue
    model, inputs = build_model(family), build_inputs(family)
    if family == "qwen-image" and sys.argv[1] == "0.36.0":
        inputs["txt_seq_lens"] = [8]  # later versions take it from the mask
    with torch.no_grad():
        stock = model(**inputs, return_dict=False)[0]
        kinds = [type(m) for m in model.modules()]
        processors = [type(m.processor) for m in model.modules() if hasattr(m, "processor")]
        with apply(model, DensePattern()):
            assert torch.equal(model(**inputs, return_dict=False)[0], stock), family
        with apply(model, RadialPattern(), dense_steps=0, dense_layers=0) as handle:
            model(**inputs, return_dict=False)
            report = handle.report()
            assert report.sparse_calls == report.calls > 0, (family, report.dense_reasons)
        assert [type(m) for m in model.modules()] == kinds
        assert [type(m.processor) for m in model.modules() if hasattr(m, "processor")] == processors
        assert torch.equal(model(**inputs, return_dict=False)[0], stock), family
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


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.36.0", "0.39.0"])
def test_other_versions(version: str, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), f"diffusers=={version}"]
    got = subprocess.run(install, capture_output=True, text=True, timeout=500, check=False)
    if got.returncode:
        pytest.skip(f"diffusers {version} cannot be installed here: {got.stderr.strip().splitlines()[-1]}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, version, *FAMILIES],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "families: " in ran.stdout
    assert int(ran.stdout.rsplit(":", 1)[1]) >= 8
