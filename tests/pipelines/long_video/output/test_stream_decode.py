"""Streaming decode against whole-clip decode, and its state through a checkpoint."""

import pytest
import torch
import video_pipes

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.output.stream_decode import (
    CausalCacheDecoder,
    OverlapDecoder,
    PictureDecoder,
    ReturnedCacheDecoder,
)

CLIP = 7


def whole(vae, latents):
    with torch.no_grad():
        return vae.decode(latents, return_dict=False)[0]


def streamed(decoder, latents, sizes):
    with torch.no_grad():
        parts = [decoder.push(chunk) for chunk in latents.split(sizes, 2)]
        rest = decoder.finish()
    parts = [p for p in [*parts, rest] if p is not None and p.shape[2]]
    return torch.cat(parts, 2)


@pytest.mark.parametrize("sizes", [[1] * CLIP, [3, 4], [2, 1, 4]])
def test_wan_one_latent_at_a_time_is_the_whole_clip_to_the_bit(sizes):
    vae, latents = video_pipes.wan_vae(), torch.randn(1, 16, CLIP, 6, 6)
    decoder = CausalCacheDecoder(vae)
    got = streamed(decoder, latents, sizes)
    assert torch.equal(got, whole(vae, latents))
    assert got.shape[2] == decoder.frames_for(CLIP) == 25


def test_wan_with_patches_as_in_ti2v_is_exact_too():
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=True,
        scale_factor_spatial=16,
    ).eval()
    latents = torch.randn(1, 16, 4, 3, 3)
    torch.testing.assert_close(streamed(CausalCacheDecoder(vae), latents, [1] * 4), whole(vae, latents), atol=2e-5, rtol=1e-5)
    # a processor may round a 1 x 1 convolution of four latents unlike four of one; without it the bits must agree
    vae.post_quant_conv = torch.nn.Identity()
    assert torch.equal(streamed(CausalCacheDecoder(vae), latents, [1] * 4), whole(vae, latents))


def test_a_decode_of_something_else_in_between_changes_nothing():
    vae, latents = video_pipes.wan_vae(), torch.randn(1, 16, 4, 6, 6)
    decoder = CausalCacheDecoder(vae)
    with torch.no_grad():
        first = decoder.push(latents[:, :, :2])
        vae.decode(torch.randn(1, 16, 3, 6, 6))
        second = decoder.push(latents[:, :, 2:])
    assert torch.equal(torch.cat([first, second], 2), whole(vae, latents))


@pytest.mark.parametrize("sizes", [[1] * CLIP, [3, 2, 2], [5, 2], [1, 6]])
def test_cogvideox_in_its_own_chunks_is_the_whole_clip(sizes):
    vae, latents = video_pipes.cog_vae(), torch.randn(1, 4, CLIP, 6, 6)
    got = streamed(ReturnedCacheDecoder(vae), latents, sizes)
    torch.testing.assert_close(got, whole(vae, latents), rtol=1e-5, atol=1e-5)
    assert got.shape[2] == 25


def test_pictures_are_decoded_one_by_one():
    vae, latents = video_pipes.image_vae(), torch.randn(1, 4, 3, 4, 4)
    got = streamed(PictureDecoder(vae), latents, [1, 2])
    want = torch.stack([whole(vae, latents[:, :, i]) for i in range(3)], 2).clamp(-1, 1)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("length", "chunk", "overlap"), [(3, 8, 2), (9, 4, 2), (13, 5, 3), (8, 7, 1)])
def test_overlapped_decode_has_the_right_length_and_the_right_frames_away_from_seams(length, chunk, overlap):
    vae, latents = video_pipes.ltx_vae(), torch.randn(1, 8, length, 4, 4)
    ratio = 4
    decoder = OverlapDecoder(vae, ratio, chunk, overlap)
    got, want = streamed(decoder, latents, [1] * length), whole(vae, latents).clamp(-1, 1)
    assert got.shape == want.shape == (1, 3, decoder.frames_for(length), 16, 16)
    # the first chunk up to its last receptive field is exactly the whole clip's
    assert (got[:, :, 0] - want[:, :, 0]).abs().max() < 1e-5 if length <= chunk else True
    if length <= chunk:
        torch.testing.assert_close(got, want)


