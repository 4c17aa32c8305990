"""A map as a pattern: density met, per layer, head and band, at other sizes; and every file that must be refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import genattn
from genattn.errors import GenAttnError
from genattn.geometry.token_layout import Segment, TokenLayout
from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.reference.attention import visible_mask
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.as_json import pattern_from_dict, pattern_to_dict
from genattn.patterns.combine import Union
from genattn.patterns.global_tokens import GlobalTokens
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.profiled import ProfiledPattern, keep_rows
from genattn.patterns.rotating_anchors import RotatingAnchors
from genattn.selection.budget import Budget
from genattn.selection.profile_map import FORMAT, ProfileHeader, ProfileMap, read_map, write_map
from genattn.selection.relative_map import CellGrid
from genattn.selection.rules import TopK

LAYOUT = TokenLayout.from_grid((6, 8, 8))
HEADER = ProfileHeader("WanTransformer3DModel", 2, 3, (6, 2, 2), (0.5, 1.0), 0.3, 4, (0.1, 0.3, 0.6, 1.0), "grid 6x8x8")


def _map(header: ProfileHeader = HEADER) -> ProfileMap:
    draw = torch.Generator().manual_seed(0)
    grid, first = CellGrid(*header.grid), (header.layers, header.heads, len(header.bands))
    tensors = {}
    for value in ("mass", "loss"):
        tensors[f"relative.{value}"] = torch.randn(*first, *grid.offset_shape, generator=draw).half()
        for part in ("key", "query"):
            tensors[f"{part}.{value}"] = torch.randn(*first, *grid.shape, generator=draw).half()
        scale = torch.rand(*first, 1, generator=draw) + 0.5
        tensors[f"error.{value}"] = scale * torch.tensor([1.0, 0.3, 0.1, 0.0])
    return ProfileMap(header, tensors)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_map(_map(), tmp_path / "map.safetensors"))


@pytest.mark.parametrize("density", [None, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("grid", [(6, 8, 8), (9, 8, 8), (3, 12, 16), (1, 16, 16), (5, 7, 9)])
def test_density_is_met_at_any_size(path: str, density: float | None, grid: tuple[int, int, int]) -> None:
    """The mean over layers, heads and bands; every query sees its own cell."""
    layout = TokenLayout.from_grid(grid)
    pattern = ProfiledPattern(path, density=density, block=16)
    found = []
    for layer in range(2):
        for fraction in (0.1, 0.9):
            there = pattern.for_layer(layer, 2).for_step(fraction=fraction)
            plan = there.plan(layout, 16, 16)
            assert plan.num_heads == 3
            found.append(plan.density)
            assert visible_mask(plan).diagonal(dim1=1, dim2=2).all()
    assert sum(found) / 4 == pytest.approx(density or 0.3, abs=0.02)


def test_plan_is_the_rule_and_text_is_whole(path: str) -> None:
    layout = TokenLayout((Segment("text", (5,)), Segment("grid", (6, 8, 8)), Segment("padding", (3,))))
    pattern = ProfiledPattern(path, block=16).for_layer(1, 2).for_step(fraction=0.2)
    mask = pattern.mask(layout)
    for block in ((16, 16), (32, 8), (128, 128)):
        assert torch.equal(visible_mask(pattern.plan(layout, *block)), mask)
    assert mask[:, :, :5].all()
    assert mask[:, :5, :-3].all()
    assert not mask[:, :, -3:].any()
    assert not torch.equal(mask[0], mask[1])
    q = torch.randn(1, layout.seqlen, 3, 8)
    assert genattn.attention(q, q, q, pattern, layout).shape == q.shape
    both = Union(pattern, NeighborhoodPattern((1, 3, 3)))
    assert torch.equal(both.mask(layout), mask | NeighborhoodPattern((1, 3, 3)).mask(layout))


def test_layers_bands_and_heads_differ(path: str) -> None:
    pattern = ProfiledPattern(path)
    plans = [
        pattern.for_layer(n, 2).for_step(fraction=f).plan(LAYOUT, 16, 16).columns.tolist() for n in (0, 1) for f in (0.0, 0.6)
    ]
    assert len({tuple(p) for p in plans}) == 4
    unknown = pattern.for_layer(0, 2).for_step(fraction=None)
    assert isinstance(unknown.plan(LAYOUT, 16, 16), BlockPlan)
    whole = pattern.for_layer(0, 2).for_step(fraction=0.0)
    mine = whole.for_heads(1, 2).mask(LAYOUT)
    assert torch.equal(mine, whole.mask(LAYOUT)[1:])
    assert pattern.map.header.band(0.49) == 0
    assert pattern.map.header.band(1.0) == 1


def test_the_worst_heads_get_more(path: str) -> None:
    """Shares follow the errors: the head that gains most gets most, and the sum of what is expected falls."""
    found = read_map(path)
    shares = found.spread("mass", 0.2)
    gain = found.tensors["error.mass"][..., 0]
    assert float(shares.flatten()[gain.flatten().argmax()]) == pytest.approx(0.3)
    assert float(shares.flatten()[gain.flatten().argmin()]) == pytest.approx(0.1)
    assert float(shares.mean()) == pytest.approx(0.2)
    even = found.tensors["error.mass"][..., :2].mean(-1).sum()  # halfway between shares of 0.1 and 0.3
    assert float(found.expected_error("mass", 0.2).sum()) < float(even) - 1e-3
    assert found.spread("mass", 0.2) is shares


def test_rows_share_what_rounding_leaves() -> None:
    values = torch.randn(2, 10, 10, generator=torch.Generator().manual_seed(2))
    tokens = torch.full((10,), 4)
    kept = keep_rows(values, torch.tensor([0.25, 0.33]), tokens)
    assert kept.float().mean((1, 2)).tolist() == [pytest.approx(0.25, abs=0.011), pytest.approx(0.33, abs=0.011)]
    assert kept.diagonal(dim1=1, dim2=2).all()
    counts = kept.sum(-1)
    assert (counts.amax(1) - counts.amin(1)).tolist() == [1, 1]
    for head in range(2):
        for row in range(10):
            others = [j for j in range(10) if j != row]
            chosen = [float(values[head, row, j]) for j in others if kept[head, row, j]]
            left = [float(values[head, row, j]) for j in others if not kept[head, row, j]]
            assert min(chosen, default=9e9) >= max(left, default=-9e9)


def test_saved_and_read(path: str) -> None:
    pattern = ProfiledPattern(path, density=0.4)
    assert pattern_from_dict(pattern_to_dict(pattern)) == pattern


def test_another_model_is_refused(path: str) -> None:
    pattern = ProfiledPattern(path)
    pattern.check_model("WanTransformer3DModel", (3, 3), 2)
    for name, heads, layers in (
        ("FluxTransformer2DModel", (3,), 2),
        ("WanTransformer3DModel", (3, 4), 2),
        (HEADER.model, (3,), 5),
    ):
        with pytest.raises(GenAttnError, match="was made for WanTransformer3DModel with 2 layers of 3 heads, got .*profile"):
            pattern.check_model(name, heads, layers)
    with pytest.raises(GenAttnError, match="has 2 layers, got layer 0 of 7"):
        pattern.for_layer(0, 7)
    with pytest.raises(GenAttnError, match="has 2 layers, got layer 0 of 7"):
        Union(pattern, pattern).for_layer(0, 7)
    with pytest.raises(GenAttnError, match="one mask per layer"):
        pattern.plan(LAYOUT)
    with pytest.raises(GenAttnError, match="needs a grid, got the layout 'text 4'"):
        pattern.for_layer(0, 2).plan(TokenLayout((Segment("text", (4,)),)))


@pytest.mark.parametrize("settings", [{"density": 0.0}, {"density": 1.5}, {"block": 0}])
def test_settings_out_of_range(path: str, settings: dict[str, float]) -> None:
    with pytest.raises(GenAttnError, match=next(iter(settings))):
        ProfiledPattern(path, **settings)  # type: ignore[arg-type]


def _write(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> str:
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=about)
    return str(path)


def test_files_that_are_refused(tmp_path: Path) -> None:
    good = _map()
    about = {"format": FORMAT, "version": "1", "header": json.dumps(asdict(HEADER))}
    missing = dict(list(good.tensors.items())[1:])
    wild = good.tensors | {"error.mass": torch.full_like(good.tensors["error.mass"], float("nan"))}
    header = asdict(HEADER)
    cases = {
        "there is no": str(tmp_path / "none.safetensors"),
        "got a safetensors file of format None": _write(tmp_path / "a.safetensors", good.tensors, {}),
        "has version '2' of the map's format, this genattn reads 1": _write(
            tmp_path / "b.safetensors", good.tensors, about | {"version": "2"}
        ),
        "damaged header": _write(tmp_path / "c.safetensors", good.tensors, about | {"header": "{"}),
        "damaged header .unknown entries": _write(
            tmp_path / "d.safetensors", good.tensors, about | {"header": json.dumps(header | {"more": 1})}
        ),
        "relative.mass do not fit its header": _write(tmp_path / "e.safetensors", missing, about),
        "holds values that are not finite": _write(tmp_path / "f.safetensors", wild, about),
    }
    cut = tmp_path / "g.safetensors"
    cut.write_bytes((tmp_path / "f.safetensors").read_bytes()[:-40])
    text = tmp_path / "h.safetensors"
    text.write_text("no map at all")
    cases |= {"must be a whole safetensors file": str(cut)}
    for says, file in [*cases.items(), ("must be a whole safetensors file", str(text))]:
        with pytest.raises(GenAttnError, match=says):
            ProfiledPattern(file)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_map(_map(), tmp_path / "map.safetensors")
    assert read_map(path).header.prompts == 4
    write_map(_map(replace(HEADER, prompts=5, layout="another")), path)
    assert read_map(path).header.prompts == 5
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_type_is_no_matter(path: str, dtype: torch.dtype) -> None:
    pattern, layout = ProfiledPattern(path, block=16).for_layer(1, 2), TokenLayout.from_grid((300, 4, 4))
    expected, before = pattern.rule(layout).table, torch.get_default_dtype()  # type: ignore[attr-defined]
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(pattern.rule(layout).table, expected)  # type: ignore[attr-defined]
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "around",
    [
        lambda pattern: GlobalTokens(pattern, (0,)),
        lambda pattern: RotatingAnchors(pattern, 2),
        lambda pattern: Union(pattern, NeighborhoodPattern(3)),
        lambda pattern: AdaptivePattern(inside=pattern),
        lambda pattern: AdaptivePattern(always=RotatingAnchors(pattern, 2)),
    ],
)
def test_a_map_of_another_model_is_refused_wherever_it_stands(path: str, around: Any) -> None:
    pattern = around(ProfiledPattern(path))
    pattern.check_model("WanTransformer3DModel", (3, 3), 2)
    with pytest.raises(GenAttnError, match="was made for WanTransformer3DModel with 2 layers of 3 heads, got .* 4 heads"):
        pattern.check_model("WanTransformer3DModel", (4, 4), 2)


@pytest.mark.parametrize("given", [{"selection": TopK((0.2, 0.3, 0.4))}, {"budget": Budget((0.5, (0.2, 0.3, 0.4)))}])
def test_amounts_for_other_heads_are_refused(given: dict[str, Any]) -> None:
    AdaptivePattern(**given).check_model("Model", (3, 3), 2)
    with pytest.raises(GenAttnError, match="one per head, got 3 amounts for Model with 4 heads"):
        AdaptivePattern(**given).check_model("Model", (4, 4), 2)
