"""The table of model families."""

import functools

from torch import nn

from genattn.layouts import image, video
from genattn.layouts.family import Family

FAMILIES: tuple[Family, ...] = (*video.FAMILIES, *image.FAMILIES)


@functools.cache
def _by_class() -> dict[str, Family]:
    return {name: family for family in FAMILIES for name in family.models}


def family_of(model: nn.Module) -> Family | None:
    """The family of a denoiser, by the name of its class or of a base class; None when it is not known."""
    table = _by_class()
    return next((table[base.__name__] for base in type(model).__mro__ if base.__name__ in table), None)
