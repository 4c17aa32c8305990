"""The table of model families."""

import functools

from torch import nn

from genattn.errors import GenAttnError
from genattn.layouts import audio, image, image_ids, unets, video, video_history, video_packed
from genattn.layouts.family import Family

_MODULES = (video, video_packed, video_history, image_ids, image, unets, audio)
FAMILIES: tuple[Family, ...] = tuple(family for module in _MODULES for family in module.FAMILIES)


@functools.cache
def _by_class() -> dict[str, Family]:
    return {name: family for family in FAMILIES for name in family.models}


def family_of(model: nn.Module) -> Family | None:
    """The family of a denoiser, by the name of its class or of a base class; None when it is not known."""
    table = _by_class()
    return next((table[base.__name__] for base in type(model).__mro__ if base.__name__ in table), None)


def register_family(family: Family) -> None:
    """Make the denoiser classes of `family` known in this process; a class that was known follows the new family.

    Raises GenAttnError when the family names no class or no list of blocks.
    """
    if not family.models or not family.stacks:
        raise GenAttnError(f"a family must name its classes and stacks, got models={family.models} and stacks={family.stacks}")
    _by_class().update(dict.fromkeys(family.models, family))
