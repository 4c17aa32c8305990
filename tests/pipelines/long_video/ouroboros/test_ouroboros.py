"""The parts of Ouroboros, each against its definition and each with its off position equal to plain FIFO."""

import types

import pytest
import torch
import video_pipes
from fifo_runs import CLIP, denoise, flow_solver, run, unipc_solver

from genattn.errors import GenAttnError
from genattn.pipelines.long_video.bases.frame_denoisers import frame_denoiser
from genattn.pipelines.long_video.ouroboros.coherent_tail import CoherentTail, low_pass, mix_frequencies, published_share
from genattn.pipelines.long_video.ouroboros.memory_frames import MemoryFrames
from genattn.pipelines.long_video.ouroboros.ouroboros import Ouroboros
from genattn.pipelines.long_video.ouroboros.resample_check import ResampleCheck
from genattn.pipelines.long_video.ouroboros.self_recurrent import GuidanceSettings, SubjectWindows, subject_loss
from genattn.pipelines.long_video.ouroboros.subject_attention import SubjectWatch, cross_map, grid_of
from genattn.pipelines.long_video.ouroboros.subject_tokens import subject_tokens
from genattn.pipelines.long_video.queue.fifo import Fifo, WindowAnswer, WindowBatch, start_queue
from genattn.pipelines.long_video.queue.latent_queue import QueueShape
from genattn.pipelines.long_video.queue.prompt_schedule import PromptSchedule
from genattn.pipelines.long_video.queue.prompted_windows import PromptedWindows
from genattn.pipelines.long_video.queue.window_group import WindowGroup
from genattn.pipelines.long_video.solvers.frame_solvers import solver_from_scheduler
from genattn.seam.handle import apply

FRAMES = 4


# ---- coherent tail


def tail_of(tail, solver, latents):
    fifo = types.SimpleNamespace(solver=solver, seed=3)
    return tail(fifo, latents, [10])


def vp_solver(levels=64):
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="linspace", clip_sample=False
    )
    return solver_from_scheduler(scheduler, levels)


@pytest.mark.parametrize("make", [vp_solver, lambda: flow_solver(32)], ids=["vp", "flow"])
@pytest.mark.parametrize("kind", ["gaussian", "butterworth", "ideal"])
def test_the_variance_keeping_tail_is_standard_normal_in_every_band(make, kind):
    torch.manual_seed(0)
    latents = torch.randn(1, 16, 3, 64, 64)
    new = tail_of(CoherentTail(kind=kind), make(), latents)
    assert abs(float(new.std()) - 1) < 0.01
    power = torch.fft.fftn(new, dim=(-2, -1)).abs().square().mean((0, 1, 2)) / (64 * 64)
    assert abs(float(power[:4, :4].mean()) - 1) < 0.2
    assert abs(float(power[28:36, 28:36].mean()) - 1) < 0.15


def test_the_published_mix_loses_variance_as_the_released_demo_does():
    torch.manual_seed(0)
    latents = torch.randn(1, 16, 3, 64, 64)
    new = tail_of(CoherentTail(mix="published"), vp_solver(), latents)
    assert 0.94 < float(new.std()) < 0.97
    power = torch.fft.fftn(new, dim=(-2, -1)).abs().square().mean((0, 1, 2)) / (64 * 64)
    assert 0.4 < float(power[:3, :3].mean()) < 0.6


def correlation_with_last(new, latents, rows):
    a, b = (torch.fft.fftn(x[:, :, -1], dim=(-2, -1)) for x in (latents, new))
    return float(((a.conj() * b).real.mean((0, 1)) / a.abs().square().mean((0, 1)))[rows, rows].mean())


def zero_snr_solver(levels=16):
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return solver_from_scheduler(scheduler, levels)


