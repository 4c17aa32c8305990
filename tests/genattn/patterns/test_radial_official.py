"""Parity with the released Radial Attention code, by its published densities and its known holes."""

import numpy as np
import pytest

from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.radial import RadialPattern
from genattn.patterns.radial_official import official_block_mask

# frames, tokens per frame, block, decay, model, sink, half window, density of video x video blocks
RUNS = [
    (18, 3840, 128, 0.2, "wan", None, False, 0.287),
    (18, 3840, 128, 0.2, "wan", None, True, 0.263),
    (18, 3840, 128, 0.5, "wan", None, False, 0.339),
    (18, 3840, 128, 1.0, "wan", None, False, 0.431),
    (18, 3840, 128, 1.0, "wan", None, True, 0.407),
    (20, 3840, 64, 0.8, "wan", None, False, 0.349),
    (20, 3840, 128, 0.8, "wan", None, False, 0.353),
    (41, 3840, 128, 0.2, "wan", None, True, 0.171),
    (41, 3840, 128, 0.5, "wan", None, True, 0.197),
    (41, 3840, 128, 1.0, "wan", None, True, 0.253),
    (30, 3840, 128, 0.95, "hunyuan", None, False, 0.275),
    (30, 3840, 128, 1.0, "hunyuan", None, False, 0.293),
    (30, 3840, 128, 1.0, "hunyuan", True, False, 0.319),
    (32, 3600, 128, 0.95, "hunyuan", None, False, 0.275),
    (32, 3600, 128, 1.0, "hunyuan", True, False, 0.305),
    (64, 3600, 128, 1.0, "hunyuan", None, False, 0.178),
    (64, 3600, 128, 1.0, "hunyuan", True, False, 0.192),
    (128, 3600, 128, 1.0, "hunyuan", None, False, 0.109),
    (128, 3600, 128, 1.0, "hunyuan", True, False, 0.116),
    (21, 1664, 128, 0.2, "wan", None, False, 0.356),
    (21, 1664, 128, 1.0, "wan", None, False, 0.449),
    (21, 1536, 128, 0.2, "wan", None, False, 0.369),
    (21, 1024, 128, 0.2, "wan", None, False, 0.455),
    (21, 1024, 128, 1.0, "wan", None, False, 0.583),
]
# sizes that the released code cannot run: the ceil form
CEIL = [
    (21, 1560, 128, 0.2, "wan", None, False, 0.344),
    (21, 1560, 128, 1.0, "wan", None, False, 0.449),
    (21, 1560, 64, 0.2, "wan", None, False, 0.271),
    (41, 1560, 128, 0.2, "wan", None, False, 0.238),
    (41, 1560, 128, 1.0, "wan", None, False, 0.299),
    (81, 1560, 128, 0.2, "wan", None, False, 0.155),
    (81, 1560, 128, 1.0, "wan", None, False, 0.187),
    (21, 3600, 128, 0.2, "wan", None, False, 0.265),
    (21, 3600, 128, 1.0, "wan", None, False, 0.399),
    (31, 3600, 128, 0.2, "wan", None, False, 0.209),
    (41, 3600, 128, 0.2, "wan", None, False, 0.177),
    (33, 3600, 128, 0.95, "hunyuan", None, False, 0.272),
]
# name, frames, grid of a frame, model, query blocks without a key
HOLES = [
    ("Hunyuan 544x960x125", 32, (34, 60), "hunyuan", 8),
    ("Wan2.2-5B 704x1280x125", 32, (22, 40), "wan", 4),
    ("Wan 544x960x61", 16, (34, 60), "wan", 4),
    ("Wan 416x704x61", 16, (26, 44), "wan", 4),
    ("Wan 400x640x61", 16, (25, 40), "wan", 2),
    ("Wan 768x1280x69", 18, (48, 80), "wan", 0),
]


