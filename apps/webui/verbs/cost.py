"""The app's verb `cost`: what a clip would cost, told before it is made."""

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
    pipe = session.open(model)
    settings = SamplingSettings(model.source, **vars(form))
    call = call_arguments(pipe, settings)
    session.limits.check_clip(call["height"], call["width"], call.get("num_frames"), call["num_inference_steps"])
    assert attention.pattern is not None
    with genattn.apply(pipe, attention.pattern, **attention.schedule) as handle:
        found = handle.explain(**call, prompt=prompt, output_type="latent")
    return " · ".join(_parts(found, call, session.seconds_of(model.name, call)))


def _parts(found: Any, call: dict[str, Any], seconds: float | None) -> list[str]:
    size = "x".join(str(call[name]) for name in ("num_frames", "height", "width") if name in call)
    tokens = max((site.tokens for site in found.sites), default=0)
    parts = [f"{size}: {tokens:,} tokens", f"{call['num_inference_steps']} steps"]
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
    parts.append("not yet timed here" if seconds is None else f"the last dense clip of this size took {seconds:.1f} s")
    return parts
