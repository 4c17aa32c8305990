"""Every base: equal timesteps equal the stock pipeline's own loop; a frame's own timestep moves that frame; hooks leave
nothing behind."""

import importlib
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import video_pipes

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import (
    Pass,
    base_classes,
    capability_markdown,
    capability_table,
    frame_denoiser,
    refusal_table,
    why_no_frames,
)
from genattn.pipelines.long_video.queue.fifo import Fifo, WindowBatch, sample_clip, start_queue
from genattn.pipelines.long_video.queue.frame_noise import frame_noise
from genattn.pipelines.long_video.queue.given_frames import GivenFrames
from genattn.pipelines.long_video.queue.latent_queue import QueueShape
from genattn.pipelines.long_video.queue.prompt_schedule import PromptSchedule
from genattn.pipelines.long_video.queue.prompted_windows import PromptedWindows
from genattn.pipelines.long_video.start_frames import given_latents

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning",
    "ignore:__array__ implementation",
    # the stock Mochi asks for autocast in float32, which a CPU does not have
    "ignore:In CPU autocast, but the target dtype is not supported:UserWarning",
)

WINDOW, STEPS = 3, 4
GUIDANCE = 3.0


@pytest.fixture(scope="module", params=list(video_pipes.FAMILIES))
def built(request):
    family = request.param
    builder, size, frames, extra = video_pipes.FAMILIES[family]
    pipe = builder()
    base = frame_denoiser(pipe)
    assert base.family == family
    solver = base.solver(STEPS, (WINDOW, *base.latent_size(size, size)))
    negative = None if base.tells_guidance else "bad"
    schedule = PromptSchedule.parse("a cat")
    windows = PromptedWindows(base, solver.grid, schedule, negative_prompt=negative, guidance_scale=GUIDANCE)
    like = torch.zeros(1, base.channels, WINDOW, *base.latent_size(size, size))
    return types.SimpleNamespace(
        family=family, pipe=pipe, base=base, solver=solver, windows=windows, like=like, size=size, frames=frames, extra=extra
    )


def stock_clip(built, noise, monkeypatch):
    pipe, family = built.pipe, built.family
    name = "video_length" if family == "Latte" else "num_frames"
    call = {name: built.frames, "latents": noise, "output_type": "latent", **built.extra}
    if family == "Wan TI2V" or family == "LTX-Video image to video":
        call["image"] = picture(built.size)
    if family.startswith("LTX-Video"):
        call["latents"] = pipe._pack_latents(noise, 1, 1)
    if family == "CogVideoX":
        call["latents"] = noise.transpose(1, 2)
    if family == "Kandinsky 5":
        call["latents"] = noise.permute(0, 2, 3, 4, 1).clone()
    if family == "SkyReels-V2":
        # this pipeline cannot take latents, so the noise it draws is handed to it
        del call["latents"]
        monkeypatch.setattr(importlib.import_module(type(pipe).__module__), "randn_tensor", lambda *a, **k: noise)
    if family == "LTX-2":
        return silent_clip(built, noise, call)
    if family not in GUIDED_BY_A_GUIDER:
        call["guidance_scale"] = GUIDANCE
    out = pipe(
        prompt="a cat",
        negative_prompt="bad",
        num_inference_steps=STEPS,
        height=built.size,
        width=built.size,
        **call,
    )
    out = out.frames if hasattr(out, "frames") else out[0]
    if family.startswith("LTX-Video"):
        return pipe._unpack_latents(out, WINDOW, *built.like.shape[-2:], 1, 1)
    if family == "Cosmos":
        return out / built.pipe.scheduler.config.sigma_data
    if family == "Kandinsky 5":
        return out.permute(0, 4, 1, 2, 3)
    return out.transpose(1, 2) if family == "CogVideoX" else out


