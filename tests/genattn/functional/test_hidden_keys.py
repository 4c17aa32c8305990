"""Keys that a mask hides take no part in a choice by content: as if the padding were not there."""

from collections.abc import Callable

import pytest
import torch

from genattn import GenAttnError, TokenLayout, attention
from genattn.functional.dispatch import AnyPlan, plan_for
from genattn.functional.each_sample import same_places
from genattn.layouts.site import AttentionSite
from genattn.patterns.adaptive import AdaptivePattern
from genattn.patterns.block_topk import BlockTopK
from genattn.patterns.combine import Intersection, PerHead, Union
from genattn.patterns.neighborhood import NeighborhoodPattern
from genattn.patterns.pattern import Pattern, SiteMemory
from genattn.patterns.published import sol, sparge
from genattn.patterns.radial import RadialPattern
from genattn.seam.plugin import AttentionCall, CallRecord, Run
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin
from genattn.selection.estimate import PooledScore
from genattn.selection.guards import Similarity
from genattn.selection.rules import ErrorAware, Threshold, TopK, TopP
from genattn.selection.seen import seen_lanes, seen_places
from genattn.selection.tiling import Boxes, Clusters, Runs

FRAMES, WHOLE = TokenLayout.from_grid((4, 8, 8), text_after=5), TokenLayout.from_grid((6, 8, 8), text_after=5)
WINDOW = NeighborhoodPattern((-1, 5, 5))
TILES = Boxes((16, 16))
CHOOSING: dict[str, Pattern] = {
    "top-k": AdaptivePattern(TopK(0.3), tiles=TILES),
    "top-p": AdaptivePattern(TopP(0.6), tiles=TILES),
    "threshold": AdaptivePattern(Threshold(0.3), tiles=TILES),
    "sol": sol(0.3, "diag"),
    "error-aware": AdaptivePattern(ErrorAware(0.3), PooledScore(0), TILES, tail="mean"),
    "guarded": AdaptivePattern(TopK(0.2), tiles=TILES, guard=Similarity(0.1, "pairs", centred=True, queries=True, shut=True)),
    "sparge": sparge(0.6),
    "neighbours": AdaptivePattern(TopK(0.1), tiles=Runs((16, 16)), neighbours=1),
    "inside": AdaptivePattern(TopP(0.6), tiles=TILES, inside=NeighborhoodPattern((-1, 7, 7)), always=WINDOW),
    "clusters": AdaptivePattern(TopK(0.3), tiles=Clusters(6, 8)),
    "clusters by error": AdaptivePattern(ErrorAware(0.3), tiles=Clusters(6, 8), tail="mean"),
    "block top-k": BlockTopK(0.3),
    "union": Union(AdaptivePattern(TopK(0.3), tiles=TILES), AdaptivePattern(TopP(0.3), tiles=TILES)),
    "intersection": Intersection(RadialPattern(), AdaptivePattern(TopK(0.3), tiles=TILES)),
    "clusters in a union": Union(AdaptivePattern(TopK(0.3), tiles=Clusters(6, 8)), WINDOW),
    "per head": PerHead((AdaptivePattern(TopK(0.3), tiles=TILES), WINDOW)),
}


