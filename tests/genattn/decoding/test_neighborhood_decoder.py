"""LTX-2.5's decoder on our kernels: stock's numbers, a fraction of its memory, and stock again afterwards."""

import pytest
import torch

import genattn
from genattn.decoding.neighborhood_decoder import NeighborhoodDecoder, NeighborhoodProcessor
from genattn.errors import GenAttnError
from genattn.pipelines.tiny.random.build import build_model

decoders = pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder", reason="diffusers before LTX-2.5")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
Attention = decoders.LTX2VideoVaeNeighborhoodAttention


def _attention(kernel: tuple[int, int, int], heads: int = 1) -> torch.nn.Module:
    attention = Attention(64 * heads, kernel)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return attention.eval()


def _decoder() -> torch.nn.Module:
    model = decoders.LTX2VideoDiffusionDecoderModel(
        latent_channels=4,
        patch_size=2,
        decoder_head_dim=8,
        decoder_stage_channels=(32, 16, 8, 8, 8),
        decoder_stage_depths=(1, 1, 1, 1, 2),
        decoder_stage_kernels=((3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        decoder_upsample_strides=((1, 1, 1), (2, 1, 1), (1, 1, 1), (1, 2, 2)),
        decoder_upsample_channel_reductions=(2, 2, 1, 1),
        decoder_stage5_kernel=(3, 5, 5),
        temporal_compression_ratio=2,
        decoder_t_emb_dim=8,
    ).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


@pytest.mark.parametrize("impl", ["halo", "cpu", "grouped"])
@pytest.mark.parametrize(
    ("kernel", "grid"), [((3, 7, 7), (4, 8, 9)), ((3, 5, 5), (4, 6, 7)), ((11, 11, 11), (11, 12, 11)), ((3, 7, 7), (3, 7, 7))]
)
def test_stock_numbers_at_the_shipped_windows(kernel: tuple[int, int, int], grid: tuple[int, int, int], impl: str) -> None:
    attention, hidden = _attention(kernel), torch.randn(1, *grid, 64)
    with torch.no_grad():
        stock = attention(hidden)
        attention.set_processor(NeighborhoodProcessor(impl))
        assert attention.build_block_mask(hidden) is None, "a block mask would be made, and thrown away"
        torch.testing.assert_close(attention(hidden), stock, atol=2e-5, rtol=2e-5)


def test_a_decode_is_stocks_and_stock_comes_back() -> None:
    model = _decoder()
    latents = torch.randn(1, 4, 2, 3, 3)
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]

    def decode() -> torch.Tensor:
        with torch.no_grad():
            return model.decode(latents, generator=torch.Generator().manual_seed(0)).sample

    stock = decode()
    handle = genattn.apply(model, NeighborhoodDecoder())
    torch.testing.assert_close(decode(), stock, atol=1e-4, rtol=1e-4)
    report = handle.report()
    assert report.sparse_calls == report.calls == len(processors) == 6
    assert 0 < report.density <= 1
    assert "6 of 6 attention calls ran sparse" in report.verdict
    with handle.options(enabled=False):  # there is nothing else to fall back to
        torch.testing.assert_close(decode(), stock, atol=1e-4, rtol=1e-4)
    handle.remove()
    assert all(a is b for a, b in zip([m.processor for m in model.modules() if hasattr(m, "processor")], processors))
    assert torch.equal(decode(), stock)


def test_a_processor_that_came_later_stays() -> None:
    model = _decoder()
    handle = genattn.apply(model, NeighborhoodDecoder())
    module = model.decoder.diff_blocks[0].attn
    module.processor = later = decoders.LTX2VideoVaeNeighborhoodAttnProcessor()
    handle.remove()
    assert module.processor is later


def test_the_decode_pipeline_is_a_target() -> None:
    class DecodePipeline:
        def __init__(self) -> None:
            self.scheduler = None
            self.components = {"diffusion_decoder": _decoder(), "scheduler": None, "vae": None}

    pipe = DecodePipeline()
    with genattn.apply(pipe, NeighborhoodDecoder()) as handle:
        assert {site.model for site in handle.sites} == {"diffusion_decoder"}


def test_refusals() -> None:
    with pytest.raises(GenAttnError, match="has no neighborhood attention"):
        genattn.apply(build_model("wan"), NeighborhoodDecoder())
    layout = genattn.TokenLayout.from_grid((2, 3, 4))
    tensor = torch.randn(1, 24, 1, 8)
    with pytest.raises(GenAttnError, match="is for NeighborhoodPattern, got RadialPattern"):
        genattn.attention(tensor, tensor, tensor, genattn.RadialPattern(), layout, impl="halo")
    with pytest.raises(GenAttnError, match="returns no log-sum-exp"):
        genattn.attention(tensor, tensor, tensor, genattn.NeighborhoodPattern(2), layout, impl="halo", return_lse=True)


def test_the_plan_stays_small_at_production_size() -> None:
    from genattn.patterns.halo import halo_plan

    layout = genattn.TokenLayout.from_grid((57, 176, 176))
    plan = halo_plan(genattn.NeighborhoodPattern((11, 11, 11)), layout)
    held = sum(t.numel() * t.element_size() for kinds in plan.axes for part in kinds for t in vars(part).values())
    assert plan.places is None
    assert held < 1 << 20
    assert plan.computed_density < 3 * (11 / 57) * (11 / 176) ** 2
