"""LoRA files and pictures on the way into a run."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from genattn.apps.cli.long import _picture_statistics
from genattn.apps.sampling.inputs import add_loras, lora_of, read_picture
from genattn.apps.sampling.output_files import read_metadata
from genattn.apps.sampling.run import DENSE, SamplingSettings, call_arguments, open_pipeline, run_once
from genattn.errors import GenAttnError
from genattn.guidance.headhunter import style_objectives


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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_what_is_transparent_stands_on_white(mode: str, kind: str, tmp_path: Path) -> None:
    """Black hides under the transparent half in every file that keeps it."""
    clear = {} if mode in ("RGBA", "LA") else {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    if kind != "PNG" and mode != {"WEBP": "RGBA", "GIF": "P"}[kind]:
        pytest.skip(f"Pillow writes no {kind} of this kind")
    ink: Any = {"RGBA": (64, 64, 64, 255), "LA": (64, 255), "P": 1, "RGB": (64, 64, 64)}[mode]
    picture = Image.new(mode, (8, 4), 0)
    if mode == "P":
        picture.putpalette([0, 0, 0, 64, 64, 64])
    picture.paste(ink, (0, 0, 4, 4))
    picture.save(tmp_path / "a", kind, **clear, **({"lossless": True} if kind == "WEBP" else {}))
    seen = np.asarray(read_picture(tmp_path / "a"))
    assert seen.shape == (4, 8, 3)
    assert (seen[:, :4] == 64).all()
    assert (seen[:, 4:] == 255).all()


def test_what_is_half_transparent_lets_the_white_through(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 51)).save(tmp_path / "a.png")  # a fifth of red
    assert np.asarray(read_picture(tmp_path / "a.png"))[0, 0].tolist() == [255, 204, 204]


def test_a_pipeline_without_a_start_picture_says_so(random_wan_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    settings = SamplingSettings(str(random_wan_folder), frames=5, height=64, width=64, image=tmp_path / "a.png")
    with pytest.raises(GenAttnError, match="WanPipeline takes no image; leave it out"):
        call_arguments(open_pipeline(settings), settings)


def bomb(path: Path) -> Path:
    """A PNG of a few bytes that claims 3.6 gigapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def test_a_picture_that_unpacks_without_end_is_refused_in_every_reader(tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.png")
    with pytest.raises(GenAttnError, match=r"--image .* must have fewer pixels .*; make it smaller"):
        read_picture(path)
    with pytest.raises(GenAttnError, match="cannot be read"):
        read_metadata(path)
    with pytest.raises(GenAttnError, match="must have fewer pixels"):
        _picture_statistics(path)
    with pytest.raises(GenAttnError, match="must be a readable picture"):
        style_objectives.read_picture(path)


def test_a_large_picture_is_read_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (20, 20), 7).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert read_picture(tmp_path / "a.png").getpixel((3, 3)) == (7, 7, 7)


@pytest.mark.parametrize("cut", [0, 30, 200])
def test_a_picture_that_is_cut_off_is_named(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[: cut and -cut])
    for look in (read_picture, _picture_statistics):
        with pytest.raises(GenAttnError, match=r"a\.jpg' cannot be read as a picture: .*; check the file"):
            look(path)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.4, 300.0]], np.float32), [0, 100, 255]),
        (np.array([[0.0, np.nan, 0.0]], np.float32), [0, 0, 0]),
        (np.array([[0, 257 * 3, 65535]], np.int32), [0, 3, 255]),
    ],
)
def test_grey_of_other_depths_is_scaled(values: np.ndarray, shown: list[int], tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.asarray(read_picture(tmp_path / "a.tif"))[0, :, 0].tolist() == shown
    found = style_objectives.read_picture(tmp_path / "a.tif")
    assert (found[0, 0] * 255).round().tolist() == shown
