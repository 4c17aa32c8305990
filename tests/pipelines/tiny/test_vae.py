import json

import numpy as np
import pytest
import torch

from genattn.errors import GenAttnError
from genattn.pipelines.tiny import vae as tiny_vae
from genattn.pipelines.tiny.latents import SHARD, cache_latents, load_latents, measure_latents
from genattn.pipelines.tiny.world import caption, render, sample_scene


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return tiny_vae.build_vae(z_dim=4, base_dim=4, decoder_base_dim=4).eval()


def test_it_compresses_four_times_in_space_and_time(vae):
    clips = tiny_vae.training_clips(1, 29, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mode()
        assert latents.shape == (1, 4, 8, 16, 16)
        assert vae.decode(latents).sample.shape == clips.shape


def test_stills_need_no_third_dimension(vae):
    stills = tiny_vae.training_clips(2, 1, 32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = vae(stills).sample
        with tiny_vae.still_convolutions(vae):
            flat = vae(stills).sample
        assert all("forward" not in vars(module) for module in vae.modules())
        torch.testing.assert_close(flat, stock, atol=1e-5, rtol=1e-4)


def test_two_dimensional_convolutions_leave_clips_alone(vae):
    clips = tiny_vae.training_clips(1, 5, 32, torch.Generator().manual_seed(0))
    with torch.no_grad(), tiny_vae.still_convolutions(vae):
        inside = vae(clips).sample
    with torch.no_grad():
        torch.testing.assert_close(inside, vae(clips).sample)


def test_a_fresh_one_treats_every_frame_alike(vae):
    still = tiny_vae.training_clips(1, 1, 32, torch.Generator().manual_seed(3))
    with torch.no_grad():
        decoded = vae(still.expand(-1, -1, 9, -1, -1)).sample
        alone = vae(still).sample
    torch.testing.assert_close(decoded, alone.expand_as(decoded), atol=1e-4, rtol=1e-3)


def test_the_loss_goes_down_and_weighs_objects_more():
    torch.manual_seed(0)
    model = tiny_vae.build_vae(z_dim=4, base_dim=4, decoder_base_dim=4)
    clips = tiny_vae.training_clips(4, 1, 32, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for step in range(25):
        loss = tiny_vae.vae_loss(model, clips, torch.Generator().manual_seed(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    near = tiny_vae._near_objects(clips)
    assert 0 < near.mean() < 0.7


def test_training_clips_are_deterministic_pieces():
    first, again = (tiny_vae.training_clips(2, 5, 32, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (2, 3, 5, 32, 32)
    assert first.min() >= -1
    assert first.max() <= 1


def test_psnr_is_that_of_the_reconstruction(vae):
    clips = tiny_vae.training_clips(1, 1, 32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        error = (vae(clips).sample - clips).square().mean()
    assert tiny_vae.psnr(vae, clips) == pytest.approx(10 * np.log10(4 / error.item()), abs=1e-3)


def test_pixels_become_the_model_range():
    clips = np.array([0, 255], np.uint8).reshape(1, 1, 1, 2, 1).repeat(3, -1)
    assert tiny_vae.to_model_range(clips)[0, :, 0, 0].tolist() == [[-1.0, 1.0]] * 3


@pytest.mark.parametrize("clips", [np.zeros((1, 1, 8, 8, 3)), np.zeros((1, 8, 8, 3), np.uint8)])
def test_what_is_no_clip_is_refused(clips):
    with pytest.raises(GenAttnError, match="clips must be uint8"):
        tiny_vae.to_model_range(clips)


def test_the_cache_resumes_and_keeps_what_is_there(vae, tmp_path):
    assert cache_latents(vae, tmp_path, range(1), minutes=10, frames=1, size=16) == 1
    first = (tmp_path / "latents-00000.safetensors").read_bytes()
    (tmp_path / "latents-00000.safetensors").touch()
    assert cache_latents(vae, tmp_path, range(2), minutes=10, frames=1, size=16) == 2
    assert (tmp_path / "latents-00000.safetensors").read_bytes() == first
    latents, captions = load_latents(tmp_path)
    assert latents.shape == (2 * SHARD, 4, 1, 4, 4)
    assert captions[70] == caption(sample_scene(70, two_objects=0.15))
    still = tiny_vae.to_model_range(render(sample_scene(70, two_objects=0.15), 2, 16, 16)[None, :1])
    with torch.no_grad():
        expected = vae.encode(still).latent_dist.mode()[0]
    torch.testing.assert_close(latents[70].float(), expected, atol=2e-3, rtol=2e-3)


def test_the_clock_stops_the_cache(vae, tmp_path):
    assert cache_latents(vae, tmp_path, range(3), minutes=-1.0, frames=1, size=16) == 0
    with pytest.raises(GenAttnError, match="at least one shard"):
        load_latents(tmp_path)


def test_measured_latents_are_normalised_by_their_measures():
    latents = torch.randn(50, 3, 2, 8, 8) * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1, 1) + 1.0
    mean, std = measure_latents(latents)
    assert mean == pytest.approx([1.0, 1.0, 1.0], abs=0.1)
    assert std == pytest.approx([1.0, 2.0, 0.5], rel=0.05)
    json.dumps([mean, std])


def test_added_channels_change_nothing(vae):
    wide = tiny_vae.widen_latents(vae, 3)
    assert wide.config.z_dim == 7
    assert wide.config.latents_std[4:] == [1.0] * 3
    clips = tiny_vae.training_clips(1, 5, 32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        narrow, posterior = vae.encode(clips).latent_dist, wide.encode(clips).latent_dist
        torch.testing.assert_close(posterior.mean[:, :4], narrow.mean)
        torch.testing.assert_close(posterior.logvar[:, :4], narrow.logvar)
        assert posterior.mean[:, 4:].abs().max() == 0
        noisy = posterior.mean.clone()
        noisy[:, 4:] = 5 * torch.randn_like(noisy[:, 4:])
        torch.testing.assert_close(wide.decode(noisy).sample, vae.decode(narrow.mean).sample)


def test_taking_the_added_channels_away_gives_the_same_autoencoder(vae):
    back = tiny_vae.narrow_latents(tiny_vae.widen_latents(vae, 3), 3)
    assert back.config.latents_std == vae.config.latents_std
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value)


@pytest.mark.parametrize("channels", [0, 4])
def test_no_channels_left_is_refused(vae, channels):
    with pytest.raises(GenAttnError, match=rf"channels must be in \[1, 3\], got {channels}"):
        tiny_vae.narrow_latents(vae, channels)


def test_no_channels_to_add_is_refused(vae):
    with pytest.raises(GenAttnError, match="channels must be >= 1, got 0"):
        tiny_vae.widen_latents(vae, 0)


def test_near_an_object_is_within_two_pixels() -> None:
    clips = torch.zeros(1, 3, 1, 12, 12)
    clips[0, 1, 0, 6, 5] = 0.11
    expected = torch.zeros(12, 12)
    expected[4:9, 3:8] = 1
    assert torch.equal(tiny_vae._near_objects(clips)[0, 0, 0], expected)
    clips[0, 1, 0, 6, 5] = 0.09
    assert not tiny_vae._near_objects(clips).any()
