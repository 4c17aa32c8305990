"""BroadWay as published, on motion modules of stock AnimateDiff pipelines."""

from typing import Any

import pytest
import torch
from animatediff_pipes import KINDS, build, make_adapter, make_unet
from diffusers import UNetMotionModel

import genattn
from genattn.errors import GenAttnError
from genattn.guidance.broadway.blocks import choose_sites
from genattn.guidance.broadway.broadway import BroadWay
from genattn.guidance.broadway.calls import conditional_part
from genattn.guidance.broadway.forward_maps import ForwardMaps
from genattn.guidance.broadway.motion import motion_attention, motion_map
from genattn.guidance.broadway.temporal_map import MapEdit, edit_map, published_edit
from genattn.layouts.site import AttentionSite
from genattn.seam.plugin import AttentionCall, Inner, Plugin


class PublishedBroadWay(Plugin):
    """The paper's listing on explicit float64 maps, with its Fourier transform."""

    def __init__(self, alpha: float, beta: float, tau: int) -> None:
        self.settings = alpha, beta, tau
        self.maps: dict[str, torch.Tensor] = {}
        self.energies: list[dict[str, float]] = []

    def attach(self, model: Any, sites: Any) -> None:
        self.guided = choose_sites(sites)

    def wants(self, site: Any) -> bool:
        return site.name in self.guided.anchor_of

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        scores = torch.einsum("nqhd,nkhd->nhqk", call.query.double(), call.key.double()) * call.query.shape[-1] ** -0.5
        rows = scores.softmax(-1)
        source = self.guided.anchor_of[call.site.name]
        anchor = None
        if source == call.site.name:
            self.maps[source] = rows
        else:
            anchor = upscale(self.maps[source], rows.shape[0])
        edited, told = published_edit(rows, anchor, *self.settings, slice(rows.shape[0] // 2, None))
        self.energies.append(told)
        return torch.einsum("nhqk,nkhd->nqhd", edited, call.value.double()).to(call.query.dtype)


def upscale(rows: torch.Tensor, sequences: int, aspect: float = 16 / 12) -> torch.Tensor:
    """Bilinear from one level of two samples of 12 x 16 latents to another, plane by plane."""
    places = {2 * (12 >> level) * (16 >> level): (12 >> level, 16 >> level) for level in range(3)}
    (h0, w0), (h1, w1) = places[rows.shape[0]], places[sequences]
    planes = rows.reshape(2, h0 * w0, -1).transpose(1, 2).reshape(2, -1, h0, w0)
    planes = torch.nn.functional.interpolate(planes, (h1, w1), mode="bilinear")
    return planes.reshape(2, -1, h1 * w1).transpose(1, 2).reshape(sequences, *rows.shape[1:])


def motion_model(widths: tuple[int, ...] = (8, 8, 16), **adapter: Any) -> UNetMotionModel:
    return UNetMotionModel.from_unet2d(make_unet(widths), make_adapter(widths, **adapter)).eval()


def inputs(frames: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(2, 4, frames, 12, 16, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2 * frames, 5, 32, generator=generator),
    }


@torch.no_grad()
def run_model(model: Any, **more: Any) -> torch.Tensor:
    return model(**{**inputs(), **more}).sample


@torch.no_grad()
def run_pipe(pipe: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(0)  # SparseCtrl draws from the global generator
    return pipe(**kwargs, generator=torch.Generator().manual_seed(0)).frames


def test_nothing_edited_is_stock() -> None:
    model = motion_model()
    stock = run_model(model)
    plugin = BroadWay(0.0, 1.0, stop=1.0)
    with genattn.apply(model, plugin).set(num_steps=4):
        torch.testing.assert_close(run_model(model), stock, atol=1e-5, rtol=1e-5)
    assert len(plugin.report) > 0
    assert torch.equal(run_model(model), stock)


@pytest.mark.parametrize(("alpha", "beta", "tau"), [(0.6, 1.5, 7), (0.1, 10.0, 5)])
def test_equals_the_published_listing(alpha: float, beta: float, tau: int) -> None:
    model = motion_model()
    stock = run_model(model)
    published = PublishedBroadWay(alpha, beta, tau)
    with genattn.apply(model, published):
        want = run_model(model)
    plugin = BroadWay(alpha, beta, tau, stop=1.0)
    with genattn.apply(model, plugin).set(num_steps=4):
        got = run_model(model)
    effect = float((want - stock).abs().max())
    assert effect > 1e-3
    assert float((got - want).abs().max()) < 1e-3 * effect
    rows = plugin.report.rows()
    assert len(rows) == len(published.energies) == 8
    for row, told in zip(rows, published.energies):
        assert row["beta"] == pytest.approx(told["beta"], rel=1e-3)
        assert row["e1"] == pytest.approx(told["e1"], rel=1e-4)
        assert row["e3"] == pytest.approx(told["e3"], rel=1e-3)
        assert row["e3"] >= row["e1"] * (1 - 1e-6)


DAILY = ("plain", "sdxl", "freenoise")


@pytest.mark.parametrize("kind", [k if k in DAILY else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_pipelines_of_every_kind(kind: str) -> None:
    pipe, kwargs = build(kind, frames=8)
    stock = run_pipe(pipe, kwargs)
    plugin = BroadWay.preset("animatediff", stop=0.5)
    with genattn.apply(pipe, plugin) as handle:
        guided = run_pipe(pipe, kwargs)
        reached = [row for row in handle.report().to_dict()["sites"] if row["calls"]]
    rows = plugin.report.rows()
    assert {r["step"] for r in rows} == {0}
    blocks = {"up_blocks.1", "up_blocks.2"} if kind == "sdxl" else {"up_blocks.1", "up_blocks.2", "up_blocks.3"}
    assert {r["block"] for r in rows} == blocks
    assert len(reached) == 4 * len(blocks)
    assert len(rows) == len(reached) * (3 if kind == "freenoise" else 1)
    assert all(r["e3"] >= r["e1"] * (1 - 1e-5) for r in rows)
    assert bool(torch.isfinite(guided).all())
    assert not torch.allclose(guided, stock, atol=1e-4)
    assert torch.equal(run_pipe(pipe, kwargs), stock)


def test_energies_are_those_of_the_conditional_half() -> None:
    model = motion_model()
    whole, half, first = (BroadWay(0.0, 1.0, stop=1.0, conditional=c) for c in ("all", "auto", (0.0, 0.5)))
    energies = []
    for plugin in (whole, half, first):
        with genattn.apply(model, plugin).set(num_steps=4):
            run_model(model)
        energies.append([r["e1"] for r in plugin.report.rows()])
    for both, second, opening in zip(*energies):
        assert both == pytest.approx((second + opening) / 2, rel=1e-5)
    assert energies[1] != energies[2]


def test_pag_pipelines_have_the_conditional_third() -> None:
    class PAGCFGIdentitySelfAttnProcessor2_0:
        pass

    class PAGIdentitySelfAttnProcessor2_0:
        pass

    model = torch.nn.Module()
    model.attn_processors = {"a": PAGCFGIdentitySelfAttnProcessor2_0()}  # type: ignore[assignment]
    assert conditional_part("auto", "cond_uncond", 3, model) == (1 / 3, 2 / 3)
    model.attn_processors = {"a": PAGIdentitySelfAttnProcessor2_0()}  # type: ignore[assignment]
    assert conditional_part("auto", "cond", 2, model) == (0.0, 0.5)


@pytest.mark.parametrize("frames", [2, 5, 13])
def test_any_number_of_frames(frames: int) -> None:
    model = motion_model()
    plugin = BroadWay(stop=1.0)
    with torch.no_grad(), genattn.apply(model, plugin).set(num_steps=4):
        out = model(**inputs(frames)).sample
    assert bool(torch.isfinite(out).all())
    assert all(r["e3"] >= r["e1"] * (1 - 1e-5) and r["frames"] == frames for r in plugin.report.rows())


def test_one_frame_is_refused() -> None:
    model = motion_model()
    with pytest.raises(GenAttnError, match="at least 2 frames and no mask, got 1 queries"):
        refuse(model, inputs(1))


def refuse(model: Any, given: dict[str, Any]) -> None:
    with genattn.apply(model, BroadWay(stop=1.0)).set(num_steps=4), torch.no_grad():
        model(**given)


def test_bfloat16_model_keeps_float32_maps() -> None:
    model = motion_model().bfloat16()
    given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs().items()}
    plugin = BroadWay(stop=1.0)
    with torch.no_grad(), genattn.apply(model, plugin).set(num_steps=4):
        out = model(**given).sample
    assert out.dtype == torch.bfloat16
    rows = plugin.report.rows()
    assert all(r["e3"] >= r["e1"] * (1 - 1e-5) for r in rows)
    query = torch.randn(6, 16, 2, 8).bfloat16()
    assert motion_map(query, query).dtype == torch.float32


def test_heads_that_differ_between_blocks() -> None:
    model = UNetMotionModel(
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion",) * 2 + ("DownBlockMotion",),
        up_block_types=("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 2,
        cross_attention_dim=32,
        num_attention_heads=2,
        motion_num_attention_heads=(2, 4, 8),
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    plugin = BroadWay(stop=1.0)
    with genattn.apply(model, plugin).set(num_steps=4):
        out = run_model(model)
    assert bool(torch.isfinite(out).all())
    assert any(r["disparity"] > 0 for r in plugin.report.rows())


def test_whole_maps_and_their_shortcut_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value, other = (torch.randn(12, 9, 3, 8, generator=generator) for _ in range(4))
    rows, anchor = motion_map(query, key), motion_map(other, key)
    for edit in (MapEdit(), MapEdit(0.5, energy=-0.1), MapEdit("auto", "auto"), MapEdit(0.3, 0.4, keep_energy=False)):
        got, scalars = motion_attention(rows, value, edit, anchor=anchor, conditional=slice(6, 12))
        whole, numbers = edit_map(rows, anchor, edit, torch.arange(6, 12))
        torch.testing.assert_close(got, torch.einsum("nhqk,nkhd->nqhd", whole, value), atol=1e-5, rtol=1e-4)
        for name in ("alpha", "beta", "e1", "e2", "e3", "disparity"):
            torch.testing.assert_close(getattr(scalars, name), getattr(numbers, name), atol=1e-5, rtol=1e-4)


def test_split_inference_is_refused() -> None:
    pipe, _ = build("freenoise")
    pipe.enable_free_noise_split_inference(spatial_split_size=16, temporal_split_size=4)
    with pytest.raises(GenAttnError, match="got split inference at"):
        genattn.apply(pipe, BroadWay())


def test_image_unets_are_refused() -> None:
    with pytest.raises(GenAttnError, match="latent frames, got 1"):
        refuse(
            make_unet((8, 16)),
            {"sample": torch.randn(1, 4, 8, 8), "timestep": 5, "encoder_hidden_states": torch.randn(1, 5, 32)},
        )


class Skipped(Plugin):
    """Answers the anchor's calls by itself, as a cache would."""

    def wants(self, site: AttentionSite) -> bool:
        return site.kind == "temporal"

    def attention(self, call: AttentionCall, inner: Inner) -> torch.Tensor:
        return torch.zeros_like(call.query) if call.site.name.startswith("up_blocks.1") else inner(call)


def test_an_anchor_that_did_not_run_is_told() -> None:
    guided = BroadWay(blocks=["up_blocks.2"], anchor="up_blocks.1", stop=1.0)
    model = motion_model()
    with (
        genattn.apply(model, Skipped(), guided).set(num_steps=4),
        pytest.raises(GenAttnError, match="must run before the blocks"),
    ):
        run_model(model)


def test_maps_of_another_resolution_need_the_clips_shape() -> None:
    maps, large, small = ForwardMaps((0.0, 1.0), None, None), torch.rand(64, 2, 9, 9), torch.rand(16, 2, 9, 9)  # type: ignore[arg-type]
    maps.maps[None, "up_blocks.1", 0] = large
    assert maps.motion_anchor(large, None, "up_blocks.1", 0) is large
    with pytest.raises(GenAttnError, match=r"needs latents of shape .*, got maps \(64, 2, 9, 9\) and \(16, 2, 9, 9\)"):
        maps.motion_anchor(small, None, "up_blocks.1", 0)
