"""Legal sizes are told before work starts, with the nearest ones."""

from types import SimpleNamespace

import pytest

from genattn.apps.sampling.legal_sizes import check_size, spatial_multiple, temporal_multiple
from genattn.errors import GenAttnError


def _pipe(name: str, patch: object, patch_t: int | None = None, **attributes: int) -> object:
    config = SimpleNamespace(patch_size=patch, **({"patch_size_t": patch_t} if patch_t else {}))
    return type(name, (), {"transformer": SimpleNamespace(config=config), **attributes})()


WAN = _pipe("WanPipeline", (1, 2, 2), vae_scale_factor_spatial=8, vae_scale_factor_temporal=4)
TINY = _pipe("WanPipeline", (1, 2, 2), vae_scale_factor_spatial=4, vae_scale_factor_temporal=4)
LTX = _pipe("LTXPipeline", 1, 1, vae_spatial_compression_ratio=32, vae_temporal_compression_ratio=8)
COG = _pipe("CogVideoXPipeline", 2, 2, vae_scale_factor_spatial=8, vae_scale_factor_temporal=4)
SD3 = _pipe("StableDiffusion3Pipeline", 2, vae_scale_factor=8)


def test_multiples() -> None:
    assert [spatial_multiple(p) for p in (WAN, TINY, LTX, COG, SD3)] == [16, 16, 32, 16, 16]
    assert [temporal_multiple(p) for p in (WAN, TINY, LTX, COG, SD3)] == [4, 4, 8, 8, None]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((100, 64, 29), "height must be a positive multiple of 16 for WanPipeline, got 100; nearest: 96 or 112"),
        ((64, 5, 29), "width .* got 5; nearest: 16"),
        ((64, 64, 30), r"frames must be 4 \* n \+ 1 for WanPipeline, got 30; nearest: 29 or 33"),
        ((64, 64, 0), "frames must be >= 1, got 0"),
    ],
)
def test_refusals(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(GenAttnError, match=message):
        check_size(WAN, *size)


def test_legal_sizes_pass() -> None:
    check_size(WAN, 480, 832, 81)
    check_size(SD3, 1024, 1024, None)
    check_size(LTX, 512, 704, 161)


def test_a_pipeline_without_denoiser_is_refused() -> None:
    with pytest.raises(GenAttnError, match="neither a transformer nor a unet"):
        spatial_multiple(type("Other", (), {})())
