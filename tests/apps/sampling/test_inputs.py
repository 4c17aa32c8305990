"""LoRA files and pictures on the way into a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genattn.apps.sampling.inputs import add_loras, lora_of, read_picture
from genattn.apps.sampling.run import DENSE, SamplingSettings, call_arguments, open_pipeline, run_once
from genattn.errors import GenAttnError


@pytest.fixture
def lora(random_wan_folder: Path, tmp_path: Path) -> Path:
    """A LoRA with large random weights for the random Wan."""
    peft = pytest.importorskip("peft", reason="LoRA files need peft")
    pipe = open_pipeline(SamplingSettings(str(random_wan_folder)))
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers={name: w * 5 for name, w in layers.items()})
    return tmp_path / "pytorch_lora_weights.safetensors"


def _frames(folder: Path, *loras: str) -> np.ndarray:
    settings = SamplingSettings(str(folder), frames=5, height=64, width=64, steps=1, guidance_scale=1.0, lora=loras)
    pipe = open_pipeline(settings)
    return run_once(pipe, call_arguments(pipe, settings), "a cat", 0, DENSE, "dense").frames


def test_a_lora_acts_with_its_weight(random_wan_folder: Path, lora: Path) -> None:
    stock = _frames(random_wan_folder)
    assert np.array_equal(_frames(random_wan_folder, f"{lora}:0"), stock)
    half, whole = _frames(random_wan_folder, f"{lora}:0.5"), _frames(random_wan_folder, str(lora))
    assert not np.array_equal(whole, stock)
    assert not np.array_equal(whole, half)
    twice = _frames(random_wan_folder, f"{lora}:0.25", f"{lora}:0.25")
    assert np.abs(twice.astype(int) - half).max() <= 1, "two halves of a half"


def test_names_and_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "style.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    assert lora_of(f"{file}:0.8") == (str(file), 0.8)
    assert lora_of(str(file)) == (str(file), 1.0)
    assert lora_of("owner/name:-1") == ("owner/name", -1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("style.ckpt", "--lora must be a .safetensors file or a hub id, got 'style.ckpt'; other formats are not loaded"),
        ("missing.safetensors:0.5", r"there is no file 'missing.safetensors'"),
        ("name", r"a hub id \(owner/name\), and there is no file 'name'"),
        ("owner/name:nan", "the weight of --lora must be a finite number, got 'owner/name:nan'"),
    ],
)
def test_refused_before_a_model_is_opened(text: str, message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        SamplingSettings(lora=(text,))


@pytest.mark.parametrize("content", [b"", b"12345678{}", b"not a model"])
def test_a_file_cut_short_is_refused_before_a_model_is_opened(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(content)
    with pytest.raises(GenAttnError, match=r"--lora '.*cut.safetensors' must be a whole safetensors file: .*; copy it again"):
        SamplingSettings(lora=(f"{tmp_path / 'cut.safetensors'}:0.5",))


def test_what_does_not_fit_is_told(random_wan_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    wrong = tmp_path / "wrong.safetensors"
    save_file({"nothing.of.this.kind": torch.zeros(1)}, wrong)
    pipe = open_pipeline(SamplingSettings(str(random_wan_folder)))
    with pytest.raises(GenAttnError, match="cannot be used"):
        add_loras(pipe, [str(wrong)])
    with pytest.raises(GenAttnError, match="object takes no LoRA; leave --lora out"):
        add_loras(object(), [str(wrong)])


def test_pictures_stand_upright(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), dtype=np.uint8)
    pixels[:, :2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees when shown
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    shown: Any = read_picture(tmp_path / "a.png")
    assert shown.size == (4, 8)
    assert np.asarray(shown)[:2].min() == 255
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(GenAttnError, match="cannot be read as a picture"):
        read_picture(tmp_path / "b.png")
    with pytest.raises(GenAttnError, match="--image must be a picture, and there is no file"):
        SamplingSettings(image=tmp_path / "c.png")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_sixteen_bits_keeps_its_shades(kind: str, tmp_path: Path) -> None:
    """Pillow's own conversion makes everything above 255 white."""
    shades = np.array([[0, 257, 128 * 257, 65535]] * 8, dtype=np.uint16)
    Image.fromarray(shades).save(tmp_path / "a.png", kind)
    assert np.asarray(read_picture(tmp_path / "a.png"))[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_a_pipeline_without_a_start_picture_says_so(random_wan_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    settings = SamplingSettings(str(random_wan_folder), frames=5, height=64, width=64, image=tmp_path / "a.png")
    with pytest.raises(GenAttnError, match="WanPipeline takes no image; leave it out"):
        call_arguments(open_pipeline(settings), settings)