# exp(-1/2) of what the step back keeps: the grid's own at 64 levels, the published schedule's where the grid keeps nothing
@pytest.mark.parametrize("mix", ["variance", "published"])
@pytest.mark.parametrize(
    ("make", "share"),
    [(vp_solver, 0.551), (lambda: flow_solver(16), 0.413), (lambda: flow_solver(64), 0.551), (zero_snr_solver, 0.413)],
    ids=["vp", "flow", "flow of 64", "zero terminal SNR"],
)
def test_low_frequencies_come_from_the_last_latent_at_the_released_share(make, share, mix):
    torch.manual_seed(0)
    latents = torch.randn(1, 256, 3, 64, 64)
    new = tail_of(CoherentTail(mix=mix), make(), latents)
    assert correlation_with_last(new, latents, slice(0, 1)) == pytest.approx(share, abs=0.12)
    assert abs(correlation_with_last(new, latents, slice(30, 34))) < 0.1


@pytest.mark.parametrize("kind", ["gaussian", "butterworth", "ideal"])
def test_every_filter_keeps_the_released_share(kind):
    torch.manual_seed(0)
    latents = torch.randn(1, 256, 1, 32, 32)
    new = tail_of(CoherentTail(kind=kind), flow_solver(16), latents)
    assert correlation_with_last(new, latents, slice(0, 1)) == pytest.approx(0.413, abs=0.12)


def test_the_published_share_is_the_demos():
    assert [round(published_share(n), 3) for n in (64, 32, 16, 8)] == [0.909, 0.828, 0.680, 0.460]
    assert 0 < published_share(1) < 0.1


@pytest.mark.parametrize("make", [vp_solver, lambda: flow_solver(16), zero_snr_solver], ids=["vp", "flow", "zero SNR"])
def test_a_large_share_is_taken_from_the_latent_before_its_step(make):
    torch.manual_seed(0)
    before, stepped = torch.randn(2, 1, 256, 3, 32, 32)
    fifo = types.SimpleNamespace(solver=make(), seed=3, queue=types.SimpleNamespace(latents=before))
    small, large = (CoherentTail(keep=keep)(fifo, stepped, [10]) for keep in (0.5, 0.86))
    assert correlation_with_last(small, stepped, slice(0, 1)) == pytest.approx(0.5, abs=0.12)
    assert correlation_with_last(large, stepped, slice(0, 1)) == pytest.approx(0, abs=0.12)
    assert correlation_with_last(large, before, slice(0, 1)) == pytest.approx(0.86, abs=0.12)


# ---- the tail as a loop: what it hands on must not pile up


def ddim_solver(levels, **settings):
    import diffusers

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False} | settings
    return solver_from_scheduler(diffusers.DDIMScheduler(**settings), levels)


