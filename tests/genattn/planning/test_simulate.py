"""The simulator against the published one, against the plans it speaks for, and against its own definition."""

import pytest

from genattn.errors import GenAttnError
from genattn.geometry.token_layout import TokenLayout
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.radial import RadialPattern
from genattn.planning.simulate import end_to_end, simulate, simulate_pattern

# share of attention in the run; grid; window; tile of queries, tile of keys; rows: stride, published end-to-end by worst tile
HUNYUAN_SMALL = (0.607, (30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8))
HUNYUAN_LARGE = (0.607, (30, 48, 80), (30, 40, 40), (2, 16, 8), (2, 8, 8))
FLUX = (0.518, (256, 256), (80, 80), (16, 16), (16, 8))
COSMOS_SMALL = (0.587, (16, 44, 80), (16, 24, 16), (8, 4, 8), (4, 4, 8))
COSMOS_LARGE = (0.587, (16, 44, 80), (16, 32, 48), (8, 4, 8), (4, 4, 8))
PUBLISHED = [
    (HUNYUAN_SMALL, (1, 1, 1), 1.73),
    (HUNYUAN_SMALL, (2, 1, 1), 1.78),
    (HUNYUAN_SMALL, (1, 1, 8), 1.99),
    (HUNYUAN_SMALL, (2, 1, 8), 2.02),
    (HUNYUAN_SMALL, (1, 8, 8), 2.17),
    (HUNYUAN_SMALL, (2, 8, 8), 2.20),
    (HUNYUAN_SMALL, (16, 8, 8), 2.23),
    (HUNYUAN_SMALL, (18, 24, 24), 2.06),
    (HUNYUAN_LARGE, (1, 1, 1), 1.21),
    (HUNYUAN_LARGE, (1, 1, 8), 1.44),
    (HUNYUAN_LARGE, (1, 32, 8), 1.55),
    (HUNYUAN_LARGE, (30, 40, 40), 1.44),
    (FLUX, (1, 1), 1.76),
    (FLUX, (16, 1), 1.84),
    (FLUX, (16, 16), 1.88),
    (COSMOS_SMALL, (1, 1, 1), 1.90),
    (COSMOS_SMALL, (1, 8, 1), 1.96),
    (COSMOS_SMALL, (1, 1, 16), 2.05),
    (COSMOS_SMALL, (1, 8, 16), 2.10),
    (COSMOS_LARGE, (1, 1, 1), 1.35),
    (COSMOS_LARGE, (1, 8, 1), 1.42),
    (COSMOS_LARGE, (1, 1, 16), 1.42),
    (COSMOS_LARGE, (1, 8, 16), 1.50),
]


@pytest.mark.parametrize(("case", "stride", "published"), PUBLISHED, ids=str)
def test_published_simulator(case: tuple, stride: tuple[int, ...], published: float) -> None:
    share, grid, window, tile_q, tile_k = case
    got = simulate(grid, window, stride, tile_q=tile_q, tile_k=tile_k, attention_share=share)
    assert got.end_to_end[0] == pytest.approx(published, abs=0.02)
    assert got.worst_tile <= got.flops + 1e-9  # type: ignore[operator]


@pytest.mark.parametrize(
    ("grid", "window", "stride", "static", "halo"),
    [
        ((30, 48, 80), (18, 24, 24), 1, 0.49, 0.71),
        ((21, 45, 80), (10, 24, 40), 1, 0.47, 0.70),
        ((21, 45, 80), (10, 24, 40), (2, 8, 8), 0.76, 0.89),
    ],
)
def test_work_on_aligned_and_haloed_boxes(
    grid: tuple[int, ...], window: tuple[int, ...], stride: object, static: float, halo: float
) -> None:
    """Share of the multiplications that is wanted, for boxes of 2 x 8 x 8."""
    for use_halo, expected in ((False, static), (True, halo)):
        got = simulate(grid, window, stride, tile_q=(2, 8, 8), tile_k=(2, 8, 8), halo=use_halo)  # type: ignore[arg-type]
        assert got.total_work / got.flops == pytest.approx(expected, abs=0.011)  # type: ignore[operator]


@pytest.mark.parametrize(
    "case", [((6, 9, 10), (3, 5, 4), 1, 1), ((7, 12), (4, 6), (2, 3), 1), ((5, 11, 13), (2, 3, 4), 1, (1, 3, 2))]
)
@pytest.mark.parametrize("causal", [False, True])
def test_says_what_the_plan_does(case: tuple, causal: bool) -> None:
    grid, window, stride, dilation = case
    got = simulate(grid, window, stride, dilation, causal, block=16)
    plan = NeighborhoodPattern(window, stride, dilation, causal).plan(TokenLayout.from_grid(grid), 16, 16)
    assert got.total_work == pytest.approx(1 / plan.computed_density)
    assert got.density == pytest.approx(plan.density)
    assert got.mask_free == pytest.approx(plan.full_share)
    assert got.worst_tile == pytest.approx(plan.key_tiles.shape[0] / int(plan.row_lengths.max()))
    assert got.padding[0] == pytest.approx(float((plan.query_tiles < 0).float().mean()))


def test_any_pattern() -> None:
    layout = TokenLayout.from_grid((21, 30, 52), text_after=77)
    got = simulate_pattern(RadialPattern(), layout, attention_share=0.8)
    plan = RadialPattern().plan(layout)
    assert got.total_work == pytest.approx(1 / plan.computed_density)
    assert got.worst_tile == pytest.approx(1.0), "text sees everything"
    assert 1 < got.end_to_end[1] < 5
    assert got.mask_free == 1.0


def test_amdahl() -> None:
    assert end_to_end(11.11, 0.607) == pytest.approx(2.23, abs=0.01)
    assert end_to_end(5.0, 0.0) == 1.0
    for speedup, share in ((0.0, 0.5), (2.0, 1.5), (2.0, -0.1)):
        with pytest.raises(GenAttnError, match="share must be"):
            end_to_end(speedup, share)


def test_bad_settings() -> None:
    with pytest.raises(GenAttnError, match="nearest legal window_size: 30"):
        simulate((30, 48, 80), (31, 24, 24))
    with pytest.raises(GenAttnError, match="tile must be between 1 and 30"):
        simulate((30, 48, 80), (18, 24, 24), tile_q=(31, 1, 1), tile_k=(2, 8, 8))
