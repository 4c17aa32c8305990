"""What the app's sampling verbs share: sizes within the limits, and one sampling run that tells its steps."""

import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import genattn
from genattn.apps.webui.verbs.job import Job
from genattn.apps.webui.verbs.limits import number, whole
from genattn.apps.webui.verbs.session import Model, Session
from genattn.errors import GenAttnError
from genattn.fingerprint import place_of

LARGEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class ClipForm:
    """What a form asks for beside the prompt; None, and 0 in the form, means what the model was made for."""

    negative_prompt: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None

    @classmethod
    def read(cls, **sent: Any) -> "ClipForm":
        """From a form's values; raises GenAttnError for what is no number, or a negative one."""
        sizes = {name: sent.get(name) for name in ("frames", "height", "width", "steps")}
        scale = sent.get("guidance_scale")
        return cls(
            negative_prompt=sent.get("negative_prompt") or None,
            guidance_scale=number("guidance scale", scale) if scale else None,
            **{name: whole(name, value, 1) if value else None for name, value in sizes.items()},
        )


def read_seed(seed: Any, randomize: bool) -> int:
    """The form's seed, or a new one; raises GenAttnError for one outside [0, 2^31 - 1]."""
    if randomize:
        return secrets.randbelow(LARGEST_SEED + 1)
    found = whole("seed", seed, 0, 0)
    if found > LARGEST_SEED:
        raise GenAttnError(f"seed must be at most {LARGEST_SEED}, got {found}; choose a smaller one")
    return found


def chosen_attention(session: Session, name: str, options: str | None, dense_steps: Any, dense_layers: Any) -> Any:
    """The AttentionSettings that the form names. A preset of the session says itself what stays dense.

    Raises GenAttnError for dense attention, an unknown name, or settings that the pattern refuses.
    """
    from genattn.apps.sampling.attention_names import attention_from_name
    from genattn.apps.sampling.run import AttentionSettings

    if name in session.presets:
        return session.presets[name]
    pattern = attention_from_name(name, options)
    if pattern is None:
        raise GenAttnError("dense attention always runs beside the other; choose a sparse one")
    return AttentionSettings(name, pattern, number("dense steps", dense_steps), whole("dense layers", dense_layers, 0))


def open_for(job: Job, session: Session, model: Model, form: ClipForm) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the arguments of its call, checked against model and server; raises GenAttnError."""
    from genattn.apps.sampling.run import SamplingSettings, call_arguments

    job.tell("opening the model")
    pipe = session.open(model)
    settings = SamplingSettings(
        model.source,
        form.negative_prompt,
        form.frames,
        form.height,
        form.width,
        form.steps,
        form.guidance_scale,
    )
    call = call_arguments(pipe, settings)
    session.limits.check_clip(call["height"], call["width"], call.get("num_frames"), call["num_inference_steps"])
    return pipe, call


def sample(
    job: Job, pipe: Any, call: dict[str, Any], prompt: str, seed: int, stage: str, plugins: Sequence[Any] = (), **schedule: Any
) -> tuple[Any, Any]:
    """One run of the pipeline under `plugins`: its RunResult, and the handle's Report (None without plugins).

    The plugins are gone afterwards, whatever happens. Raises Stopped, and GenAttnError as `run_once` does.
    """
    from genattn.apps.sampling.pipeline_calls import taken_arguments
    from genattn.apps.sampling.run import DENSE, run_once
    from genattn.seam.sites import denoisers

    steps = call["num_inference_steps"]
    job.tell(stage, 0, steps)
    told = dict(call)
    if "callback_on_step_end" in taken_arguments(pipe):
        told["callback_on_step_end"] = job.on_step(stage, steps)
    with ExitStack() as stack:
        stack.enter_context(job.watching(*denoisers(pipe).values()))
        handle = stack.enter_context(genattn.apply(pipe, *plugins, **schedule)) if plugins else None
        result = run_once(pipe, told, prompt, seed, DENSE, stage)
        report = None if handle is None else handle.report()
    return result, report


def describe_call(model: Model, pipe: Any, call: dict[str, Any], prompt: str, seed: int) -> dict[str, Any]:
    """The part of a report that says what was asked for."""
    from genattn.apps.sampling.run import prompt_warnings, versions

    return {
        "model": model.name,
        "pipeline": type(pipe).__name__,
        "prompt": prompt,
        "seed": seed,
        **call,
        "device": place_of(pipe),
        "versions": versions(),
        "warnings": prompt_warnings(pipe, prompt),
    }