def silent_clip(built, noise, call):
    """The stock pipeline with sound beside the picture and neither looking at the other, every further guidance off."""
    pipe, stock = built.pipe, built.pipe.transformer.forward
    sound = types.SimpleNamespace(mel_bins=8, latent_channels=2)
    pipe.audio_vae = types.SimpleNamespace(config=sound, latents_mean=torch.zeros(4), latents_std=torch.ones(4))
    off = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    off |= {f"audio_{name}": value for name, value in off.items()}
    pipe.transformer.forward = lambda *a, **k: stock(*a, **{**k, "isolate_modalities": True})
    try:
        size = {"height": built.size, "width": built.size}
        steps = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        clip = pipe(
            prompt="a cat", negative_prompt="bad", generator=torch.Generator().manual_seed(7), **steps, **size, **off, **call
        )
    finally:
        del pipe.transformer.forward
        pipe.audio_vae = None
    # this pipeline brings latents to the VAE's scale before it hands them out; the tiny one's is 1
    return clip.frames


def picture(size):
    from PIL import Image

    ramp = np.broadcast_to(np.linspace(0, 255, size, dtype=np.uint8), (size, size))
    return Image.fromarray(np.stack([ramp, ramp.T, np.full_like(ramp, 90)], -1))


# their guider holds the scale; the tiny pipelines' is GUIDANCE
GUIDED_BY_A_GUIDER = ("HunyuanVideo-1.5",)
CONDITIONED = ("Wan TI2V", "LTX-Video image to video")


def test_equal_levels_equal_the_stock_pipeline(built, monkeypatch):
    """With a picture where the pipeline takes one: given latents are clean and told timestep 0, as there."""
    given = None
    with built.base.installed(), torch.no_grad():
        if built.family in CONDITIONED:
            given = given_latents(built.base, picture(built.size), (built.size, built.size))
        windows = built.windows if given is None else GivenFrames(built.windows, given, WINDOW)
        ours = sample_clip(windows, built.solver, built.like, seed=4)
    noise = frame_noise(4, range(WINDOW), built.like, purpose="start")
    if given is not None:
        ours = windows.placed(ours, torch.arange(WINDOW))
    if built.family == "LTX-Video image to video":
        # latents given to this pipeline hold the picture's already
        noise = windows.placed(noise, torch.arange(WINDOW))
    stock = stock_clip(built, noise, monkeypatch)
    # Cosmos starts at sigma 80, where the scaled noise has std 1 - 2e-5
    tolerance = 2e-4 if built.family == "Cosmos" else 2e-5
    torch.testing.assert_close(ours, stock.float(), rtol=tolerance, atol=tolerance * max(1.0, float(stock.abs().max())))


def predict(built, times, latents):
    embeds = built.windows.prompts[0].cond
    if built.base.text_per_frame:
        embeds = {k: v.repeat_interleave(WINDOW, 0) for k, v in embeds.items()}
    with torch.no_grad(), built.base.installed():
        return built.base.predict(latents, times, embeds, Pass("cond", 0, STEPS, 1.0))


def test_a_frames_own_timestep_moves_that_frame_and_its_path_is_the_stock_one(built):
    torch.manual_seed(2)
    latents = torch.randn_like(built.like)
    grid = built.solver.grid.timesteps[1:].float()
    same = grid[2].expand(1, WINDOW).clone()
    own = same.clone()
    own[0, 1] = grid[0]
    a, b = predict(built, same, latents), predict(built, own, latents)
    moved = (a - b).abs().amax((0, 1, 3, 4))
    assert moved.argmax() == 1
    assert moved[1] > 1e-3 * a.abs().max()


def test_the_per_frame_path_with_nearly_equal_timesteps_is_the_scalar_path(built):
    # the two code paths must meet: a hair's difference in one frame may only make a hair's difference in the answer
    torch.manual_seed(3)
    latents = torch.randn_like(built.like)
    same = built.solver.grid.timesteps[3].float().expand(1, WINDOW).clone()
    own = same.clone()
    own[0, 1] += 1e-3 * (1 if built.family != "Cosmos" else 1e-3)
    a, b = predict(built, same, latents), predict(built, own, latents)
    torch.testing.assert_close(a, b, rtol=0, atol=2e-3 * float(a.abs().max()))