LOOPS = {
    "flow": lambda levels: flow_solver(levels),
    "flow with UniPC": lambda levels: unipc_solver(levels),
    "epsilon": lambda levels: ddim_solver(levels, timestep_spacing="linspace"),
    # leading spacing stops short of the last step, where epsilon says nothing
    "epsilon, zero terminal SNR": lambda levels: ddim_solver(levels, rescale_betas_zero_snr=True, timestep_spacing="leading"),
    "v, zero terminal SNR": lambda levels: ddim_solver(
        levels, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "v": lambda levels: ddim_solver(levels, prediction_type="v_prediction", timestep_spacing="linspace"),
    "sample, zero terminal SNR": lambda levels: ddim_solver(
        levels, prediction_type="sample", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
}


def knowing_denoise(grid, mean=2.0, spread=0.5):
    """The best possible model of independent places with that mean and spread; a grey picture weighs heavily at frequency 0."""

    def answer(batch):
        x = batch.latents.double()
        alpha, sigma = grid.at(grid.alpha, batch.levels, x), grid.at(grid.sigma, batch.levels, x)
        # a latent below the grid is clean: there is nothing to guess
        trust = alpha * spread**2 / (alpha.square() * spread**2 + sigma.square()).clamp(min=1e-12)
        clean = mean + trust * (x - alpha * mean)
        levels = batch.levels.clamp(min=0)
        return WindowAnswer(grid.prediction_from_clean(x, clean, levels).float())

    return answer


def tail_levels(solver, denoise, clip, ticks, **settings):
    shape = QueueShape(solver.num_levels, clip.shape[2])
    fifo = Fifo(denoise, solver, start_queue(shape, solver, clip, seed=1), seed=1, tail=CoherentTail(**settings))
    found = []
    for _ in range(ticks):
        fifo.tick()
        at_zero = fifo.queue.latents[0, :, -1].float().sum((-2, -1)) / (clip.shape[-1] * clip.shape[-2]) ** 0.5
        found.append(float(at_zero.square().mean().sqrt()))
    return torch.tensor(found)


@pytest.mark.parametrize("levels", [8, 16, 64])
@pytest.mark.parametrize("keep", [None, 0.86])
@pytest.mark.parametrize("mix", ["variance", "published"])
@pytest.mark.parametrize("name", LOOPS)
def test_frequency_zero_of_the_tail_stays_that_of_noise_over_sixty_ticks(name, mix, keep, levels):
    solver = LOOPS[name](levels)
    torch.manual_seed(0)
    clip = 2 + 0.5 * torch.randn(1, 16, 4, 8, 8)
    rms = tail_levels(solver, knowing_denoise(solver.grid), clip, 60, mix=mix, keep=keep)
    assert rms.isfinite().all()
    assert float(rms.max()) < 2.0


@pytest.mark.parametrize("name", ["flow", "v, zero terminal SNR"])
def test_the_stepped_latent_at_a_large_share_would_pile_up(name, monkeypatch):
    from genattn.pipelines.long_video.ouroboros import coherent_tail

    # the loop above can tell: with the limit out of the way its bound is passed
    monkeypatch.setattr(coherent_tail, "LARGEST_LATENT_SHARE", 1.0)
    solver = LOOPS[name](16)
    clip = 2 + 0.5 * torch.randn(1, 16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert float(tail_levels(solver, knowing_denoise(solver.grid), clip, 60, keep=0.86).max()) > 2.5


@pytest.mark.slow
@pytest.mark.parametrize(("model", "levels", "per_level"), [("tiny-wan", 16, 1), ("tiny-animatediff", 8, 2)])
def test_frequency_zero_of_the_shipped_models_tails_stays_that_of_noise(model, levels, per_level, monkeypatch):
    from diffusers import DiffusionPipeline

    from genattn.apps.sampling.load_pipeline import shipped_model
    from genattn.pipelines.long_video.generate import long_video

    pipe = DiffusionPipeline.from_pretrained(shipped_model().parent / model)
    pipe.set_progress_bar_config(disable=True)
    found, plain = [], CoherentTail.__call__

    def watched(self, fifo, stepped, numbers):
        new = plain(self, fifo, stepped, numbers)
        at_zero = new[0].float().sum((-2, -1)) / (new.shape[-1] * new.shape[-2]) ** 0.5
        found.append(float(at_zero.square().mean()))
        return new

    monkeypatch.setattr(CoherentTail, "__call__", watched)
    prompt = "a red circle moves right on a dark background"
    call = {"num_inference_steps": levels, "latents_per_level": per_level, "progress": False, "stream": True}
    video = long_video(pipe, prompt, ouroboros=Ouroboros(), **call)
    frames = iter(video)
    while len(found) < 60:
        next(frames)
    frames.close()
    # four channels alone scatter by a third; ten ticks together do not
    rms = torch.tensor(found[:60]).reshape(6, 10).mean(1).sqrt()
    assert float(rms.max()) < 2.0


def test_cut_off_one_keeps_and_none_is_noise():
    latents = torch.randn(1, 2, 1, 8, 8)
    passed = torch.ones(8, 8)
    assert torch.allclose(mix_frequencies(latents, torch.randn_like(latents), passed, True), latents, atol=1e-5)
    assert torch.allclose(mix_frequencies(torch.randn_like(latents), latents, 0 * passed, True), latents, atol=1e-5)


def test_filters_peak_at_zero_frequency_and_fall():
    for kind in ("gaussian", "butterworth", "ideal"):
        filtered = low_pass(16, 12, 0.25, kind)
        assert filtered[8, 6] == 1
        assert filtered[8, 6:].diff().max() <= 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutoff": 0}, "cutoff must be"),
        ({"kind": "box"}, "kind must be"),
        ({"mix": "half"}, "mix must be"),
        ({"keep": 2}, "keep must be"),
    ],
)
def test_wrong_tails_are_refused(settings, message):
    with pytest.raises(GenAttnError, match=message):
        CoherentTail(**settings)


# ---- subject tokens


def test_subject_tokens_are_found_where_the_words_stand():
    from genattn.pipelines.tiny.random.text import clip_tokenizer, t5_tokenizer

    for tokenizer in (t5_tokenizer(), clip_tokenizer()):
        prompt = "a red circle moves"
        ids = tokenizer(prompt).input_ids
        found = subject_tokens(tokenizer, prompt, "red circle")
        words = tokenizer.decode([ids[i] for i in found]).replace(" ", "")
        assert words == "redcircle"
        whole = subject_tokens(tokenizer, prompt, None)
        assert set(found) < set(whole)
        assert not {ids[i] for i in whole} & set(tokenizer.all_special_ids)
        two = subject_tokens(tokenizer, prompt, ("red", "moves"))
        assert tokenizer.decode([ids[i] for i in two]).replace(" ", "") == "redmoves"
        with pytest.raises(GenAttnError, match="must stand in the prompt"):
            subject_tokens(tokenizer, prompt, "blue")


# ---- masks and appended keys


def test_cross_map_is_the_softmax_share():
    q, k = torch.randn(2, 10, 3, 4), torch.randn(2, 7, 3, 4)
    want = ((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) / 2).softmax(-1)[..., [1, 4]].sum(-1).mean(1)
    torch.testing.assert_close(cross_map(q, k, [1, 4], None, chunk=3), want)


def test_grids_of_halved_latents():
    assert grid_of(8 * 6, 8, 6) == (8, 6)
    assert grid_of(4 * 3, 8, 6) == (4, 3)
    assert grid_of(3 * 2, 5, 3) == (3, 2)
    assert grid_of(7, 8, 6) is None


@pytest.fixture(scope="module")
def unet():
    pipe = video_pipes.animatediff()
    base = frame_denoiser(pipe)
    solver = base.solver(6, (FRAMES, 8, 8))
    windows = PromptedWindows(base, solver.grid, PromptSchedule.parse("a red circle"), negative_prompt="", guidance_scale=3.0)
    return types.SimpleNamespace(pipe=pipe, base=base, solver=solver, windows=windows)


def one_window(built, seed=0):
    torch.manual_seed(seed)
    latents = torch.randn(1, built.base.channels, FRAMES, 8, 8)
    levels = torch.tensor([[1, 2, 3, 4]])
    return WindowBatch(latents, levels, torch.arange(FRAMES)[None], (slice(0, FRAMES),), (0,))


def subject_windows(built, guidance=None, attend=True, count=3):
    watch = SubjectWatch(0.5, attend)
    return SubjectWindows(built.windows, watch, [[1, 2]], count, guidance or GuidanceSettings())


def test_an_empty_mask_is_stock(unet):
    batch = one_window(unet)
    with torch.no_grad(), unet.base.installed():
        stock = unet.windows.answer(batch)
        watch = SubjectWatch()
        with apply(unet.pipe, watch):
            watch.begin(FRAMES, (8, 8), None, torch.zeros(FRAMES, 8, 8, dtype=torch.bool))
            assert torch.equal(unet.windows.answer(batch), stock)
            watch.end()
            # outside a window the plugin does nothing at all
            assert torch.equal(unet.windows.answer(batch), stock)
        assert watch.appended == 0


def test_a_mask_changes_the_answer_and_equals_attention_over_appended_keys(unet):
    batch = one_window(unet)
    with torch.no_grad(), unet.base.installed():
        stock = unet.windows.answer(batch)
        subject = subject_windows(unet)
        with apply(unet.pipe, subject.watch):
            changed = subject(batch).prediction
    assert subject.watch.appended > 0
    assert (changed - stock).abs().max() > 1e-4


def test_appended_keys_are_those_of_all_frames():
    watch = SubjectWatch()
    watch._targets = {"t"}
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 3, 3] = True
    watch.begin(2, (4, 4), None, mask)
    key, value = torch.randn(2, 16, 3, 5), torch.randn(2, 16, 3, 5)
    seen = {}

    class Call(types.SimpleNamespace):
        def with_tensors(self, **changes):
            return Call(**{**vars(self), **changes})

    call = Call(query=key, key=key, value=value, mask=None, scale=None, site=types.SimpleNamespace(name="t"))
    watch.attention(call, lambda c: seen.update(key=c.key, value=c.value))
    assert seen["key"].shape == (2, 18, 3, 5)
    for frame in range(2):
        assert torch.equal(seen["key"][frame, 16], key[0, 1 * 4 + 2])
        assert torch.equal(seen["key"][frame, 17], key[1, 3 * 4 + 3])
        assert torch.equal(seen["value"][frame, 17], value[1, 15])