def _qkv(batch: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [2 * torch.randn(batch, WHOLE.seqlen, 2, 16, generator=draw) for _ in range(3)]


def _shown(batch: int = 1) -> torch.Tensor:
    """The last two frames are hidden, and some places of the first."""
    mask = torch.ones(batch, WHOLE.seqlen, dtype=torch.bool)
    mask[:, 4 * 64 : 6 * 64] = False
    mask[:, 3:17:2] = False
    return mask


@pytest.mark.parametrize("content", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("name", CHOOSING)
def test_what_stands_at_hidden_places_is_no_matter(name: str, content: float) -> None:
    """Not in a tile, of which some is seen, and not in a tile of its own."""
    inputs, mask = _qkv(), _shown()
    wanted = attention(*inputs, CHOOSING[name], WHOLE, key_mask=mask)
    other = [x.masked_fill(~mask[..., None, None], content) for x in inputs]
    found = attention(*other, CHOOSING[name], WHOLE, key_mask=mask)
    torch.testing.assert_close(found[mask], wanted[mask])  # type: ignore[call-overload]


@pytest.mark.parametrize("name", [n for n in CHOOSING if n not in ("block top-k", "intersection", "sparge", "sol")])
def test_hidden_frames_are_as_frames_that_are_not_there(name: str) -> None:
    """The share is one of the tiles that are left, the mass is theirs, and so is what stands in for skipped tiles."""
    inputs, mask = _qkv(), torch.ones(1, WHOLE.seqlen, dtype=torch.bool)
    mask[:, 4 * 64 : 6 * 64] = False
    found = attention(*inputs, CHOOSING[name], WHOLE, key_mask=mask)
    wanted = attention(*(x[:, mask[0]] for x in inputs), CHOOSING[name], FRAMES)
    torch.testing.assert_close(found[:, mask[0]], wanted)  # type: ignore[index]


@pytest.mark.parametrize("rule", [TopK(0.2), TopP(0.3), Threshold(0.5), ErrorAware(0.2)])
def test_a_tile_of_hidden_keys_is_never_chosen(rule: TopK | TopP | Threshold | ErrorAware) -> None:
    """Though its keys score highest of all; the places in the budget go to tiles that are seen."""
    query, key, _ = _qkv()
    query, mask = query.abs(), _shown()
    key[:, 4 * 64 : 6 * 64] = 50 * torch.rand(1, 128, 2, 16)
    pattern = AdaptivePattern(rule, tiles=TILES)
    with_mask = pattern.listing(query, key, WHOLE, 16, 16, key_mask=mask)
    hidden = ~mask[0][with_mask.key_tiles.long().clamp_min(0)] | (with_mask.key_tiles < 0)
    assert not with_mask.listed[:, :, hidden.all(1)].any()
    of_grid = WHOLE.raster_index[with_mask.key_tiles[:, 0].long()] >= 0
    rows = WHOLE.raster_index[with_mask.query_tiles[:, 0].long()] >= 0
    counted = int((of_grid & ~hidden.all(1)).sum())
    assert counted == 16
    chosen = with_mask.listed[:, rows][:, :, of_grid].sum(-1)
    assert int(chosen.min()) >= (4 if isinstance(rule, TopK | ErrorAware) else 1)  # 0.2 of 16, rounded up
    assert int(chosen.max()) <= 16
    without = pattern.listing(query, key, WHOLE, 16, 16)
    assert without.listed[:, :, hidden.all(1) & of_grid][:, :16].any()  # else this would tell nothing


@pytest.mark.parametrize("name", CHOOSING)
def test_an_entry_with_a_mask_of_its_own_chooses_as_alone(name: str) -> None:
    inputs, mask = _qkv(3), _shown(3)
    mask[1], mask[2, :200] = True, False
    found = attention(*inputs, CHOOSING[name], WHOLE, key_mask=mask)
    for entry in range(3):
        one = slice(entry, entry + 1)
        own = None if entry == 1 else mask[one]
        alone = attention(*(x[one] for x in inputs), CHOOSING[name], WHOLE, key_mask=own)
        torch.testing.assert_close(found[one], alone)  # type: ignore[index]


@pytest.mark.parametrize("name", CHOOSING)
def test_a_mask_that_hides_text_or_all_changes_no_choice(name: str) -> None:
    query, key, value = _qkv()
    text, none = torch.ones(1, WHOLE.seqlen, dtype=torch.bool), torch.zeros(1, WHOLE.seqlen, dtype=torch.bool)
    text[:, -3:] = False
    assert seen_places(text, WHOLE) is None
    assert seen_places(none, WHOLE) is None
    wanted: AnyPlan = plan_for(query, key, CHOOSING[name], WHOLE)
    if name != "guarded":  # its mean of all keys is one of the text too
        assert plan_for(query, key, CHOOSING[name], WHOLE, key_mask=text).density == wanted.density
    out = attention(query, key, value, CHOOSING[name], WHOLE, key_mask=none)
    assert torch.equal(out, torch.zeros_like(value))  # type: ignore[arg-type]


def test_lanes_of_tiles() -> None:
    tiles = torch.tensor([[0, 1], [2, 3], [4, -1]], dtype=torch.int32)
    seen = torch.tensor([True, False, False, False, True])
    assert seen_lanes(tiles, seen).tolist() == [[0, -1], [-1, -1], [4, -1]]
    assert seen_lanes(tiles, seen, or_all=True).tolist() == [[0, -1], [2, 3], [4, -1]]
    assert seen_lanes(tiles, None) is tiles


@pytest.mark.parametrize(
    "make",
    [
        lambda x, mask: plan_for(x, x, AdaptivePattern(), WHOLE, key_mask=mask),
        lambda x, mask: plan_for(x, x, AdaptivePattern(tiles="clusters"), WHOLE, key_mask=mask),
        lambda x, mask: plan_for(x, x, CHOOSING["union"], WHOLE, key_mask=mask),
    ],
)
def test_entries_that_hide_different_places_have_no_choice_in_common(make: Callable[..., AnyPlan]) -> None:
    query, _, _ = _qkv(2)
    mask = _shown(2)
    mask[:, -2:] = False
    mask[1, -5:] = True  # text may differ
    make(query, mask)
    mask[1, 20] = False
    with pytest.raises(GenAttnError, match="must hide the same places of the grid in all entries"):
        make(query, mask)
    with pytest.raises(GenAttnError, match=r"key_mask must be bool \(2, 389\), got torch.bool \(1, 389\)"):
        make(query, mask[:1])


@pytest.mark.parametrize("pattern", [AdaptivePattern(), RadialPattern()])
def test_a_mask_that_does_not_fit(pattern: Pattern) -> None:
    query, _, _ = _qkv(2)
    for mask in (_shown(1), _shown(2).float(), _shown(2)[:, :-1]):
        with pytest.raises(GenAttnError, match=r"key_mask must be bool \(2, 389\), got"):
            attention(query, query, query, pattern, WHOLE, key_mask=mask)


def test_groups_are_cut_where_entries_hide_different_places() -> None:
    mask = _shown(4)
    groups = [torch.tensor([0, 2]), torch.tensor([1, 3])]
    assert [rows.tolist() for rows in same_places(groups, mask, WHOLE)] == [[0, 2], [1, 3]]
    mask[0, -5:] = False
    assert [rows.tolist() for rows in same_places(groups, mask, WHOLE)] == [[0, 2], [1, 3]]
    mask[3, 0] = False
    assert sorted(rows.tolist() for rows in same_places(groups, mask, WHOLE)) == [[0, 2], [1], [3]]
    assert same_places(groups, None, WHOLE) is groups


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_entries_of_a_model_choose_by_their_own_masks(square: bool, samples: int) -> None:
    """Two entries of one sample or of two, of which one has fewer frames; and text rows that see all but their first key."""
    query, key, value = _qkv(2)
    mask = _shown(2)
    mask[0] = True
    given = mask[:, None, None]
    if square:
        given = given.expand(-1, -1, WHOLE.seqlen, -1).clone()
        given[:, :, -5:] = True
        given[:, :, -5:, 0] = False
    plugin = SparsePlugin(AdaptivePattern(TopK(0.2), tiles=TILES), Schedule(dense_steps=0, dense_layers=0))
    site = AttentionSite("blocks.0.attn", "blocks", 0, 0, "self", 2)
    run = Run(step=0, num_steps=2, pass_name="cond_uncond", layout=WHOLE, samples=samples)

    def inner(call: AttentionCall) -> torch.Tensor:
        parts = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
        return torch.nn.functional.scaled_dot_product_attention(*parts, call.mask).transpose(1, 2)

    call = AttentionCall(query, key, value, given, None, False, False, site, run, WHOLE, record=CallRecord())
    found = plugin.attention(call, inner)
    assert call.record.sparse, call.record
    rows = slice(None, -5) if square else slice(None)
    for entry in range(2):
        one = slice(entry, entry + 1)
        tailed = plugin.pattern.with_measured_tail()
        alone = attention(query[one], key[one], value[one], tailed, WHOLE, key_mask=mask[one])
        torch.testing.assert_close(found[one][:, rows], alone[:, rows])  # type: ignore[index]
    if square:
        torch.testing.assert_close(found[:, -5:], inner(call)[:, -5:])


@pytest.mark.parametrize("content", [float("inf"), float("nan")])
@pytest.mark.parametrize("tail", [None, "mean2"])
@pytest.mark.parametrize("impl", ["reference", "cpu", "grouped", "sdpa", "flex", "halo"])
def test_no_backend_lets_hidden_places_through(impl: str, tail: str | None, content: float) -> None:
    """Not into the answers, which are zero where nothing is left to see, and not into the gradients of the others."""
    if impl == "halo" and tail:
        pytest.skip("boxes that follow the query have no tail")
    layout = TokenLayout.from_grid((2, 8, 8))
    pattern = NeighborhoodPattern((1, 3, 3), tail=tail)
    mask = torch.ones(2, layout.seqlen, dtype=torch.bool)
    mask[0, :70], mask[1, ::3] = False, False
    given = [torch.randn(2, layout.seqlen, 2, 8) for _ in range(3)]
    results = []
    for spoilt in (False, True):
        inputs = [x.clone() for x in given]
        for x in inputs[1:] if spoilt else ():
            x[~mask] = content
        inputs = [x.requires_grad_(impl != "flex") for x in inputs]
        if impl == "flex":
            with pytest.raises(GenAttnError, match="a key mask would need a new compiled mask"):
                attention(*inputs, pattern, layout, impl=impl, key_mask=mask)
            return
        out = attention(*inputs, pattern, layout, impl=impl, key_mask=mask)
        assert isinstance(out, torch.Tensor)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    for clean, found in zip(*results):
        torch.testing.assert_close(found, clean)
    out, _, key_grad, value_grad = results[1]
    assert (out[0, :54].abs().max() == 0) == (tail is None)  # a window of hidden keys alone
    assert key_grad[~mask].abs().max() == 0  # type: ignore[union-attr, index]
    assert value_grad[~mask].abs().max() == 0  # type: ignore[union-attr, index]


def test_a_kept_choice_keeps_to_its_mask() -> None:
    query, key, _ = _qkv()
    pattern, memory = AdaptivePattern(TopK(0.2), tiles=TILES, refresh_every=2), SiteMemory(step=0, pass_name="cond")
    first = pattern.plan_for(query, key, WHOLE, 16, 16, memory, key_mask=_shown())
    memory.step = 1
    assert pattern.plan_for(query, key, WHOLE, 16, 16, memory, key_mask=_shown()) is first
