"""NAG on ComfyUI's own models: tiny random ones of every family, in ComfyUI's Python, against a slow twin of two passes."""

import pytest
from comfy_scene import LIVE, rows_of

pytestmark = LIVE
SERVED = (
    "wan", "wan-in-context", "ltx", "ltx-masked", "ltx2", "cosmos", "unet", "flux", "flux-kontext", "flux2", "chroma",
    "hunyuan", "hunyuan-masked", "qwen", "qwen-masked", "qwen-edit", "sd3", "sd35",
)  # fmt: skip
REFUSED = {
    "krea": "lets no node replace its blocks",
    "z-image": "turned by the length of the prompt",
    "kandinsky": "its text attends to itself",
    "h3": "packed into one sequence",
}


@pytest.fixture(scope="module")
def told() -> dict[str, dict]:
    return rows_of("comfy_nag.py", *SERVED, *REFUSED)


@pytest.mark.parametrize("family", SERVED)
def test_it_is_the_twin_of_two_passes(told: dict[str, dict], family: str) -> None:
    row = told[family]
    if "absent" in row:
        pytest.skip(f"this ComfyUI has no such family: {row['absent']}")
    assert "error" not in row, row["error"]
    assert row["finite"]
    assert row["calls"] > 0
    assert row["changed"] > 0.05
    assert row["off"], "scale 1 is the stock model to the bit"
    assert row["outside"], "so is a step outside the window"
    assert row["same_text"] < 1e-5, "a negative that is the positive changes nothing"
    if "twin" in row:
        assert row["twin"] < 1e-5
        assert row["guided_of_pair"] < 1e-5
        assert row["unconditional_of_pair"] < 1e-5, "unconditional samples are left alone"
    if "sparse" in row:
        assert row["under_full_window"] < 1e-5
        sparse, calls = row["sparse"]
        assert sparse == calls > 0, row["reasons"]


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_take_a_second_text_says_why(told: dict[str, dict], family: str) -> None:
    row = told[family]
    if "absent" in row:
        pytest.skip(f"this ComfyUI has no such family: {row['absent']}")
    assert REFUSED[family] in row["error"]