@pytest.mark.parametrize("run", RUNS + CEIL, ids=lambda r: "-".join(map(str, r[:7])))
def test_density_of_the_released_code(run: tuple[object, ...]) -> None:
    assert round(float(official_block_mask(*run[:7]).mean()), 3) == run[7]  # type: ignore[arg-type]


@pytest.mark.parametrize(("frames", "published"), [(64, 0.808), (128, 0.883)])
def test_sparsity_of_the_paper_at_253_and_509_frames(frames: int, published: float) -> None:
    """The paper's figures are those of the released code with the sink that it later dropped for HunyuanVideo."""
    pattern = RadialPattern(variant="official", model="hunyuan", sink=True, decay=1.0)
    density = pattern.plan(TokenLayout.from_grid((frames, 45, 80))).density
    assert 1 - density == pytest.approx(published, abs=0.001)


@pytest.mark.parametrize(("name", "frames", "grid", "model", "holes"), HOLES)
def test_silent_holes(name: str, frames: int, grid: tuple[int, int], model: str, holes: int) -> None:
    """Query blocks with no key at all in the released mask, and none in ours."""
    mask = official_block_mask(frames, grid[0] * grid[1], 128, 0.2 if model == "wan" else 0.95, model)
    assert int((~mask.any(1)).sum()) == holes
    layout = TokenLayout.from_grid((frames, *grid))
    official = RadialPattern(variant="official", model=model).plan(layout)
    assert int((official.row_lengths == 0).sum()) == holes
    assert int((RadialPattern().plan(layout).row_lengths == 0).sum()) == 0


def _slow_mask(frames: int, tokens: int, block: int, decay: float, model: str) -> np.ndarray:
    """The released double loop, token by token, on whole blocks only."""
    blocks, patch = frames * tokens // block, -(-tokens // block)
    out = np.zeros((blocks, blocks), dtype=bool)
    place = np.arange(tokens)
    apart = np.abs(place[:, None] - place[None])
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            length = 2 ** tokens.bit_length() / 2 ** d.bit_length()
            keep = length >= 128 or d % int(128 / length) == 0
            local = (apart <= (tokens if d <= 1 else max(length * decay, block))) & keep
            if j == 0 and model == "wan":
                local[:] = True
            down, right = i * tokens % block, j * tokens % block
            canvas = np.zeros((down + patch * block, right + patch * block), dtype=bool)
            canvas[down : down + tokens, right : right + tokens] = local
            for a in range(patch):
                for b in range(patch):
                    part = canvas[a * block : (a + 1) * block, b * block : (b + 1) * block].sum(0)
                    if (part > block / 3).sum() / ((part > 0).sum() + 1e-9) > 0.6:
                        row, column = i * tokens // block + a, j * tokens // block + b
                        if row < blocks and column < blocks:
                            out[row, column] = True
    return out


@pytest.mark.parametrize(("frames", "tokens", "block"), [(8, 48, 16), (16, 50, 16), (16, 31, 8), (5, 96, 32), (32, 17, 16)])
@pytest.mark.parametrize("model", ["wan", "hunyuan"])
@pytest.mark.parametrize("decay", [0.2, 1.0])
def test_same_mask_as_the_double_loop(frames: int, tokens: int, block: int, model: str, decay: float) -> None:
    assert frames * tokens % block == 0
    got = official_block_mask(frames, tokens, block, decay, model)
    assert np.array_equal(got, _slow_mask(frames, tokens, block, decay, model))


def test_text_rows_and_columns_are_dense() -> None:
    """HunyuanVideo's joint stream: text last; and text first, which the released code never had."""
    for layout in (TokenLayout.from_grid((8, 16, 16), text_after=40), TokenLayout.from_grid((8, 16, 16), text_before=40)):
        mask = RadialPattern(variant="official", model="hunyuan").mask(layout)
        text = layout.raster_index < 0
        assert mask[text].all()
        assert mask[:, text].all()
        grid = mask[~text][:, ~text].float().mean()
        assert float(grid) == pytest.approx(float(official_block_mask(8, 256, 128, 0.95, "hunyuan").mean()))