def test_two_windows_in_one_batch_equal_one_by_one(built):
    torch.manual_seed(5)
    shape = QueueShape(STEPS, WINDOW, 1, True)
    clip = torch.randn_like(built.like)
    outs = []
    for batch in (1, 2):
        with built.base.installed():
            fifo = Fifo(built.windows, built.solver, start_queue(shape, built.solver, clip), window_batch=batch)
            outs.append(torch.cat([fifo.tick()[0] for _ in range(4)], 2))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=2e-5 * float(outs[0].abs().max()))
    assert torch.isfinite(outs[0]).all()


def test_hooks_are_gone_after_use(built):
    def footprint():
        modules = built.pipe.transformer.modules() if hasattr(built.pipe, "transformer") else built.pipe.unet.modules()
        return [(len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m)) for m in modules]

    before = footprint()
    with pytest.raises(RuntimeError, match="on purpose"), built.base.installed():
        raise RuntimeError("on purpose")
    assert footprint() == before


def test_frames_go_through_the_vae_and_back(built):
    decoder = built.base.decoder()
    video = torch.rand(1, 3, decoder.frames_for(3), built.size, built.size) * 2 - 1
    with torch.no_grad():
        latents = built.base.encode_frames(video)
        assert latents.shape == built.like.shape
        frames = decoder.push(built.base.to_vae(latents))
        rest = decoder.finish()
    frames = frames if rest is None else rest if frames.shape[2] == 0 else torch.cat([frames, rest], 2)
    assert tuple(frames.shape) == (1, 3, decoder.frames_for(3), built.size, built.size)
    assert torch.isfinite(frames).all()


def test_the_vae_gets_back_the_latents_it_made(built, monkeypatch):
    """The scale of the queue's latents is taken off again as it was put on."""
    vae, made = built.pipe.vae, []
    stock = vae.encode
    monkeypatch.setattr(vae, "encode", lambda *args, **kwargs: made.append(stock(*args, **kwargs)) or made[-1])
    video = torch.rand(1, 3, built.base.decoder().frames_for(3), built.size, built.size) * 2 - 1
    with torch.no_grad():
        found = built.base.to_vae(built.base.encode_frames(video))
    own = torch.cat([answer.latent_dist.mode() for answer in made])
    torch.testing.assert_close(found, own if own.ndim == 5 else own.transpose(0, 1)[None], atol=1e-5, rtol=1e-4)


def test_image_to_video_models_with_extra_channels_are_refused():
    pipe = video_pipes.wan_ti2v()
    pipe.register_to_config(expand_timesteps=False)
    with pytest.raises(GenAttnError, match="reads a clean first frame in extra channels"):
        frame_denoiser(pipe)


def test_sizes_that_do_not_fit_are_refused(built):
    with pytest.raises(GenAttnError, match="must be multiples of"):
        built.base.latent_size(built.size + 1, built.size)


def test_every_family_is_in_the_table():
    rows = capability_table()
    assert [row["family"] for row in rows] == list(video_pipes.FAMILIES) == list(base_classes())
    assert all(row[name] for row in rows for name in ("pipelines", "per-frame timestep", "decoding"))
    assert len({row["pipelines"] for row in refusal_table()}) == len(refusal_table())


def test_the_manual_holds_the_generated_table():
    page = (Path(__file__).resolve().parents[4] / "docs" / "long-video.md").read_text(encoding="utf-8")
    begin, end = "<!-- begin generated: bases -->\n", "\n<!-- end generated: bases -->"
    assert page.split(begin)[1].split(end)[0] == capability_markdown()


@pytest.mark.parametrize(
    "name",
    [
        "HunyuanVideoFramepackPipeline",
        "AllegroPipeline",
        "LTX2ConditionPipeline",
        "MotifVideoPipeline",
        "WanVACEPipeline",
        "Cosmos2VideoToWorldPipeline",
        "StableDiffusionPipeline",
    ],
)
def test_other_pipelines_are_refused_with_the_reason(name):
    pipe = type(name, (), {})()
    reason = why_no_frames(pipe)
    assert reason is not None
    assert name in reason
    assert "WanPipeline" in reason
    with pytest.raises(GenAttnError, match="cannot give every frame its own timestep"):
        frame_denoiser(pipe)


