"""What a run would cost, told before it is made: a clip here, and the words that pictures and hunts share."""

from collections import Counter
from typing import Any

import genattn
from genattn.apps.sampling.run import AttentionSettings, SamplingSettings, call_arguments
from genattn.apps.webui.verbs.sampling import ClipForm
from genattn.apps.webui.verbs.session import Model, Session


def cost_line(session: Session, model: Model, form: ClipForm, prompt: str, attention: AttentionSettings) -> str:
    """One line for people: tokens, steps, the share of the scores, what stays dense, and the seconds of the last such run.

    The model is opened where it is not. Raises GenAttnError for anything that model, pattern or server cannot serve.
    """
    pipe, call = call_of(session, model, form)
    assert attention.pattern is not None
    with genattn.apply(pipe, attention.pattern, **attention.schedule) as handle:
        found = handle.explain(**call, prompt=prompt, output_type="latent")
    return " · ".join(_parts(found, call, session.seconds_of(model.name, call)))


def call_of(session: Session, model: Model, form: ClipForm) -> tuple[Any, dict[str, Any]]:
    """The pipeline and the arguments of its call; raises GenAttnError for what model or server cannot serve."""
    pipe = session.open(model)
    call = call_arguments(pipe, SamplingSettings(model.source, **vars(form)))
    session.limits.check_clip(call["height"], call["width"], call.get("num_frames"), call["num_inference_steps"])
    return pipe, call


def size_of(call: dict[str, Any]) -> str:
    """Frames, height and width of a call."""
    return "x".join(str(call[name]) for name in ("num_frames", "height", "width") if name in call)


def seconds_told(seconds: float | None, what: str) -> str:
    """What the last run of a size took. what: it was."""
    return "not yet timed here" if seconds is None else f"the last {what} of this size took {seconds:.1f} s"


def _parts(found: Any, call: dict[str, Any], seconds: float | None) -> list[str]:
    tokens = max((site.tokens for site in found.sites), default=0)
    parts = [f"{size_of(call)}: {tokens:,} tokens", f"{call['num_inference_steps']} steps"]
    if found.flops_share is not None and any(site.density is not None for site in found.sites):
        parts.append(f"attention computes **{found.flops_share:.0%}** of the dense scores")
    elif any(site.sparse for site in found.sites):
        parts.append("attention chooses its tiles while it runs")
    reasons: Counter[str] = Counter()
    for site in found.sites:
        reasons.update(site.reasons)
    calls = sum(site.sparse + site.dense for site in found.sites)
    if calls:
        most = "".join(f"{', mostly' if len(reasons) > 1 else ''}: {why}" for why, _ in reasons.most_common(1))
        parts.append(f"{sum(reasons.values()) / calls:.0%} of the calls stay dense{most}")
    parts.append(seconds_told(seconds, "dense clip"))
    return parts