def test_masks_are_where_the_words_look():
    watch = SubjectWatch(0.5)
    watch._sources = {"c"}
    watch.begin(1, (4, 4), [1])
    query = torch.zeros(1, 16, 1, 2)
    query[0, 5] = torch.tensor([0.0, 9.0])
    key = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    call = types.SimpleNamespace(query=query, key=key, scale=1.0, site=types.SimpleNamespace(name="c"))
    watch.attention(call, lambda c: None)
    mask = watch.mask()
    assert mask is not None
    assert mask.sum() == 1
    assert mask[0, 1, 1]


def test_models_that_cannot_be_watched_are_refused():
    windows = types.SimpleNamespace(base=frame_denoiser(video_pipes.cogvideox()))
    with pytest.raises(GenAttnError, match="no cross-attention to read"):
        Ouroboros(subject_attention=True).build(windows, QueueShape(4, 4), WindowGroup.alone(), 0)
    with pytest.raises(GenAttnError, match="use memory_frames instead"):
        apply(video_pipes.wan(), SubjectWatch())
    with pytest.raises(GenAttnError, match="subject masks need both"):
        SubjectWatch().attach(torch.nn.Identity(), [])
    with pytest.raises(GenAttnError, match="threshold must be"):
        SubjectWatch(1.0)