def test_checkpoints_that_need_a_picture_or_pack_time_are_refused():
    pipe = video_pipes.wan()
    pipe.transformer.register_to_config(patch_size=(2, 2, 2))
    with pytest.raises(GenAttnError, match="one latent per patch in time"):
        frame_denoiser(pipe)
    pipe.transformer.register_to_config(patch_size=(1, 2, 2), image_dim=8)
    with pytest.raises(GenAttnError, match="image embedding"):
        frame_denoiser(pipe)
    for builder, model, config, message in (
        (video_pipes.skyreels, "transformer", {"patch_size": (2, 2, 2)}, "one latent per patch"),
        (video_pipes.cosmos, "transformer", {"patch_size": (2, 2, 2)}, "one latent per patch"),
        (video_pipes.cogvideox, "transformer", {"patch_size_t": 2}, "CogVideoX 1.5"),
        (video_pipes.cogvideox, "transformer", {"ofs_embed_dim": 8}, "reads a given picture"),
    ):
        pipe = builder()
        getattr(pipe, model).register_to_config(**config)
        with pytest.raises(GenAttnError, match=message):
            frame_denoiser(pipe)
    pipe = video_pipes.ltx()
    pipe.transformer_temporal_patch_size = 2
    with pytest.raises(GenAttnError, match="one latent per patch"):
        frame_denoiser(pipe)
    pipe = video_pipes.cosmos()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(GenAttnError, match="EDMEulerScheduler"):
        frame_denoiser(pipe).solver(4, (3, 4, 4))


def test_free_noise_and_ip_adapters_are_refused():
    pipe = video_pipes.animatediff()
    pipe.unet.encoder_hid_proj = torch.nn.Identity()
    assert "IP-Adapter" in str(why_no_frames(pipe))
    pipe.unet.encoder_hid_proj = None
    pipe.enable_free_noise(context_length=4, context_stride=2)
    assert "FreeNoise" in str(why_no_frames(pipe))


def test_windows_beyond_the_models_positions_are_refused():
    pipe = video_pipes.animatediff()
    assert "motion modules" in str(frame_denoiser(pipe).limits(pipe.unet.config.motion_max_seq_length + 1))
    assert frame_denoiser(pipe).limits(4) is None
    assert "frame positions" in str(frame_denoiser(video_pipes.latte()).limits(4))
    cog = video_pipes.cogvideox()
    assert frame_denoiser(cog).limits(7) is None
    cog.transformer.register_to_config(use_learned_positional_embeddings=True)
    assert "learned positions" in str(frame_denoiser(cog).limits(7))


def test_latte_without_a_negative_prompt_is_guided_by_the_empty_one():
    base = frame_denoiser(video_pipes.latte())
    empty, none, bad = (base.encode_prompt("a cat", negative, True).uncond for negative in ("", None, "bad"))
    assert torch.equal(none["encoder_hidden_states"], empty["encoder_hidden_states"])
    shown, hidden = bad["encoder_hidden_states"], empty["encoder_hidden_states"]
    assert shown.shape != hidden.shape or not torch.equal(shown, hidden)
    assert base.encode_prompt("a cat", "bad", False).uncond is None


@pytest.mark.parametrize(("holds", "length"), [(16, 16), (int(1e30), 1024)])
def test_ltx2_reads_as_many_words_as_the_stock_call_where_its_tokenizer_holds_them(holds, length, monkeypatch):
    pipe = video_pipes.ltx2()
    pipe.tokenizer.model_max_length = holds
    told, stock = [], pipe.encode_prompt

    def encode(*args, max_sequence_length, **kwargs):
        told.append(max_sequence_length)
        return stock(*args, max_sequence_length=16, **kwargs)

    monkeypatch.setattr(pipe, "encode_prompt", encode)
    frame_denoiser(pipe).encode_prompt("a cat", None, False)
    assert told == [length]


