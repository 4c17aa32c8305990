import pytest
import torch

from genattn.errors import GenAttnError
from genattn.pipelines.tiny import denoiser, text
from genattn.pipelines.tiny.text import build_text_encoder, build_tokenizer
from genattn.pipelines.training import places

CAPTIONS = [
    "a red circle moves right on a dark background",
    "",
    "a small red circle moves right and a small blue square stays still on a dark background",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    built = denoiser.TinyDenoiser(4, len(tokenizer), denoiser.DenoiserSize(2, 12, 2, 24)).eval()
    torch.nn.init.normal_(built.transformer.proj_out.weight)
    return built


@pytest.fixture
def inputs(tokenizer):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 4, 4, generator=generator)
    return latents, torch.tensor([0.2, 0.6, 0.95]), text.tokenize(tokenizer, CAPTIONS)


@pytest.mark.parametrize("padded_length", [20, 64, 512])
def test_folded_padding_is_the_stock_padding(model, inputs, padded_length, tokenizer):
    latents, sigma, ids = inputs
    with torch.no_grad():
        folded = model(latents, sigma, ids, padded_length)
        long_ids = tokenizer(CAPTIONS, padding="max_length", max_length=padded_length, return_tensors="pt").input_ids
        embeds = text.encode_text(model.text_encoder, long_ids)
        denoiser.with_training_attention(model.transformer, None)
        stock = model.transformer(latents, sigma * 1000, embeds, return_dict=False)[0]
    torch.testing.assert_close(folded, stock, atol=2e-5, rtol=1e-4)


def test_the_number_of_pads_matters(model, inputs):
    latents, sigma, ids = inputs
    with torch.no_grad():
        assert not torch.allclose(model(latents, sigma, ids, 20), model(latents, sigma, ids, 512), atol=1e-3)


def test_the_loss_is_that_of_the_noise_at_the_start_and_reaches_every_weight(tokenizer):
    torch.manual_seed(0)
    fresh = denoiser.TinyDenoiser(4 + places.POSITION_CHANNELS, len(tokenizer), denoiser.DenoiserSize(2, 12, 2, 24))
    torch.nn.init.zeros_(fresh.transformer.proj_out.bias)
    ids = text.tokenize(tokenizer, CAPTIONS)
    latents = torch.randn(3, 4, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = places.with_positions(latents)
    loss = denoiser.flow_loss(fresh, latents, ids, ids[1], torch.Generator().manual_seed(1))
    # variance of the noise and of the latents; half that of the waves of place, weighed by their own
    amplitude = places.POSITION_AMPLITUDE
    assert loss.item() == pytest.approx(2.0 + 0.5 * (1 + amplitude**2) / amplitude**2, rel=0.1)
    again = denoiser.flow_loss(fresh, latents, ids, ids[1], torch.Generator().manual_seed(1))
    assert loss.item() == again.item()
    torch.nn.init.normal_(fresh.transformer.proj_out.weight)
    denoiser.flow_loss(fresh, latents, ids, ids[1], torch.Generator().manual_seed(1)).backward()
    assert [name for name, parameter in fresh.named_parameters() if parameter.grad is None] == []


def test_noise_levels_follow_the_scheduler_shift():
    sigma = denoiser.sample_sigma(20000, torch.Generator().manual_seed(0))
    assert sigma.min() > 0
    assert sigma.max() < 1
    shift = denoiser.FLOW_SHIFT
    assert sigma.median().item() == pytest.approx(shift / (1 + shift), abs=0.01)


def test_channels_of_place_are_orthogonal_waves_over_the_whole_clip():
    latents = torch.randn(2, 4, 8, 6, 10)
    placed = places.with_positions(latents)
    assert torch.equal(placed[:, :4], latents)
    waves = placed[0, 4:].flatten(1).double() / places.POSITION_AMPLITUDE
    products = waves @ waves.T / waves.shape[1]
    torch.testing.assert_close(products, torch.eye(places.POSITION_CHANNELS).double(), atol=1e-5, rtol=0)
    first = 0
    for axis, number in enumerate(places.POSITION_WAVES):
        others = [other + 1 for other in range(3) if other != axis]
        of_axis = placed[0, 4 + first : 4 + first + number]
        assert of_axis.amax(others).equal(of_axis.amin(others))
        first += number
    some = places.with_positions(latents[:, :, [1, 5]], torch.tensor([1, 5]))
    assert torch.equal(some[:, 4:], placed[:, 4:, [1, 5]])
    assert torch.equal(places.with_positions(latents[:, :, :1])[:, 4:], placed[:, 4:, :1])
    each = places.with_positions(latents[:, :, :1], torch.tensor([[6], [2]]))
    assert torch.equal(each[0, 4:, 0], placed[0, 4:, 6])
    assert torch.equal(each[1, 4:, 0], placed[1, 4:, 2])


def test_ids_without_room_for_padding_are_refused(model, inputs):
    latents, sigma, ids = inputs
    with pytest.raises(GenAttnError, match="must keep one pad"):
        model(latents, sigma, ids[:, :10])
    with pytest.raises(GenAttnError, match="no longer than padded_length"):
        model(latents, sigma, ids, padded_length=10)


@pytest.mark.parametrize("change", [{"heads": 0}, {"head_dim": 13}, {"head_dim": 4}, {"layers": 0}])
def test_bad_sizes_are_refused(change):
    with pytest.raises(GenAttnError, match="sizes must be >= 1"):
        denoiser.DenoiserSize(**change)


def test_heads_that_do_not_divide_the_text_width_are_refused():
    with pytest.raises(GenAttnError, match="heads must divide width"):
        build_text_encoder(100, width=30, heads=4)


def test_objects_weigh_more_and_the_mean_weight_is_one():
    latents = 0.1 * torch.rand(2, 3, 4, 8, 8)
    latents[0, 1, :, 4, 4] = 2.0
    weight = places.object_weight(latents)
    assert weight.shape == (2, 1, 4, 8, 8)
    assert float(weight.mean()) == pytest.approx(1.0)
    around = weight[0, 0, 0, 3:6, 3:6]
    assert (around == around[0, 0]).all()
    assert float(around[0, 0] / weight[0, 0, 0, 0, 0]) == pytest.approx(places.OBJECT_WEIGHT)
    assert (weight[1] == weight[1, 0, 0, 0, 0]).all()


def test_an_object_is_more_than_half_a_deviation_from_the_background():
    latents = torch.zeros(1, 2, 1, 8, 8)
    latents[0, 0, 0, 1, 1], latents[0, 1, 0, 6, 6] = 0.49, -0.51
    heavy = places.object_weight(latents)[0, 0, 0] > 1
    assert heavy[5:, 5:].all()
    assert heavy.sum() == 9