# ---- memory and guidance


def test_the_cleanest_window_feeds_the_memory_as_a_moving_average(unet):
    subject = subject_windows(unet, GuidanceSettings(decay=0.75), count=1)
    with torch.no_grad(), unet.base.installed(), apply(unet.pipe, subject.watch):
        subject(one_window(unet, 0))
        first = {k: v.clone() for k, v in subject.memory.items()}
        subject(one_window(unet, 1))
        second = subject_windows(unet, count=1)
        second.watch = subject.watch
        second(one_window(unet, 1))
    assert first
    for name, value in subject.memory.items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second.memory[name])


def test_the_push_is_the_gradient_of_the_subject_loss(unet):
    batch = one_window(unet, 2)
    subject = subject_windows(unet, GuidanceSettings(scale=1.0, scale_by="published"), attend=False, count=3)
    with unet.base.installed(), apply(unet.pipe, subject.watch):
        with torch.no_grad():
            subject(WindowBatch(batch.latents * 0.5, batch.levels, batch.numbers, batch.keep, (2,)))
            push = subject(batch).push
        assert push is not None
        # the definition, by finite differences along the push
        losses = []
        weights = unet.windows.weights(batch)
        mask_from = batch.latents
        for sign in (-1, 1):
            moved = mask_from + sign * 1e-2 * push / push.norm()
            subject.watch.begin(FRAMES, (8, 8), [1, 2], collect=True)
            with torch.no_grad():
                unet.windows.predict(batch, weights, "cond", moved)
            losses.append(float(subject_loss(subject.watch.features, subject.memory)))
            subject.watch.end()
    slope = (losses[1] - losses[0]) / 2e-2
    assert slope == pytest.approx(float(push.norm()), rel=0.1)


