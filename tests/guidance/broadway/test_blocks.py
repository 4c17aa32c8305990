"""Which attentions are guided, which map each is pulled to, and what is refused."""

import pytest
import torch

from genattn.errors import GenAttnError
from genattn.guidance.broadway.blocks import block_name, checked_blocks, choose_sites, pick_blocks
from genattn.guidance.broadway.calls import ClipShape, clip_shape, conditional_part, entries
from genattn.layouts.site import AttentionSite


def unet_sites(ups: int = 4, modules: tuple[int, ...] = (3, 3, 3, 3)) -> list[AttentionSite]:
    """Motion modules and spatial attention of a UNet, listed down, up, mid as the model lists them."""
    sites = []
    places = [f"down_blocks.{b}" for b in range(ups)] + [f"up_blocks.{b}" for b in range(ups)] + ["mid_block"]
    for place in places:
        count = 1 if place == "mid_block" else modules[int(place.rsplit(".", 1)[1])]
        for i in range(count):
            for j in (1, 2):
                name = f"{place}.motion_modules.{i}.transformer_blocks.0.attn{j}"
                sites.append(AttentionSite(name, place, i, len(sites), "temporal", 8))
            sites.append(
                AttentionSite(f"{place}.attentions.{i}.transformer_blocks.0.attn1", place, i, len(sites), "spatial", 8)
            )
    return sites


def dit_sites(layers: int = 6) -> list[AttentionSite]:
    kinds = (("attn1", "self"), ("attn2", "cross"))
    return [AttentionSite(f"blocks.{i}.{n}", "blocks", i, i, k, 2) for i in range(layers) for n, k in kinds]


def test_block_names() -> None:
    assert block_name("up_blocks.2.motion_modules.0.transformer_blocks.0.attn1") == "up_blocks.2"
    assert block_name("blocks.14.attn1") == "blocks.14"
    assert block_name("mid_block.motion_modules.0.attn1") == "mid_block"


def test_motion_modules_as_published() -> None:
    guided = choose_sites(unet_sites())
    assert guided.temporal
    assert guided.blocks == ("up_blocks.1", "up_blocks.2", "up_blocks.3")
    assert len(guided.anchor_of) == 18
    for name, anchor in guided.anchor_of.items():
        assert anchor.startswith("up_blocks.1.")
        assert anchor.split(".", 2)[2] == name.split(".", 2)[2]
    assert len(guided.anchors) == 6


def test_anchor_pairs_by_relative_place_where_counts_differ() -> None:
    guided = choose_sites(unet_sites(modules=(2, 2, 5, 1)))
    third = [guided.anchor_of[f"up_blocks.2.motion_modules.{i}.transformer_blocks.0.attn1"] for i in range(5)]
    assert [a.split(".")[3] for a in third] == ["0", "0", "0", "1", "1"]
    assert guided.anchor_of["up_blocks.3.motion_modules.0.transformer_blocks.0.attn2"].startswith("up_blocks.1.")


def test_sdxl_has_three_levels() -> None:
    assert choose_sites(unet_sites(3)).blocks == ("up_blocks.1", "up_blocks.2")
    assert choose_sites(unet_sites(3), anchor="up_blocks.0").blocks == ("up_blocks.0", "up_blocks.1", "up_blocks.2")


def test_mid_block_runs_before_the_up_blocks() -> None:
    guided = choose_sites(unet_sites(), anchor="mid_block")
    assert guided.blocks[0] == "mid_block"
    with pytest.raises(GenAttnError, match="anchor must run before.*'up_blocks.2' after up_blocks.1"):
        choose_sites(unet_sites(), anchor="up_blocks.2")


def test_dits_guide_the_second_half_from_its_first_block() -> None:
    guided = choose_sites(dit_sites())
    assert not guided.temporal
    assert guided.anchor_of == {f"blocks.{i}.attn1": "blocks.3.attn1" for i in (3, 4, 5)}
    assert choose_sites(dit_sites(), ["blocks.1", 4], "first").anchor_of["blocks.4.attn1"] == "blocks.1.attn1"
    assert choose_sites(dit_sites(), ["2-3"], 0).anchors == {"blocks.0.attn1"}


def test_running_mean_is_for_dits() -> None:
    guided = choose_sites(dit_sites(), anchor="mean")
    assert guided.running_mean
    assert all(name == anchor for name, anchor in guided.anchor_of.items())
    with pytest.raises(GenAttnError, match="their maps differ in resolution"):
        choose_sites(unet_sites(), anchor="mean")


@pytest.mark.parametrize("wanted", [["up_blocks.7"], ["9"], [6], ["4-2"], ["blocks.10"], []])
def test_unknown_blocks_are_refused_with_the_known_ones(wanted: list[str | int]) -> None:
    names = [f"blocks.{i}" for i in range(6)]
    with pytest.raises(GenAttnError, match=r"blocks\.0, blocks\.1.*got"):
        pick_blocks(wanted, names)


def test_a_name_is_not_a_prefix() -> None:
    assert pick_blocks(["blocks.1"], [f"blocks.{i}" for i in range(12)]) == ["blocks.1"]


def test_model_without_such_attention_is_refused() -> None:
    with pytest.raises(GenAttnError, match="got a model with cross, spatial"):
        choose_sites([s for s in unet_sites() if s.kind == "spatial"] + [dit_sites()[1]])


def test_clip_shape_and_its_levels() -> None:
    latents = torch.zeros(2, 4, 16, 9, 14)
    clip = clip_shape((latents,), {})
    assert clip == ClipShape(2, 9, 14) == clip_shape((), {"sample": latents}) == clip_shape((), {"hidden_states": latents})
    assert clip.places(2 * 9 * 14) == (9, 14)
    assert clip.places(2 * 5 * 7) == (5, 7)
    assert clip.places(2 * 3 * 4) == (3, 4)
    assert clip.places(9 * 14) == (9, 14)  # one half of the batch
    with pytest.raises(GenAttnError, match="one sequence per place of a 9x14 latent"):
        clip.places(100)
    assert clip_shape((torch.zeros(2, 4, 8, 8),), {}) is None


@pytest.mark.parametrize(
    ("setting", "name", "batch", "part"),
    [
        ("auto", "cond_uncond", 2, (0.5, 1.0)),
        ("auto", "cond", 2, (0.0, 1.0)),
        ("auto", "uncond", 2, (0.0, 1.0)),
        ("auto", None, 4, (0.5, 1.0)),
        ("auto", None, 3, (0.0, 1.0)),
        ("auto", None, None, (0.0, 1.0)),
        ("all", "cond_uncond", 2, (0.0, 1.0)),
        ((1 / 3, 2 / 3), None, 3, (1 / 3, 2 / 3)),
    ],
)
def test_conditional_part(setting: object, name: str | None, batch: int | None, part: tuple[float, float]) -> None:
    assert conditional_part(setting, name, batch) == part  # type: ignore[arg-type]


def test_entries() -> None:
    assert entries((0.5, 1.0), 128) == slice(64, 128)
    assert entries((1 / 3, 2 / 3), 3) == slice(1, 2)
    with pytest.raises(GenAttnError, match="at least one sample, got"):
        entries((0.0, 0.1), 2)


def test_no_blocks_are_not_all_blocks() -> None:
    assert checked_blocks(None) is None
    assert checked_blocks(["up_blocks.2", 3]) == ("up_blocks.2", 3)
    with pytest.raises(GenAttnError, match=r"blocks must be a list of blocks by name or position .*, got \[\]"):
        checked_blocks([])