def test_cross_fade_is_a_straight_line_between_the_two_decodes():
    class Level:
        """A VAE whose frames say which decode they came from."""

        dtype = torch.float32
        calls = 0

        def decode(self, latents, return_dict):
            Level.calls += 1
            value = -0.5 if Level.calls == 1 else 0.5
            return (torch.full((1, 3, 1 + 4 * (latents.shape[2] - 1), 1, 1), value),)

    decoder = OverlapDecoder(Level(), 4, chunk=4, overlap=2)
    frames = streamed(decoder, torch.zeros(1, 1, 6, 1, 1), [6])[0, 0, :, 0, 0]
    assert len(frames) == decoder.frames_for(6) == 21
    assert (frames[:9] == -0.5).all()
    assert torch.allclose(frames[9:13], torch.tensor([-0.3, -0.1, 0.1, 0.3]))
    assert (frames[13:] == 0.5).all()


MAKERS = {
    "wan": (lambda: CausalCacheDecoder(video_pipes.wan_vae()), 16),
    "cog": (lambda: ReturnedCacheDecoder(video_pipes.cog_vae()), 4),
    "overlap": (lambda: OverlapDecoder(video_pipes.ltx_vae(), 4, 4, 2), 8),
    "picture": (lambda: PictureDecoder(video_pipes.image_vae()), 4),
}


@pytest.mark.parametrize("cut", [0, 1, 4, 6])
@pytest.mark.parametrize("name", MAKERS)
def test_state_through_a_checkpoint_gives_the_same_frames_to_the_bit(name, cut):
    make, channels = MAKERS[name]
    latents = torch.randn(1, channels, 9, 4, 4)
    straight = streamed(make(), latents, [1] * 9)
    first, second = make(), make()
    with torch.no_grad():
        head = [first.push(latents[:, :, i : i + 1]) for i in range(cut)]
        second.load(first.to_tensors(), first.to_numbers())
        tail = streamed(second, latents[:, :, cut:], [1] * (9 - cut))
    head = [h for h in head if h.shape[2]]
    assert torch.equal(torch.cat([*head, tail], 2), straight)


@pytest.mark.parametrize(
    ("name", "frames", "nearest"),
    [("wan", 27, "25 and 29"), ("wan", 2, "1 and 5"), ("cog", 28, "25 and 33"), ("cog", 29, "25 and 33")],
)
def test_lengths_the_vae_cannot_end_on_are_refused_and_the_nearest_told(name, frames, nearest):
    with pytest.raises(GenAttnError, match=f"nearest are {nearest}"):
        MAKERS[name][0]().latents_for(frames)


def test_lengths_it_can_end_on():
    assert [MAKERS["wan"][0]().latents_for(n) for n in (1, 5, 29)] == [1, 2, 8]
    assert MAKERS["cog"][0]().latents_for(25) == 7
    assert MAKERS["picture"][0]().latents_for(11) == 11
    assert OverlapDecoder(video_pipes.ltx_vae(), 4, causal_first=False).latents_for(12) == 3
    for name in ("wan", "cog", "picture"):
        with pytest.raises(GenAttnError, match="num_frames must be >= 1, got 0"):
            MAKERS[name][0]().latents_for(0)


def test_an_overlap_as_long_as_the_chunk_is_refused():
    with pytest.raises(GenAttnError, match="overlap must be 1 to chunk - 1"):
        OverlapDecoder(video_pipes.ltx_vae(), 4, chunk=3, overlap=3)


@pytest.mark.parametrize("make", [lambda vae: OverlapDecoder(vae, 4, chunk=4, overlap=2), PictureDecoder])
def test_frames_stay_within_what_a_picture_can_show(make):
    class Loud:
        """A VAE that overshoots."""

        dtype = torch.float32

        def decode(self, latents, return_dict, **_):
            frames = 1 + 4 * (latents.shape[2] - 1) if latents.ndim == 5 else 0
            shape = (1, 3, frames, 1, 1) if frames else (len(latents), 3, 1, 1)
            return (torch.where(torch.rand(shape) < 0.5, -1.5, 1.5),)

    frames = streamed(make(Loud()), torch.zeros(1, 1, 6, 1, 1), [6])
    assert (float(frames.min()), float(frames.max())) == (-1.0, 1.0)