def test_guidance_by_relative_scale_has_the_size_it_says_and_keeps_its_cadence(unet):
    batch = one_window(unet, 2)
    subject = subject_windows(unet, GuidanceSettings(scale=0.1, every=2), count=3)
    with torch.no_grad(), unet.base.installed(), apply(unet.pipe, subject.watch):
        assert subject(batch).push is None
        subject(WindowBatch(batch.latents * 0.5, batch.levels, batch.numbers, batch.keep, (2,)))
        answer = subject(batch)
        late = subject(WindowBatch(batch.latents, batch.levels, batch.numbers, batch.keep, (2,)))
        subject.after_step(None, batch.latents)
        off = subject(batch)
    assert answer.push is not None
    # relative to the conditional answer, which guidance then moves on from
    strongest = answer.push.square().mean(1).sqrt().amax()
    sizes = answer.prediction.square().mean((0, 2, 3, 4)).sqrt()
    assert 0.05 < float(strongest / sizes.median()) < 0.2
    assert float(answer.push.square().mean().sqrt()) < float(strongest)
    assert late.push is None
    assert off.push is None
    assert len(subject.losses) == 1


def test_a_new_prompt_may_reset_the_memory(unet):
    base = unet.base
    schedule = PromptSchedule.parse({0: "a red circle", 2: "a blue cross"})
    windows = PromptedWindows(base, unet.solver.grid, schedule, guidance_scale=1.0)
    for mode, same in (("reset", False), ("keep", True)):
        subject = SubjectWindows(windows, SubjectWatch(), [[1], [1]], 1, GuidanceSettings(decay=1.0, on_switch=mode))
        with torch.no_grad(), base.installed(), apply(unet.pipe, subject.watch):
            subject(one_window(unet, 0))
            before = {k: v.clone() for k, v in subject.memory.items()}
            late = one_window(unet, 1)
            subject(WindowBatch(late.latents, late.levels, late.numbers + 50, late.keep, late.index))
        assert all(torch.equal(before[k], v) for k, v in subject.memory.items()) == same


def test_guidance_lowers_the_loss_of_a_run(unet):
    shape = QueueShape(6, FRAMES, lookahead=False)
    torch.manual_seed(0)
    clip = torch.randn(1, 4, FRAMES, 8, 8)
    ends = []
    for scale in (1e-9, 0.3):
        subject = subject_windows(
            unet, GuidanceSettings(scale=scale, share=1.0, decay=1.0), attend=False, count=len(shape.windows)
        )
        with unet.base.installed(), apply(unet.pipe, subject.watch):
            fifo = Fifo(subject, unet.solver, start_queue(shape, unet.solver, clip), hooks=[subject])
            for _ in range(4):
                fifo.tick()
        ends.append(sum(subject.losses[-len(shape.windows) :]))
    assert ends[1] < ends[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1}, "guidance must be >= 0"),
        ({"every": 0}, "guidance_every must be >= 1"),
        ({"share": 0}, "guidance_share must be"),
        ({"decay": 1.5}, "memory_decay must be"),
        ({"scale_by": "x"}, "guidance_scale_by must be"),
        ({"on_switch": "x"}, "memory_on_switch must be"),
    ],
)
def test_wrong_guidance_is_refused(settings, message):
    with pytest.raises(GenAttnError, match=message):
        GuidanceSettings(**settings)


