"""The negative prompt as given: what it must be, and whose it is in a batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from genattn.errors import GenAttnError
from genattn.guidance.passes.pass_role import PassRole
from genattn.seam.processors import stock_class
from genattn.seam.root_inputs import RootInputs
from genattn.settings import refuse, several


def checked_prompts(given: Any, embeds: Any) -> tuple[str, ...]:
    """The negative texts, none where they come encoded.

    Raises GenAttnError unless exactly one of the two is given, and for texts that say nothing.
    """
    if (given is None) == (embeds is None):
        raise GenAttnError(
            f"either negative_prompt or negative_embeds must be given, got {given!r} and "
            f"{'nothing' if embeds is None else 'some'}; name one"
        )
    if given is None:
        return ()
    what = "a text or a list of texts; e.g. 'blurry'"
    prompts = (given,) if isinstance(given, str) else several("negative_prompt", given, what)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise refuse("negative_prompt", given, what)
    if any(not prompt.strip() for prompt in prompts):
        raise GenAttnError(
            f"negative_prompt must say something, got {given!r}: an empty text names nothing to keep out; "
            "leave NAG off, or name what you do not want"
        )
    return prompts


def check_names(embeds: Any, model: nn.Module, name: str) -> None:
    """Raise GenAttnError for encoded texts under names that the forward of `model`, a `name`, does not take."""
    if not isinstance(embeds, Mapping):
        return
    known = RootInputs(stock_class(model), None).names
    strange = sorted(set(embeds) - set(known))
    if strange or not embeds:
        raise GenAttnError(f"negative_embeds must name inputs of {name}, got {strange or 'none'}; they are {', '.join(known)}")


def samples_of(role: PassRole, texts: int, mine: Any) -> torch.Tensor:
    """int64 [B]: which negative text each sample has, a prompt's images side by side.

    Args:
        role: which samples are conditional.
        texts: how many negative texts there are.
        mine: the positive text of every sample, [B, T, C]; tells whether the texts fit the prompts.

    Raises:
        GenAttnError: for neither one text nor one per prompt.
    """
    once = role.rows[: len(role.rows) // role.copies]
    guided = len(once)
    if guided % texts:
        raise GenAttnError(
            f"negative_prompt must be one text or one per prompt, got {texts} for {guided} conditional samples; "
            "give as many as there are prompts"
        )
    per = guided // texts
    if texts > 1 and per > 1 and isinstance(mine, torch.Tensor) and len(mine) == role.batch:
        groups = mine[once.to(mine.device)].unflatten(0, (texts, per))
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise GenAttnError(
                f"negative_prompt must be one text or one per prompt, got {texts} for more prompts than that in a batch of "
                f"{guided}; give as many as there are prompts"
            )
    samples = torch.zeros(role.batch, dtype=torch.int64)
    samples[role.rows] = (torch.arange(guided) // per).repeat(role.copies)
    return samples
