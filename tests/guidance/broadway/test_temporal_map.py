"""The arithmetic on frame-to-frame maps, against the published form and by its own laws."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from genattn.errors import GenAttnError
from genattn.guidance.broadway.temporal_map import (
    AUTO_DISPARITY,
    BETA_LIMIT,
    Energies,
    MapEdit,
    _beta,
    band_projection,
    basis_maps,
    combine,
    edit_map,
    energy,
    gram,
    high_bins,
    parse_energy,
    published_edit,
    resize_anchor,
    solve,
)

frames = st.integers(2, 34)
taus = st.floats(0.0, 8.0)


def random_map(*shape: int, seed: int = 0, sharpness: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * sharpness).softmax(-1)


@given(frames, taus, st.sampled_from([16, None]))
@settings(deadline=None)
def test_band_is_symmetric_never_constant_never_empty(count: int, tau: float, tau_frames: int | None) -> None:
    band = set(high_bins(count, tau, tau_frames))
    assert band
    assert band == {count - k for k in band}
    assert 0 not in band
    assert count // 2 in band


def test_band_is_the_published_one_for_sixteen_frames() -> None:
    for tau in range(8):
        assert set(high_bins(16, tau)) == set(range(8 - tau, 8 + tau + 1))
        assert set(high_bins(24, tau, None)) == set(range(12 - tau, 12 + tau + 1))


def test_band_scales_with_the_clip() -> None:
    shares = [len(high_bins(count, 4.0)) / count for count in (16, 32, 64, 128)]
    assert max(shares) - min(shares) < 0.07
    assert len(high_bins(8, 7)) == 7  # the published band would swallow the constant bin


@given(frames, taus)
@settings(deadline=None)
def test_projection_is_the_transform_with_the_other_bins_dropped(count: int, tau: float) -> None:
    projection = band_projection(count, tau)
    rows = random_map(3, count).double()
    spectrum = torch.fft.fft(rows)
    kept = torch.zeros(count)
    kept[list(high_bins(count, tau))] = 1
    back = torch.fft.ifft(spectrum * kept)
    assert back.imag.abs().max() < 1e-12  # a symmetric band leaves nothing imaginary behind, for odd clips too
    torch.testing.assert_close(rows @ projection, back.real, atol=1e-12, rtol=0)
    torch.testing.assert_close(projection @ projection, projection, atol=1e-12, rtol=0)


@given(
    st.sampled_from([16, 18, 20, 24]),
    st.integers(1, 7),
    st.floats(0.0, 1.0),
    st.floats(1.0, 10.0),
    st.booleans(),
    st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_edit_equals_the_published_one(count: int, tau: int, alpha: float, beta: float, anchored: bool, seed: int) -> None:
    rows, anchor = random_map(10, 2, count, count, seed=seed), random_map(10, 2, count, count, seed=seed + 1)
    other = anchor if anchored else None
    want, numbers = published_edit(rows, other, alpha, beta, tau, slice(5, None))
    got, scalars = edit_map(rows, other, MapEdit(alpha, beta, tau, None), torch.arange(5, 10))
    # what beta multiplies may be tiny, so the root in it amplifies rounding
    torch.testing.assert_close(got.double(), want, atol=1e-5 * beta, rtol=1e-3)
    for name in ("e1", "e3", "beta"):
        assert float(getattr(scalars, name)) == pytest.approx(numbers[name], rel=2e-3)


def test_paper_defaults_are_contrast_about_the_uniform_map() -> None:
    rows = random_map(20, 4, 16, 16)
    got, scalars = edit_map(rows, None, MapEdit(beta=1.5))
    torch.testing.assert_close(got, 1 / 16 + 1.5 * (rows - 1 / 16), atol=1e-6, rtol=0)
    assert float(scalars.beta) == 1.5
    assert float(scalars.e1) == pytest.approx(float(energy(rows)))


@given(frames, taus, st.floats(0.0, 1.0), st.floats(0.3, 3.0), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_energy_never_falls_and_rows_sum_to_one(count: int, tau: float, alpha: float, sharp: float, seed: int) -> None:
    rows, anchor = random_map(6, count, count, seed=seed, sharpness=sharp), random_map(6, count, count, seed=seed + 1)
    got, scalars = edit_map(rows, anchor, MapEdit(alpha, 1.0, tau))
    torch.testing.assert_close(got.sum(-1), torch.ones(6, count), atol=1e-4, rtol=0)
    assert float(scalars.e3) == pytest.approx(float(energy(got)), rel=1e-4)
    if float(scalars.beta) < 99:  # where the band is all but empty, no factor can bring the energy back
        assert float(energy(got)) >= float(energy(rows)) * (1 - 1e-5)


@given(st.sampled_from([5, 8, 13, 16, 21]), st.floats(-0.3, 1.0), st.floats(0.0, 0.8))
@settings(max_examples=30, deadline=None)
def test_energy_target_is_met_up_and_down(count: int, change: float, alpha: float) -> None:
    rows, anchor = random_map(8, count, count, sharpness=2.0), random_map(8, count, count, seed=1)
    got, scalars = edit_map(rows, anchor, MapEdit(alpha, energy=change, tau=8.0))
    reachable = max(float(energy(rows)) * (1 + change), 1 / count)  # the constant part cannot be taken away
    assert float(energy(got)) == pytest.approx(reachable, rel=1e-3)
    assert float(scalars.beta) >= 0


def test_beta_below_one_calms() -> None:
    rows = random_map(8, 16, 16)
    got, _ = edit_map(rows, None, MapEdit(beta=0.5, keep_energy=False))
    assert float(energy(got)) < float(energy(rows))


def test_auto_alpha_brings_disparity_to_its_target_and_auto_beta_keeps_the_energy() -> None:
    rows, anchor = random_map(8, 16, 16), random_map(8, 16, 16, seed=1)
    got, scalars = edit_map(rows, anchor, MapEdit("auto", "auto"))
    motion = (energy(anchor) - 1 / 16).sqrt()
    left = (1 - float(scalars.alpha)) * float(scalars.disparity)
    assert left == pytest.approx(AUTO_DISPARITY * float(motion), rel=1e-3)
    assert float(energy(got)) == pytest.approx(float(energy(rows)), rel=1e-4)
    same, scalars = edit_map(rows, rows, MapEdit("auto", "auto"))
    assert float(scalars.alpha) == 0
    torch.testing.assert_close(same, rows, atol=1e-6, rtol=0)


def test_uniform_map_stays_finite() -> None:
    rows = torch.full((4, 9, 9), 1 / 9)
    for edit in (MapEdit(), MapEdit(energy=0.5), MapEdit("auto", "auto")):
        got, scalars = edit_map(rows, rows, edit)
        torch.testing.assert_close(got, rows)
        assert math.isfinite(float(scalars.beta))


@given(st.integers(3, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_hidden_frames_stay_hidden(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(7, count, generator=generator) < 0.6
    visible[:, 0] = True
    rows = random_map(7, count, seed=seed).masked_fill(~visible, 0)
    rows = rows / rows.sum(-1, keepdim=True)
    anchor = random_map(7, count, seed=seed + 1)
    edit = MapEdit(0.7, 1.0)
    basis = basis_maps(rows, anchor, band_projection(count, edit.tau), visible)
    scalars = solve(gram(basis) / 7, edit, count)
    got = combine(basis, scalars)
    assert (got[~visible] == 0).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(7), atol=1e-4, rtol=0)
    assert float(scalars.e3) == pytest.approx(float(energy(got)), rel=1e-3)
    if float(scalars.beta) < 99 and bool((visible.sum(-1) > 1).any()):
        assert float(energy(got)) >= float(energy(rows)) * (1 - 1e-4)


def test_gram_without_an_anchor_has_no_difference() -> None:
    basis = basis_maps(random_map(5, 8), None, band_projection(8, 7.0))
    assert basis.shape[0] == 2
    matrix = gram(basis)
    assert (matrix[1] == 0).all()
    assert (matrix[3] == 0).all()


def test_anchor_resizes_between_places_and_heads() -> None:
    anchor = random_map(2 * 3 * 4, 4, 5, 5)
    same = resize_anchor(anchor, (3, 4), (3, 4), 4)
    assert same is anchor
    wide = resize_anchor(anchor, (3, 4), (6, 7), 2)
    assert wide.shape == (2 * 6 * 7, 2, 5, 5)
    torch.testing.assert_close(wide.sum(-1), torch.ones(84, 2, 5))
    torch.testing.assert_close(wide[:, 0], wide[:, 1])
    # a map that depends on the sample alone is the same at every resolution: samples do not mix
    flat = random_map(2, 1, 4, 5, 5).expand(2, 12, 4, 5, 5).reshape(24, 4, 5, 5)
    torch.testing.assert_close(resize_anchor(flat, (3, 4), (5, 8), 4), flat[::12].repeat_interleave(40, 0))


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\]"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"alpha": True}, "alpha must be"),
        ({"beta": -1}, r"beta must be in \[0, 100\]"),
        ({"beta": float("nan")}, "beta must be"),
        ({"beta": 0.5}, "keep_energy=False"),
        ({"tau": -1}, r"tau must be in \[0, 8\]"),
        ({"tau": 9}, r"tau must be in \[0, 8\]"),
        ({"tau_frames": 1}, "tau_frames must be"),
        ({"energy": -1.0}, r"energy must be in \(-1, 10\]"),
        ({"energy": 11.0}, "energy must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict[str, float], words: str) -> None:
    with pytest.raises(GenAttnError, match=words):
        MapEdit(**settings_)


def test_single_frame_is_refused() -> None:
    with pytest.raises(GenAttnError, match="at least 2 frames, got 1"):
        high_bins(1, 7.0)


def test_published_band_that_swallows_the_constant_bin_is_refused() -> None:
    with pytest.raises(GenAttnError, match="at least 2 tau"):
        published_edit(random_map(4, 8, 8), None, 0.5, 1.5, 7)


@pytest.mark.parametrize(("text", "value"), [("+20%", 0.2), ("-15 %", -0.15), ("0.3", 0.3), (1, 1.0), (None, None)])
def test_energy_is_read(text: str | float | None, value: float | None) -> None:
    assert parse_energy(text) == (value if value is None else pytest.approx(value))


@pytest.mark.parametrize("text", ["more", "20 percent", "%", True])
def test_energy_that_is_no_number_is_refused(text: object) -> None:
    with pytest.raises(GenAttnError, match="energy must be a percentage"):
        parse_energy(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("edit", [MapEdit(0.5, 1.5), MapEdit(0.5, "auto"), MapEdit(0.5, 1.0, energy=2.0)])
def test_beta_is_bounded_where_the_band_is_nearly_empty(edit: MapEdit) -> None:
    """Keeping the energy may not multiply what is hardly more than rounding without bound."""
    nearly_empty = Energies(*(torch.tensor(value) for value in (1.0, 0.5, 0.0, 1e-7, 0.1)))
    assert float(_beta(edit, nearly_empty)) == BETA_LIMIT
    empty = Energies(*(torch.tensor(value) for value in (1.0, 0.5, 0.0, 0.0, 0.1)))
    assert float(_beta(edit, empty)) == (1.5 if edit.beta == 1.5 else 1.0)
