"""Families whose blocks take one modulation vector, against block formulas written out per token in float64."""

import types
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import video_pipes

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import Pass, frame_denoiser
from genattn.pipelines.long_video.bases.per_frame_modulation import FrameEmbedding, Spread, forwards_replaced
from genattn.pipelines.long_video.generate import long_video

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning",
    "ignore:__array__ implementation",
    # the stock Mochi asks for autocast in float32, which a CPU does not have
    "ignore:In CPU autocast, but the target dtype is not supported:UserWarning",
)

FAMILIES = ("HunyuanVideo", "HunyuanVideo-1.5", "Mochi", "Kandinsky 5")
# parts of their stock blocks go through float32, whatever the weights are
IN_FLOAT32 = ("Mochi", "Kandinsky 5")
FRAMES = 3
LEVELS = torch.tensor([[40.0, 500.0, 960.0]])


def norm(hidden):
    return F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)


def made(module, embedding, parts):
    return F.linear(F.silu(embedding), module.linear.weight, module.linear.bias).chunk(parts, -1)


def dual_block(block, tokens, hidden, text, temb, mask=None, rope=None, *_):
    """x + g attn((1 + s) LN(x) + b), then the same around the feed-forward; vectors per token for the video."""
    shift, scale, gate, ff_shift, ff_scale, ff_gate = made(block.norm1, tokens, 6)
    words = [part[:, None] for part in made(block.norm1_context, temb, 6)]
    video, context = block.attn(
        hidden_states=norm(hidden) * (1 + scale) + shift,
        encoder_hidden_states=norm(text) * (1 + words[1]) + words[0],
        attention_mask=mask,
        image_rotary_emb=rope,
    )
    hidden, text = hidden + gate * video, text + words[2] * context
    hidden = hidden + ff_gate * block.ff(norm(hidden) * (1 + ff_scale) + ff_shift)
    return hidden, text + words[5] * block.ff_context(norm(text) * (1 + words[4]) + words[3])


def single_block(block, tokens, hidden, text, temb, mask=None, rope=None, *_):
    both = torch.cat([hidden, text], 1)
    every = torch.cat([tokens, temb[:, None].expand(-1, text.shape[1], -1)], 1)
    shift, scale, gate = made(block.norm, every, 3)
    normed = norm(both) * (1 + scale) + shift
    inner = block.act_mlp(block.proj_mlp(normed))
    places = hidden.shape[1]
    seen = block.attn(normed[:, :places], normed[:, places:], attention_mask=mask, image_rotary_emb=rope)
    both = both + gate * block.proj_out(torch.cat([torch.cat(seen, 1), inner], 2))
    return both[:, :places], both[:, places:]


def last_norm(module, tokens, hidden, _):
    scale, shift = made(module, tokens, 2)
    return norm(hidden) * (1 + scale) + shift


def kandinsky_block(block, tokens, hidden, text, temb, rope, sparse):
    """Three residuals, each x + g f((1 + s) LN(x) + b)."""
    layer = block.visual_modulation.out_layer
    vectors = F.linear(F.silu(tokens), layer.weight, layer.bias).chunk(9, -1)
    parts = (
        lambda x: block.self_attention(x, rotary_emb=rope, sparse_params=sparse),
        lambda x: block.cross_attention(x, encoder_hidden_states=text),
        block.feed_forward,
    )
    for i, part in enumerate(parts):
        shift, scale, gate = vectors[3 * i : 3 * i + 3]
        # the stock block goes through float32 here
        normed = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=1e-5) * (scale.float() + 1.0) + shift.float()
        hidden = (hidden.float() + gate.float() * part(normed.type_as(hidden)).float()).type_as(hidden)
    return hidden


