"""What was asked for and cannot happen is told once, and stands in the report: no step to act at, a denoiser exchanged."""

import copy
import functools
import pickle
import warnings
from typing import Any

import diffusers
import pytest
import torch

import genattn
from genattn import RadialPattern
from genattn.guidance.broadway import BroadWay
from genattn.guidance.broadway.enhance_a_video import EnhanceAVideo
from genattn.guidance.nag import NAG
from genattn.guidance.s2 import S2Guidance
from genattn.guidance.softpag import SoftPAG
from genattn.guidance.tag import TAG
from genattn.patterns.dense import DensePattern
from genattn.pipelines.tiny.random.build import build_inputs, build_model, build_pipeline
from genattn.seam.plugin import Plugin, Run
from genattn.seam.report import GenAttnWarning
from genattn.seam.schedule import Schedule
from genattn.seam.sparse_plugin import SparsePlugin

LATE = {"start": 0.6, "stop": 0.9}
IDLE: dict[str, Any] = {
    "S2Guidance": lambda: S2Guidance(),
    "SoftPAG": lambda: SoftPAG(heads="L1H0", **LATE),
    "NAG": lambda: NAG("red", **LATE),
    "TAG": lambda: TAG(**LATE),
    "BroadWay": lambda: BroadWay(**LATE),
    "EnhanceAVideo": lambda: EnhanceAVideo(**LATE),
}


def _run(steps: int | None, sigmas: tuple[float, ...] = (), **more: Any) -> Run:
    return Run(step=0, num_steps=steps, sigmas=sigmas, **more)


@pytest.mark.parametrize("name", IDLE)
def test_a_window_without_a_step_is_told(name: str) -> None:
    """One step stands at 0 of the run, where a window that opens later does not reach."""
    plugin = IDLE[name]()
    assert "its window is steps" in plugin.why_idle(_run(1))
    assert plugin.why_idle(_run(20)) == ""
    assert plugin.why_idle(_run(None)) == ""
    assert plugin.why_idle(_run(20, tuple(float(n) for n in range(20, 0, -1)))) == ""


def test_a_noise_window_without_a_step_is_told() -> None:
    plugin = SoftPAG(heads="L1H0", sigma_start=0.5, sigma_stop=0.4)
    assert "sigma 0.5 down to 0.4" in plugin.why_idle(_run(3, (1.0, 0.6, 0.3)))
    assert plugin.why_idle(_run(3, (1.0, 0.45, 0.3))) == ""
    both = SoftPAG(heads="L1H0", start=0.5, sigma_start=0.7)
    assert both.why_idle(_run(3, (0.7, 0.6, 0.71)))  # the fractions leave the last step, the noise the others
    assert plugin.why_idle(_run(3)) == ""  # nobody tells


@pytest.mark.parametrize(
    ("schedule", "steps", "sigmas", "reason"),
    [
        (Schedule(), 1, (), "first dense steps"),
        (Schedule(), 2, (), ""),
        (Schedule(dense_steps=3), 3, (), "first dense steps"),
        (Schedule(dense_steps=1, dense_last_steps=2), 3, (), "last dense steps"),
        (Schedule(dense_steps=1, dense_last_steps=1), 3, (), ""),
        (Schedule(dense_steps=1.0), 3, (), ""),  # that is asking for it
        (Schedule(dense_steps=0, sigma=(0.1, 0.2)), 3, (1.0, 0.5, 0.3), "outside the noise window"),
        (Schedule(dense_steps=0, sigma=(0.1, 0.3)), 3, (1.0, 0.5, 0.3), ""),
        (Schedule(dense_steps=0.5, sigma=(0.9, 1.0)), 3, (1.0, 0.5, 0.3), "outside the noise window"),
        (Schedule(dense_steps=0, sigma=(0.1, 0.2)), 3, (), ""),
        (Schedule(dense_steps=0, passes=("uncond",)), 3, (1.0, 0.5, 0.3), ""),
        (Schedule(), None, (), ""),
    ],
)
def test_a_schedule_that_leaves_no_step_is_told(
    schedule: Schedule, steps: int | None, sigmas: tuple[float, ...], reason: str
) -> None:
    plugin = SparsePlugin(RadialPattern(), schedule)
    run = _run(steps, sigmas, pass_name="cond")
    assert (reason in plugin.why_idle(run)) if reason else plugin.why_idle(run) == ""
    assert SparsePlugin(DensePattern(), schedule).why_idle(run) == ""