def test_subject_windows_need_one_text_per_window(unet):
    windows = PromptedWindows(unet.base, unet.solver.grid, PromptSchedule.parse("a"), blend="prediction")
    with pytest.raises(GenAttnError, match="use 'embeds'"):
        SubjectWindows(windows, SubjectWatch(), [[1]], 1, GuidanceSettings())
    with pytest.raises(GenAttnError, match="blend must be"):
        PromptedWindows(unet.base, unet.solver.grid, PromptSchedule.parse("a"), blend="x")


# ---- memory frames


def test_memory_frames_stand_in_front_clean_and_their_answers_are_dropped():
    seen = {}

    def watch(batch):
        seen["batch"] = batch
        return denoise(batch)

    memory = MemoryFrames(watch, head=2, anchors=1, recent=2, spacing=2)
    for n in range(12):
        memory.on_leave(torch.full((1, 3, 1, 5, 6), float(n)), [n])
    assert memory.chosen() == [1, 7, 9]
    batch = WindowBatch(torch.randn(CLIP), torch.tensor([[0, 1, 2, 3]]), torch.arange(20, 24)[None], (slice(2, 4),), (0,))
    answer = memory(batch)
    given = seen["batch"]
    assert given.levels.tolist() == [[-1, -1, -1, 0, 1, 2, 3]]
    assert given.numbers.tolist() == [[1, 7, 9, 20, 21, 22, 23]]
    assert given.latents[0, 0, :3, 0, 0].tolist() == [1.0, 7.0, 9.0]
    assert given.keep == (slice(5, 7),)
    assert torch.equal(answer.prediction, denoise(given).prediction[:, :, 3:])


def test_the_memory_stays_small_and_survives_a_checkpoint():
    memory = MemoryFrames(denoise, head=2, anchors=2, recent=2, spacing=4)
    for n in range(200):
        memory.on_leave(torch.full((1, 1, 1, 2, 2), float(n)), [n])
    assert len(memory.bank) <= 2 + 4 * 2 + 3
    assert memory.chosen()[:2] == [1, 2]
    again = MemoryFrames(denoise, head=2, anchors=2, recent=2, spacing=4)
    again.load(memory.to_tensors(), {})
    assert again.chosen() == memory.chosen()
    assert memory.settings()["spacing"] == 4


def test_an_empty_memory_is_plain_fifo():
    memory = MemoryFrames(denoise, head=2)
    shape, solver, clip = QueueShape(8, 4), flow_solver(8), torch.randn(CLIP)
    plain = run(solver, shape, clip, 5)[0]
    assert torch.equal(run(solver, shape, clip, 5, denoise=memory)[0], plain)
    for wrong in ({"anchors": 0, "recent": 0}, {"anchors": -1}, {"spacing": 0}):
        with pytest.raises(GenAttnError, match=r"memory frames need|spacing must be"):
            MemoryFrames(denoise, 2, **wrong)


# ---- re-sampling


def test_a_latent_that_parted_is_drawn_again_and_others_are_left_alone():
    shape, solver, clip = QueueShape(8, 4), flow_solver(8), torch.randn(CLIP)

    def flat(batch):
        # an answer that leads every latent to the same picture
        return type(denoise(batch))(
            solver.grid.prediction_from_clean(batch.latents, torch.ones_like(batch.latents), batch.levels)
        )

    check = ResampleCheck(depth=5, tolerance=0.0001)
    _, _, fifo = run(solver, shape, clip, 6, denoise=flat, hooks=[check])
    before = check.resampled
    stepped = fifo.queue.latents.clone()
    slot = shape.head + 2
    stepped[:, :, slot] = -stepped[:, :, slot]
    fifo._forgotten.clear()
    out = check.after_step(fifo, stepped)
    assert check.resampled == before + 1
    assert fifo._forgotten == {slot}
    others = [i for i in range(shape.slots) if i != slot]
    assert torch.equal(out[:, :, others], stepped[:, :, others])
    assert not torch.equal(out[:, :, slot], stepped[:, :, slot])
    again = ResampleCheck(depth=5)
    again.load({}, check.to_numbers())
    assert (again.mean, again.resampled) == (check.mean, check.resampled)


