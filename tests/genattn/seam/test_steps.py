"""Step, number of steps, noise level and run boundaries, on stock pipelines with stock schedulers."""

import threading
from typing import Any

import diffusers
import pytest
import torch

import genattn
from genattn.guidance.softpag import SoftPAG
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.denoiser import CacheContexts
from genattn.seam.handle import apply
from genattn.seam.plugin import Plugin, Run
from genattn.seam.steps import StepTracker


class Log(Plugin):
    """Keeps every run it sees."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.begun = 0

    def begin_run(self, run: Run) -> None:
        self.begun += 1

    def forward(self, run: Run, args: Any, kwargs: Any, inner: Any) -> Any:
        self.runs.append(run)
        return inner(*args, **kwargs)

    def take(self) -> list[Run]:
        runs, self.runs = self.runs, []
        return runs


def sample(pipe: Any, kwargs: dict[str, Any], **more: Any) -> None:
    pipe(**{**kwargs, **more, "output_type": "latent"}, generator=torch.Generator().manual_seed(0))


PASSES = {
    "wan": ["cond", "uncond"],
    "sd3": ["cond_uncond"],
    "flux": ["cond"],
    "cogvideox": ["cond_uncond"],
    "unet": ["cond_uncond"],
}


@pytest.mark.parametrize("family", list(PASSES))
def test_steps_and_passes(family: str) -> None:
    pipe, kwargs = build_pipeline(family)
    log = Log()
    with apply(pipe, log):
        sample(pipe, kwargs, num_inference_steps=4)
        runs = log.take()
        passes = PASSES[family]
        assert [run.step for run in runs] == [i for i in range(4) for _ in passes]
        assert {run.num_steps for run in runs} == {4}
        assert [run.pass_name for run in runs] == passes * 4
        sigmas = [run.sigma for run in runs]
        assert None not in sigmas
        assert sigmas == sorted(sigmas, reverse=True)
        known = getattr(pipe.scheduler, "sigmas", None)
        if known is not None:
            assert sigmas[:: len(passes)] == pytest.approx(known[:4].tolist(), abs=1e-6)
        sample(pipe, kwargs, num_inference_steps=2)  # a second run starts at zero
        assert [run.step for run in log.take()] == [i for i in range(2) for _ in passes]
        assert log.begun == 2


@pytest.mark.parametrize(
    ("scheduler", "forwards", "steps"),
    [
        ("FlowMatchHeunDiscreteScheduler", 7, 4),
        ("FlowMatchEulerDiscreteScheduler", 4, 4),
        ("UniPCMultistepScheduler", 4, 4),
    ],
)
def test_second_order_samplers_on_sd3(scheduler: str, forwards: int, steps: int) -> None:
    pipe, kwargs = build_pipeline("sd3")
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if scheduler.startswith("UniPC") else {}
    pipe.scheduler = getattr(diffusers, scheduler)(**settings)
    log = Log()
    with apply(pipe, log):
        sample(pipe, kwargs, num_inference_steps=4)
    runs = log.take()
    assert len(runs) == forwards
    assert [run.step for run in runs] == ([0, 1, 1, 2, 2, 3, 3] if forwards == 7 else [0, 1, 2, 3])
    assert {run.num_steps for run in runs} == {steps}
    fractions = [run.fraction for run in runs]
    assert fractions[0] == 0
    assert fractions[-1] < 1


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize(
    "scheduler",
    [
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",  # its list of timesteps goes up within a step
        "LCMScheduler",
        "EulerAncestralDiscreteScheduler",
    ],
)
def test_samplers_of_unets(scheduler: str) -> None:
    pipe, kwargs = build_pipeline("unet")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    log = Log()
    with apply(pipe, log):
        sample(pipe, kwargs, num_inference_steps=4)
    runs = log.take()
    steps = [run.step for run in runs]
    assert steps[0] == 0
    assert steps == sorted(steps)
    assert steps[-1] == runs[-1].num_steps - 1
    assert log.begun == 1


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("num_steps", [3, 10])
def test_a_rise_within_a_step_is_no_new_run_where_the_list_falls_far_after_it(num_steps: int) -> None:
    """Three and ten Karras steps hold a rise by less than a rounding, and the evaluation after it is far below."""
    pipe, kwargs = build_pipeline("unet")
    stock = diffusers.KDPM2AncestralDiscreteScheduler(use_karras_sigmas=True)
    pipe.scheduler = stock
    log = Log()
    with apply(pipe, log):
        sample(pipe, kwargs, num_inference_steps=num_steps)
    times = stock.timesteps.tolist()
    assert any(times[i] < times[i + 1] and times[i + 2] < times[i] for i in range(len(times) - 2)), "what is tried"
    assert log.begun == 1
    assert [run.step for run in log.take()][-1] == len(set(times)) - 1


def test_two_experts_count_as_one_run() -> None:
    pipe, kwargs = build_pipeline("wan-experts")
    log = Log()
    with apply(pipe, log):
        sample(pipe, kwargs, num_inference_steps=4)
        sample(pipe, kwargs, num_inference_steps=4)
    runs = log.take()
    assert [run.step for run in runs] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert {id(run.model) for run in runs} == {id(pipe.transformer), id(pipe.transformer_2)}
    assert log.begun == 2


def test_one_step_runs_are_told_apart() -> None:
    pipe, kwargs = build_pipeline("flux")
    log = Log()
    with apply(pipe, log):
        for _ in range(3):
            sample(pipe, kwargs, num_inference_steps=1)
    assert [(run.step, run.num_steps) for run in log.take()] == [(0, 1)] * 3
    assert log.begun == 3


def test_image_to_image_counts_what_it_visits() -> None:
    pipe, kwargs = build_pipeline("flux")
    image = diffusers.FluxImg2ImgPipeline(**pipe.components)
    image.set_progress_bar_config(disable=True)
    log = Log()
    with apply(image, log):
        sample(image, kwargs, image=torch.rand(1, 3, 16, 24), strength=0.5, num_inference_steps=8)
    runs = log.take()
    assert [run.step for run in runs] == [0, 1, 2, 3]
    assert {run.num_steps for run in runs} == {4}
    assert [run.sigma for run in runs] == pytest.approx(image.scheduler.sigmas[4:8].tolist(), abs=1e-6)


def test_per_token_timesteps_use_the_largest() -> None:
    model, inputs = build_model("wan-ti2v"), build_inputs("wan-ti2v")
    log = Log()
    with apply(model, log), torch.no_grad():
        for value in (900, 600, 300):
            model(**{**inputs, "timestep": inputs["timestep"].clamp(max=value) * 0 + (inputs["timestep"] > 0) * value})
    assert [run.timestep for run in log.runs] == [900, 600, 300]
    assert [run.step for run in log.runs] == [0, 1, 2]


def test_bare_model_starts_again_when_the_timestep_goes_back() -> None:
    for family, times in (("wan", (900, 500, 500, 100, 950, 500)), ("lumina2", (0.1, 0.5, 0.5, 0.9, 0.05, 0.5))):
        model, inputs = build_model(family), build_inputs(family)
        log = Log()
        with apply(model, log), torch.no_grad():
            for t in times:
                model(**{**inputs, "timestep": torch.full_like(inputs["timestep"], t)})
        assert [run.step for run in log.runs] == [0, 1, 1, 2, 0, 1]
        assert log.begun == 2
        assert {run.num_steps for run in log.runs} == {None}


def test_unknown_number_of_steps_is_never_guessed() -> None:
    model, inputs = build_model("wan"), build_inputs("wan")
    with apply(model, genattn.RadialPattern()) as handle, torch.no_grad():
        model(**inputs)
        assert handle.report().sparse_calls == 0
        assert any("give num_steps" in reason for reason in handle.report().dense_reasons)
        with handle.options(num_steps=2):
            model(**{**inputs, "timestep": torch.tensor([400])})
            assert handle.report().sparse_calls == 2
            for t in (300, 200):  # more forwards than were announced
                model(**{**inputs, "timestep": torch.tensor([t])})
        assert handle.report().sparse_calls == 2


def test_a_pipeline_that_is_gone_tells_nothing() -> None:
    pipe, _ = build_pipeline("flux")
    tracker = StepTracker(pipe)
    assert tracker.has_pipe
    del pipe
    import gc

    gc.collect()
    assert not tracker.has_pipe
    assert tracker.observe(0.5, {}, None).num_steps is None


# ---- the part of the schedule that runs


def video_to_video(pipe: Any) -> tuple[Any, dict[str, Any]]:
    from PIL import Image

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.UniPCMultistepScheduler(**flow)
    parts = {name: getattr(pipe, name) for name in ("transformer", "vae", "text_encoder", "tokenizer")}
    other = diffusers.WanVideoToVideoPipeline(**parts, scheduler=scheduler)
    other.set_progress_bar_config(disable=True)
    text = torch.randn(1, 16, pipe.transformer.config.text_dim)
    video = [Image.new("RGB", (48, 64), (20 * n, 100, 50)) for n in range(9)]
    call = {"video": video, "prompt_embeds": text, "negative_prompt_embeds": text, "height": 64, "width": 48}
    return other, {**call, "num_inference_steps": 8, "strength": 0.5, "max_sequence_length": 16}


def test_video_to_video_counts_the_steps_that_run() -> None:
    pipe, call = video_to_video(build_pipeline("wan")[0])
    log = Log()
    with apply(pipe, log):
        sample(pipe, call)
    runs = log.take()
    assert [run.step for run in runs] == [step for step in range(4) for _ in range(2)]
    assert {run.num_steps for run in runs} == {pipe.num_timesteps} == {4}
    noise = dict(zip(pipe.scheduler.timesteps.tolist(), pipe.scheduler.sigmas.tolist()))
    for run in runs:
        assert run.timestep is not None
        assert run.sigma == pytest.approx(noise[run.timestep], abs=1e-6)


def test_image_to_image_knows_the_noise_level() -> None:
    pipe, kwargs = build_pipeline("flux")
    image = diffusers.FluxImg2ImgPipeline(**pipe.components)
    image.set_progress_bar_config(disable=True)
    log = Log()
    with apply(image, log):
        sample(image, kwargs, image=torch.rand(1, 3, 16, 24), strength=0.5, num_inference_steps=8)
    sigmas = image.scheduler.sigmas.tolist()
    assert [run.sigma for run in log.take()] == pytest.approx(sigmas[4:8])


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # a scheduler of diffusers
def test_the_pipeline_that_runs_is_asked() -> None:
    a, call = build_pipeline("unet")
    b = diffusers.StableDiffusionPipeline(
        **{name: part for name, part in a.components.items() if name != "scheduler"},
        scheduler=diffusers.EulerDiscreteScheduler.from_config(a.scheduler.config),
        requires_safety_checker=False,
    )
    b.set_progress_bar_config(disable=True)
    log = Log()
    with apply(a, log):
        sample(a, call, num_inference_steps=5)
        assert {run.num_steps for run in log.take()} == {5}
        sample(b, call, num_inference_steps=3)  # which was never applied
        runs = log.take()
        assert [run.step for run in runs] == [0, 1, 2]
        assert {run.num_steps for run in runs} == {3}
        assert {id(run.pipe) for run in runs} == {id(b)}
        assert {run.samples for run in runs} == {1}
    with apply(a.unet, log):
        sample(b, call, num_inference_steps=2)
        assert {run.num_steps for run in log.take()} == {2}


@pytest.mark.parametrize("count", [None, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_start_is_found_in_the_list(count: int | None, scaled: bool) -> None:
    from types import SimpleNamespace

    from genattn.seam.visits import visits

    times = torch.tensor([900.0, 800, 700, 600, 500, 400, 300, 200])
    scheduler = SimpleNamespace(timesteps=times, sigmas=torch.cat([times / 1000, torch.zeros(1)]), config=None)
    pipe = SimpleNamespace(scheduler=scheduler, _num_timesteps=count)
    found, place = visits(pipe, 0.5 if scaled else 500.0)
    assert [t for t, _ in found] == [500, 400, 300, 200]
    assert [sigma for _, sigma in found] == pytest.approx([0.5, 0.4, 0.3, 0.2])
    assert place == 0
    # joined in the middle of the run
    found, place = visits(pipe, 300.0)
    assert (found[place][0], place) == (300, 2 if count else 0)
    # the first part of the list
    found, place = visits(pipe, 900.0)
    assert [t for t, _ in found] == times[: count or 8].tolist()
    # a denoiser that is told something else entirely: no noise level is guessed for a part of the list
    found, _ = visits(pipe, -7.0)
    assert len(found) == (count or 8)
    assert [sigma for _, sigma in found] == ([None] * 4 if count else pytest.approx((times / 1000).tolist()))
    # told no timestep at all, the scheduler's own place comes before the list's end and beginning
    scheduler.step_index = 2
    found, place = visits(pipe, None)
    assert [t for t, _ in found] == times[2 : 2 + (count or 8)].tolist()
    assert place == 0


def test_a_third_pass_of_a_step_is_not_named() -> None:
    class Pipe:
        do_classifier_free_guidance = True

        def __init__(self) -> None:
            self.scheduler, self.transformer = None, torch.nn.Identity()

        def __call__(self, tracker: StepTracker) -> list[str | None]:
            return [self.forward(tracker) for _ in range(3)]

        def forward(self, tracker: StepTracker) -> str | None:
            tracker.observe(0.5, {}, None, model=self.transformer)
            return tracker.guess_pass("two_pass")

    pipe = Pipe()
    tracker = StepTracker(pipe)
    assert pipe(tracker) == ["cond", "uncond", None]
    assert pipe.forward(tracker) is None  # a loop of the user's own


def test_two_threads_know_their_own_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    from genattn.seam.root_inputs import RootInputs

    a, call = build_pipeline("wan")
    own = {name: part for name, part in a.components.items() if name != "scheduler"}
    b = type(a)(**own, scheduler=type(a.scheduler).from_config(a.scheduler.config))
    b.set_progress_bar_config(disable=True)
    call |= {"negative_prompt": None}
    texts = {"prompt_embeds": torch.zeros(1, 7, 32), "negative_prompt_embeds": torch.zeros(1, 7, 32), "prompt": None}
    arrived, stock = [threading.Event(), threading.Event()], RootInputs.layout

    def layout(self: RootInputs, model: Any, bound: Any) -> Any:
        """Both threads stand here together, if nothing keeps them apart."""
        number = int(threading.current_thread().name)
        arrived[number].set()
        arrived[1 - number].wait(0.2)
        return stock(self, model, bound)

    monkeypatch.setattr(RootInputs, "layout", layout)
    log = Log()
    with apply(a, log):
        runs = [
            threading.Thread(target=sample, args=(pipe, {**call, **texts}), kwargs={"num_inference_steps": steps}, name=str(n))
            for n, (pipe, steps) in enumerate([(a, 2), (b, 3)])
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
    of = {pipe: [run for run in log.runs if run.pipe is pipe] for pipe in (a, b)}
    for pipe, steps in ((a, 2), (b, 3)):
        assert [(run.step, run.num_steps, run.pass_name) for run in of[pipe]] == [
            (step, steps, name) for step in range(steps) for name in ("cond", "uncond")
        ]


def test_cache_contexts_of_threads_and_of_equal_names() -> None:
    contexts, seen = CacheContexts(), []
    first, equal = ["cond", {"sigma": torch.ones(2)}], ["cond", {"sigma": torch.ones(2)}]
    contexts.enter(first)
    contexts.enter(equal)
    contexts.leave(equal)
    assert contexts.open() == [first]

    def elsewhere() -> None:
        seen.append(contexts.innermost()[0])  # a replica takes what the pipeline is in
        contexts.enter(["uncond", {}])
        seen.append(contexts.innermost()[0])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == ["cond", "uncond"]
    assert contexts.innermost() == ("cond", first[1])
    contexts.leave(first)
    assert CacheContexts().innermost() == (None, {})


# ---- loops of the user's own, after calls of the pipeline


class Stopped(Exception):
    """Ends a call in the middle."""


def call_until(pipe: Any, kwargs: dict[str, Any], steps: int, stop: int | None = None) -> None:
    def at_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == stop:
            raise Stopped
        return tensors

    more = {"num_inference_steps": steps, "output_type": "latent", "callback_on_step_end": at_step_end}
    pipe(**{**kwargs, **more}, generator=torch.Generator().manual_seed(0))


def own_loop(pipe: Any, scheduler: Any, steps: int) -> list[Any]:
    """What there is to know of each step of a loop over `scheduler`."""
    scheduler.set_timesteps(steps)
    inputs = build_inputs("wan")
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            pipe.transformer(**{**inputs, "timestep": timestep[None]}, return_dict=False)
    return [(step, steps, pytest.approx(float(scheduler.sigmas[step]))) for step in range(steps)]


def told(log: Log) -> list[tuple[int, int | None, float | None]]:
    return [(run.step, run.num_steps, run.sigma) for run in log.take()]


@pytest.mark.parametrize("before", ["nothing", "fewer", "more", "stopped"])
def test_a_loop_over_the_pipelines_scheduler(before: str) -> None:
    pipe, kwargs = build_pipeline("wan")
    log = Log()
    with apply(pipe, log):
        if before == "stopped":
            with pytest.raises(Stopped):
                call_until(pipe, kwargs, 6, stop=1)
        elif before != "nothing":
            call_until(pipe, kwargs, {"fewer": 2, "more": 8}[before])
        told(log)
        wanted = own_loop(pipe, pipe.scheduler, 6)
        assert told(log) == wanted
        wanted = own_loop(pipe, pipe.scheduler, 3)
        assert told(log) == wanted


def test_a_loop_over_another_scheduler() -> None:
    pipe, kwargs = build_pipeline("wan")
    log, other = Log(), diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    with apply(pipe, log):
        call_until(pipe, kwargs, 3)
        told(log)
        wanted = own_loop(pipe, other, 6)
        seen = told(log)
    assert [step for step, _, _ in seen] == list(range(6))
    assert seen[0][2] == wanted[0][2]  # both lists begin with the same timestep
    assert [entry[1:] for entry in seen[1:]] == [(None, None)] * 5  # never a number of another list


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_the_guidance_of_an_earlier_call_says_nothing_of_a_loop(scale: float) -> None:
    pipe, kwargs = build_pipeline("unet")
    inputs = build_inputs("unet")
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *inputs["sample"].shape[1:], generator=noise)
    texts = torch.randn(2, *inputs["encoder_hidden_states"].shape[1:], generator=noise)

    def forward(sample: torch.Tensor, text: torch.Tensor, **settings: Any) -> torch.Tensor:
        with apply(pipe, SoftPAG("L0", u=1.0, **settings)), torch.no_grad():
            if not settings:
                call_until(pipe, {**kwargs, "guidance_scale": scale}, 1)
            return pipe.unet(sample, torch.tensor(500), encoder_hidden_states=text, return_dict=False)[0]  # type: ignore[no-any-return]

    alone = [forward(latents[i : i + 1], texts[i : i + 1], layout="single") for i in (0, 1)]
    torch.testing.assert_close(forward(latents, texts), torch.cat(alone), atol=1e-5, rtol=1e-4)
    twice = latents[:1].repeat(2, 1, 1, 1)  # [uncond, cond]
    torch.testing.assert_close(forward(twice, texts), forward(twice, texts, layout="uncond_cond"))
