"""tiny-sd3 trains, resumes, exports a stock pipeline and samples as it was trained."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from genattn.errors import GenAttnError
from genattn.guidance.heads.head_set import HeadSet
from genattn.guidance.softpag.softpag import SoftPAG
from genattn.pipelines.tiny.evaluate import evaluation_scenes
from genattn.pipelines.tiny.oracle_objective import caption_match
from genattn.pipelines.tiny.sd3 import (
    Sd3Size,
    TinySd3,
    assemble_sd3,
    build_parser,
    caption_tokenizer,
    load_image_vae,
    main,
    tokenize_captions,
)
from genattn.pipelines.tiny.world import caption
from genattn.seam.handle import apply


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    steps = ["--vae-steps", "1", "--steps", "2", "--batch", "2", "--vae-batch", "2"]
    main(["train", "--cpu", "--run-dir", str(folder / "run"), "--out", str(folder / "model"), *steps])
    return folder


def test_exports_a_stock_pipeline(run: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(run / "model")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle moves right on a dark background", height=64, width=64, num_inference_steps=2, output_type="pt")
    assert image.images.shape == (1, 3, 64, 64)
    assert len(pipe.transformer.transformer_blocks) >= 6
    assert pipe.transformer.config.num_attention_heads >= 4
    assert sum(f.stat().st_size for f in (run / "model").rglob("*") if f.is_file()) < 12e6


@torch.no_grad()
def test_trains_on_what_the_pipeline_feeds(run: Path) -> None:
    pipe, steps = assemble_sd3(run / "run")
    assert steps == 2
    text = "a red circle moves right on a dark background"
    model = TinySd3()
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        getattr(model, name).load_state_dict(getattr(pipe, name).state_dict())
    embeds, _, pooled, _ = pipe.encode_prompt(text, text, text, do_classifier_free_guidance=False, max_sequence_length=77)
    noisy, sigma = torch.randn(1, 4, 16, 16), torch.tensor([0.5])
    expected = pipe.transformer(noisy, embeds, pooled, sigma * 1000, return_dict=False)[0]
    assert embeds[:, 24:].abs().max() == 0
    found = model.eval()(noisy, sigma, tokenize_captions(caption_tokenizer(), [text]), 77)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(GenAttnError, match="phase vae must come first"):
        load_image_vae(tmp_path)
    with pytest.raises(GenAttnError, match="the weights must be of size"):
        assemble_sd3(run / "run", Sd3Size(layers=7))
    (tmp_path / "vae").symlink_to(run / "run" / "vae")
    with pytest.raises(GenAttnError, match="phase transformer must come before"):
        assemble_sd3(tmp_path)
    with pytest.raises(GenAttnError, match="sizes must be >= 1"):
        Sd3Size(layers=0)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["train"])


def test_the_study_compares_at_equal_cost(run: Path, tmp_path: Path) -> None:
    import csv

    from genattn.pipelines.tiny.studies import sd3 as tiny_sd3_study

    numbers = {"count": 2, "hunting": 2, "rounds": 1, "top-k": 1, "steps": 2, "batch": 12, "random-sets": 1}
    asked = [part for name, value in numbers.items() for part in (f"--{name}", str(value))]
    table = tmp_path / "table.csv"
    tiny_sd3_study.main(
        [
            "--model",
            str(run / "model"),
            "--run-dir",
            str(tmp_path),
            "--csv",
            str(table),
            "--card-from",
            str(run / "run"),
            "--cpu",
            *asked,
        ]
    )
    with table.open() as file:
        rows = {row["condition"]: row for row in csv.DictReader(file)}
    layer = next(name for name in rows if name.startswith("layer L"))
    sweep = {"u 0.25", "u 0.5", "u 0.75", "u 1"}
    assert set(rows) == {"unguided", "cfg", "hunted", "hunted + cfg", layer, "random sets", "probe", *sweep}
    card = (run / "model" / "README.md").read_text()
    assert f"| hunted | {float(rows['hunted']['mean']):.3f}" in card
    assert "| transformer | 2 |" in card
    assert float(rows["hunted"]["hunted_minus"]) == 0
    assert (tmp_path / "heads.json").exists()
    with pytest.raises(GenAttnError, match="must be a pipeline folder"):
        tiny_sd3_study.main(["--model", str(tmp_path), "--run-dir", str(tmp_path)])
    with pytest.raises(GenAttnError, match="must be >= 2"):
        tiny_sd3_study.StudySettings(count=1)


def test_differences_have_intervals() -> None:
    import numpy as np

    from genattn.pipelines.tiny.studies.sd3 import compare

    rng = np.random.default_rng(0)
    plain = rng.uniform(size=(400, 4))
    rows = compare({"unguided": plain, "hunted": plain + 0.1, "random 0": plain, "random 1": plain + 0.2})
    found = {row["condition"]: row for row in rows}
    assert found["unguided"]["minus_low"] == pytest.approx(0.1)
    assert found["random sets"]["hunted_minus"] == pytest.approx(0.0, abs=1e-9)
    assert found["unguided"]["low"] < found["unguided"]["mean"] < found["unguided"]["high"]


def test_the_shipped_folder_is_small_stock_and_draws_what_is_asked() -> None:
    shipped = Path(__file__).resolve().parents[3] / "assets" / "tiny-sd3"
    files = [path for path in shipped.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert not {path.suffix for path in files} - {".json", ".jsonl", ".safetensors", ".md"}
    assert not [path for path in files if path.name == "config.json" and "_name_or_path" in path.read_text()]
    pipe = StableDiffusion3Pipeline.from_pretrained(shipped, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    texts = [caption(scene) for scene in evaluation_scenes(8)]
    seeds = [torch.Generator().manual_seed(seed) for seed in range(8)]
    size = {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 3.0}
    pictures = pipe(texts, generator=seeds, output_type="pt", **size).images
    assert sum(caption_match(list(pictures), texts)) / 8 > 0.9


def test_the_shipped_heads_fit_the_shipped_model() -> None:
    shipped = Path(__file__).resolve().parents[3] / "assets"
    heads = HeadSet.load(shipped / "heads" / "tiny-sd3.json")
    pipe = StableDiffusion3Pipeline.from_pretrained(shipped / "tiny-sd3", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    prompt = "a red circle moves right on a dark background"
    plain = pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images
    with apply(pipe, SoftPAG.from_head_set(heads)):
        guided = pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images
    assert heads.heads
    assert float((guided - plain).abs().max()) > 1e-3