def test_forgetting_clears_the_solvers_history():
    from fifo_runs import unipc_solver

    class Forget(ResampleCheck):
        def after_step(self, fifo, stepped):
            fifo.forget(fifo.queue.shape.head + 3)
            return stepped

    fifo = run(unipc_solver(8), QueueShape(8, 4), torch.randn(CLIP), 3, hooks=[Forget()])[2]
    # the slot moved one to the left at the end of the tick
    steps = fifo.queue.state["steps"].flatten()
    assert steps[fifo.queue.shape.head + 2] == 0
    assert (steps[fifo.queue.shape.head + 3 :][:2] > 0).all()


def test_queues_too_short_to_judge_are_left_alone():
    check = ResampleCheck(depth=10)
    run(flow_solver(2), QueueShape(2, 2), torch.randn(1, 3, 2, 4, 4), 2, hooks=[check])
    assert check.mean is None
    for wrong in ({"depth": 0}, {"tolerance": -1}, {"candidates": 0}):
        with pytest.raises(GenAttnError, match=r"resample \w+ must be >="):
            ResampleCheck(**wrong)


# ---- settings


def test_settings_go_through_json_and_wrong_ones_are_refused():
    settings = Ouroboros(tail="published", subject=("a", "b"), memory_frames=2)
    assert Ouroboros.from_json(settings.to_json()) == settings
    assert Ouroboros.from_json(None).tail == "gaussian"
    for wrong, message in (
        ({"tail": "x"}, "tail must be"),
        ({"memory_frames": -1}, "memory_frames and resample"),
        ({"guidance": -1}, "guidance must be"),
        ({"subject_attention": True, "mask_threshold": 2}, "threshold must be"),
    ):
        with pytest.raises(GenAttnError, match=message):
            Ouroboros(**wrong)
    with pytest.raises(GenAttnError, match="unknown Ouroboros settings: mood"):
        Ouroboros.from_json({"mood": 1})


def test_what_one_process_must_do_is_refused_in_several(unet):
    group = WindowGroup(0, 2, lambda tensor: tensor)
    with pytest.raises(GenAttnError, match="memory of one process"):
        Ouroboros(guidance=0.1).build(unet.windows, QueueShape(6, 4), group, 0)
    long = unet.pipe.unet.config.motion_max_seq_length
    with pytest.raises(GenAttnError, match="memory_frames make windows longer"):
        Ouroboros(memory_frames=2).build(unet.windows, QueueShape(6, long), WindowGroup.alone(), 0)


@pytest.mark.parametrize("family", ["Wan", "LTX-Video"])
def test_memory_guidance_and_check_run_together_on_a_transformer(family):
    pipe = video_pipes.FAMILIES[family][0]()
    base = frame_denoiser(pipe)
    size = base.latent_size(32, 32)
    solver = base.solver(5, (3, *size))
    windows = PromptedWindows(base, solver.grid, PromptSchedule.parse("a red circle"), guidance_scale=2.0, negative_prompt="")
    shape = QueueShape(5, 3)
    settings = Ouroboros(subject="red circle", guidance=0.1, memory_frames=2, memory_spacing=1, resample=2)
    parts = settings.build(windows, shape, WindowGroup.alone(), 0)
    torch.manual_seed(0)
    with base.installed(), parts.applied():
        start = start_queue(shape, solver, torch.randn(1, base.channels, 3, *size))
        fifo = Fifo(parts.denoise, solver, start, tail=parts.tail, hooks=parts.hooks)
        out = torch.cat([fifo.tick()[0] for _ in range(7)], 2)
    assert torch.isfinite(out).all()
    assert parts.hooks[0].losses
    assert parts.hooks[1].bank
    names = [n for hook in parts.hooks for n in (*hook.to_tensors(), *hook.to_numbers())]
    assert len(names) == len(set(names))