def test_on_a_pipeline_it_is_warned_of_once_and_stands_in_the_report() -> None:
    pipe, call = build_pipeline("wan")
    with genattn.apply(pipe, RadialPattern(), S2Guidance(), dense_steps=1) as handle:
        with pytest.warns(GenAttnWarning, match="acts at no step of a run of 1") as told:
            pipe(**{**call, "num_inference_steps": 1})
        assert len(told) == 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe(**{**call, "num_inference_steps": 1})
            pipe(**{**call, "num_inference_steps": 3})
        sparse, s2 = handle.report().notes
        assert sparse == "RadialPattern acts at no step of a run of 1: first dense steps (dense_steps=1)"
        assert s2.startswith("S2Guidance acts at no step of a run of 1: its window is steps 0.1 to 0.9 of the run; widen it")
        assert sparse in handle.report().table()
        assert handle.report().to_dict()["notes"] == [sparse, s2]
    with genattn.apply(pipe, RadialPattern(), dense_steps=0) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        with handle.options(enabled=False, dense_steps=2):
            pipe(**{**call, "num_inference_steps": 1})
        with handle.options(dense_steps=2), pytest.raises(GenAttnWarning, match="no step of a run of 1"):
            pipe(**{**call, "num_inference_steps": 1})


def test_sigmas_of_the_run_are_the_schedulers() -> None:
    pipe, call = build_pipeline("wan")

    runs: list[Run] = []

    class Log(Plugin):
        def begin_run(self, run: Run) -> None:
            runs.append(run)

    with genattn.apply(pipe, Log()):
        pipe(**{**call, "num_inference_steps": 3})
    (run,) = runs
    assert run.num_steps == len(run.sigmas) == 3
    assert run.sigmas == tuple(pipe.scheduler.sigmas.tolist()[:3])
    assert run.sigma == run.sigmas[0]


def test_another_denoiser_is_told_when_it_is_given() -> None:
    pipe, call = build_pipeline("wan")
    stock, old, new = type(pipe), pipe.transformer, build_model("wan", seed=1)
    with torch.no_grad():
        plain = pipe(**{**call, "output_type": "latent"}, generator=torch.Generator().manual_seed(0)).frames
    handle = genattn.apply(pipe, RadialPattern(), dense_steps=0)
    other = genattn.apply(pipe, TAG())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.transformer = old  # the same
        pipe.transformer = torch.compile(old, backend="eager")
        pipe.transformer = old
        pipe.text_encoder = pipe.text_encoder
        pipe.transformer = None
    with pytest.warns(GenAttnWarning, match=r"now and runs without (RadialPattern|TAG), ") as told:
        pipe.transformer = new
    assert len(told) == 2  # each handle for its own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.transformer = old
        pipe.transformer = new  # once
    assert handle.report().notes == [str(told[0].message).removeprefix("genattn: ")]
    handle.remove()
    assert type(pipe) is not stock
    other._notes.clear()
    with pytest.warns(GenAttnWarning, match="TAG"):
        pipe.transformer = new
    other.remove()
    assert type(pipe) is stock
    pipe.transformer = old
    with torch.no_grad():
        assert torch.equal(pipe(**{**call, "output_type": "latent"}, generator=torch.Generator().manual_seed(0)).frames, plain)


def test_the_second_expert_and_a_unet_are_watched_too() -> None:
    pipe, _ = build_pipeline("wan")
    pipe.register_modules(transformer_2=build_model("wan", seed=1))
    with genattn.apply(pipe, RadialPattern()), pytest.warns(GenAttnWarning, match=r"pipe.transformer_2 is another"):
        pipe.register_modules(transformer_2=build_model("wan", seed=2))
    unet, _ = build_pipeline("unet")
    with genattn.apply(unet, RadialPattern()), pytest.warns(GenAttnWarning, match=r"pipe.unet is another"):
        unet.unet = build_model("unet", seed=2)


def test_a_watched_pipeline_passes_for_its_own_class() -> None:
    pipe, _ = build_pipeline("sd3")
    with genattn.apply(pipe, RadialPattern()):
        assert isinstance(pipe, diffusers.StableDiffusion3Pipeline)
        assert pipe.__class__ is diffusers.StableDiffusion3Pipeline
        for copied in (copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
            assert type(copied) is diffusers.StableDiffusion3Pipeline
            copied.transformer = build_model("sd3", seed=3)
        turned = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        assert type(turned) is diffusers.StableDiffusion3Img2ImgPipeline
    assert type(pipe) is diffusers.StableDiffusion3Pipeline


def test_a_target_whose_class_cannot_be_exchanged_is_served_all_the_same() -> None:
    target = functools.partial(dict)  # of a type that is written in C
    target.transformer = build_model("wan")  # type: ignore[attr-defined]
    target.components = {"transformer": target.transformer}  # type: ignore[attr-defined]
    with genattn.apply(target, RadialPattern(), dense_steps=0, dense_layers=0) as handle, torch.no_grad():
        target.transformer(**build_inputs("wan"))  # type: ignore[attr-defined]
        assert handle.report().sparse_calls
    assert type(target) is functools.partial