def kandinsky_last(module, tokens, hidden, text, temb):
    layer = module.modulation.out_layer
    shape = hidden.shape
    shift, scale = F.linear(F.silu(tokens), layer.weight, layer.bias).float().chunk(2, -1)
    normed = F.layer_norm(hidden.float().flatten(1, 3), shape[-1:], eps=1e-5) * (scale + 1.0) + shift
    rows = module.out_layer(normed.type_as(hidden))
    batch, frames, height, width, _ = shape
    patches = rows.reshape(batch, frames, height, width, -1, 2, 2)
    return patches.permute(0, 1, 2, 5, 3, 6, 4).reshape(batch, frames, 2 * height, 2 * width, -1)


def mochi_block(block, tokens, hidden_states, encoder_hidden_states, temb, encoder_attention_mask, image_rotary_emb):
    """x + RMS(f(RMS(x) (1 + s))) tanh(g), for both streams."""

    def rms(x, by):
        return (F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * by).type_as(x)

    hidden, text = hidden_states, encoder_hidden_states
    scale, gate, ff_scale, ff_gate = made(block.norm1, tokens, 4)
    if block.context_pre_only:
        layer = block.norm1_context.linear_1
        words = [F.linear(F.silu(temb), layer.weight, layer.bias)[:, None]]
    else:
        words = [part[:, None] for part in made(block.norm1_context, temb, 4)]
    video, context = block.attn1(
        hidden_states=rms(hidden, 1 + scale),
        encoder_hidden_states=rms(text, 1 + words[0]),
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    hidden = hidden + rms(video, gate.tanh())
    hidden = hidden + rms(block.ff(rms(hidden, 1 + ff_scale)), ff_gate.tanh())
    if not block.context_pre_only:
        text = text + rms(context, words[1].tanh())
        text = text + rms(block.ff_context(rms(text, 1 + words[2])), words[3].tanh())
    return hidden, text


def references(model):
    if hasattr(model, "pos_frequencies"):
        blocks = [(block, partial(mochi_block, block)) for block in model.transformer_blocks]
        return [*blocks, (model.norm_out, partial(last_norm, model.norm_out))]
    if hasattr(model, "visual_transformer_blocks"):
        blocks = [(block, partial(kandinsky_block, block)) for block in model.visual_transformer_blocks]
        return [*blocks, (model.out_layer, partial(kandinsky_last, model.out_layer))]
    blocks = [(block, partial(dual_block, block)) for block in model.transformer_blocks]
    singles = [(block, partial(single_block, block)) for block in getattr(model, "single_transformer_blocks", ())]
    return [*blocks, *singles, (model.norm_out, partial(last_norm, model.norm_out))]


def embedding_of(base, time, embeds):
    model = base.pipe.transformer
    if base.family == "HunyuanVideo":
        guidance = torch.full_like(time, 6000.0)
        return model.time_text_embed(time, embeds["pooled_projections"], guidance)[0]
    if base.family == "Mochi":
        return model.time_embed(time, embeds["encoder_hidden_states"], embeds["encoder_attention_mask"], time.dtype)[0]
    if base.family == "Kandinsky 5":
        return model.time_embeddings(time) + model.pooled_text_embeddings(embeds["pooled_projections"])
    return model.time_embed(time)


@pytest.fixture(scope="module", params=FAMILIES)
def built(request):
    builder, size, _, _ = video_pipes.FAMILIES[request.param]
    base = frame_denoiser(builder())
    with torch.no_grad():
        embeds = base.encode_prompt("a cat", None, False).cond
    dtype = torch.float32 if base.family in IN_FLOAT32 else torch.float64
    base.pipe.transformer.to(dtype)
    embeds = {name: value.to(dtype) if value.is_floating_point() else value for name, value in embeds.items()}
    torch.manual_seed(1)
    latents = torch.randn(1, base.channels, FRAMES, *base.latent_size(size, size), dtype=dtype)
    return types.SimpleNamespace(
        base=base,
        model=base.pipe.transformer,
        embeds=embeds,
        latents=latents,
        arguments=base.arguments(latents, embeds),
        rounding=3e-6 if dtype == torch.float32 else 1e-12,
    )


def frame_answer(built, times):
    """Through the path of the frames, whether or not their timesteps differ."""
    base = built.base
    own = FrameEmbedding(base.embedding(times, built.embeds), base.tokens(built.latents))
    with base.installed(), base.told(own):
        return built.model(timestep=times.mean(1), **built.arguments).sample


@torch.no_grad()
def test_one_level_through_the_frames_path_is_the_stock_forward(built):
    times = torch.full((1, FRAMES), 480.0, dtype=built.latents.dtype)
    stock = built.model(timestep=times[:, 0], **built.arguments).sample
    ours = frame_answer(built, times)
    torch.testing.assert_close(ours, stock, rtol=0, atol=built.rounding * float(stock.abs().max()))


@torch.no_grad()
def test_levels_by_frame_equal_the_block_formulas_per_token(built):
    base, model = built.base, built.model
    times, tokens = LEVELS.to(built.latents.dtype), base.tokens(built.latents)
    by_frame = [embedding_of(base, times[:, f], built.embeds)[:, None] for f in range(FRAMES)]
    per_token = torch.cat([embedding.expand(-1, tokens, -1) for embedding in by_frame], 1)
    formulas = [(module, lambda m, stock, *a, f=f, **k: f(per_token, *a, **k)) for module, f in references(model)]
    with forwards_replaced(formulas):
        expected = model(timestep=times.mean(1), **built.arguments).sample
    ours = frame_answer(built, times)
    torch.testing.assert_close(ours, expected, rtol=0, atol=built.rounding * float(expected.abs().max()))
    # `predict` takes that way by itself when the timesteps differ
    with base.installed():
        predicted = base.predict(built.latents, times, built.embeds, Pass("cond", 0, 4, 1.0))
    torch.testing.assert_close(predicted, base.from_model(ours.float()))
    one = model(timestep=times.mean(1), **built.arguments).sample
    assert float((one - ours).abs().max()) > 1e-3 * float(one.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_film_is_the_beginning_of_a_long_one(family):
    builder, size, _, _ = video_pipes.FAMILIES[family]
    pipe = builder()
    # In float32 one value of 19,200 (HunyuanVideo-1.5), 19,200 (HunyuanVideo) or 38,400 (Mochi) is one step of 255 from its
    # float64 film, so any other order of rounding may show; in float64 only a film that knows its length would.
    exact = family != "Kandinsky 5"  # whose stock blocks mix dtypes in float64
    for module in (pipe.transformer, pipe.vae) if exact else ():
        module.double()
    told = {"height": size, "width": size, "window": FRAMES, "partitions": 1, "seed": 3, "progress": False}
    decoder = frame_denoiser(pipe).decoder()
    lengths = [decoder.frames_for(latents) for latents in (14, 11)]
    long, short = (np.stack(list(long_video(pipe, "a cat", num_frames=n, stream=True, **told))) for n in lengths)
    # without a cache the last chunk of a film is decoded with as many latents as are left; the first gives 25 frames
    assert long.shape == (lengths[0], size, size, 3)
    assert np.abs(long[:25].astype(int) - short[:25].astype(int)).max() <= (0 if exact else 1)
    assert len(np.unique(long.reshape(len(long), -1), axis=0)) > 20


def test_a_guider_that_a_queue_cannot_follow_is_refused():
    pipe = video_pipes.hunyuan15()
    pipe.guider.guidance_rescale = 0.5
    with pytest.raises(GenAttnError, match="guides every level alike"):
        frame_denoiser(pipe)
    pipe.guider = torch.nn.Identity()
    with pytest.raises(GenAttnError, match="follows ClassifierFreeGuidance, got the guider Identity"):
        frame_denoiser(pipe)


def test_hunyuan_with_given_pictures_or_packed_time_is_refused():
    pipe = video_pipes.hunyuan()
    pipe.transformer.register_to_config(image_condition_type="token_replace")
    with pytest.raises(GenAttnError, match="takes its first frame from a given picture"):
        frame_denoiser(pipe)
    pipe.transformer.register_to_config(patch_size_t=2)
    with pytest.raises(GenAttnError, match="one latent per patch in time, got patch_size_t=2"):
        frame_denoiser(pipe)


def test_mochi_is_refused_without_its_schedule():
    pipe = video_pipes.mochi()
    base = frame_denoiser(pipe)
    with pytest.raises(GenAttnError, match="at least 2 levels, got 1"):
        base.solver(1, (3, 4, 4))
    grid = base.solver(8, (3, 4, 4)).grid
    # told 1000 for a finished latent and 0 for pure noise
    assert float(grid.timesteps[0]) == 1000.0
    assert float(grid.timesteps[-1]) == 0.0
    assert (grid.sigma.diff() > 0).all()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(GenAttnError, match="invert_sigmas=True, got one without"):
        base.solver(8, (3, 4, 4))


def test_a_told_guidance_scale_makes_one_pass_and_moves_the_answer():
    base = frame_denoiser(video_pipes.hunyuan())
    embeds = base.encode_prompt("a cat", None, True)
    assert embeds.uncond is None
    latents, times = torch.randn(1, base.channels, FRAMES, 4, 4), LEVELS
    answers = []
    for scale in (1.0, 9.0):
        base.guidance_scale = scale
        with torch.no_grad(), base.installed():
            answers.append(base.predict(latents, times, embeds.cond, Pass("cond", 0, 4, 1.0)))
    assert not torch.allclose(answers[0], answers[1])
    told = {"height": 32, "width": 32, "window": FRAMES, "partitions": 1, "progress": False}
    with pytest.raises(GenAttnError, match="reads no negative prompt, got 'blur'; leave it out, or apply NAG"):
        long_video(base.pipe, "a cat", negative_prompt="blur", num_frames=9, **told)


def test_the_guider_gives_the_scale_unless_it_is_switched_off():
    base = frame_denoiser(video_pipes.hunyuan15())
    assert base.default("guidance_scale") == 3.0
    base.pipe.guider.disable()
    assert base.default("guidance_scale") == 1.0
    assert base.default("num_frames") == 121
    base.pipe.target_size = 640
    assert base.default_size() == (480, 852)


def test_a_block_that_lays_its_vector_out_in_another_way_is_refused():
    own = FrameEmbedding(torch.arange(4.0).reshape(1, 2, 2), 3)
    spread = own.later(own.frames)
    assert spread.unsqueeze(1).shape == spread[:, None].shape == (1, 6, 2)
    assert torch.equal(torch.tanh(spread)[:, None], own.spread(own.frames).tanh())
    with pytest.raises(GenAttnError, match="along axis 1, got 2"):
        spread.unsqueeze(2)
    with pytest.raises(GenAttnError, match=r"as \[:, None\], got 0"):
        spread[0]
    assert isinstance(spread, Spread)


def test_a_forward_that_was_there_before_comes_back():
    module = torch.nn.Linear(2, 2)
    stock = module.forward
    with forwards_replaced([(module, lambda m, stock, x: stock(x) + 1)]):
        x = torch.ones(1, 2)
        assert torch.equal(module(x), stock(x) + 1)
    assert "forward" not in vars(module)
    mine = lambda x: x  # noqa: E731
    module.forward = mine
    with pytest.raises(RuntimeError, match="on purpose"), forwards_replaced([(module, lambda m, stock, x: stock(x))]):
        raise RuntimeError("on purpose")
    assert module.forward is mine


def test_prompts_of_different_lengths_are_mixed_by_their_answers_only():
    pipe = video_pipes.kandinsky()
    told = {"height": 32, "width": 32, "window": FRAMES, "partitions": 1, "lookahead": False, "progress": False}
    prompts = {0: "a cat", 9: "a dog that runs far"}
    with pytest.raises(GenAttnError, match="must have one length, got prompts of 7 and 21 tokens"):
        long_video(pipe, prompts, num_frames=17, **told)
    both = long_video(pipe, prompts, num_frames=17, prompt_blend="prediction", **told).video
    one = long_video(pipe, "a cat", num_frames=17, **told).video
    assert not np.array_equal(both[-4:], one[-4:])