def test_two_experts_are_routed_by_level():
    pipe = video_pipes.wan(two_experts=True)
    base = frame_denoiser(pipe)
    solver = base.solver(STEPS, (WINDOW, 4, 4))
    windows = PromptedWindows(base, solver.grid, PromptSchedule.parse("a cat"), guidance_scale=1.0)
    times = solver.grid.timesteps[1:]
    boundary = 800
    assert (times >= boundary).any()
    assert (times < boundary).any()
    latents = torch.randn(1, 16, WINDOW, 4, 4)
    levels = torch.tensor([[0, STEPS - 1, 0]])
    batch = WindowBatch(latents, levels, torch.arange(WINDOW)[None], (slice(0, WINDOW),), (0,))
    with torch.no_grad():
        mixed = windows.answer(batch)
        own = solver.grid.model_timesteps(levels)
        where = Pass("cond", 0, STEPS, 1.0)
        high = base._forward(pipe.transformer, latents, own, windows.prompts[0].cond, where)
        low = base._forward(pipe.transformer_2, latents, own, windows.prompts[0].cond, where)
    assert torch.equal(mixed[:, :, 1], high[:, :, 1])
    assert torch.equal(mixed[:, :, 0], low[:, :, 0])
    assert not torch.allclose(high, low)


def test_two_experts_with_two_scales_equal_the_stock_pipeline():
    pipe = video_pipes.wan(two_experts=True)
    base = frame_denoiser(pipe)
    base.guidance_scale_2 = 1.7
    solver = base.solver(STEPS, (WINDOW, 4, 4))
    windows = PromptedWindows(base, solver.grid, PromptSchedule.parse("a cat"), negative_prompt="bad", guidance_scale=3.0)
    like = torch.zeros(1, 16, WINDOW, 4, 4)
    ours = sample_clip(windows, solver, like, seed=1)
    noise = frame_noise(1, range(WINDOW), like, purpose="start")
    call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": STEPS, "latents": noise, "output_type": "latent"}
    stock = pipe("a cat", "bad", guidance_scale=3.0, guidance_scale_2=1.7, max_sequence_length=512, **call).frames
    torch.testing.assert_close(ours, stock, rtol=2e-5, atol=2e-5)


def test_ti2v_with_timesteps_per_token_and_unipc_equal_the_stock_pipeline():
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe = video_pipes.wan(scheduler=diffusers.UniPCMultistepScheduler(**flow))
    pipe.register_to_config(expand_timesteps=True)
    base = frame_denoiser(pipe)
    solver = base.solver(STEPS, (WINDOW, 4, 4))
    windows = PromptedWindows(base, solver.grid, PromptSchedule.parse("a cat"), negative_prompt="bad", guidance_scale=3.0)
    like = torch.zeros(1, 16, WINDOW, 4, 4)
    ours = sample_clip(windows, solver, like, seed=1)
    noise = frame_noise(1, range(WINDOW), like, purpose="start")
    call = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": STEPS, "latents": noise, "output_type": "latent"}
    stock = pipe("a cat", "bad", guidance_scale=3.0, max_sequence_length=512, **call).frames
    torch.testing.assert_close(ours, stock, rtol=2e-5, atol=2e-5)


def test_skyreels_with_frame_rates_takes_a_batch_sample_by_sample():
    pipe = video_pipes.skyreels(inject_sample_info=True)
    base = frame_denoiser(pipe)
    latents, times = torch.randn(2, 16, WINDOW, 4, 4), torch.tensor([[900.0, 500.0, 100.0], [800.0, 800.0, 800.0]])
    embeds = {"encoder_hidden_states": torch.randn(2, 6, 32)}
    with torch.no_grad():
        both = base.predict(latents, times, embeds, Pass("cond", 0, STEPS, 1.0))
        second = base.predict(latents[1:], times[1:], {k: v[1:] for k, v in embeds.items()}, Pass("cond", 0, STEPS, 1.0))
    assert torch.equal(both[1:], second)
