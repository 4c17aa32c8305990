"""Host side of a fade in the Triton kernels: its tables and numbers as arguments."""

import math

from genattn.kernels.plan.block_plan import BlockPlan
from genattn.kernels.triton.launch import Arguments


def fade_arguments(plan: BlockPlan) -> Arguments:
    """What all kernels but int8's take for it. None everywhere without one: the compiler then sees no argument at all."""
    if plan.fade is None:
        return {**dict.fromkeys(("WINDOW", "SPAN", "fade_factor", "fade_off")), "FADE": False}
    return {
        "WINDOW": plan.fade.window,
        "SPAN": plan.fade.span,
        "fade_factor": plan.fade.kernel_factor,
        "fade_off": plan.fade.penalty * math.log2(math.e),
        "FADE": True,
    }
