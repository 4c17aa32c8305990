"""What the app refuses before it works: sizes, prompts, numbers, uploads."""

from pathlib import Path

import pytest
from PIL import Image

from genattn.apps.webui.verbs.limits import Limits, number, read_picture, whole
from genattn.errors import GenAttnError


def test_clips_within_the_limits() -> None:
    limits = Limits(pixels=100, frames=9, steps=5)
    limits.check_clip(10, 10, 9, 5)
    limits.check_clip(10, 10, None, 5)
    for wrong, said in (((11, 10, 9, 5), "at most 100 pixels"), ((10, 10, 10, 5), "9 frames"), ((10, 10, 9, 6), "5 steps")):
        with pytest.raises(GenAttnError, match=said):
            limits.check_clip(*wrong)


def test_limits_are_whole_numbers() -> None:
    with pytest.raises(GenAttnError, match="limit steps must be a whole number"):
        Limits(steps=0)


def test_prompts() -> None:
    limits = Limits(prompt_chars=10)
    limits.check_prompts("a cat", None)
    with pytest.raises(GenAttnError, match="must say what to show"):
        limits.check_prompts("  ")
    with pytest.raises(GenAttnError, match="10 characters of prompt"):
        limits.check_prompts("a cat", "another")


def test_numbers_from_a_form() -> None:
    assert whole("seed", 12.0, 0) == 12
    assert whole("seed", None, 0, 7) == 7
    assert whole("seed", 0, 0) == 0
    assert whole("seed", None, 3, 0) == 0
    assert number("u", 0.5) == 0.5
    assert number("u", None, 1.0) == 1.0
    for wrong in (None, "12", 1.5, float("nan"), float("inf"), True, [1]):
        with pytest.raises(GenAttnError, match="must be a whole number"):
            whole("seed", wrong, 0)
    with pytest.raises(GenAttnError, match="seed must be >= 0, got -1"):
        whole("seed", -1, 0)
    for wrong in (None, "0.5", float("nan"), True):
        with pytest.raises(GenAttnError, match="must be a finite number"):
            number("u", wrong)


def test_uploads_by_suffix_and_size(tmp_path: Path) -> None:
    limits = Limits(upload_bytes=10)
    good = tmp_path / "set.json"
    good.write_text("{}")
    assert limits.check_upload(good, (".json",)) == good
    with pytest.raises(GenAttnError, match="must be a file ending in"):
        limits.check_upload(tmp_path / "set.pkl", (".json",))
    good.write_text("{" + " " * 20 + "}")
    with pytest.raises(GenAttnError, match="at most 10 bytes, got 22"):
        limits.check_upload(good, (".json",))


def test_pictures_are_known_by_their_content(tmp_path: Path) -> None:
    limits = Limits(pixels=100)
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "red").save(path)
    assert read_picture(path, limits, (16, 16)).size == (16, 16)
    turned = Image.Exif()
    turned[0x0112] = 6  # a phone's: turn a quarter to the right when shown
    lying = Image.new("RGB", (20, 10), "red")
    lying.paste("blue", (10, 0, 20, 10))
    lying.save(path, exif=turned)
    upright = read_picture(path, limits, (20, 10))
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == (255, 0, 0)
    assert upright.getpixel((5, 17)) == (0, 0, 255)
    Image.new("RGB", (60, 60)).save(path)
    with pytest.raises(GenAttnError, match="pictures of at most 1,600 pixels"):
        read_picture(path, limits, (16, 16))
    path.write_text("<svg/>")
    with pytest.raises(GenAttnError, match="whole PNG, JPEG, WEBP file"):
        read_picture(path, limits, (16, 16))
    Image.new("RGB", (8, 8)).save(path, format="GIF")
    with pytest.raises(GenAttnError, match="whole PNG, JPEG, WEBP file"):
        read_picture(path, limits, (16, 16))
