"""Which way a negative prompt goes: classifier-free guidance where the call runs it, NAG inside the attention where not."""

from collections.abc import Mapping
from typing import Any

from genattn.apps.sampling.pipeline_calls import is_modular, taken_arguments
from genattn.guidance.nag import NAG


def runs_guidance(pipe: Any, call: Mapping[str, Any]) -> bool:
    """Whether this call runs an unconditional pass, in which a negative prompt has its place."""
    accepted = taken_arguments(pipe)
    if "negative_prompt" not in accepted:
        return False
    if is_modular(pipe):  # its guider holds the scale
        scale = getattr(getattr(pipe, "guider", None), "guidance_scale", None)
        return isinstance(scale, int | float) and scale > 1
    # pipelines of guidance-distilled models keep `guidance_scale` for the model's own input
    for name in ("true_cfg_scale", "guidance_scale"):
        if name in accepted:
            value = call.get(name, accepted[name])
            return isinstance(value, int | float) and value > 1
    return False


def split_negative(pipe: Any, call: Mapping[str, Any]) -> tuple[dict[str, Any], NAG | None]:
    """(the call, None), or the call without its negative prompt and the plugin that stands for it.

    Raises:
        GenAttnError: for a negative prompt that says nothing.
    """
    rest = dict(call)
    negative = rest.get("negative_prompt")
    if negative is None or runs_guidance(pipe, call):
        return rest, None
    del rest["negative_prompt"]
    return rest, NAG(negative)
