"""Offline objectives know what they are named after; scorers and one's own functions are checked."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from genattn.errors import GenAttnError
from genattn.guidance.headhunter.objectives import (
    STATISTICS,
    as_frames,
    checked,
    load_objective,
    luma,
    objective_mark,
    steadiness,
)
from genattn.guidance.headhunter.style_objectives import PaletteObjective, StyleObjective, read_picture

SIZE = 64


def waves() -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, SIZE), torch.linspace(0, 1, SIZE), indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin(f) for f in (12 * x + 3 * y, 9 * y, 7 * (x + y))])


def blurred(image: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(image[None], [3] * 4, mode="reflect"), 7, 1)[0]


def grey(image: torch.Tensor) -> torch.Tensor:
    return luma(image[None])[0].expand(3, -1, -1)


def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    base, noise = waves(), torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    noisy = (base + 0.2 * (noise - 0.5)).clamp(0, 1)
    return {
        "sharpness": (noisy, blurred(base)),
        "colourfulness": (base, grey(base)),
        "contrast": (base, 0.5 + 0.3 * (base - 0.5)),
        "saturation": (base, grey(base)),
        "brightness": ((base + 0.1).clamp(0, 1), base),
        "warmth": (base + torch.tensor([0.1, 0.0, -0.1])[:, None, None], base),
        "edge_density": (base, torch.full_like(base, 0.5)),
        "symmetry": ((base + base.flip(-1)) / 2, base),
        "unclipped": (base, (3 * base - 1).clamp(0, 1)),
        "spectral_slope": (blurred(noise), noise),
    }


@pytest.mark.parametrize("name", STATISTICS)
def test_more_of_it_scores_higher(name: str) -> None:
    more, less = pairs()[name]
    scores = load_objective(name)([more, less, torch.stack([more, less])], ["", "", ""])
    assert scores[0] > scores[1]
    assert scores[2] == pytest.approx((scores[0] + scores[1]) / 2, abs=1e-4)
    negated = load_objective(f"-{name}")([more, less], ["", ""])
    assert negated == pytest.approx([-s for s in scores[:2]], abs=1e-6)


def test_known_values() -> None:
    red = torch.zeros(3, 8, 8)
    red[0] = 1.0
    value = lambda name: load_objective(name)([red], [""])[0]  # noqa: E731
    assert value("brightness") == pytest.approx(0.299, abs=1e-6)
    assert value("saturation") == pytest.approx(1.0, abs=1e-5)
    assert value("warmth") == 1.0
    assert value("unclipped") == -1.0
    assert value("symmetry") == 0.0
    # rg = 255, yb = 127.5 everywhere: no spread, all offset
    assert value("colourfulness") == pytest.approx(0.3 * np.hypot(255, 127.5), rel=1e-5)


def test_steadiness() -> None:
    still = torch.rand(1, 3, 8, 8).expand(4, -1, -1, -1)
    assert steadiness(still) == 0.0
    assert steadiness(still[0]) == 0.0
    flicker = still * torch.tensor([1.0, 0.5, 1.0, 0.5])[:, None, None, None]
    assert load_objective("steadiness")([flicker], [""])[0] < -0.1


def test_closeness_to_a_picture(tmp_path: Path) -> None:
    base = waves()
    shuffled = base.flatten(1)[:, torch.randperm(SIZE * SIZE)].view_as(base)
    palette, style = PaletteObjective(base), StyleObjective(base)
    scores = palette([base, shuffled, grey(base)], [""] * 3)
    assert scores[0] == 0.0
    assert scores[1] == pytest.approx(0.0, abs=1e-6)
    assert scores[2] < -0.01
    same, rolled, noise = style([base, torch.roll(base, (9, 5), (1, 2)), torch.rand_like(base)], [""] * 3)
    assert same == 0.0
    assert same > rolled > noise
    path = tmp_path / "ref.png"
    Image.fromarray((base.movedim(0, -1) * 255).round().to(torch.uint8).numpy()).save(path)
    torch.testing.assert_close(read_picture(path), base, atol=1 / 255, rtol=0)
    for name in ("palette", "style"):
        near, far = load_objective(f"{name}:{path}")([base, torch.rand_like(base)], ["", ""])
        assert near > far
    Image.new("L", (8, 8), 128).save(path)
    assert read_picture(path).shape == (3, 8, 8)
    with pytest.raises(GenAttnError, match="must be a readable picture"):
        load_objective(f"palette:{tmp_path / 'absent.png'}")


def test_pictures_of_every_kind_are_read_as_seen(tmp_path: Path) -> None:
    path = tmp_path / "ref.png"
    red = Image.new("RGB", (8, 4), (255, 0, 0))
    red_seen = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 8)
    red.convert("P").save(path)
    torch.testing.assert_close(read_picture(path), red_seen)
    red.convert("RGBA").save(path)
    torch.testing.assert_close(read_picture(path), red_seen)
    Image.new("LA", (8, 4), (51, 255)).save(path)
    torch.testing.assert_close(read_picture(path), torch.full((3, 4, 8), 0.2))
    Image.fromarray(np.full((4, 8), 13107, np.uint16)).save(path)
    torch.testing.assert_close(read_picture(path), torch.full((3, 4, 8), 0.2))
    Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(path)
    torch.testing.assert_close(read_picture(path), torch.ones(3, 4, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # filmed upright: a quarter turn to the right
    red.save(path, exif=exif)
    assert read_picture(path).shape == (3, 8, 4)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(GenAttnError, match="must be a readable picture"):
        read_picture(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sharpnes", "objective must be one of sharpness"),
        ("", "objective must be one of"),
        ("palette", "palette:PICTURE"),
        ("clip_score", "clip_score:PATH"),
        ("clip_score:/nowhere", "weights must lie at /nowhere/config.json"),
        ("pick_score:/nowhere", "weights must lie at"),
        ("aesthetic:/nowhere", "CLIP_FOLDER\\+HEAD"),
        ("aesthetic:/nowhere+/nowhere.safetensors", "weights must lie at"),
        ("hps:/nowhere.pt", "weights must lie at /nowhere.pt"),
        ("image_reward:/nowhere.pt", "weights must lie at"),
        ("no_such_module:score", "importable module:function"),
        ("math:no_such_function", "importable module:function"),
        ("math:pi", "must be a function"),
    ],
)
def test_refuses_names(name: str, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        load_objective(name)


def test_missing_packages_are_named(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"0")
    with pytest.raises(GenAttnError, match="needs the package hpsv2"):
        load_objective(f"hps:{weights}")


def zeros(samples: object, prompts: object) -> list[float]:
    return [0.0]


def test_ones_own_function_is_checked() -> None:
    sample = torch.rand(3, 8, 8)
    assert load_objective("statistics:fmean") is not None
    good = checked(lambda samples, prompts: torch.tensor([float(len(p)) for p in prompts]), "length")
    assert good([sample, sample], ["a", "abc"]) == [1.0, 3.0]
    with pytest.raises(GenAttnError, match="'few' must give one score per sample, got 1 for 2"):
        checked(zeros, "few")([sample, sample], ["", ""])
    with pytest.raises(GenAttnError, match="'bad' must give finite scores, got nan for sample 1"):
        checked(lambda samples, prompts: [0.0, float("nan")], "bad")([sample, sample], ["", ""])
    with pytest.raises(GenAttnError, match=r"must be \[3, H, W\] or \[T, 3, H, W\], got \(1, 8, 8\)"):
        as_frames(torch.rand(1, 8, 8))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of the least size, in the form of a checkpoint."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    from genattn.pipelines.tiny.random import text as tiny_random_text

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = tiny_random_text.clip_tokenizer()
    text = {"vocab_size": 1000, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval().save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer).save_pretrained(folder)
    return folder


def test_scores_by_a_local_clip(clip_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    samples, prompts = [torch.rand(3, 20, 24), torch.rand(2, 3, 20, 24)], ["a cat", "a dog on a hill"]
    clip, pick = (load_objective(f"{kind}:{clip_folder}") for kind in ("clip_score", "pick_score"))
    first, second = clip(samples, prompts), pick(samples, prompts)
    assert all(0 <= score <= 100 for score in first)
    factor = json.loads((clip_folder / "config.json").read_text())["logit_scale_init_value"]
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(max(0.0, 100 * b / np.exp(factor)), abs=1e-3)
    assert clip(samples[:1], prompts[1:]) != first[:1]
    head = tmp_path / "head.safetensors"
    save_file({"weight": torch.ones(1, 8), "bias": torch.tensor([5.0])}, head)
    aesthetic = load_objective(f"aesthetic:{clip_folder}+{head}")(samples, prompts)
    assert all(5 - 8**0.5 <= score <= 5 + 8**0.5 for score in aesthetic)
    save_file({"weight": torch.ones(2, 8)}, head)
    with pytest.raises(GenAttnError, match=r"must hold one \[1, E\] weight"):
        load_objective(f"aesthetic:{clip_folder}+{head}")


def test_scores_by_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"0")
    loads: list[str] = []
    package = types.ModuleType("ImageReward")
    package.load = lambda path: (
        loads.append(path)
        or types.SimpleNamespace(  # type: ignore[attr-defined]
            score=lambda prompt, pictures: [float(len(prompt)) + picture.width for picture in pictures]
        )
    )
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    objective = load_objective(f"image_reward:{weights}")
    for _ in range(2):
        assert objective([torch.rand(3, 8, 6), torch.rand(2, 3, 8, 6)], ["ab", "abc"]) == [8.0, 9.0]
    assert loads == [str(weights)]
    hps = types.ModuleType("hpsv2")
    hps.score = lambda pictures, prompt, cp: [0.25] * len(pictures)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hpsv2", hps)
    assert load_objective(f"hps:{weights}")([torch.rand(3, 8, 6)], ["a"]) == [0.25]


def test_a_palette_is_looked_at_from_32_sides() -> None:
    """Scores of a search that goes on must be those of the search that began."""
    palette = PaletteObjective(torch.rand(3, 16, 16))
    assert palette.profile(torch.rand(2, 3, 16, 16)).shape == (2, 32, 64)
    assert torch.allclose(palette.directions.norm(dim=1), torch.ones(32))
    grey = palette.profile(torch.full((1, 3, 8, 8), 0.5))
    assert torch.allclose(grey, (0.5 * palette.directions.sum(1))[None, :, None].expand_as(grey))


def test_an_objective_is_known_by_what_its_name_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of another picture, other weights or a changed function are not gone on with."""
    for name in (
        "sharpness",
        "-warmth",
        "my own",
        "no_such_module:function",
        ":function",
        ".relative:function",
        "clip_score:/no",
    ):
        assert objective_mark(name) == name
    module, picture, weights = tmp_path / "my_judge.py", tmp_path / "p.png", tmp_path / "clip"
    monkeypatch.syspath_prepend(str(tmp_path))
    weights.mkdir()
    seen: dict[str, set[str]] = {}
    for content in ("x = 1", "x = 2"):
        for file in (module, picture, weights / "a.safetensors", tmp_path / "head.safetensors"):
            file.write_text(content)
        names = ("my_judge:x", "-my_judge:x", f"palette:{picture}", f"style:{picture}", f"hps:{weights}")
        for name in (*names, f"aesthetic:{weights}+{tmp_path / 'head.safetensors'}"):
            mark = objective_mark(name)
            assert mark == objective_mark(name)
            assert mark.startswith(f"{name} ")
            seen.setdefault(name, set()).add(mark)
    assert all(len(marks) == 2 for marks in seen.values())
